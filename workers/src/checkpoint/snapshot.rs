//! A rank's part of a checkpoint, taken between two steps.
//!
//! Tensors are shared with the training until it writes them: a snapshot costs no copy while the next step's forward and
//! backward passes run, and at most one copy of the rank's shard if the update comes before the file is written.

use std::ops::Range;

use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::stability::StabilityWatch;

use super::{Kind, Record, Storage};

/// The values of a record.
#[derive(Clone)]
pub enum RecordValues {
    /// Elements of a tensor that is shared until it is written to.
    Floats(Tensor, Range<usize>),
    /// Whole numbers.
    Counts(Vec<u64>),
}

impl RecordValues {
    /// As they stand in a file.
    pub fn bytes(&self) -> &[u8] {
        match self {
            RecordValues::Floats(tensor, range) => match storage_of(tensor) {
                Storage::Bf16 => bytemuck::cast_slice(&tensor.values::<u16>()[range.clone()]),
                _ => bytemuck::cast_slice(&tensor.values::<f32>()[range.clone()]),
            },
            RecordValues::Counts(counts) => bytemuck::cast_slice(counts),
        }
    }
}

/// How the values of a tensor are stored.
fn storage_of(tensor: &Tensor) -> Storage {
    if tensor.format() == Format::BF16 { Storage::Bf16 } else { Storage::F32 }
}

/// A record with its values.
#[derive(Clone)]
pub struct SnapshotPiece {
    /// What it is.
    pub record: Record,
    /// Its values, as many as the record's range has.
    pub values: RecordValues,
}

/// Everything a rank answers for.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// In no particular order.
    pub pieces: Vec<SnapshotPiece>,
    /// State of the stability watch: for the manifest.
    pub watch: StabilityWatch,
}

impl Snapshot {
    /// Adds elements of a tensor.
    pub fn add(
        &mut self,
        kind: Kind,
        (name, shape, range): (&str, &[usize], Range<usize>),
        values: (Tensor, Range<usize>),
    ) {
        let (name, shape, format) = (name.to_owned(), shape.to_vec(), storage_of(&values.0));
        let record = Record { name, kind, shape, format, range };
        self.pieces.push(SnapshotPiece { record, values: RecordValues::Floats(values.0, values.1) });
    }

    /// Adds whole numbers.
    pub fn add_counts(&mut self, name: String, counts: Vec<u64>) {
        let len = counts.len();
        let record =
            Record { name, kind: Kind::Count, shape: vec![len], format: Storage::U64, range: 0..len };
        self.pieces.push(SnapshotPiece { record, values: RecordValues::Counts(counts) });
    }
}
