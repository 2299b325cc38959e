//! Writes one rank's shard: a safetensors file whose header also holds the records, with its checksum made on the way.

use std::io;
use std::path::Path;

use contraflow_runtime::checkpoint::ShardFile;
use contraflow_runtime::failpoint::failpoint;

use super::{Record, Records, Snapshot, Storage};
use crate::error::RankError;
use crate::hashed_file::{FinishedFile, HashedFile};

/// File name of a rank's shard.
pub fn shard_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// Key of the records in the header's `__metadata__`, as a JSON text: safetensors allows nothing but texts there.
pub(super) const RECORDS_KEY: &str = "records";

/// Writes a snapshot into the file `name` of an existing folder, synced. The snapshot is dropped piece by piece.
///
/// **Errors**: what the system says, with the path; no file is left then.
pub fn write_shard(dir: &Path, name: &str, mut snapshot: Snapshot) -> Result<ShardFile, RankError> {
    snapshot.pieces.sort_by_cached_key(|piece| piece.record.key());
    let path = dir.join(name);
    let FinishedFile { bytes, blake3 } = write_pieces(&path, snapshot).map_err(|source| {
        // Whatever is left of it belongs to no checkpoint; a full disk is better off without.
        drop(std::fs::remove_file(&path));
        RankError::File { path: path.display().to_string(), source }
    })?;
    Ok(ShardFile { file: name.to_owned(), bytes, blake3 })
}

/// A snapshot as the bytes of a shard, put into an empty buffer. The snapshot is dropped.
///
/// **Errors**: none that a snapshot of this program gives.
pub fn shard_bytes(mut snapshot: Snapshot, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
    snapshot.pieces.sort_by_cached_key(|piece| piece.record.key());
    let header = header(snapshot.pieces.iter().map(|piece| &piece.record))?;
    let values: usize = snapshot.pieces.iter().map(|piece| piece.values.bytes().len()).sum();
    buffer.reserve_exact(8 + header.len() + values);
    buffer.extend_from_slice(&(header.len() as u64).to_le_bytes());
    buffer.extend_from_slice(header.as_bytes());
    for piece in snapshot.pieces {
        buffer.extend_from_slice(piece.values.bytes());
    }
    Ok(buffer)
}

/// Some ranges of records, of no two one tensor's, as the bytes of a shard of their own.
///
/// **Errors**: one of them is not whole in `records`.
pub fn part_of(records: &Records, mut wanted: Vec<Record>) -> Result<Vec<u8>, RankError> {
    wanted.sort_by_cached_key(Record::key);
    let text = header(wanted.iter());
    let text = text.map_err(|source| RankError::File { path: "memory".into(), source })?;
    let mut part = (text.len() as u64).to_le_bytes().to_vec();
    part.extend_from_slice(text.as_bytes());
    wanted.iter().try_for_each(|record| records.append(record, &mut part))?;
    Ok(part)
}

fn write_pieces(path: &Path, snapshot: Snapshot) -> io::Result<FinishedFile> {
    failpoint("checkpoint.shard-begins");
    let header = header(snapshot.pieces.iter().map(|piece| &piece.record))?;
    let mut out = HashedFile::create(path)?;
    out.write(&(header.len() as u64).to_le_bytes())?;
    out.write(header.as_bytes())?;
    let half = snapshot.pieces.len() / 2;
    for (index, piece) in snapshot.pieces.into_iter().enumerate() {
        if index == half {
            failpoint("checkpoint.shard-half-written");
        }
        out.write(piece.values.bytes())?;
    }
    failpoint("checkpoint.shard-written");
    let sealed = out.finish()?;
    failpoint("checkpoint.shard-synced");
    Ok(sealed)
}

fn header<'a>(records: impl Iterator<Item = &'a Record> + Clone) -> io::Result<String> {
    let list = serde_json::to_string(&records.clone().collect::<Vec<_>>())?;
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({RECORDS_KEY: list}));
    let mut offset = 0;
    for record in records {
        let end = offset + record.range.len() * record.format.bytes();
        let dtype = match record.format {
            Storage::F32 => "F32",
            Storage::Bf16 => "BF16",
            Storage::U64 => "U64",
        };
        let entry =
            serde_json::json!({"dtype": dtype, "shape": [record.range.len()], "data_offsets": [offset, end]});
        header.insert(record.key(), entry);
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // The format wants the data to begin at a multiple of 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    Ok(text)
}
