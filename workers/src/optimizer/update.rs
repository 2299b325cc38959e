//! One update of a rank: gradient reduction, the global norm, AdamW on this rank's shard, weight gathering, gate biases.
//!
//! ZeRO-1: the moments of each parameter are spread over its replica group (report section 3.2.3). The step's few totals
//! (norm, losses, expert counts) are summed over the whole world at once; every rank decides from the same numbers, so
//! what the watch says against a step holds on all of them before any update. Knows parameters and groups, no layers.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use contraflow_kernels::adamw::{self, AdamW};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::par::Threads;
use contraflow_kernels::tensor::Tensor;
use contraflow_proto::GradientNorms;
use contraflow_runtime::fabric::{Endpoint, FrameKind};
use contraflow_runtime::recipe::{Decay, OptimizerSection, WatchSection};
use contraflow_runtime::topology::collective::shard;
use contraflow_runtime::watch::evidence::Evidence;
use contraflow_runtime::watch::{Action, Divergence, Seen, Verdict, Watch};

use super::buckets::{Bucket, Piece};
use super::inspect::{self, SquaresByPlace, gradient_norms};
use crate::comm::address::StepId;
use crate::comm::collectives::Collectives;
use crate::engine::compute::Totals;
use crate::error::RankError;
use crate::kept;
use crate::model::expert_counts;
use crate::model::params::{Param, RankParams, Store};

/// What one update is told.
#[derive(Clone, Copy, Debug)]
pub struct UpdateOrder {
    /// Which step.
    pub id: StepId,
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// How far a gate bias moves (gamma).
    pub bias_speed: f64,
    /// Whether this rank has been told to stop: if any has, all stop after this step.
    pub stop: bool,
    /// When the state after the update is wanted.
    pub save: SaveWhen,
    /// Whether the state after the update is kept in memory, unless the ranks stop after it.
    pub keep: bool,
    /// Who must have this rank's state of the step before in memory: what is sent into the totals says so, and so nobody makes
    /// this update before every buddy has that state.
    pub kept_by: Option<usize>,
}

/// When the state after an update is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveWhen {
    /// Not at all: there is nowhere to keep it.
    Never,
    /// If the ranks stop after this step.
    AtStop,
    /// After this step.
    Now,
}

/// What every rank knows after an update.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GlobalTotals {
    /// Mean loss of the global batch.
    pub loss: f64,
    /// Mean MTP loss times lambda.
    pub mtp_loss: f64,
    /// Balance loss, scaled.
    pub balance_loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// The same by where the parameters stand.
    pub gradient_norms: GradientNorms,
    /// Tokens per expert and layer, over the global batch.
    pub expert_counts: BTreeMap<usize, Vec<u64>>,
    /// Some rank has been told to stop: this step is the last.
    pub stop: bool,
    /// Whether no update was made: the watch let the run go on with the next batch.
    pub skipped: bool,
    /// What the watch says against the step, in words.
    pub warning: Option<String>,
}

impl GlobalTotals {
    fn is_finite(&self) -> bool {
        [self.loss, self.mtp_loss, self.balance_loss, self.grad_norm].iter().all(|total| total.is_finite())
    }
}

/// The optimizer's own state.
pub struct OptimizerState {
    recipe: OptimizerSection,
    rules: WatchSection,
    /// What the watch remembers of the steps so far; a checkpoint holds it.
    pub(crate) watch: Watch,
    names: Vec<String>,
    pub(crate) endpoint: Endpoint,
    pub(crate) world: Vec<usize>,
    /// Number of experts, and of layers that may have a gate: the shape of the counts in the totals.
    pub(crate) counts_shape: (usize, usize),
    pub(crate) buckets: Vec<Bucket>,
    threads: Arc<Threads>,
}

