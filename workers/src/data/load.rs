//! From the paths of a recipe to the sequences of a run: text in memory, or prepared folders mapped, one or more sources.
//!
//! The end of the data walk before ranks exist. Knows no recipe: the caller hands over its keys.

use std::path::{Path, PathBuf};

use super::corpus::Corpus;
use super::documents::DocumentEncoder;
use super::fault::DataFault;
use super::packing::PackedDataset;
use super::shards::{Part, ShardIndex, Shards};

/// Which sequences are wanted.
#[derive(Clone, Copy, Debug)]
pub struct DataRequest<'a> {
    /// Files and folders, prepared or not; none: the default corpus.
    pub paths: &'a [PathBuf],
    /// Share of each path in the order of training; none: all paths are one source.
    pub weights: &'a [u32],
    /// The field or column of rows that holds the text.
    pub field: &'a str,
    /// Files and folders to validate on, prepared or not; none: what is held back of the others.
    pub validation: &'a [PathBuf],
    /// Share of the text that is held back, where no paths are to validate on. Prepared folders have held back theirs.
    pub validation_share: f64,
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
    if wanted.validation.is_empty() {
        return load_sources(wanted);
    }
    let plain = DocumentEncoder::plain(wanted.encoder.tokenizer().clone());
    let whole = WholeRequest { field: wanted.field, encoder: &plain, part: Part::All };
    let train = load_sources(DataRequest { validation_share: 0.0, ..wanted });
    let validation = load_whole(wanted.validation, whole, wanted.sequence_length);
    match (train, validation) {
        (Ok(train), Ok(validation)) => Ok(with_validation(train, validation)),
        (train, validation) => Err([train.err(), validation.err()].into_iter().flatten().flatten().collect()),
    }
}

/// Takes other sequences to validate on than those that were held back.
fn with_validation(train: Loaded, validation: Whole) -> Loaded {
    let mut hasher = blake3::Hasher::new();
    hasher.update(train.hash.as_bytes());
    hasher.update(validation.hash.as_bytes());
    let mut warnings = [train.warnings, validation.warnings].concat();
    if train.validation.num_tokens() > 0 {
        warnings
            .push("what was held back for validation is not read: data.validation names another text".into());
    }
    let hash = hasher.finalize().to_hex().to_string();
    Loaded { hash, validation: validation.sequences, warnings, ..train }
}

fn load_sources(wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
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
    let index = checked_index(dir, encoder)?;
    let side = |part: Part| open_part(dir, &index, part, sequence_length);
    let (train, validation) = match (side(Part::Train), side(Part::Validation)) {
        (Ok(train), Ok(validation)) => (train, validation),
        (train, validation) => {
            let faults = |side: Result<PackedDataset, Vec<DataFault>>| side.err().unwrap_or_default();
            return Err([faults(train), faults(validation)].concat());
        }
    };
    Ok(Loaded { name: "prepared".into(), hash: index.hash(), train, validation, warnings: Vec::new() })
}

/// The index of a folder that this encoder has prepared.
fn checked_index(dir: &Path, encoder: &DocumentEncoder) -> Result<ShardIndex, Vec<DataFault>> {
    let index = ShardIndex::read(dir).map_err(|fault| vec![fault])?;
    index.check_matches(dir, encoder.tokenizer(), encoder.fim_rate()).map_err(|fault| vec![fault])?;
    Ok(index)
}

fn open_part(
    dir: &Path,
    index: &ShardIndex,
    part: Part,
    sequence_length: usize,
) -> Result<PackedDataset, Vec<DataFault>> {
    let shards = Shards::open(dir, index, &index.records(part))?;
    Ok(PackedDataset::from_shards(shards, index.end_of_document, sequence_length))
}

/// How paths are read that are not split.
#[derive(Clone, Copy, Debug)]
pub struct WholeRequest<'a> {
    /// The field or column of rows that holds the text.
    pub field: &'a str,
    /// How documents become tokens.
    pub encoder: &'a DocumentEncoder,
    /// What of prepared folders is read; text is read whole.
    pub part: Part,
}

