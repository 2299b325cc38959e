//! What the operations of an update do to a rank's own tensors: gradients into flat parts, squares of the summed gradient,
//! AdamW on the rank's shard, gathered shards into weights, gate biases.
//!
//! ZeRO-1: the moments of each parameter are spread over its replica group (report section 3.2.3). Knows parameters and
//! buckets; no layers, no other rank, and nothing of the order in which all this happens.

use std::collections::BTreeMap;
use std::ops::Range;

use contraflow_kernels::adamw::{self, AdamW, Rounding};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::random::SplitMix64;
use contraflow_runtime::recipe::{Decay, NumberFormat, OptimizerSection, PrecisionSection, WatchSection};
use contraflow_runtime::stability::evidence::Evidence;
use contraflow_runtime::stability::{Seen, StabilityWatch, Verdict};
use contraflow_runtime::topology::collective::shard;

use super::average::Average;
use super::buckets::{Bucket, BucketGroup, BucketSlice};
use super::squares::{SquaresByPlace, square};
use super::totals::TotalsLayout;
use crate::model::expert_counts;
use crate::model::init::name_bits;
use crate::model::params::{Param, PublishedTensor, RankParams};

/// Inputs of one update.
#[derive(Clone, Copy, Debug)]
pub struct UpdateRates {
    /// Optimizer update, counted from 1.
    pub step: u64,
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// How far a gate bias moves (gamma).
    pub bias_speed: f64,
}

/// The optimizer's own state.
pub struct OptimizerState {
    recipe: OptimizerSection,
    rules: WatchSection,
    /// State of the stability watch of the steps so far; a checkpoint holds it.
    pub(crate) watch: StabilityWatch,
    /// The published list of the model's weights: what a bad tensor is named by.
    pub names: Vec<String>,
    pub(super) rank: usize,
    /// How the step's totals are laid out.
    pub layout: TotalsLayout,
    moments: Moments,
    pub(super) buckets: Vec<Bucket>,
    pub(super) average: Option<Average>,
}

/// What the optimizer is made with.
pub struct OptimizerSetup {
    /// `[optimizer]`.
    pub recipe: OptimizerSection,
    /// `[watch]`.
    pub watch: WatchSection,
    /// The published list of the model's weights, without stored copies.
    pub names: Vec<String>,
    /// This rank.
    pub rank: usize,
    /// Routed experts and layers of the model.
    pub layout: TotalsLayout,
    /// How the moments are stored.
    pub moments: Moments,
}

/// How the moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moments {
    /// F32 or BF16.
    pub format: Format,
    /// Seed of stochastic rounding to BF16; to nearest without one.
    pub seed: Option<u64>,
}

impl Moments {
    /// As they are computed with.
    pub const F32: Moments = Moments { format: Format::F32, seed: None };

    /// Those of a recipe.
    pub fn of(precision: &PrecisionSection, seed: u64) -> Self {
        let format = if precision.moments == NumberFormat::Bf16 { Format::BF16 } else { Format::F32 };
        Moments { format, seed: precision.stochastic_rounding.then_some(seed) }
    }

    /// Of the elements of a published tensor from `first` on. Chance follows from seed, step and element, whoever updates it.
    fn rounding(&self, name: &str, first: usize, step: u64) -> Rounding {
        let Some(seed) = self.seed else { return Rounding::Nearest };
        let of_step = SplitMix64::new(seed ^ step.rotate_left(32)).next_u64();
        Rounding::Stochastic { key: SplitMix64::new(name_bits(name) ^ of_step).next_u64(), first }
    }
}

impl OptimizerState {
    /// Zero moments for this rank's shard of each bucket. Parameters that are computed with in a narrow format keep the masters
    /// of the shard alone, so they get their values afterwards.
    pub fn new(setup: OptimizerSetup, params: &mut RankParams) -> Self {
        let OptimizerSetup { recipe, watch, names, rank, layout, moments } = setup;
        let mut buckets = Bucket::all_of(params, rank);
        for bucket in &mut buckets {
            bucket.make_moments(moments.format);
            for &(store, index, start) in &bucket.members {
                let param = params.param_mut(store, index);
                let at = |place: usize| place.clamp(start, start + param.len()) - start;
                param.own(at(bucket.shard.start)..at(bucket.shard.end));
            }
        }
        OptimizerState {
            recipe,
            rules: watch,
            watch: StabilityWatch::default(),
            names,
            rank,
            layout,
            moments,
            buckets,
            average: None,
        }
    }

    /// A bucket of this rank.
    ///
    /// # Panics
    /// If the rank does not hold it: the program was made for another placement.
    pub fn bucket(&self, number: usize) -> &Bucket {
        let found = self.buckets.iter().find(|bucket| bucket.number == number);
        found.unwrap_or_else(|| panic!("this rank does not hold bucket {number}"))
    }

    /// By bucket, the ranks that hold it.
    pub fn groups(&self) -> BTreeMap<usize, BucketGroup> {
        self.buckets.iter().map(|bucket| (bucket.number, bucket.group())).collect()
    }

