//! A prepared folder: token files with an index, mapped into memory and checked before use.
//!
//! A shard holds its tokens, little-endian and as wide as the index says, and behind them for every document the number
//! of tokens up to its end, as u64. `prepare` writes these folders; packing reads token ranges out of them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use contraflow_runtime::files;
use serde::{Deserialize, Serialize};

use super::fault::{DataFault, unreadable};
use super::mmap::MappedFile;
use super::tokenizer::{self, Tokenizer};

/// Name of the index in its folder.
pub const INDEX: &str = "index.json";

/// What the index calls itself.
const FORMAT: &str = "contraflow tokens";

/// The newest version that is read, and the one that is written. The first one had no bytes of text.
const VERSION: u32 = 2;

/// Bytes of a document's end.
pub(super) const END_BYTES: usize = 8;

/// The index of a prepared folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardIndex {
    format: String,
    version: u32,
    /// What was prepared and how, see `prepare`.
    pub(super) input: String,
    /// [`Tokenizer::hash`].
    pub tokenizer: String,
    /// Every id is below this.
    pub id_limit: usize,
    /// The id that closes documents.
    pub end_of_document: u32,
    /// Bytes of an id in the shards: 2 or 4.
    pub id_bytes: usize,
    /// Share of the training documents that are rearranged to be filled in.
    pub fim_rate: f64,
    /// What is learnt from.
    pub train: Vec<ShardRecord>,
    /// What is only measured on.
    pub validation: Vec<ShardRecord>,
}

/// Which part of a prepared folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What is learnt from.
    Train,
    /// What is only measured on.
    Validation,
    /// Both.
    All,
}

/// One shard, as the index knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// Name in the folder.
    pub file: String,
    /// Number of tokens.
    pub tokens: u64,
    /// Number of documents.
    pub documents: u64,
    /// Bytes of the documents' text, if that is known.
    #[serde(default)]
    pub text_bytes: Option<u64>,
    /// Checksum of the whole file.
    pub blake3: String,
}

/// The format that carries the two fields every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

