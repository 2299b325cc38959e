//! `data prepare`: text of any size to a prepared folder, in bounded memory, on all cores, and resumable.
//!
//! The documents are cut into units in their order: a unit ends behind the document with which its training tokens reach
//! the size of a shard. A unit's shards are written, flushed and renamed, then its record is; a later call keeps every
//! unit that has a record and continues behind it. So the folder does not depend on how often the work was interrupted.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use contraflow_runtime::files::sync_dir;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::corpus::Document;
use super::documents::DocumentEncoder;
use super::files::{self, DataFault, FileFormat};
use super::shards::{INDEX, ShardIndex, ShardRecord};
use crate::hashed_file::HashedFile;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Preparation {
    /// Files and folders of text, JSONL and Parquet.
    pub paths: Vec<PathBuf>,
    /// How documents become tokens.
    pub encoder: DocumentEncoder,
    /// The folder that comes into being.
    pub to: PathBuf,
    /// Training tokens of a shard, at least.
    pub shard_tokens: usize,
}

/// How far the work is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the files that have been read whole.
    pub bytes_read: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Units in the folder.
    pub units: usize,
    /// Tokens in the folder.
    pub tokens: u64,
}

/// Why nothing was prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareFault {
    /// The user has to fix it.
    #[error(transparent)]
    Data(#[from] DataFault),
    /// The system refuses to write.
    #[error("{}: {reason}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The watcher asked for an end; what is finished is kept.
    #[error("stopped: finished shards are kept; run the same command again to continue")]
    Stopped,
}

/// One document in this many is held out for validation.
const DOCUMENTS_PER_VALIDATION: u64 = 10;

/// Text that is encoded at a time, over all cores.
const BATCH_BYTES: usize = 4 << 20;

/// A unit that is finished.
#[derive(Debug, Serialize, Deserialize)]
struct Unit {
    /// Documents of the input up to its end.
    documents: u64,
    train: ShardRecord,
    validation: ShardRecord,
}

