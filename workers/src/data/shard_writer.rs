//! Writes a shard of a prepared folder, and files that are there whole or not at all. Knows no documents.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use contraflow_runtime::files::sync_dir;

use super::shards::ShardRecord;
use crate::hashed_file::HashedFile;

/// The system refuses to write.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct WriteFault {
    /// The file or folder.
    pub path: PathBuf,
    /// What the system said.
    pub reason: String,
}

pub(super) fn cannot_write(path: &Path, error: &io::Error) -> WriteFault {
    WriteFault { path: path.into(), reason: error.to_string() }
}

/// Writes a file so that it is there whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), WriteFault> {
    let fresh = path.with_extension("partial");
    let write = || -> io::Result<()> {
        let mut file = File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        put_in_place(&fresh, path)
    };
    write().map_err(|error| cannot_write(path, &error))
}

/// Renames a flushed file and flushes its folder.
fn put_in_place(fresh: &Path, path: &Path) -> io::Result<()> {
    fs::rename(fresh, path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// A shard that is being written; its memory is the ends of its documents.
pub(super) struct ShardWriter {
    path: PathBuf,
    fresh: PathBuf,
    file: HashedFile,
    id_bytes: usize,
    /// Tokens so far.
    pub(super) tokens: u64,
    text_bytes: u64,
    ends: Vec<u64>,
    bytes: Vec<u8>,
}

impl ShardWriter {
    pub(super) fn create(path: PathBuf, id_bytes: usize) -> Result<Self, WriteFault> {
        let fresh = path.with_extension("partial");
        let file = HashedFile::create(&fresh).map_err(|error| cannot_write(&fresh, &error))?;
        let (ends, bytes) = (Vec::new(), Vec::new());
        Ok(Self { path, fresh, file, id_bytes, tokens: 0, text_bytes: 0, ends, bytes })
    }

    /// Adds a document of so many bytes of text.
    pub(super) fn push(&mut self, ids: &[u32], text_bytes: usize) -> Result<(), WriteFault> {
        self.tokens += ids.len() as u64;
        self.text_bytes += text_bytes as u64;
        self.ends.push(self.tokens);
        self.bytes.clear();
        for id in ids {
            self.bytes.extend(&id.to_le_bytes()[..self.id_bytes]);
        }
        self.write()
    }

    fn write(&mut self) -> Result<(), WriteFault> {
        self.file.write(&self.bytes).map_err(|error| cannot_write(&self.path, &error))
    }

    pub(super) fn close(mut self) -> Result<ShardRecord, WriteFault> {
        self.bytes = self.ends.iter().flat_map(|end| end.to_le_bytes()).collect();
        self.write()?;
        let path = self.path;
        let sealed = self.file.finish().and_then(|sealed| {
            put_in_place(&self.fresh, &path)?;
            Ok(sealed)
        });
        let sealed = sealed.map_err(|error| cannot_write(&path, &error))?;
        Ok(ShardRecord {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            tokens: self.tokens,
            documents: self.ends.len() as u64,
            text_bytes: Some(self.text_bytes),
            blake3: sealed.blake3,
        })
    }
}
