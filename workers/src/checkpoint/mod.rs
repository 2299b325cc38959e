//! What a checkpoint holds: records of tensors, written by the rank that owns them, read by any rank that needs them.
//!
//! A record is a row-major range of one published tensor, in one of several kinds. Every element of every tensor is in
//! exactly one record of each kind, whatever the layout: routed experts go by their global number, a tensor that several
//! ranks hold is cut along its ZeRO-1 shards, and what first and last stage share is stored once. So any layout can read
//! what any other has written. Knows tensors and files; the manifest and the folder are the runtime's.

mod newest;
pub mod provenance;
mod read;
pub mod saves;
mod shard;
mod snapshot;
#[cfg(test)]
mod tests;
pub mod writers;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use newest::NewestWhole;
pub use read::{Checkpoint, CheckpointFaults, Records, parse_header};
pub use shard::{part_of, shard_bytes, shard_name, write_shard};
pub use snapshot::{Awaited, RecordValues, Snapshot, SnapshotPiece};

/// What a record's values are of their tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// What the optimizer updates, always in f32; what the model computes with, rounded.
    Weight,
    /// First moment of AdamW.
    ExpAvg,
    /// Second moment of AdamW.
    ExpAvgSq,
    /// Moving average of what the optimizer updates, and of the gate biases, in f32; where the recipe asks for one.
    Average,
    /// Tokens per expert since the start of the run, under the name of the layer's gate bias.
    Count,
}

/// How a record's values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// 4 bytes, little-endian.
    F32,
    /// 2 bytes, little-endian: moments, where the recipe says so.
    Bf16,
    /// 8 bytes, little-endian.
    U64,
}

impl Storage {
    /// **Units**: bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::Bf16 => 2,
            Storage::U64 => 8,
        }
    }
}

/// One run of values of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Published name of the tensor.
    pub name: String,
    /// What of it.
    pub kind: Kind,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub format: Storage,
    /// Which elements of the whole tensor, row-major.
    pub range: Range<usize>,
}

impl Record {
    /// Name of the record in a shard: a rank has at most one range of a tensor.
    pub fn key(&self) -> String {
        let kind = match self.kind {
            Kind::Weight => "weight",
            Kind::ExpAvg => "exp_avg",
            Kind::ExpAvgSq => "exp_avg_sq",
            Kind::Average => "average",
            Kind::Count => "count",
        };
        format!("{kind}/{}", self.name)
    }
}
