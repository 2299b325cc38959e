//! Which weights a rank keeps the [moving average](super::average) of: those that it answers for in a checkpoint, in the order of a
//! snapshot. Knows parameters and buckets, no threads.

use contraflow_kernels::tensor::Tensor;

use super::average::Average;
use super::buckets::BucketSlice;
use super::state::shared_or_cut;
use super::update::OptimizerState;
use crate::checkpoint::{Awaited, Kind, Records};
use crate::error::RankError;
use crate::model::params::{RankParams, gate_bias_name};

impl OptimizerState {
    /// Begins the average, with what `records` have of it; without them, or where they have none, with the weights as they are.
    /// A decay of 0: there is none.
    ///
    /// **Errors**: those of [`Records::read`]; the thread cannot be started.
    pub fn start_average(
        &mut self,
        decay: f64,
        params: &RankParams,
        records: Option<&Records>,
    ) -> Result<(), RankError> {
        if decay == 0.0 {
            return Ok(());
        }
        // Copies: shared ones would be copied by the first update.
        let weights = self.own_weights_shared(params).into_iter();
        let mut values: Vec<Tensor> = weights.map(|own| Tensor::from(own.view(0..own.len()))).collect();
        if let Some(records) = records {
            self.read_average(params, records, &mut values)?;
        }
        let started = Average::start(decay, values);
        self.average = Some(started.map_err(|source| RankError::File { path: "a thread".into(), source })?);
        Ok(())
    }

    fn read_average(
        &self,
        params: &RankParams,
        records: &Records,
        values: &mut [Tensor],
    ) -> Result<(), RankError> {
        let mut values = values.iter_mut();
        for BucketSlice { store, index, in_param, .. } in self.own_pieces(params) {
            let Some(value) = values.next() else { return Ok(()) };
            for (part, in_part, within) in params.param(store, index).parts_in(in_param) {
                if records.shape(Kind::Average, &part.name).is_some() {
                    let tensor = (part.name.as_str(), part.shape.as_slice());
                    records.read(Kind::Average, tensor, in_part, value.view_mut(within))?;
                }
            }
        }
        for (layer, value) in self.own_gates(params).zip(values) {
            let (name, len) = (gate_bias_name(layer), value.len());
            if records.shape(Kind::Average, &name).is_some() {
                records.read(Kind::Average, (&name, &[len]), 0..len, value.view_mut(0..len))?;
            }
        }
        Ok(())
    }

    /// Moves the average towards the weights that a step has left, if it has updated them; beside the training. Where it is wanted
    /// for a [snapshot](Self::snapshot), its tensors come later.
    ///
    /// **Errors**: the average's thread has ended.
    pub fn average(
        &self,
        params: &RankParams,
        has_updated: bool,
        is_wanted: bool,
    ) -> Result<Vec<Awaited>, RankError> {
        let Some(average) = &self.average else { return Ok(Vec::new()) };
        let masters = if has_updated { self.own_weights_shared(params) } else { Vec::new() };
        average.order(masters, is_wanted)
    }

    /// The weights that this rank answers for: masters of its shard, piece by piece, then the biases of the gates whose first
    /// holder it is. Shared until they are written to, but for parts of a parameter.
    fn own_weights_shared(&self, params: &RankParams) -> Vec<Tensor> {
        let pieces = self.own_pieces(params).map(|BucketSlice { store, index, in_param, .. }| {
            let param = params.param(store, index);
            shared_or_cut(param.master(), param.in_master(in_param))
        });
        let biases = self.own_gates(params).filter_map(|layer| params.dense.gate_biases.get(&layer).cloned());
        pieces.chain(biases).collect()
    }

    fn own_pieces<'a>(&'a self, params: &'a RankParams) -> impl Iterator<Item = BucketSlice> + 'a {
        self.buckets.iter().flat_map(|bucket| bucket.pieces(&bucket.shard, params))
    }

    /// Layers whose gates have a bias that this rank is the first to hold.
    fn own_gates<'a>(&'a self, params: &'a RankParams) -> impl Iterator<Item = usize> + 'a {
        let is_own =
            |layer: &usize| params.dense.gate_holders(*layer).is_some_and(|holders| holders[0] == self.rank);
        params.dense.gate_biases.keys().copied().filter(is_own)
    }
}
