//! A rank's part of a checkpoint, taken between two steps.
//!
//! Tensors are shared with the training until it writes them: a snapshot costs no copy while the next step's forward and
//! backward passes run, and at most one copy of the rank's shard if the update comes before the file is written.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::stability::StabilityWatch;

use super::{Kind, Record, Storage};

/// The values of a record.
#[derive(Clone)]
pub enum RecordValues {
    /// Elements of a tensor that is shared until it is written to.
    Floats(Tensor, Range<usize>),
    /// The same of a tensor in F32 that is still being made.
    Awaited(Awaited, Range<usize>),
    /// Whole numbers.
    Counts(Vec<u64>),
}

impl RecordValues {
    /// As they stand in a file. Waits for a tensor that is still being made.
    pub fn bytes(&self) -> &[u8] {
        match self {
            RecordValues::Floats(tensor, range) => match storage_of(tensor) {
                Storage::Bf16 => bytemuck::cast_slice(&tensor.values::<u16>()[range.clone()]),
                _ => bytemuck::cast_slice(&tensor.values::<f32>()[range.clone()]),
            },
            RecordValues::Awaited(awaited, range) => {
                bytemuck::cast_slice(&awaited.wait().values::<f32>()[range.clone()])
            }
            RecordValues::Counts(counts) => bytemuck::cast_slice(counts),
        }
    }
}

/// A tensor that another thread is going to give, once; all clones get it.
#[derive(Clone, Default)]
pub struct Awaited(Arc<OnceLock<Option<Tensor>>>);

impl Awaited {
    /// Gives it.
    pub fn give(&self, tensor: Tensor) {
        // Whoever gives twice, the first one counts.
        drop(self.0.set(Some(tensor)));
    }

    /// Says that it will never come, if it has not come.
    pub fn give_up(&self) {
        drop(self.0.set(None));
    }

    /// Waits for it.
    ///
    /// # Panics
    /// If it will never come: whoever was to make it has ended.
    pub fn wait(&self) -> &Tensor {
        self.0
            .wait()
            .as_ref()
            .unwrap_or_else(|| panic!("the average of the weights has ended with its thread"))
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

    /// Adds elements of a tensor in F32 that is still being made.
    pub fn add_awaited(
        &mut self,
        kind: Kind,
        (name, shape, range): (&str, &[usize], Range<usize>),
        values: (Awaited, Range<usize>),
    ) {
        let (name, shape, format) = (name.to_owned(), shape.to_vec(), Storage::F32);
        let record = Record { name, kind, shape, format, range };
        self.pieces.push(SnapshotPiece { record, values: RecordValues::Awaited(values.0, values.1) });
    }

    /// Adds whole numbers.
    pub fn add_counts(&mut self, name: String, counts: Vec<u64>) {
        let len = counts.len();
        let record =
            Record { name, kind: Kind::Count, shape: vec![len], format: Storage::U64, range: 0..len };
        self.pieces.push(SnapshotPiece { record, values: RecordValues::Counts(counts) });
    }
}
