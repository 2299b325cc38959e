//! The gate: which experts a token goes to and with what weight, and the balance loss on its scores.
//!
//! Called at the end of the attention component, on logits that a linear layer made. It knows neither where experts
//! live nor how their bias is learnt; it hands out ids, weights and the scores that the backward pass needs.
//!
//! Shape letters: T tokens, K top-k, E experts.

use crate::{
    math,
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor},
};

/// Keeps the normalising division finite when all chosen scores underflow; far below any f32 rounding otherwise.
const NORMALISER_FLOOR: f32 = 1e-20;

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Of each logit by itself (DeepSeek-V3 report, equation 15).
    Sigmoid,
    /// Over all experts of a token (DeepSeek-V2 report, equation 22).
    Softmax,
}

/// What a group of experts is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The sum of its two best experts (DeepSeek-V3).
    TopTwo,
    /// Its best expert (DeepSeek-V2).
    Best,
}

/// The fixed choices of one gate.
///
/// **Source**: DeepSeek-V3 report, equations 13 to 16; group limit, section 2.1.2.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSpec {
    /// How logits become scores.
    pub scoring: Scoring,
    /// What a group is chosen by.
    pub group_score: GroupScore,
    /// E, the routed experts of the layer.
    pub num_experts: usize,
    /// K, the experts each token goes to.
    pub top_k: usize,
    /// Equal runs of neighbouring experts, of which a token may use only some.
    pub num_groups: usize,
    /// The groups a token may use.
    pub top_groups: usize,
    /// Whether the chosen scores are divided by their sum.
    pub normalise: bool,
    /// Factor on every weight.
    pub scale: f32,
}

/// What the gate decided for each token.
#[derive(Clone)]
pub struct Routing {
    /// Chosen experts in U32, per token by descending biased score, ties to the lower id.
    ///
    /// **Shapes**: `[T, K]`.
    pub expert_ids: Tensor,
    /// Their weights, from the scores without bias.
    ///
    /// **Shapes**: `[T, K]`.
    pub weights: Tensor,
    /// Of every expert, by the spec's scoring.
    ///
    /// **Shapes**: `[T, E]`.
    pub scores: Tensor,
}

/// Scores, choice and weights of every token.
///
/// The bias, where the gate has one, decides the choice only; no gradient passes through it. Non-finite logits still give K distinct experts
/// per token, so that the fault surfaces as a non-finite loss and not as a wrong index.
///
/// **Shapes**: `logits` `[T, E]`, `bias` `[E]`.
/// **Errors**: panics if the spec's numbers do not fit each other or the inputs; a recipe is checked long before.
pub fn forward(logits: &Tensor, bias: Option<&Tensor>, spec: &GateSpec) -> Routing {
    spec.check();
    let unbiased = vec![0.0; spec.num_experts];
    let bias = bias.map_or(unbiased.as_slice(), Tensor::f32);
    assert_eq!(logits.cols(), spec.num_experts, "expected one logit per expert");
    assert_eq!(bias.len(), spec.num_experts, "expected one bias per expert");
    let num_tokens = logits.rows();
    let mut scores = Tensor::for_overwrite(&[num_tokens, spec.num_experts]);
    let mut expert_ids = Tensor::for_overwrite_in(Format::U32, &[num_tokens, spec.top_k]);
    let mut weights = Tensor::for_overwrite(&[num_tokens, spec.top_k]);

    let ranges = par::partition(num_tokens, MIN_PARALLEL / spec.num_experts);
    let scores_of = par::split(scores.f32_mut(), spec.num_experts, &ranges);
    let ids_of = par::split(expert_ids.u32_mut(), spec.top_k, &ranges);
    let weights_of = par::split(weights.f32_mut(), spec.top_k, &ranges);
    let outputs = scores_of.into_iter().zip(ids_of).zip(weights_of);
    let tasks: Vec<_> = ranges.iter().zip(outputs).collect();
    par::for_each(tasks, |(tokens, ((scores, ids), weights))| {
        let logits = &logits.f32()[tokens.start * spec.num_experts..tokens.end * spec.num_experts];
        match spec.scoring {
            Scoring::Sigmoid => sigmoid_into(logits, scores),
            Scoring::Softmax => softmax_into(logits, scores, spec.num_experts),
        }
        route(scores, bias, spec, ids, weights);
    });
    Routing { expert_ids, weights, scores }
}

/// Choice and weights of some tokens.
///
/// **Shapes**: `scores` `[t, E]`, `expert_ids` and `weights` `[t * K]`.
fn route(scores: &[f32], bias: &[f32], spec: &GateSpec, expert_ids: &mut [u32], weights: &mut [f32]) {
    let mut choice = Choice::new(spec);
    let outputs = expert_ids.chunks_exact_mut(spec.top_k).zip(weights.chunks_exact_mut(spec.top_k));
    for (scores, (ids, weights)) in scores.chunks_exact(spec.num_experts).zip(outputs) {
        choice.choose(scores, bias, spec);
        let chosen = || choice.experts.best.iter().map(|&(_, id)| scores[id as usize]);
        let factor = if spec.normalise { spec.scale / normaliser(chosen()) } else { spec.scale };
        for ((id, weight), &(_, expert)) in ids.iter_mut().zip(weights).zip(&choice.experts.best) {
            (*id, *weight) = (expert, scores[expert as usize] * factor);
        }
    }
}

