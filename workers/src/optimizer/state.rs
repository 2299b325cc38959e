//! The state of a rank's optimizer into a snapshot, and out of a checkpoint or of its own part alone.

use std::ops::Range;

use contraflow_kernels::tensor::Tensor;

use super::buckets::BucketSlice;
use super::totals::TotalsLayout;
use super::update::OptimizerState;
use crate::checkpoint::{Awaited, Kind, Records, Snapshot};
use crate::comm::collectives::Collectives;
use crate::error::RankError;
use crate::model::params::{RankParams, gate_bias_name};

impl OptimizerState {
    /// What this rank answers for in a checkpoint: its shard of weights and moments, and the gate biases and counts of the
    /// gates whose first holder it is.
    ///
    /// `averages` are what [`OptimizerState::average`] gave: of each of these weights, or none.
    pub fn snapshot(&self, params: &RankParams, averages: Vec<Awaited>) -> Snapshot {
        let mut snapshot = Snapshot { watch: self.watch.clone(), ..Snapshot::default() };
        let mut averages = averages.into_iter();
        for bucket in &self.buckets {
            for BucketSlice { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                let param = params.param(store, index);
                let weight = shared_or_cut(param.master(), param.in_master(in_param.clone()));
                let average = averages.next();
                for (part, in_part, within) in param.parts_in(in_param) {
                    let place = || (part.name.as_str(), part.shape.as_slice(), in_part.clone());
                    let of = |first: usize| first + within.start..first + within.end;
                    snapshot.add(Kind::Weight, place(), (weight.clone(), of(0)));
                    if let Some(average) = &average {
                        snapshot.add_awaited(Kind::Average, place(), (average.clone(), of(0)));
                    }
                    snapshot.add(Kind::ExpAvg, place(), (bucket.exp_avg.clone(), of(in_range.start)));
                    snapshot.add(Kind::ExpAvgSq, place(), (bucket.exp_avg_sq.clone(), of(in_range.start)));
                }
            }
        }
        let rank = self.rank;
        for (&layer, counts) in &params.dense.expert_counts {
            if params.dense.gate_holders(layer).is_some_and(|holders| holders[0] == rank) {
                // A gate's counts go by the name of its bias, whether it has one or not.
                let (name, len) = (gate_bias_name(layer), counts.len());
                if let Some(bias) = params.dense.gate_biases.get(&layer) {
                    snapshot.add(Kind::Weight, (&name, &[len], 0..len), (bias.clone(), 0..len));
                    if let Some(average) = averages.next() {
                        snapshot.add_awaited(Kind::Average, (&name, &[len], 0..len), (average, 0..len));
                    }
                }
                snapshot.add_counts(name, counts.clone());
            }
        }
        snapshot
    }

    /// Reads this rank's shard of the moments, written in whatever layout.
    ///
    /// **Errors**: those of [`Records::read`].
    pub fn restore(&mut self, params: &RankParams, records: &Records) -> Result<(), RankError> {
        for bucket in &mut self.buckets {
            for BucketSlice { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                for (part, in_part, within) in params.param(store, index).parts_in(in_param) {
                    let target = in_range.start + within.start..in_range.start + within.end;
                    let tensor = (part.name.as_str(), part.shape.as_slice());
                    let exp_avg = bucket.exp_avg.view_mut(target.clone());
                    records.read(Kind::ExpAvg, tensor, in_part.clone(), exp_avg)?;
                    let exp_avg_sq = bucket.exp_avg_sq.view_mut(target);
                    records.read(Kind::ExpAvgSq, tensor, in_part, exp_avg_sq)?;
                }
            }
        }
        Ok(())
    }

    /// Restores this rank's own shard in the same layout: what others hold copies of, and what this rank holds of theirs,
    /// the ranks exchange.
    ///
    /// **Errors**: those of [`Records::read`] and of the fabric.
    pub fn recover(
        &mut self,
        params: &mut RankParams,
        records: &Records,
        (collectives, world): (&Collectives, &[usize]),
    ) -> Result<(), RankError> {
        self.restore(params, records)?;
        for bucket in &self.buckets {
            for BucketSlice { store, index, in_param, .. } in bucket.pieces(&bucket.shard, params) {
                let param = params.param_mut(store, index);
                let parts: Vec<_> = param
                    .parts_in(in_param.clone())
                    .map(|(part, in_part, within)| (part.name.clone(), part.shape.clone(), in_part, within))
                    .collect();
                for (name, shape, in_part, within) in parts {
                    let target = in_param.start + within.start..in_param.start + within.end;
                    let values = param.master_view_mut(target);
                    records.read(Kind::Weight, (&name, &shape), in_part, values)?;
                }
            }
        }
        for bucket in self.buckets.iter().filter(|bucket| bucket.group.len() > 1) {
            let own = self.own_weights(params, bucket.number);
            let group = bucket.group();
            let gathered = collectives.all_gather((&group.ranks, bucket.number), own, |at| group.runs(at))?;
            self.unpack(params, bucket.number, &gathered);
        }
        self.gather_gates(params, records, (collectives, world))
    }

    /// Biases and counts of the gates: one rank's part has each, and a sum with nothing else in it is what it was.
    fn gather_gates(
        &self,
        params: &mut RankParams,
        records: &Records,
        (collectives, world): (&Collectives, &[usize]),
    ) -> Result<(), RankError> {
        let TotalsLayout { num_experts, num_layers } = self.layout;
        let (mut biases, mut counts) = (vec![0.0_f64; num_experts * num_layers], Vec::new());
        counts.resize(biases.len(), 0.0_f64);
        let of_layer = |layer: usize| layer * num_experts..(layer + 1) * num_experts;
        for &layer in params.dense.expert_counts.keys() {
            let name = gate_bias_name(layer);
            if records.shape(Kind::Weight, &name).is_some() {
                let own = records.read_numbers(Kind::Weight, &name, &[num_experts])?;
                biases[of_layer(layer)].iter_mut().zip(own).for_each(|(bias, own)| *bias = own.into());
            }
            if records.shape(Kind::Count, &name).is_some() {
                let own = records.read_counts(&name, num_experts)?;
                // Tokens of a run are far fewer than 2^53.
                counts[of_layer(layer)].iter_mut().zip(own).for_each(|(count, own)| *count = own as f64);
            }
        }
        let both = [biases, counts].concat();
        let both = collectives.all_reduce(world, 0, both)?;
        let (biases, counts) = both.split_at(num_experts * num_layers);
        for (&layer, own) in &mut params.dense.gate_biases {
            let biases = biases[of_layer(layer)].iter().map(|&bias| bias as f32).collect();
            *own = Tensor::from_vec(&[num_experts], biases);
        }
        for (&layer, own) in &mut params.dense.expert_counts {
            *own = counts[of_layer(layer)].iter().map(|&count| count as u64).collect();
        }
        Ok(())
    }
}

/// A range of a tensor, as a tensor: the whole is shared until it is written to, a part is copied, so that a
/// rank never keeps more than its shard.
pub(super) fn shared_or_cut(tensor: &Tensor, range: Range<usize>) -> Tensor {
    if range.len() == tensor.len() {
        return tensor.clone();
    }
    Tensor::from(tensor.view(range))
}