/// All sequences of some paths, in order: to be measured on.
#[derive(Clone, Debug)]
pub struct Whole {
    /// The sequences.
    pub sequences: PackedDataset,
    /// Hash of what a loss depends on.
    pub hash: String,
    /// What the user should know, in sentences.
    pub warnings: Vec<String>,
}

/// Loads files and folders of text in one piece, and prepared folders each as a piece of its own.
///
/// **Errors**: every fault of every path at once; a prepared folder has nothing in the part that is wanted.
pub fn load_whole(
    paths: &[PathBuf],
    wanted: WholeRequest,
    sequence_length: usize,
) -> Result<Whole, Vec<DataFault>> {
    let (mut pieces, mut faults, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
    let mut hasher = blake3::Hasher::new();
    let mut keep = |piece: PackedDataset, hash: &str| {
        hasher.update(hash.as_bytes());
        pieces.push(piece);
    };
    let is_same_kind = |one: &PathBuf, other: &PathBuf| !ShardIndex::is_in(one) && !ShardIndex::is_in(other);
    for run in paths.chunk_by(is_same_kind) {
        let loaded = match run {
            [dir] if ShardIndex::is_in(dir) => load_part(dir, wanted, sequence_length),
            _ => load_text_whole(run, wanted, sequence_length),
        };
        match loaded {
            Ok((piece, hash, more)) => {
                keep(piece, &hash);
                warnings.extend(more);
            }
            Err(found) => faults.extend(found),
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let weights = vec![1; pieces.len()];
    let hash = hasher.finalize().to_hex().to_string();
    Ok(Whole { sequences: PackedDataset::join(pieces, &weights), hash, warnings })
}

type Piece = (PackedDataset, String, Vec<String>);

fn load_part(dir: &Path, wanted: WholeRequest, sequence_length: usize) -> Result<Piece, Vec<DataFault>> {
    // What is measured on is never rearranged: a folder of any rate will do, but for its part to train on.
    let index = ShardIndex::read(dir).map_err(|fault| vec![fault])?;
    let rate = if wanted.part == Part::Validation { index.fim_rate } else { wanted.encoder.fim_rate() };
    index.check_matches(dir, wanted.encoder.tokenizer(), rate).map_err(|fault| vec![fault])?;
    if index.records(wanted.part).is_empty() {
        let (expected, other) = match wanted.part {
            Part::Train => ("a part to train on", "validation"),
            _ => ("a part to validate on", "train"),
        };
        let fault = DataFault::Prepared {
            path: dir.into(),
            expected: expected.into(),
            got: format!("none (--split {other} and --split all read the other one)"),
        };
        return Err(vec![fault]);
    }
    Ok((open_part(dir, &index, wanted.part, sequence_length)?, index.hash(), Vec::new()))
}

fn load_text_whole(
    paths: &[PathBuf],
    wanted: WholeRequest,
    sequence_length: usize,
) -> Result<Piece, Vec<DataFault>> {
    let (documents, skipped) = Corpus::read_whole(paths, wanted.field)?;
    let mut hasher = blake3::Hasher::new();
    for document in &documents {
        hasher.update(&(document.text.len() as u64).to_le_bytes());
        hasher.update(&document.text);
    }
    let sequences = PackedDataset::encode(&documents, wanted.encoder, sequence_length);
    Ok((sequences, hasher.finalize().to_hex().to_string(), skipped.warnings()))
}

fn load_text(paths: &[PathBuf], wanted: DataRequest) -> Result<Loaded, Vec<DataFault>> {
    let DataRequest { field, validation_share, encoder, sequence_length, .. } = wanted;
    let corpus = Corpus::load(paths, field, validation_share)?;
    let plain = DocumentEncoder::plain(encoder.tokenizer().clone());
    Ok(Loaded {
        hash: hash(&corpus, encoder),
        train: PackedDataset::encode(&corpus.train, encoder, sequence_length),
        validation: PackedDataset::encode(&corpus.validation, &plain, sequence_length),
        name: corpus.name,
        warnings: corpus.warnings,
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