/// Gradient of the scores, from the gradient of the weights, through the normalisation.
///
/// **Shapes**: `d_weights` `[T, K]`, result `[T, E]`, zero for experts a token did not choose.
pub fn backward(d_weights: &Tensor, routing: &Routing, spec: &GateSpec) -> Tensor {
    assert_eq!(d_weights.len(), routing.weights.len(), "expected one gradient per weight");
    let mut d_scores = Tensor::zeros(routing.scores.shape());
    let rows = d_scores.f32_mut().chunks_exact_mut(spec.num_experts);
    let scores = routing.scores.f32().chunks_exact(spec.num_experts);
    let chosen =
        routing.expert_ids.u32().chunks_exact(spec.top_k).zip(d_weights.f32().chunks_exact(spec.top_k));
    for ((row, scores), (ids, d_weights)) in rows.zip(scores).zip(chosen) {
        let chosen = || ids.iter().map(|&id| scores[id as usize]);
        // w_k = c s_k / n with n = sum s: dL/ds_k = c (g_k - sum_j g_j s_j / n) / n; without normalisation, c g_k.
        let (factor, mean) = if spec.normalise {
            let sum = normaliser(chosen());
            let dot: f32 = chosen().zip(d_weights).map(|(score, gradient)| score * gradient).sum();
            (spec.scale / sum, dot / sum)
        } else {
            (spec.scale, 0.0)
        };
        for (&id, gradient) in ids.iter().zip(d_weights) {
            row[id as usize] = factor * (gradient - mean);
        }
    }
    d_scores
}

/// Turns the gradient of the scores into that of the logits, in place.
///
/// **Shapes**: `d_scores` `[T, E]`.
pub fn logits_gradient(d_scores: &mut Tensor, routing: &Routing, scoring: Scoring) {
    assert_eq!(d_scores.shape(), routing.scores.shape(), "expected one gradient per score");
    match scoring {
        Scoring::Sigmoid => {
            for (gradient, score) in d_scores.f32_mut().iter_mut().zip(routing.scores.f32()) {
                *gradient *= score * (1.0 - score);
            }
        }
        Scoring::Softmax => {
            let num_experts = routing.scores.cols();
            let tokens = d_scores.f32_mut().chunks_exact_mut(num_experts);
            for (gradients, scores) in tokens.zip(routing.scores.f32().chunks_exact(num_experts)) {
                let mean: f32 = gradients.iter().zip(scores).map(|(gradient, score)| gradient * score).sum();
                for (gradient, score) in gradients.iter_mut().zip(scores) {
                    *gradient = score * (*gradient - mean);
                }
            }
        }
    }
}

/// Sequence-wise balance loss: the sum over sequences of sum_i f_i P_i, which is 1 per sequence at perfect balance.
///
/// f counts the routes actually taken and is a constant; P, the mean share of an expert in the scores, carries the
/// gradient, which is multiplied by `gradient_scale` and added to `d_scores`.
///
/// **Shapes**: `d_scores` `[T, E]`; T is a multiple of `sequence_len`.
/// **Source**: report, equations 17 to 20, without alpha.
pub fn balance_loss(
    routing: &Routing,
    sequence_len: usize,
    spec: &GateSpec,
    gradient_scale: f32,
    mut d_scores: Option<&mut Tensor>,
) -> f64 {
    let num_experts = spec.num_experts;
    assert_eq!(
        routing.scores.rows() % sequence_len,
        0,
        "expected whole sequences of {sequence_len} tokens, got {} tokens",
        routing.scores.rows()
    );
    let sequences = routing.scores.f32().chunks_exact(sequence_len * num_experts);
    let choices = routing.expert_ids.u32().chunks_exact(sequence_len * spec.top_k);
    let mut total = 0.0;
    for (sequence, (scores, expert_ids)) in sequences.zip(choices).enumerate() {
        let load = relative_load(expert_ids, sequence_len, spec);
        // sum_i f_i P_i is the mean over tokens of sum_i f_i s_i / sum_j s_j, and so is its gradient.
        let token_loss = |token: &[f32]| {
            let sum = token.iter().map(|&score| f64::from(score)).sum::<f64>() + f64::from(NORMALISER_FLOOR);
            let dot = load.iter().zip(token).map(|(load, &score)| load * f64::from(score)).sum::<f64>();
            (dot / sum, sum)
        };
        let loss: f64 = scores.chunks_exact(num_experts).map(|token| token_loss(token).0).sum();
        total += loss / sequence_len as f64;

        let Some(d_scores) = d_scores.as_deref_mut() else { continue };
        let start = sequence * sequence_len * num_experts;
        let rows = d_scores.f32_mut()[start..start + scores.len()].chunks_exact_mut(num_experts);
        for (row, token) in rows.zip(scores.chunks_exact(num_experts)) {
            let (loss, sum) = token_loss(token);
            let factor = f64::from(gradient_scale) / (sequence_len as f64 * sum);
            for (gradient, load) in row.iter_mut().zip(&load) {
                *gradient += (factor * (load - loss)) as f32;
            }
        }
    }
    total
}