/// What the optimizer is made with.
pub struct OptimizerSetup {
    /// `[optimizer]`.
    pub recipe: OptimizerSection,
    /// `[watch]`.
    pub watch: WatchSection,
    /// The published list of the model's weights, without stored copies: what a bad tensor is named by.
    pub names: Vec<String>,
    /// This rank's end of the fabric.
    pub endpoint: Endpoint,
    /// All ranks of the job.
    pub world: Vec<usize>,
    /// Routed experts of the model.
    pub num_experts: usize,
    /// Layers of the model, MTP included.
    pub num_layers: usize,
    /// What its arithmetic may use.
    pub threads: Arc<Threads>,
}

impl OptimizerState {
    /// Zero moments for this rank's shard of each bucket.
    pub fn new(setup: OptimizerSetup, params: &RankParams) -> Self {
        let mut buckets: BTreeMap<usize, Bucket> = BTreeMap::new();
        for (store, list) in [(Store::Dense, &params.dense), (Store::Experts, &params.experts)] {
            for (index, param) in list.iter().enumerate() {
                let bucket = buckets.entry(param.bucket).or_insert_with(|| Bucket::empty(param));
                bucket.members.push((store, index, bucket.len));
                bucket.len += param.weight.len();
            }
        }
        let rank = setup.endpoint.rank();
        buckets.values_mut().for_each(|bucket| bucket.take_shard(rank));
        OptimizerState {
            buckets: buckets.into_values().collect(),
            recipe: setup.recipe,
            rules: setup.watch,
            watch: Watch::default(),
            names: setup.names,
            endpoint: setup.endpoint,
            world: setup.world,
            counts_shape: (setup.num_experts, setup.num_layers),
            threads: setup.threads,
        }
    }

    /// Makes one update, unless the watch objects. On an error no weight has changed.
    ///
    /// **Errors**: [`RankError::Diverged`] on every rank alike; those of the fabric.
    pub fn update(
        &mut self,
        order: &UpdateOrder,
        params: &mut RankParams,
        totals: &Totals,
    ) -> Result<GlobalTotals, RankError> {
        let (threads, span) = (self.threads.clone(), tracing::Span::current());
        threads.run(|| span.in_scope(|| self.update_in_pool(order, params, totals)))
    }

    fn update_in_pool(
        &mut self,
        order: &UpdateOrder,
        params: &mut RankParams,
        totals: &Totals,
    ) -> Result<GlobalTotals, RankError> {
        let endpoint = self.endpoint.clone();
        let collectives = Collectives { endpoint: &endpoint, id: order.id };
        let gradients = self.reduce_gradients(&collectives, params)?;
        if let Some(buddy) = order.kept_by {
            let formation = (order.id.job, order.id.generation);
            kept::acknowledged(&endpoint, formation, buddy, order.id.step - 1)?;
        }
        let global = self.sum_totals(&collectives, params, &gradients, (totals, order.stop))?;
        let seen = Seen { step: order.id.step, loss: global.loss, grad_norm: global.grad_norm };
        let evidence = if global.is_finite() {
            None
        } else {
            let found = inspect::find(params, totals, &self.names);
            Some(inspect::evidence(&collectives, &self.world, &seen, &found, &self.names)?)
        };
        let Verdict { action, why: warning } = self.judge(&seen, evidence.as_ref());
        if action == Action::Update {
            let grad_scale = (self.recipe.clip_norm / (global.grad_norm + 1e-6)).min(1.0) as f32;
            self.apply(order, params, &gradients, grad_scale);
            self.gather_weights(&collectives, params)?;
            move_gate_biases(&mut params.dense.gate_biases, &global.expert_counts, order.bias_speed);
            expert_counts::add(&mut params.dense.expert_counts, &global.expert_counts);
        }
        for param in params.dense.iter_mut().chain(params.experts.iter_mut()) {
            param.grad = None;
        }
        if matches!(action, Action::Stop | Action::RollBack) {
            let (step, why) = (seen.step, warning.unwrap_or_default());
            return Err(RankError::Diverged(Box::new(Divergence { step, action, why, evidence })));
        }
        Ok(GlobalTotals { skipped: action == Action::Skip, warning, ..global })
    }