    /// The bucket's gradients in flat parts: for each member of its group the shard that is the member's.
    pub fn pack<'a>(&self, params: &'a RankParams, bucket: usize) -> Vec<Tensor> {
        let bucket = self.bucket(bucket);
        let members = bucket.group.len();
        let gradient = |param: &'a Param, range| param.grad.as_ref().map(|grad| grad.view(range));
        let part = |index| bucket.slice(params, shard(bucket.len, members, index), gradient);
        (0..members).map(part).collect()
    }

    /// Squares of this rank's shard of a bucket's summed gradient, with the places of the parameters. `reduced` is that shard;
    /// where the rank is alone the gradient is in place.
    pub fn squares(&self, params: &RankParams, bucket: usize, reduced: Option<&Tensor>) -> Vec<(usize, f64)> {
        let bucket = self.bucket(bucket);
        let of_piece = |BucketSlice { store, index, in_param, in_range }: BucketSlice| {
            let param = params.param(store, index);
            let gradient = match reduced {
                Some(reduced) => reduced.view(in_range),
                None => param.grad.as_ref()?.view(in_param),
            };
            Some(square(param, gradient, self.layout.num_layers))
        };
        bucket.pieces(&bucket.shard, params).into_iter().filter_map(of_piece).collect()
    }

    /// The squares of all buckets in the order of their numbers: so the sum does not depend on which was ready first.
    pub fn sum_squares(&self, mut squares: impl FnMut(usize) -> Vec<(usize, f64)>) -> SquaresByPlace {
        let mut sums = SquaresByPlace::new(self.layout.num_layers);
        self.buckets.iter().for_each(|bucket| sums.add(&squares(bucket.number)));
        sums
    }

    /// The watch's verdict on a step, which it records. Every rank has the same totals, evidence and history, and so the
    /// same verdict.
    pub fn judge(&mut self, seen: &Seen, evidence: Option<&Evidence>) -> Verdict {
        let verdict = self.watch.judge(&self.rules, seen, evidence.map(ToString::to_string));
        self.watch.note(&self.rules, seen, verdict.action);
        verdict
    }

    /// AdamW on this rank's shard of a bucket. `reduced` as in [`squares`](Self::squares); a gradient that is not there is
    /// zero. The norm of all gradients says by how much they are scaled down.
    pub fn apply(
        &mut self,
        params: &mut RankParams,
        bucket: usize,
        reduced: Option<&Tensor>,
        (rates, grad_norm): (UpdateRates, f64),
    ) {
        let bucket = self.buckets.iter_mut().find(|known| known.number == bucket);
        let bucket = bucket.expect("reduced before, so it is there");
        for BucketSlice { store, index, in_param, in_range } in bucket.pieces(&bucket.shard, params) {
            let param = params.param_mut(store, index);
            let decays = self.recipe.decay == Decay::All || param.is_matrix();
            let spec = AdamW {
                lr: rates.learning_rate as f32,
                beta1: self.recipe.beta1 as f32,
                beta2: self.recipe.beta2 as f32,
                epsilon: self.recipe.epsilon as f32,
                weight_decay: if decays { self.recipe.weight_decay as f32 } else { 0.0 },
                step: self.watch.updates_at(rates.step),
                grad_scale: (self.recipe.clip_norm / (grad_norm + 1e-6)).min(1.0) as f32,
                rounding: Rounding::Nearest,
            };
            // Chance goes by published tensors; without it one run is as good as several.
            let runs: Vec<_> = match self.moments.seed {
                None => vec![(in_param, in_range, Rounding::Nearest)],
                Some(_) => {
                    let parts = param.parts_in(in_param.clone());
                    let run = |(part, in_part, within): (&PublishedTensor, Range<usize>, Range<usize>)| {
                        let of = |start: usize| start + within.start..start + within.end;
                        let rounding = self.moments.rounding(&part.name, in_part.start, rates.step);
                        (of(in_param.start), of(in_range.start), rounding)
                    };
                    parts.map(run).collect()
                }
            };
            for (in_param, in_range, rounding) in runs {
                let (weight, gradient) = match reduced {
                    Some(reduced) => (param.master_view_mut(in_param), reduced.view(in_range.clone())),
                    None => param.master_and_grad(in_param),
                };
                let state = adamw::State {
                    weight,
                    exp_avg: bucket.exp_avg.view_mut(in_range.clone()),
                    exp_avg_sq: bucket.exp_avg_sq.view_mut(in_range),
                };
                adamw::update(state, gradient, &AdamW { rounding, ..spec.clone() });
            }
        }
    }

    /// This rank's shard of a bucket's weights, in the runs in which it is gathered.
    pub fn own_weights(&self, params: &RankParams, bucket: usize) -> Vec<Tensor> {
        let bucket = self.bucket(bucket);
        let at = bucket.group.iter().position(|&member| member == self.rank).unwrap_or_default();
        let run = |(range, format)| {
            bucket.slice(params, range, |param, range| Some(param.master_view(range))).to(format)
        };
        bucket.group().runs(at).into_iter().map(run).collect()
    }

    /// Takes over what was gathered: shards of other ranks in F32, those of all ranks in BF16.
    pub fn unpack(&self, params: &mut RankParams, bucket: usize, gathered: &[(Range<usize>, Tensor)]) {
        let bucket = self.bucket(bucket);
        for &(store, index, start) in &bucket.members {
            let param = params.param_mut(store, index);
            let end = start + param.len();
            let runs = gathered.iter().filter_map(|(range, part)| {
                let (from, to) = (start.max(range.start), end.min(range.end));
                let values = || part.view(from - range.start..to - range.start);
                (from < to).then(|| (from - start..to - start, values()))
            });
            param.receive(runs);
        }
    }
}

/// Moves the gate biases by the step's tokens per expert, and counts these.
pub fn balance(params: &mut RankParams, counts: &BTreeMap<usize, Vec<u64>>, speed: f64) {
    move_gate_biases(&mut params.dense.gate_biases, counts, speed);
    expert_counts::add(&mut params.dense.expert_counts, counts);
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