/// How many routes each expert was given.
///
/// **Shapes**: `[E]` in U32; the counts sum to `T * K`.
pub fn counts(routing: &Routing) -> Tensor {
    let num_experts = routing.scores.cols();
    let mut counts = vec![0_u32; num_experts];
    for &id in routing.expert_ids.u32() {
        counts[id as usize] += 1;
    }
    Tensor::from_vec(&[num_experts], counts)
}

impl GateSpec {
    fn check(&self) {
        let GateSpec { num_experts, top_k, num_groups, top_groups, .. } = *self;
        assert!(
            num_groups > 0 && num_experts.is_multiple_of(num_groups),
            "num_groups: expected a divisor of {num_experts} experts, got {num_groups}"
        );
        assert!(
            (1..=num_groups).contains(&top_groups),
            "top_groups: expected 1 to {num_groups}, got {top_groups}"
        );
        let eligible = top_groups * (num_experts / num_groups);
        assert!(
            (1..=eligible).contains(&top_k),
            "top_k: expected 1 to {eligible}, the experts of {top_groups} groups, got {top_k}"
        );
    }
}

/// f of the balance loss: an expert's routes over what perfect balance would give it.
fn relative_load(expert_ids: &[u32], sequence_len: usize, spec: &GateSpec) -> Vec<f64> {
    let unit = spec.num_experts as f64 / (spec.top_k * sequence_len) as f64;
    let mut load = vec![0.0; spec.num_experts];
    for &id in expert_ids {
        load[id as usize] += unit;
    }
    load
}

fn normaliser(chosen: impl Iterator<Item = f32>) -> f32 {
    chosen.sum::<f32>() + NORMALISER_FLOOR
}

fn sigmoid_into(logits: &[f32], scores: &mut [f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = math::sigmoid(logit);
            }
        },
    );
}

/// Softmax of each row; the largest logit is taken off first, so that none overflows.
fn softmax_into(logits: &[f32], scores: &mut [f32], num_experts: usize) {
    for (logits, scores) in logits.chunks_exact(num_experts).zip(scores.chunks_exact_mut(num_experts)) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for (score, logit) in scores.iter_mut().zip(logits) {
            *score = (logit - largest).exp();
        }
        let sum: f32 = scores.iter().sum();
        scores.iter_mut().for_each(|score| *score /= sum);
    }
}

/// Working memory of the choice, reused from token to token.
struct Choice {
    groups: Best,
    experts: Best,
}

impl Choice {
    fn new(spec: &GateSpec) -> Self {
        Choice { groups: Best::new(spec.top_groups), experts: Best::new(spec.top_k) }
    }

    /// Leaves the chosen experts of one token in `self.experts`.
    fn choose(&mut self, scores: &[f32], bias: &[f32], spec: &GateSpec) {
        let group_size = spec.num_experts / spec.num_groups;
        self.groups.clear();
        if spec.num_groups == 1 {
            self.groups.offer(0.0, 0);
        } else {
            for (group, (scores, bias)) in scores.chunks(group_size).zip(bias.chunks(group_size)).enumerate()
            {
                self.groups.offer(group_score(scores, bias, spec.group_score), group as u32);
            }
        }
        // Visiting the kept groups by ascending id makes ties fall to the lower expert.
        self.groups.best.sort_unstable_by_key(|&(_, group)| group);
        self.experts.clear();
        for &(_, group) in &self.groups.best {
            let first = group as usize * group_size;
            for id in first..first + group_size {
                self.experts.offer(scores[id] + bias[id], id as u32);
            }
        }
    }
}

/// The best few of the values offered, in descending order; of equals, the one offered first.
struct Best {
    capacity: usize,
    best: Vec<(f32, u32)>,
}

impl Best {
    fn new(capacity: usize) -> Self {
        Best { capacity, best: Vec::with_capacity(capacity) }
    }

    fn clear(&mut self) {
        self.best.clear();
    }

    fn offer(&mut self, value: f32, id: u32) {
        let mut at = self.best.len();
        while at > 0 && value > self.best[at - 1].0 {
            at -= 1;
        }
        if at < self.capacity {
            self.best.truncate(self.capacity - 1);
            self.best.insert(at, (value, id));
        }
    }
}

/// A group's score; a group of one expert has only that one to sum.
fn group_score(scores: &[f32], bias: &[f32], by: GroupScore) -> f32 {
    let mut top = [f32::NEG_INFINITY; 2];
    for (score, bias) in scores.iter().zip(bias) {
        let value = score + bias;
        if value > top[0] {
            top = [value, top[0]];
        } else if value > top[1] {
            top[1] = value;
        }
    }
    if scores.len() == 1 || by == GroupScore::Best { top[0] } else { top[0] + top[1] }
}

#[cfg(test)]
mod tests;
