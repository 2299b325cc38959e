//! From the paths of a recipe to the sequences of a run: text in memory, or prepared folders mapped, one or more sources.
//!
//! The end of the data walk before ranks exist. Knows no recipe: the caller hands over its keys.

use std::path::{Path, PathBuf};

use super::corpus::Corpus;
use super::documents::DocumentEncoder;
use super::files::DataFault;
use super::packing::PackedDataset;
use super::shards::{ShardIndex, ShardRecord, Shards};

/// Which sequences are wanted.
#[derive(Clone, Copy, Debug)]
pub struct DataRequest<'a> {
    /// Files and folders, prepared or not; none: the default corpus.
    pub paths: &'a [PathBuf],
    /// Share of each path in the order of training; none: all paths are one source.
    pub weights: &'a [u32],
    /// How documents become tokens.
    pub encoder: &'a DocumentEncoder,
    /// Targets per sequence.
    pub sequence_length: usize,
}

/// What a run reads.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// `rust-crates`, `own-sources`, `files`, `prepared` or `sources`.
    pub name: String,
    /// Hash of everything that a loss depends on; of text as bytes that of [`Corpus`].
    pub hash: String,
    /// What is learnt from.
    pub train: PackedDataset,
    /// What is only measured on.
    pub validation: PackedDataset,
    /// What the user should know, in sentences.
    pub warnings: Vec<String>,
}

/// Loads what is wanted.
///
/// **Errors**: every fault of every path at once.
pub fn load(wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
    if wanted.weights.is_empty() {
        return load_source(wanted.paths, wanted);
    }
    let mut parts = Vec::new();
    let mut faults = Vec::new();
    for path in wanted.paths {
        match load_source(std::slice::from_ref(path), wanted) {
            Ok(part) => parts.push(part),
            Err(found) => faults.extend(found),
        }
    }
    if faults.is_empty() { Ok(join(parts, wanted.weights)) } else { Err(faults) }
}

fn join(parts: Vec<Loaded>, weights: &[u32]) -> Loaded {
    let mut hasher = blake3::Hasher::new();
    for (part, weight) in parts.iter().zip(weights) {
        hasher.update(&weight.to_le_bytes());
        hasher.update(part.hash.as_bytes());
    }
    let side = |side: fn(&Loaded) -> &PackedDataset| {
        PackedDataset::join(parts.iter().map(|part| side(part).clone()).collect(), weights)
    };
    Loaded {
        name: "sources".into(),
        hash: hasher.finalize().to_hex().to_string(),
        train: side(|part| &part.train),
        validation: side(|part| &part.validation),
        warnings: parts.iter().flat_map(|part| part.warnings.clone()).collect(),
    }
}

fn load_source(paths: &[PathBuf], wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
    match paths {
        [dir] if ShardIndex::is_in(dir) => load_prepared(dir, wanted),
        _ if paths.iter().any(|path| ShardIndex::is_in(path)) => {
            let prepared = paths.iter().filter(|path| ShardIndex::is_in(path));
            let fault = |path: &PathBuf| DataFault::Prepared {
                path: path.clone(),
                expected: "data.weights, one for each path, where a prepared folder is not the only path"
                    .into(),
                got: "none".into(),
            };
            Err(prepared.map(fault).collect())
        }
        _ => load_text(paths, wanted),
    }
}

fn load_prepared(dir: &Path, wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
    let DataRequest { encoder, sequence_length, .. } = wanted;
    let index = ShardIndex::read(dir).map_err(|fault| vec![fault])?;
    index.check_matches(dir, encoder.tokenizer(), encoder.fim_rate()).map_err(|fault| vec![fault])?;
    let side = |records: &[ShardRecord]| -> Result<PackedDataset, Vec<DataFault>> {
        let shards = Shards::open(dir, &index, records)?;
        Ok(PackedDataset::from_shards(shards, index.end_of_document, sequence_length))
    };
    let (train, validation) = match (side(&index.train), side(&index.validation)) {
        (Ok(train), Ok(validation)) => (train, validation),
        (train, validation) => {
            let faults = |side: Result<PackedDataset, Vec<DataFault>>| side.err().unwrap_or_default();
            return Err([faults(train), faults(validation)].concat());
        }
    };
    Ok(Loaded { name: "prepared".into(), hash: index.hash(), train, validation, warnings: Vec::new() })
}

/// All sequences of files and folders, or of a prepared folder, in one piece and in order: to be measured on.
///
/// **Errors**: as [`load`].
pub fn load_whole(
    paths: &[PathBuf],
    encoder: &DocumentEncoder,
    sequence_length: usize,
) -> Result<PackedDataset, Vec<DataFault>> {
    match paths {
        [dir] if ShardIndex::is_in(dir) => {
            let index = ShardIndex::read(dir).map_err(|fault| vec![fault])?;
            index.check_matches(dir, encoder.tokenizer(), encoder.fim_rate()).map_err(|fault| vec![fault])?;
            let shards = Shards::open(dir, &index, &[&index.train[..], &index.validation].concat())?;
            Ok(PackedDataset::from_shards(shards, index.end_of_document, sequence_length))
        }
        _ => Ok(PackedDataset::encode(&Corpus::read_whole(paths)?, encoder, sequence_length)),
    }
}

fn load_text(paths: &[PathBuf], wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
    let DataRequest { encoder, sequence_length, .. } = wanted;
    let corpus = Corpus::load(paths)?;
    let plain = DocumentEncoder::plain(encoder.tokenizer().clone());
    Ok(Loaded {
        hash: hash(&corpus, encoder),
        train: PackedDataset::encode(&corpus.train, encoder, sequence_length),
        validation: PackedDataset::encode(&corpus.validation, &plain, sequence_length),
        name: corpus.name,
        warnings: corpus.warning.into_iter().collect(),
    })
}

/// The corpus's own where its bytes are the tokens.
fn hash(corpus: &Corpus, encoder: &DocumentEncoder) -> String {
    if encoder.tokenizer().json().is_none() && encoder.fim_rate() == 0.0 {
        return corpus.hash.clone();
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(corpus.hash.as_bytes());
    hasher.update(encoder.tokenizer().hash().as_bytes());
    hasher.update(&encoder.fim_rate().to_le_bytes());
    hasher.finalize().to_hex().to_string()
}