    /// The watch's word on a step. Every rank has the same totals, evidence and memory, and so the same word.
    fn judge(&mut self, seen: &Seen, evidence: Option<&Evidence>) -> Verdict {
        let verdict = self.watch.judge(&self.rules, seen, evidence.map(ToString::to_string));
        self.watch.note(&self.rules, seen, verdict.action);
        verdict
    }

    /// The summed gradient of this rank's shard per bucket; `None` where the rank is alone and the gradient is in place.
    #[tracing::instrument(target = "span", skip_all)]
    fn reduce_gradients(
        &self,
        collectives: &Collectives,
        params: &RankParams,
    ) -> Result<Vec<Option<Tensor>>, RankError> {
        let reduce = |bucket: &Bucket| {
            if bucket.group.len() == 1 {
                return Ok(None);
            }
            let slice = |range| bucket.slice(params, range, |param| param.grad.as_ref());
            let sum = collectives.reduce_scatter(&bucket.group, bucket.number, bucket.len, slice)?;
            Ok(Some(sum))
        };
        self.buckets.iter().map(reduce).collect()
    }

    #[tracing::instrument(target = "span", skip_all)]
    fn sum_totals(
        &self,
        collectives: &Collectives,
        params: &RankParams,
        gradients: &[Option<Tensor>],
        (totals, stop): (&Totals, bool),
    ) -> Result<GlobalTotals, RankError> {
        let (num_experts, num_layers) = self.counts_shape;
        let mut sums = self.squares(params, gradients).into_sums();
        let first_total = sums.len();
        let stop = f64::from(u8::from(stop));
        sums.extend([totals.loss, totals.mtp_loss, totals.balance_loss, stop]);
        let first_count = sums.len();
        sums.resize(first_count + num_experts * num_layers, 0.0);
        for (&layer, counts) in &totals.expert_counts {
            for (expert, &count) in counts.iter().enumerate() {
                sums[first_count + layer * num_experts + expert] = count as f64;
            }
        }
        let sums = collectives.all_reduce(&self.world, 0, sums)?;
        let counts_of = |layer: usize| {
            let start = first_count + layer * num_experts;
            sums[start..start + num_experts].iter().map(|&count| count as u64).collect()
        };
        let (squares, rest) = sums.split_at(first_total);
        Ok(GlobalTotals {
            grad_norm: squares.iter().sum::<f64>().sqrt(),
            gradient_norms: gradient_norms(squares),
            loss: rest[0],
            mtp_loss: rest[1],
            balance_loss: rest[2],
            expert_counts: totals.expert_counts.keys().map(|&layer| (layer, counts_of(layer))).collect(),
            stop: rest[3] > 0.0,
            skipped: false,
            warning: None,
        })
    }

    /// Of this rank's shard of the summed gradient.
    fn squares(&self, params: &RankParams, gradients: &[Option<Tensor>]) -> SquaresByPlace {
        let mut squares = SquaresByPlace::new(self.counts_shape.1);
        for (bucket, reduced) in self.buckets.iter().zip(gradients) {
            for Piece { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                let param = params.param(store, index);
                match (reduced, &param.grad) {
                    (Some(reduced), _) => squares.add(param, reduced.view(in_range)),
                    (None, Some(gradient)) => squares.add(param, gradient.view(in_param)),
                    (None, None) => {}
                }
            }
        }
        squares
    }

    fn apply(
        &mut self,
        order: &UpdateOrder,
        params: &mut RankParams,
        gradients: &[Option<Tensor>],
        grad_scale: f32,
    ) {
        for (bucket, reduced) in self.buckets.iter_mut().zip(gradients) {
            for Piece { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
                let param = params.param_mut(store, index);
                let decays = self.recipe.decay == Decay::All || param.is_matrix();
                let spec = AdamW {
                    lr: order.learning_rate as f32,
                    beta1: self.recipe.beta1 as f32,
                    beta2: self.recipe.beta2 as f32,
                    epsilon: self.recipe.epsilon as f32,
                    weight_decay: if decays { self.recipe.weight_decay as f32 } else { 0.0 },
                    step: self.watch.updates_at(order.id.step),
                    grad_scale,
                };
                let Param { weight, grad, .. } = param;
                let gradient = match reduced {
                    Some(reduced) => reduced.view(in_range.clone()),
                    None => {
                        let gradient = grad.get_or_insert_with(|| Tensor::zeros(weight.shape()));
                        gradient.view(in_param.clone())
                    }
                };
                let state = adamw::State {
                    weight: weight.view_mut(in_param),
                    exp_avg: bucket.exp_avg.view_mut(in_range.clone()),
                    exp_avg_sq: bucket.exp_avg_sq.view_mut(in_range),
                };
                adamw::update(state, gradient, &spec);
            }
        }
    }

