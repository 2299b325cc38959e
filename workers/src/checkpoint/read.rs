//! Reads a checkpoint: all of it is checked at first, then any range of any tensor can be asked for by any rank. Shards lie in
//! files, or in memory, where one of them may be all there is.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use contraflow_kernels::host::HostValuesMut;
use contraflow_kernels::tensor::{Format, ViewMut};
use contraflow_runtime::checkpoint::{CheckpointError, Manifest, ShardFile};
use contraflow_runtime::files;
use safetensors::tensor::Metadata;

use super::shard::RECORDS_KEY;
use super::{Kind, Record, Storage};
use crate::error::{ErrorKind, RankError};
use crate::model::params::{Params, gate_bias_name};

/// A committed checkpoint, found whole.
pub struct Checkpoint {
    /// What the manifest says.
    pub manifest: Manifest,
    /// What it holds.
    pub records: Records,
    dir: PathBuf,
}

/// The records of some shards.
#[derive(Default)]
pub struct Records {
    /// What they are of, for messages.
    of: String,
    sources: Vec<ShardSource>,
    tensors: BTreeMap<(Kind, String), Pieces>,
}

/// Where the bytes of a shard are.
enum ShardSource {
    File { file: File, path: PathBuf },
    Memory(Arc<Vec<u8>>),
}