/// Prepares a folder, or finishes one. `watch` receives the progress and says whether to continue.
///
/// **Errors**: everything wrong with the paths at once; a folder of other contents; what the system says; a broken line
/// or file at the point where it is reached, with the units before it kept.
pub fn prepare(
    preparation: &Preparation,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<ShardIndex, Vec<PrepareFault>> {
    let all = |faults: Vec<DataFault>| faults.into_iter().map(PrepareFault::from).collect::<Vec<_>>();
    let files = files::list(&preparation.paths).map_err(all)?;
    let input = describe(preparation, &files).map_err(|fault| vec![fault.into()])?;
    run(preparation, &files, input, watch).map_err(|fault| vec![fault])
}

/// blake3 of what the folder's contents follow from, short of reading the files: their names and sizes.
fn describe(preparation: &Preparation, files: &[PathBuf]) -> Result<String, DataFault> {
    let mut hasher = blake3::Hasher::new();
    let encoder = &preparation.encoder;
    let parameters =
        format!("{}\n{}\n{}\n", encoder.tokenizer().hash(), encoder.fim_rate(), preparation.shard_tokens);
    hasher.update(parameters.as_bytes());
    for file in files {
        let size = fs::metadata(file).map_err(|error| files::unreadable(file, &error))?.len();
        hasher.update(format!("{}\n{size}\n", file.display()).as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn run(
    preparation: &Preparation,
    files: &[PathBuf],
    input: String,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<ShardIndex, PrepareFault> {
    let to = &preparation.to;
    fs::create_dir_all(to).map_err(|error| cannot_write(to, &error))?;
    let lock_path = to.join("lock");
    let lock = File::create(&lock_path).map_err(|error| cannot_write(&lock_path, &error))?;
    lock.try_lock()
        .map_err(|_| occupied(to, "a folder that no other process is preparing", "one at work"))?;
    if ShardIndex::is_in(to) {
        let index = ShardIndex::read(to)?;
        return if index.input == input { Ok(index) } else { Err(other_contents(to)) };
    }
    claim(to, &input)?;
    let mut writer = Writer::resume(preparation, files, watch)?;
    for file in files {
        FileFormat::of(file).each(file, &mut |document| writer.take(document))?;
        writer.flush()?;
        writer.progress.bytes_read += fs::metadata(file).map_or(0, |metadata| metadata.len());
        writer.report_progress()?;
    }
    let units = writer.finish()?;
    let mut index = ShardIndex::new(input, preparation.encoder.tokenizer(), preparation.encoder.fim_rate());
    let is_filled = |shard: &ShardRecord| shard.tokens > 0;
    let number = units.len();
    for unit in units {
        index.train.extend(Some(unit.train).filter(is_filled));
        index.validation.extend(Some(unit.validation).filter(is_filled));
    }
    if index.train.is_empty() {
        return Err(occupied(to, "at least one document to train on", "none"));
    }
    write_whole(&to.join(INDEX), &serde_json::to_vec_pretty(&index).unwrap_or_default())?;
    for number in 0..number {
        // Left-overs do no harm: the index is what counts from here on.
        drop(fs::remove_file(unit_path(to, number)));
    }
    drop((fs::remove_file(to.join(CLAIM)), fs::remove_file(lock_path)));
    Ok(index)
}

fn cannot_write(path: &Path, error: &io::Error) -> PrepareFault {
    PrepareFault::Write { path: path.into(), reason: error.to_string() }
}

fn occupied(to: &Path, expected: &str, got: &str) -> PrepareFault {
    DataFault::Prepared { path: to.into(), expected: expected.into(), got: got.into() }.into()
}

fn other_contents(to: &Path) -> PrepareFault {
    let expected = "a new folder, or one of the same files, tokenizer, shard size and rate";
    occupied(to, expected, "one that holds something else")
}

/// The file that says whose folder an unfinished one is.
const CLAIM: &str = "preparing";

fn claim(to: &Path, input: &str) -> Result<(), PrepareFault> {
    let path = to.join(CLAIM);
    match contraflow_runtime::files::read_to_string(&path) {
        Ok(claimed) if claimed == input => Ok(()),
        Ok(_) => Err(other_contents(to)),
        Err(_) => {
            let entries = fs::read_dir(to).map_err(|error| cannot_write(to, &error))?;
            let others = entries.flatten().filter(|entry| !is_unfinished(entry)).count();
            if others > 0 { Err(other_contents(to)) } else { write_whole(&path, input.as_bytes()) }
        }
    }
}

/// What a call that was killed before it claimed the folder may have left.
fn is_unfinished(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    name == "lock" || name.as_encoded_bytes().ends_with(b".partial")
}

fn unit_path(to: &Path, number: usize) -> PathBuf {
    to.join(format!("unit-{number:05}.json"))
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), PrepareFault> {
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

/// Where documents go.
struct Writer<'a> {
    preparation: &'a Preparation,
    watch: &'a mut dyn FnMut(Progress) -> bool,
    progress: Progress,
    units: Vec<Unit>,
    /// Documents that finished units hold and that are only counted.
    to_skip: u64,
    batch: Vec<Document>,
    batch_bytes: usize,
    /// Documents of the input so far.
    documents: u64,
    open: Option<(ShardWriter, ShardWriter)>,
}

impl<'a> Writer<'a> {
    fn resume(
        preparation: &'a Preparation,
        files: &[PathBuf],
        watch: &'a mut dyn FnMut(Progress) -> bool,
    ) -> Result<Self, PrepareFault> {
        let mut units: Vec<Unit> = Vec::new();
        // A record that cannot be read ends what is kept: the unit is made again.
        while let Some(unit) = contraflow_runtime::files::read(&unit_path(&preparation.to, units.len()))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
        {
            units.push(unit);
        }
        let size = |file: &PathBuf| fs::metadata(file).map_or(0, |metadata| metadata.len());
        let progress = Progress {
            bytes: files.iter().map(size).sum(),
            units: units.len(),
            tokens: units.iter().map(|unit| unit.train.tokens + unit.validation.tokens).sum(),
            bytes_read: 0,
        };
        let to_skip = units.last().map_or(0, |unit| unit.documents);
        Ok(Self {
            preparation,
            watch,
            progress,
            units,
            to_skip,
            batch: Vec::new(),
            batch_bytes: 0,
            documents: to_skip,
            open: None,
        })
    }

    fn report_progress(&mut self) -> Result<(), PrepareFault> {
        if (self.watch)(self.progress) { Ok(()) } else { Err(PrepareFault::Stopped) }
    }

    fn take(&mut self, document: Document) -> Result<(), PrepareFault> {
        if self.to_skip > 0 {
            self.to_skip -= 1;
            return Ok(());
        }
        self.batch_bytes += document.text.len();
        self.batch.push(document);
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    /// Encodes the waiting documents on all cores and writes them in their order.
    fn flush(&mut self) -> Result<(), PrepareFault> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let encoder = &self.preparation.encoder;
        let plain = DocumentEncoder::plain(encoder.tokenizer().clone());
        let encoded: Vec<(bool, Vec<u32>)> = batch
            .par_iter()
            .map(|document| {
                let validates = validates(&document.text);
                let encoder = if validates { &plain } else { encoder };
                (validates, encoder.encode(&document.text))
            })
            .collect();
        for (document, (validates, ids)) in batch.iter().zip(encoded) {
            self.documents += 1;
            if document.text.is_empty() {
                continue;
            }
            let (train, validation) = self.open()?;
            let side = if validates { validation } else { train };
            side.push(&ids)?;
            if !validates && self.open()?.0.tokens >= self.preparation.shard_tokens as u64 {
                self.close_unit()?;
            }
        }
        Ok(())
    }

    fn open(&mut self) -> Result<&mut (ShardWriter, ShardWriter), PrepareFault> {
        if self.open.is_none() {
            let number = self.units.len();
            let encoder = &self.preparation.encoder;
            let id_bytes = ShardIndex::new(String::new(), encoder.tokenizer(), 0.0).id_bytes;
            let make = |side: &str| {
                ShardWriter::create(self.preparation.to.join(format!("{side}-{number:05}.tokens")), id_bytes)
            };
            self.open = Some((make("train")?, make("validation")?));
        }
        Ok(self.open.as_mut().expect("it has just been filled"))
    }

    fn close_unit(&mut self) -> Result<(), PrepareFault> {
        let Some((train, validation)) = self.open.take() else { return Ok(()) };
        let (train, validation) = (train.close()?, validation.close()?);
        let unit = Unit { documents: self.documents, train, validation };
        let path = unit_path(&self.preparation.to, self.units.len());
        write_whole(&path, &serde_json::to_vec(&unit).unwrap_or_default())?;
        self.progress.units += 1;
        self.progress.tokens += unit.train.tokens + unit.validation.tokens;
        self.units.push(unit);
        self.report_progress()
    }

    fn finish(mut self) -> Result<Vec<Unit>, PrepareFault> {
        self.flush()?;
        self.close_unit()?;
        Ok(self.units)
    }
}

/// By the document's bytes alone, so that a text validates wherever it is.
fn validates(text: &[u8]) -> bool {
    let hash = blake3::hash(text);
    let number = u64::from_le_bytes(std::array::from_fn(|byte| hash.as_bytes()[byte]));
    number.is_multiple_of(DOCUMENTS_PER_VALIDATION)
}

/// A shard that is being written; its memory is the ends of its documents.
struct ShardWriter {
    path: PathBuf,
    fresh: PathBuf,
    file: HashedFile,
    id_bytes: usize,
    tokens: u64,
    ends: Vec<u64>,
    bytes: Vec<u8>,
}

impl ShardWriter {
    fn create(path: PathBuf, id_bytes: usize) -> Result<Self, PrepareFault> {
        let fresh = path.with_extension("partial");
        let file = HashedFile::create(&fresh).map_err(|error| cannot_write(&fresh, &error))?;
        let (ends, bytes) = (Vec::new(), Vec::new());
        Ok(Self { path, fresh, file, id_bytes, tokens: 0, ends, bytes })
    }

    fn push(&mut self, ids: &[u32]) -> Result<(), PrepareFault> {
        self.tokens += ids.len() as u64;
        self.ends.push(self.tokens);
        self.bytes.clear();
        for id in ids {
            self.bytes.extend(&id.to_le_bytes()[..self.id_bytes]);
        }
        self.write()
    }

    fn write(&mut self) -> Result<(), PrepareFault> {
        self.file.write(&self.bytes).map_err(|error| cannot_write(&self.path, &error))
    }

    fn close(mut self) -> Result<ShardRecord, PrepareFault> {
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
            blake3: sealed.blake3,
        })
    }
}

#[cfg(test)]
mod tests;