    /// Gives every holder of a parameter the shards of the others.
    #[tracing::instrument(target = "span", skip_all)]
    pub(crate) fn gather_weights(
        &self,
        collectives: &Collectives,
        params: &mut RankParams,
    ) -> Result<(), RankError> {
        for bucket in self.buckets.iter().filter(|bucket| bucket.group.len() > 1) {
            let mut updated = Vec::new();
            let slice = |range| bucket.slice(params, range, |param| Some(&param.weight));
            let store = |range: Range<usize>, part: &Tensor| updated.push((range, part.clone()));
            collectives.all_gather(&bucket.group, bucket.number, bucket.len, slice, store)?;
            for (range, part) in updated {
                for Piece { store, index, in_param, in_range } in bucket.pieces(&range, params) {
                    let weight = &mut params.param_mut(store, index).weight;
                    weight.view_mut(in_param).copy_from(part.view(in_range));
                }
            }
        }
        Ok(())
    }

    /// The frames one update sends from this rank: kind, bucket, destination, bytes. For comparison with what was sent.
    pub fn frames(&self) -> Vec<(FrameKind, usize, usize, usize)> {
        let mut frames = Vec::new();
        let own = self.endpoint.rank();
        for bucket in &self.buckets {
            for (index, &member) in bucket.group.iter().enumerate().filter(|&(_, &member)| member != own) {
                let theirs = 4 * shard(bucket.len, bucket.group.len(), index).len();
                frames.push((FrameKind::ReduceScatter, bucket.number, member, theirs));
                frames.push((FrameKind::AllGather, bucket.number, member, 4 * bucket.shard.len()));
            }
        }
        frames
    }
}

/// The balance rule without a loss: an expert that got more than the mean goes down by `speed`, one that got less goes up
/// (report section 2.1.2).
pub fn move_gate_biases(
    biases: &mut BTreeMap<usize, Tensor>,
    counts: &BTreeMap<usize, Vec<u64>>,
    speed: f64,
) {
    for (layer, counts) in counts {
        let Some(bias) = biases.get_mut(layer) else { continue };
        let total: u64 = counts.iter().sum();
        // mean - count, times the number of experts: exact in integers.
        let move_of = |&count: &u64| match total.cmp(&(count * counts.len() as u64)) {
            std::cmp::Ordering::Greater => speed as f32,
            std::cmp::Ordering::Less => -speed as f32,
            // Added to any number, the negative zero leaves it as it is, zeros of both signs included.
            std::cmp::Ordering::Equal => -0.0,
        };
        add_into(bias, &Tensor::from_vec(&[counts.len()], counts.iter().map(move_of).collect()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contraflow_kernels::host::HostValues;

    #[test]
    fn an_overloaded_expert_goes_down_by_exactly_the_speed() {
        let mut biases = BTreeMap::from([(1, Tensor::from_vec(&[4], vec![0.0, 0.5, 0.0, -0.25]))]);
        let counts = BTreeMap::from([(1, vec![9, 4, 5, 2])]);
        move_gate_biases(&mut biases, &counts, 0.125);
        assert_eq!(biases[&1].values::<f32>(), [-0.125, 0.625, 0.0, -0.125]);
        move_gate_biases(&mut biases, &counts, 0.0);
        assert_eq!(biases[&1].values::<f32>(), [-0.125, 0.625, 0.0, -0.125]);
    }
}