fn wrong(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> DataFault {
    DataFault::Prepared { path: path.into(), expected: expected.into(), got: got.into() }
}

impl ShardIndex {
    /// An index without shards.
    pub(super) fn new(input: String, tokenizer: &Tokenizer, fim_rate: f64) -> Self {
        let id_limit = tokenizer.id_limit();
        ShardIndex {
            format: FORMAT.into(),
            version: VERSION,
            input,
            tokenizer: tokenizer.hash(),
            id_limit,
            end_of_document: tokenizer.end_of_document(),
            id_bytes: if id_limit <= 1 << 16 { 2 } else { 4 },
            fim_rate,
            train: Vec::new(),
            validation: Vec::new(),
        }
    }

    /// Shards of one part of the folder, or of both: those to train on, then those to validate on.
    pub fn records(&self, part: Part) -> Vec<ShardRecord> {
        let (train, validation) = (&self.train[..], &self.validation[..]);
        match part {
            Part::Train => train.to_vec(),
            Part::Validation => validation.to_vec(),
            Part::All => [train, validation].concat(),
        }
    }

    /// Whether a folder is a prepared one.
    pub fn is_in(dir: &Path) -> bool {
        // The folder first: where its file system hangs, later calls on this very path are refused.
        files::metadata(dir).is_ok_and(|metadata| metadata.is_dir())
            && files::metadata(&dir.join(INDEX)).is_ok_and(|metadata| metadata.is_file())
    }

    /// Reads the index of a folder.
    ///
    /// **Errors**: it cannot be read, is another format, or of a newer version.
    pub fn read(dir: &Path) -> Result<Self, DataFault> {
        let path = dir.join(INDEX);
        let text = files::read(&path).map_err(|error| unreadable(&path, &error))?;
        Self::parse(&text).map_err(|(expected, got)| wrong(&path, expected, got))
    }

    /// Reads the text of an index. **Errors**: what was expected and what came.
    pub fn parse(text: &[u8]) -> Result<Self, (String, String)> {
        let no_index =
            |error: serde_json::Error| ("the index of prepared tokens".to_owned(), error.to_string());
        let head: Head = serde_json::from_slice(text).map_err(no_index)?;
        if head.format != FORMAT {
            return Err((format!("the format \"{FORMAT}\""), format!("\"{}\"", head.format)));
        }
        if head.version > VERSION {
            return Err((format!("version {VERSION} or older"), format!("version {}", head.version)));
        }
        let index: Self = serde_json::from_slice(text).map_err(no_index)?;
        if ![2, 4].contains(&index.id_bytes) {
            return Err(("id_bytes 2 or 4".into(), index.id_bytes.to_string()));
        }
        let is_plain = |shard: &&ShardRecord| Path::new(&shard.file).file_name() == Some(shard.file.as_ref());
        match index.train.iter().chain(&index.validation).find(|shard| !is_plain(shard)) {
            Some(shard) => Err(("a file in the folder".into(), shard.file.clone())),
            None => Ok(index),
        }
    }

    /// **Errors**: the tokens are those of another tokenizer, or differently rearranged.
    pub fn check_matches(&self, dir: &Path, tokenizer: &Tokenizer, fim_rate: f64) -> Result<(), DataFault> {
        if self.tokenizer != tokenizer.hash() {
            let expected = format!("tokens of the run's tokenizer ({})", tokenizer.hash());
            let own = dir.join(tokenizer::FILE);
            let got = match files::metadata(&own) {
                Ok(_) => format!("those of {}, which a run takes that names no other", own.display()),
                Err(_) => format!("tokens of {}", self.tokenizer),
            };
            return Err(wrong(&dir.join(INDEX), expected, got));
        }
        if self.fim_rate != fim_rate {
            let expected = format!("tokens prepared with data.fim_rate {fim_rate}");
            return Err(wrong(&dir.join(INDEX), expected, format!("a rate of {}", self.fim_rate)));
        }
        Ok(())
    }

    /// blake3 of everything that the losses depend on.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.tokenizer.as_bytes());
        for side in [&self.train, &self.validation] {
            hasher.update(&(side.len() as u64).to_le_bytes());
            for shard in side {
                hasher.update(&shard.tokens.to_le_bytes());
                hasher.update(shard.blake3.as_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Tokens of the shards of one side, one stream.
#[derive(Debug)]
pub struct Shards {
    files: Vec<Shard>,
    id_bytes: usize,
    /// Bytes of text that the tokens stand for, if that is known of all shards.
    pub text_bytes: Option<u64>,
}

#[derive(Debug)]
struct Shard {
    bytes: MappedFile,
    /// Number of tokens before this shard.
    first: usize,
    tokens: usize,
}

impl Shards {
    /// Maps the shards and checks each one whole: size, checksum, ids. All shards at once, on all cores.
    ///
    /// **Errors**: every shard that is missing, cut short or changed, by name.
    pub fn open(dir: &Path, index: &ShardIndex, records: &[ShardRecord]) -> Result<Self, Vec<DataFault>> {
        let opened = files::map_parallel(records, |record| open_shard(dir, index, record));
        let (mut files, mut faults, mut first) = (Vec::new(), Vec::new(), 0);
        for (shard, record) in opened.into_iter().zip(records) {
            let tokens = record.tokens as usize;
            match shard {
                Ok(bytes) => files.push(Shard { bytes, first, tokens }),
                Err(fault) => faults.push(fault),
            }
            first += tokens;
        }
        let text_bytes = records.iter().map(|record| record.text_bytes).sum();
        if faults.is_empty() { Ok(Self { files, id_bytes: index.id_bytes, text_bytes }) } else { Err(faults) }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.files.last().map_or(0, |shard| shard.first + shard.tokens)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many documents end before a token.
    pub fn documents_before(&self, token: usize) -> usize {
        let mut documents = 0;
        for shard in self.files.iter().take_while(|shard| shard.first < token) {
            let (ends, _) = shard.bytes[shard.tokens * self.id_bytes..].as_chunks::<END_BYTES>();
            let within = (token - shard.first) as u64;
            documents += ends.partition_point(|&end| u64::from_le_bytes(end) <= within);
        }
        documents
    }

    /// The tokens of a range, over the edges of shards.
    pub fn read(&self, range: Range<usize>) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(range.len());
        let from = self.files.partition_point(|shard| shard.first + shard.tokens <= range.start);
        for shard in &self.files[from..] {
            let start = range.start.max(shard.first);
            let end = range.end.min(shard.first + shard.tokens);
            if start >= end {
                break;
            }
            let bytes = (start - shard.first) * self.id_bytes..(end - shard.first) * self.id_bytes;
            tokens.extend(ids(&shard.bytes[bytes], self.id_bytes));
        }
        tokens
    }
}

fn ids(bytes: &[u8], id_bytes: usize) -> impl Iterator<Item = u32> {
    bytes
        .chunks_exact(id_bytes)
        .map(|id| id.iter().rev().fold(0, |value, &byte| (value << 8) | u32::from(byte)))
}

/// The checksum of a mapped file, whose pages are read on the way: each piece is a call into its file system.
fn hash_mapped(path: &Path, bytes: &[u8]) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for piece in bytes.chunks(4 << 20) {
        let _call = files::call(path)?;
        hasher.update(piece);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn open_shard(dir: &Path, index: &ShardIndex, record: &ShardRecord) -> Result<MappedFile, DataFault> {
    let path: PathBuf = dir.join(&record.file);
    let bytes = MappedFile::open(&path).map_err(|error| unreadable(&path, &error))?;
    let id_bytes = index.id_bytes as u128;
    let size = u128::from(record.tokens) * id_bytes + u128::from(record.documents) * END_BYTES as u128;
    if bytes.len() as u128 != size {
        return Err(wrong(&path, format!("{size} bytes"), bytes.len().to_string()));
    }
    let hash = hash_mapped(&path, &bytes).map_err(|error| unreadable(&path, &error))?;
    if hash != record.blake3 {
        return Err(wrong(&path, format!("the checksum {}", record.blake3), hash));
    }
    let token_bytes = record.tokens as usize * index.id_bytes;
    let beyond = ids(&bytes[..token_bytes], index.id_bytes).find(|&id| id as usize >= index.id_limit);
    match beyond {
        Some(id) => Err(wrong(&path, format!("token ids below {}", index.id_limit), id.to_string())),
        None => Ok(bytes),
    }
}
