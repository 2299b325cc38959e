//! What a rank answers for in a checkpoint, known from shapes alone: the records of its snapshot, in whatever layout. So a rank knows
//! what it needs of a state that was kept in another layout, and where each range of it lies. Knows no values.

use std::ops::Range;

use contraflow_kernels::tensor::Format;
use contraflow_runtime::recipe::Recipe;

use super::buckets::{Bucket, BucketSlice};
use super::update::Moments;
use crate::checkpoint::{Kind, Record, Storage};
use crate::model::params::{RankParams, gate_bias_name};

/// How a state is kept, beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// How the moments are stored.
    pub moments: Storage,
    /// Whether there is an average of the weights.
    pub has_average: bool,
}

impl Kept {
    /// As a recipe says.
    pub fn of(recipe: &Recipe) -> Self {
        let moments = Moments::of(&recipe.precision, recipe.training.seed);
        let moments = if moments.format == Format::BF16 { Storage::Bf16 } else { Storage::F32 };
        Kept { moments, has_average: recipe.training.ema_decay > 0.0 }
    }
}

/// The records of the rank's snapshots, in no particular order: see [`super::update::OptimizerState::snapshot`].
pub fn records(params: &RankParams, rank: usize, kept: Kept) -> Vec<Record> {
    let mut all = Vec::new();
    let mut add = |kind: Kind, format: Storage, (name, shape, range): (&str, &[usize], Range<usize>)| {
        all.push(Record { name: name.to_owned(), kind, shape: shape.to_vec(), format, range });
    };
    for bucket in Bucket::all_of(params, rank) {
        for BucketSlice { store, index, in_param, .. } in bucket.pieces(&bucket.shard, params) {
            for (part, in_part, _) in params.param(store, index).parts_in(in_param) {
                let place = || (part.name.as_str(), part.shape.as_slice(), in_part.clone());
                add(Kind::Weight, Storage::F32, place());
                if kept.has_average {
                    add(Kind::Average, Storage::F32, place());
                }
                add(Kind::ExpAvg, kept.moments, place());
                add(Kind::ExpAvgSq, kept.moments, place());
            }
        }
    }
    for (&layer, counts) in &params.dense.expert_counts {
        if params.dense.gate_holders(layer).is_some_and(|holders| holders[0] == rank) {
            let (name, len) = (gate_bias_name(layer), counts.len());
            if params.dense.gate_biases.contains_key(&layer) {
                add(Kind::Weight, Storage::F32, (&name, &[len], 0..len));
                if kept.has_average {
                    add(Kind::Average, Storage::F32, (&name, &[len], 0..len));
                }
            }
            add(Kind::Count, Storage::U64, (&name, &[len], 0..len));
        }
    }
    all
}
