//! The state of a rank's optimizer into a snapshot and out of a checkpoint.

use std::ops::Range;

use contraflow_kernels::tensor::Tensor;

use super::{Checkpoint, Kind, Snapshot};
use crate::buckets::{Piece, RankParams};
use crate::error::RankError;
use crate::update::OptimizerState;
use crate::weights::gate_bias_name;

impl OptimizerState {
    /// What this rank answers for in a checkpoint: its shard of weights and moments, and the gate biases and counts of the
    /// gates whose first holder it is.
    pub fn snapshot(&self, params: &RankParams) -> Snapshot {
        let mut snapshot = Snapshot { watch: self.watch.clone(), ..Snapshot::default() };
        for bucket in &self.buckets {
            for Piece { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                let param = params.param(store, index);
                let weight = shared_or_cut(&param.weight, in_param.clone());
                for (part, in_part, within) in param.parts_in(in_param) {
                    let place = || (part.name.as_str(), part.shape.as_slice(), in_part.clone());
                    let of = |first: usize| first + within.start..first + within.end;
                    snapshot.add(Kind::Weight, place(), (weight.clone(), of(0)));
                    snapshot.add(Kind::ExpAvg, place(), (bucket.exp_avg.clone(), of(in_range.start)));
                    snapshot.add(Kind::ExpAvgSq, place(), (bucket.exp_avg_sq.clone(), of(in_range.start)));
                }
            }
        }
        let rank = self.endpoint.rank();
        for (&layer, bias) in &params.dense.gate_biases {
            if params.dense.gate_holders(layer).is_some_and(|holders| holders[0] == rank) {
                let (name, len) = (gate_bias_name(layer), bias.len());
                let values = Tensor::from_vec(&[len], bias.clone());
                snapshot.add(Kind::Weight, (&name, &[len], 0..len), (values, 0..len));
                let counts = params.dense.expert_counts.get(&layer).cloned();
                snapshot.add_counts(name, counts.unwrap_or_else(|| vec![0; len]));
            }
        }
        snapshot
    }

    /// Reads this rank's shard of the moments, written in whatever layout, and what the watch remembers.
    ///
    /// **Errors**: those of [`Checkpoint::read`].
    pub fn restore(&mut self, params: &RankParams, checkpoint: &Checkpoint) -> Result<(), RankError> {
        self.watch = checkpoint.manifest.watch.clone();
        for bucket in &mut self.buckets {
            for Piece { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                for (part, in_part, within) in params.param(store, index).parts_in(in_param) {
                    let target = in_range.start + within.start..in_range.start + within.end;
                    let tensor = (part.name.as_str(), part.shape.as_slice());
                    let exp_avg = &mut bucket.exp_avg.f32_mut()[target.clone()];
                    checkpoint.read(Kind::ExpAvg, tensor, in_part.clone(), exp_avg)?;
                    let exp_avg_sq = &mut bucket.exp_avg_sq.f32_mut()[target];
                    checkpoint.read(Kind::ExpAvgSq, tensor, in_part, exp_avg_sq)?;
                }
            }
        }
        Ok(())
    }
}

/// A range of a tensor, as a tensor: the whole is shared until somebody writes to it, of a part a copy is made, so that a
/// rank never keeps more than its shard.
fn shared_or_cut(tensor: &Tensor, range: Range<usize>) -> Tensor {
    if range.len() == tensor.len() {
        return tensor.clone();
    }
    let mut cut = Tensor::for_overwrite(&[range.len()]);
    cut.f32_mut().copy_from_slice(&tensor.f32()[range]);
    cut
}