impl ShardSource {
    fn read(&self, first: u64, target: &mut [u8]) -> std::io::Result<()> {
        match self {
            ShardSource::File { file, .. } => file.read_exact_at(target, first),
            ShardSource::Memory(bytes) => {
                let first = usize::try_from(first).unwrap_or(usize::MAX);
                let end = first.checked_add(target.len());
                let part = end.and_then(|end| bytes.get(first..end));
                target.copy_from_slice(part.ok_or(std::io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// All records of one tensor and kind, ascending.
struct Pieces {
    shape: Vec<usize>,
    places: Vec<RecordLocation>,
}

/// Where the values of a record are.
struct RecordLocation {
    /// In which source.
    source: usize,
    /// First byte in it.
    start: u64,
    record: Record,
}

/// Everything that is wrong with a checkpoint.
#[derive(Debug)]
pub struct CheckpointFaults(pub Vec<CheckpointError>);

impl fmt::Display for CheckpointFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl From<CheckpointFaults> for RankError {
    fn from(faults: CheckpointFaults) -> Self {
        match faults.0.iter().all(|fault| fault.kind == ErrorKind::Node) {
            true => RankError::Node { message: faults.to_string() },
            false => RankError::Model { faults: faults.0.iter().map(ToString::to_string).collect() },
        }
    }
}

impl Checkpoint {
    /// Opens a checkpoint's folder and checks everything in it: manifest, sizes, checksums, and that the records of each
    /// tensor make it up without gap or overlap.
    ///
    /// **Errors**: all faults at once, by file.
    pub fn open(dir: &Path) -> Result<Self, CheckpointFaults> {
        let manifest = Manifest::read(dir).map_err(CheckpointFaults)?;
        verify_all(&manifest, dir).map_err(CheckpointFaults)?;
        let mut faults = Vec::new();
        let mut records = Records { of: dir.display().to_string(), ..Records::default() };
        for shard in &manifest.shards {
            let path = dir.join(&shard.file);
            let opened = files::open(&path).map_err(|error| error.to_string());
            let source = opened.map(|file| ShardSource::File { file, path: path.clone() });
            if let Err(message) = source.and_then(|source| records.add(source, shard.bytes)) {
                faults.push(CheckpointError::new(&path, message));
            }
        }
        for ((_, name), pieces) in &mut records.tensors {
            if let Err(message) = pieces.check() {
                faults.push(CheckpointError::new(dir, format!("{name}: {message}")));
            }
        }
        if faults.is_empty() {
            Ok(Checkpoint { manifest, records, dir: dir.to_owned() })
        } else {
            Err(CheckpointFaults(faults))
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Records {
    /// Those of shards in memory. `of` says what they are, for messages.
    ///
    /// **Errors**: the bytes of one are not a shard.
    pub fn in_memory(of: String, shards: impl IntoIterator<Item = Arc<Vec<u8>>>) -> Result<Self, RankError> {
        let mut records = Records { of, ..Records::default() };
        for shard in shards {
            let size = shard.len() as u64;
            records.add(ShardSource::Memory(shard), size).map_err(|message| records.wrong(message))?;
        }
        Ok(records)
    }

    /// Puts the values of a record as they are stored behind what is in `out`: some range of one that is here.
    ///
    /// **Errors**: there is no such record, or not all of the range.
    pub(super) fn append(&self, record: &Record, out: &mut Vec<u8>) -> Result<(), RankError> {
        let Record { name, kind, shape, format, range } = record;
        let places = &self.pieces(*kind, name, shape)?.places;
        let has = |place: &&RecordLocation| {
            let have = &place.record.range;
            have.start <= range.start && range.end <= have.end && place.record.format == *format
        };
        let lacks = || self.wrong(format!("{name}: expected elements {range:?} as {format:?}, got others"));
        let place = places.iter().find(has).filter(|_| range.start <= range.end).ok_or_else(lacks)?;
        let first = place.start + (format.bytes() * (range.start - place.record.range.start)) as u64;
        let begin = out.len();
        out.resize(begin + format.bytes() * range.len(), 0);
        self.read_bytes(place.source, first, &mut out[begin..])
    }

    /// **Units**: bytes of the values of all records.
    pub fn num_bytes(&self) -> u64 {
        let places = self.tensors.values().flat_map(|pieces| &pieces.places);
        places.map(|place| (place.record.range.len() * place.record.format.bytes()) as u64).sum()
    }

    fn add(&mut self, source: ShardSource, size: u64) -> Result<(), String> {
        let places = open_shard(&source, size, self.sources.len())?;
        self.sources.push(source);
        for place in places {
            let Record { kind, name, shape, .. } = &place.record;
            let pieces = self.tensors.entry((*kind, name.clone()));
            let pieces = pieces.or_insert_with(|| Pieces { shape: shape.clone(), places: Vec::new() });
            pieces.places.push(place);
        }
        Ok(())
    }

    fn wrong(&self, message: String) -> RankError {
        RankError::Content { path: self.of.clone(), message }
    }

    /// Published names and shapes of all weights, gate biases included.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let weights = self.tensors.iter().filter(|((kind, _), _)| *kind == Kind::Weight);
        weights.map(|((_, name), pieces)| (name.as_str(), pieces.shape.as_slice()))
    }

    /// Whether there is anything of a kind.
    pub fn has(&self, kind: Kind) -> bool {
        self.tensors.keys().any(|(own, _)| *own == kind)
    }

    /// Shape of a tensor, if there is one of that kind and name.
    pub fn shape(&self, kind: Kind, name: &str) -> Option<&[usize]> {
        self.tensors.get(&(kind, name.to_owned())).map(|pieces| pieces.shape.as_slice())
    }

    /// Reads a range of a tensor of this shape into `out`, which has the range's length and is in F32.
    ///
    /// **Errors**: there is no such tensor, it has another shape, the range is not whole here, or a file cannot be read.
    pub fn read(
        &self,
        kind: Kind,
        (name, shape): (&str, &[usize]),
        range: Range<usize>,
        mut out: ViewMut,
    ) -> Result<(), RankError> {
        match out.format() {
            Format::BF16 => self.read_into::<u16>(kind, (name, shape), range, out.values_mut()),
            _ => self.read_into::<f32>(kind, (name, shape), range, out.values_mut()),
        }
    }

    /// Reads a whole tensor of this shape as plain numbers.
    ///
    /// **Errors**: as [`Records::read`].
    pub fn read_numbers(&self, kind: Kind, name: &str, shape: &[usize]) -> Result<Vec<f32>, RankError> {
        self.read_range(kind, (name, shape), 0..shape.iter().product())
    }

    /// Reads a range of a tensor of this shape as plain numbers.
    ///
    /// **Errors**: as [`Records::read`].
    pub fn read_range(
        &self,
        kind: Kind,
        tensor: (&str, &[usize]),
        range: Range<usize>,
    ) -> Result<Vec<f32>, RankError> {
        let mut numbers = vec![0.0; range.len()];
        self.read_into(kind, tensor, range, &mut numbers)?;
        Ok(numbers)
    }

    fn read_into<T: Stored>(
        &self,
        kind: Kind,
        (name, shape): (&str, &[usize]),
        range: Range<usize>,
        out: &mut [T],
    ) -> Result<(), RankError> {
        let pieces = self.pieces(kind, name, shape)?;
        let mut num_read = 0;
        for place in &pieces.places {
            let have = &place.record.range;
            let (from, to) = (range.start.max(have.start), range.end.min(have.end));
            if from < to {
                let target = &mut out[from - range.start..to - range.start];
                let format = place.record.format;
                let first = place.start + (format.bytes() * (from - have.start)) as u64;
                if format == T::STORAGE {
                    self.read_bytes(place.source, first, bytemuck::cast_slice_mut(target))?;
                } else {
                    let mut stored = vec![T::Other::zeroed(); target.len()];
                    self.read_bytes(place.source, first, bytemuck::cast_slice_mut(&mut stored))?;
                    target.iter_mut().zip(stored).for_each(|(target, stored)| *target = T::of(stored));
                }
                num_read += to - from;
            }
        }
        if num_read < range.len() {
            return Err(self.wrong(format!("{name}: expected elements {range:?}, got {num_read} of them")));
        }
        Ok(())
    }

    /// Fills parameters with the weights of their names, and the biases and counts of their gates.
    ///
    /// **Errors**: as [`Records::read`], for the first tensor that is wrong.
    pub fn fill(&self, params: &mut Params) -> Result<(), RankError> {
        for param in params.iter_mut() {
            param.fill(|part, target| {
                self.read(Kind::Weight, (&part.name, &part.shape), 0..part.len(), target)
            })?;
        }
        for (&layer, bias) in &mut params.gate_biases {
            let len = bias.len();
            let tensor: (&str, &[usize]) = (&gate_bias_name(layer), &[len]);
            self.read(Kind::Weight, tensor, 0..len, bias.view_mut(0..len))?;
        }
        for (&layer, counts) in &mut params.expert_counts {
            *counts = self.read_counts(&gate_bias_name(layer), counts.len())?;
        }
        Ok(())
    }

    /// Reads whole numbers.
    ///
    /// **Errors**: as [`Records::read`].
    pub fn read_counts(&self, name: &str, len: usize) -> Result<Vec<u64>, RankError> {
        let mut counts = vec![0_u64; len];
        for place in &self.pieces(Kind::Count, name, &[len])?.places {
            let target = &mut counts[place.record.range.clone()];
            self.read_bytes(place.source, place.start, bytemuck::cast_slice_mut(target))?;
        }
        Ok(counts)
    }

    fn pieces(&self, kind: Kind, name: &str, shape: &[usize]) -> Result<&Pieces, RankError> {
        let pieces = self.tensors.get(&(kind, name.to_owned()));
        let pieces = pieces.ok_or_else(|| self.wrong(format!("has no {kind:?} of {name}")))?;
        if pieces.shape != shape {
            return Err(self.wrong(format!("{name}: expected shape {shape:?}, got {:?}", pieces.shape)));
        }
        Ok(pieces)
    }

    fn read_bytes(&self, source: usize, first: u64, target: &mut [u8]) -> Result<(), RankError> {
        let source = &self.sources[source];
        source.read(first, target).map_err(|error| RankError::File {
            path: match source {
                ShardSource::File { path, .. } => path.display().to_string(),
                ShardSource::Memory(_) => self.of.clone(),
            },
            source: error,
        })
    }
}

/// A number as it is stored, that can be made of the other way to store one.
trait Stored: Pod {
    const STORAGE: Storage;
    type Other: Pod;
    fn of(other: Self::Other) -> Self;
}

impl Stored for f32 {
    const STORAGE: Storage = Storage::F32;
    type Other = u16;

    fn of(other: u16) -> f32 {
        half::bf16::from_bits(other).to_f32()
    }
}

impl Stored for u16 {
    const STORAGE: Storage = Storage::Bf16;
    type Other = f32;

    fn of(other: f32) -> u16 {
        half::bf16::from_f32(other).to_bits()
    }
}

/// Compares the checksums of all shards, on as many threads as there are cores.
fn verify_all(manifest: &Manifest, dir: &Path) -> Result<(), Vec<CheckpointError>> {
    let all: Vec<&ShardFile> = manifest.files().collect();
    let checked = files::map_parallel(&all, |file| file.verify(dir));
    let faults: Vec<CheckpointError> = checked.into_iter().filter_map(Result::err).collect();
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// The records of a shard and where their values are.
fn open_shard(source: &ShardSource, size: u64, number: usize) -> Result<Vec<RecordLocation>, String> {
    let mut length = [0; 8];
    source.read(0, &mut length).map_err(|error| error.to_string())?;
    let length = u64::from_le_bytes(length);
    if length > size.saturating_sub(8) {
        return Err(format!("expected a header within {size} bytes, got one of {length}"));
    }
    let mut header = vec![0; length as usize];
    source.read(8, &mut header).map_err(|error| error.to_string())?;
    let places = parse_header(&header, size - 8 - length)?;
    let place = |(record, start)| RecordLocation { source: number, start: 8 + length + start, record };
    Ok(places.into_iter().map(place).collect())
}

/// The records of a shard's header, each with its first byte in the data.
///
/// **Errors**: no such header, or records that its tensors do not bear out.
pub fn parse_header(header: &[u8], data_len: u64) -> Result<Vec<(Record, u64)>, String> {
    let damaged = |error: serde_json::Error| format!("expected a shard's header: {error}");
    let metadata: Metadata = serde_json::from_slice(header).map_err(damaged)?;
    let list = metadata.metadata().as_ref().and_then(|metadata| metadata.get(RECORDS_KEY));
    let list = list.ok_or_else(|| format!("expected {RECORDS_KEY} in the header, got none"))?;
    let records: Vec<Record> = serde_json::from_str(list).map_err(damaged)?;
    let tensors = metadata.tensors();
    let place = |record: Record| {
        let info = tensors.get(&record.key()).ok_or_else(|| format!("{}: not in the file", record.key()))?;
        let (start, end) = info.data_offsets;
        let len = record.range.end.checked_sub(record.range.start);
        let expected = len.and_then(|len| len.checked_mul(record.format.bytes()));
        if end.checked_sub(start) != expected || end as u64 > data_len {
            return Err(format!("{}: expected its values at {start}..{end} of the file", record.key()));
        }
        Ok((record, start as u64))
    };
    records.into_iter().map(place).collect()
}

impl Pieces {
    /// Sorts the records and checks that they are the whole tensor, once.
    fn check(&mut self) -> Result<(), String> {
        self.places.sort_by_key(|place| place.record.range.start);
        let len = self.shape.iter().try_fold(1_usize, |len, &dim| len.checked_mul(dim));
        let mut next = 0;
        for RecordLocation { record, .. } in &self.places {
            let is_stored_so = match record.kind {
                Kind::Count => record.format == Storage::U64,
                Kind::Weight | Kind::Average => record.format == Storage::F32,
                Kind::ExpAvg | Kind::ExpAvgSq => record.format != Storage::U64,
            };
            if record.shape != self.shape || !is_stored_so {
                return Err(format!("expected one shape and format, got {:?} and others", record.shape));
            }
            if record.range.start != next {
                return Err(format!("expected element {next} next, got {:?}", record.range));
            }
            next = record.range.end;
        }
        if len == Some(next) {
            Ok(())
        } else {
            Err(format!("expected {:?}, got {next} elements", self.shape))
        }
    }
}
