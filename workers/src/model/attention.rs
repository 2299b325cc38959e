//! The attention component: norm, multi-head latent attention, residual, norm, gate (report section 2.1.1).
//!
//! T tokens, D hidden, H heads, C KV latent, Cq query latent. Kept for the backward pass: the input, the latents, the attention
//! output and the residual stream; outputs of norms and of the up-projections unless they are computed again.

use std::ops::Range;
use std::sync::Arc;

use contraflow_kernels::attention::{self, Attended};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::gate::{self, Routing};
use contraflow_kernels::latent::{join_keys, split_key_gradients};
use contraflow_kernels::rope::{RopeTable, rotate};
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{linear, norm};
use contraflow_runtime::model_config;

use super::micro_batch::{BalanceScale, MicroBatch};
use super::params::Params;
use super::weight_work::WeightWork;
use super::{Architecture, AttentionWeights, Query, Recompute};

/// Epsilon of the norms on the two latents, whatever that of the others is.
const LATENT_NORM_EPS: f32 = model_config::LATENT_NORM_EPS as f32;

/// What the component hands to the feed-forward part of its layer.
pub struct AttentionOutput {
    /// Residual stream after attention. **Shapes**: `[T, D]`.
    pub residual: Tensor,
    /// The same, normed: input of gate, shared and routed experts. **Shapes**: `[T, D]`.
    pub normed: Tensor,
    /// The gate's choice, in layers with routed experts.
    pub routing: Option<Arc<Routing>>,
}

/// What the backward pass needs.
pub struct SavedAttention {
    x: Tensor,
    /// `x` normed, as the projections read it, where norms are kept.
    input: Option<Tensor>,
    latents: Latents,
    /// Outputs of the norms on the latents, where they are kept.
    normed_latents: Option<NormedLatents>,
    /// Queries without a latent: they are the output of no up-projection.
    direct_queries: Option<Tensor>,
    /// Where the outputs of up-projections are kept.
    heads: Option<Heads>,
    core: Attended,
    residual: Tensor,
    /// Made once in the backward pass where norms are not kept.
    normed: Option<Tensor>,
    routing: Option<Arc<Routing>>,
}

impl SavedAttention {
    /// The residual stream after attention, normed.
    ///
    /// **Shapes**: output `[T, D]`.
    pub fn normed(&mut self, arch: &Architecture, weights: &AttentionWeights, params: &Params) -> Tensor {
        let again = || norm::forward(&self.residual, params.weight(weights.post_norm), arch.eps());
        self.normed.get_or_insert_with(again).clone()
    }
}

/// The gradients that come back to the component.
pub struct AttentionGradient {
    /// Of the residual stream. **Shapes**: `[T, D]`.
    pub residual: Tensor,
    /// Of the normed residual stream, from shared and routed experts. **Shapes**: `[T, D]`.
    pub normed: Tensor,
    /// Of the routing weights, in layers with routed experts. **Shapes**: `[T, K]`.
    pub routing_weights: Option<Tensor>,
}

/// Outputs of the down-projections.
#[derive(Clone)]
struct Latents {
    /// Of queries that have one. **Shapes**: `[T, Cq]`.
    query: Option<Tensor>,
    /// Latent before its norm, then the rope key before rotation. **Shapes**: `[T, C + rope]`.
    kv: Tensor,
}

/// The latents, normed: inputs of the up-projections.
struct NormedLatents {
    /// **Shapes**: `[T, Cq]`.
    query: Option<Tensor>,
    /// **Shapes**: `[T, C]`.
    kv: Tensor,
}

/// What the attention core reads.
#[derive(Clone)]
struct Heads {
    /// **Shapes**: `[T, H * qk]`.
    q: Tensor,
    /// **Shapes**: `[T, H * qk]`.
    k: Tensor,
    /// **Shapes**: `[T, H * v]`.
    v: Tensor,
}

fn latent_columns(arch: &Architecture) -> Range<usize> {
    0..arch.config.kv_lora_rank
}

/// Rotates the rope part of every head's query, in place.
pub fn rotate_queries(arch: &Architecture, table: &RopeTable, q: &mut Tensor, inverse: bool) {
    rotate(table, q, arch.config.num_attention_heads, arch.config.qk_nope_head_dim, inverse);
}

/// Queries of every head before rotation, and the query latent before its norm.
///
/// **Shapes**: `x` `[T, D]` normed, output `[T, H * qk]`.
pub fn queries(weights: &AttentionWeights, params: &Params, x: &Tensor) -> (Tensor, Option<Tensor>) {
    match &weights.query {
        Query::Direct(projection) => (linear::forward(x, params.weight(*projection)), None),
        Query::Latent { down, norm, up } => {
            let latent = linear::forward(x, params.weight(*down));
            let normed = norm::forward(&latent, params.weight(*norm), LATENT_NORM_EPS);
            (linear::forward(&normed, params.weight(*up)), Some(latent))
        }
    }
}

/// The rotated key that all heads share.
///
/// **Shapes**: `kv_latent` `[T, C + rope]`, output `[T, rope]`.
pub fn rope_keys(arch: &Architecture, table: &RopeTable, kv_latent: &Tensor) -> Tensor {
    let (rank, dim) = (arch.config.kv_lora_rank, arch.config.qk_rope_head_dim);
    let mut keys = kv_latent.slice_cols(rank..rank + dim);
    rotate(table, &mut keys, 1, 0, false);
    keys
}

/// The normed latents.
///
/// **Shapes**: `kv_latent` `[T, C + rope]`, output `[T, C]`.
pub fn kv_latents(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &Params,
    kv_latent: &Tensor,
) -> Tensor {
    norm::forward_cols(kv_latent, latent_columns(arch), params.weight(weights.kv_norm), LATENT_NORM_EPS)
}

/// The down-projections.
fn down(weights: &AttentionWeights, params: &Params, input: &Tensor) -> Latents {
    let query = match &weights.query {
        Query::Direct(_) => None,
        Query::Latent { down, .. } => Some(linear::forward(input, params.weight(*down))),
    };
    Latents { query, kv: linear::forward(input, params.weight(weights.kv_down)) }
}

/// The norms on the latents.
fn norm_latents(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &Params,
    latents: &Latents,
) -> NormedLatents {
    let query = match (&weights.query, &latents.query) {
        (Query::Latent { norm, .. }, Some(latent)) => {
            Some(norm::forward(latent, params.weight(*norm), LATENT_NORM_EPS))
        }
        _ => None,
    };
    NormedLatents { query, kv: kv_latents(arch, weights, params, &latents.kv) }
}

/// Queries without a latent, rotated.
fn direct_queries(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &Params,
    input: &Tensor,
    table: &RopeTable,
) -> Option<Tensor> {
    let Query::Direct(projection) = &weights.query else { return None };
    let mut q = linear::forward(input, params.weight(*projection));
    rotate_queries(arch, table, &mut q, false);
    Some(q)
}

/// The up-projections. `direct` are queries that need none.
fn up(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &Params,
    (latents, normed, direct): (&Latents, &NormedLatents, &Option<Tensor>),
    table: &RopeTable,
) -> Heads {
    let q = match (&weights.query, &normed.query, direct) {
        (Query::Latent { up, .. }, Some(normed), _) => {
            let mut q = linear::forward(normed, params.weight(*up));
            rotate_queries(arch, table, &mut q, false);
            q
        }
        (_, _, Some(direct)) => direct.clone(),
        _ => unreachable!("queries have a latent or are made directly"),
    };
    let keys = rope_keys(arch, table, &latents.kv);
    let kv = linear::forward(&normed.kv, params.weight(weights.kv_up));
    let (k, v) = join_keys(&kv, &keys, &arch.latent_heads);
    Heads { q, k, v }
}

/// Runs the component.
///
/// **Shapes**: `x` `[T, D]`.
pub fn forward(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &Params,
    x: Tensor,
    batch: &MicroBatch,
) -> (AttentionOutput, SavedAttention) {
    let Recompute { norms, mla_up_projections, .. } = arch.recompute;
    let input = norm::forward(&x, params.weight(weights.input_norm), arch.eps());
    let input = linear::input(&input, params.weight(weights.kv_down));
    let latents = down(weights, params, &input);
    let direct = direct_queries(arch, weights, params, &input, &batch.rope);
    let input = (!norms).then_some(input);
    let normed_latents = norm_latents(arch, weights, params, &latents);
    let heads = up(arch, weights, params, (&latents, &normed_latents, &direct), &batch.rope);
    let normed_latents = (!norms).then_some(normed_latents);
    let mut core = attention::forward(&heads.q, &heads.k, &heads.v, &batch.spans, &arch.heads);
    let heads = (!mla_up_projections).then_some(heads);
    let residual = linear::forward_add(&core.out, params.weight(weights.output), &x);
    core.out = core.out.to(arch.precision.attention_output);
    let normed = norm::forward(&residual, params.weight(weights.post_norm), arch.eps());
    let routing = weights.gate.map(|gate_weight| {
        let logits = linear::forward(&normed, params.weight(gate_weight));
        Arc::new(gate::forward(&logits, params.gate_biases.get(&weights.layer), &arch.gate))
    });
    let output =
        AttentionOutput { residual: residual.clone(), normed: normed.clone(), routing: routing.clone() };
    let normed = (!norms).then_some(normed);
    let saved = SavedAttention {
        x,
        input,
        latents,
        normed_latents,
        direct_queries: direct,
        heads,
        core,
        residual,
        normed,
        routing,
    };
    (output, saved)
}

/// What the backward pass gives.
pub struct AttentionBackward {
    /// Gradient with respect to the component's input. **Shapes**: `[T, D]`.
    pub dx: Tensor,
    /// The balance losses of the micro-batch, times their factors.
    pub balance_loss: f64,
    /// Deferred weight gradients.
    pub work: WeightWork,
}

/// Gradient with respect to the component's input; the weights of the norms get theirs at once.
pub fn backward_input(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &mut Params,
    gradient: AttentionGradient,
    mut saved: SavedAttention,
    batch: &MicroBatch,
) -> AttentionBackward {
    let mut work = WeightWork::default();
    let mut balance_loss = 0.0;
    let mut d_normed = gradient.normed;
    let routed = saved.routing.as_ref().zip(gradient.routing_weights);
    if let (Some(gate_weight), Some((routing, d_weights))) = (weights.gate, routed) {
        let mut d_scores = gate::backward(&d_weights, routing, &arch.gate);
        for BalanceScale { tokens, scale } in batch.balance_scales() {
            let loss = gate::balance_loss(routing, tokens, &arch.gate, scale, Some(&mut d_scores));
            balance_loss += loss * f64::from(scale);
        }
        gate::logits_gradient(&mut d_scores, routing, arch.gate.scoring);
        add_into(&mut d_normed, &linear::backward_input(&d_scores, params.weight(gate_weight)));
        work.linear(params, gate_weight, d_scores, &saved.normed(arch, weights, params));
    }
    let mut d_residual = gradient.residual;
    let (post_norm, d_post_norm) = params.weight_and_grad(weights.post_norm);
    let through_norm = norm::backward(&d_normed, &saved.residual, post_norm, arch.eps(), d_post_norm);
    add_into(&mut d_residual, &through_norm);

    let SavedAttention { x, input, latents, normed_latents, direct_queries, heads, core, .. } = saved;
    let normed_latents = normed_latents.unwrap_or_else(|| norm_latents(arch, weights, params, &latents));
    let again = || up(arch, weights, params, (&latents, &normed_latents, &direct_queries), &batch.rope);
    let Heads { q, k, v } = heads.unwrap_or_else(again);
    drop(direct_queries);
    let d_core = linear::backward_input(&d_residual, params.weight(weights.output));
    let d_heads = attention::backward(&d_core, (&q, &k, &v), &core, &batch.spans, &arch.heads);
    drop((d_core, q, k, v));
    work.linear(params, weights.output, d_residual.clone(), &core.out);
    let (d_kv, d_rope_keys) = split_key_gradients(&d_heads.dk, &d_heads.dv, &arch.latent_heads);
    let mut d_q = d_heads.dq;
    rotate_queries(arch, &batch.rope, &mut d_q, true);

    let input = input.unwrap_or_else(|| norm::forward(&x, params.weight(weights.input_norm), arch.eps()));
    let input = linear::input(&input, params.weight(weights.kv_down));
    let of_query = (latents.query, normed_latents.query);
    let mut d_input = backward_queries(weights, params, d_q, of_query, &input, &mut work);
    let gradient = KvGradient { kv: d_kv, rope_keys: d_rope_keys };
    let of_kv = (&latents.kv, &normed_latents.kv);
    let d_latent = backward_kv(arch, weights, params, gradient, of_kv, &batch.rope, &mut work);
    add_into(&mut d_input, &linear::backward_input(&d_latent, params.weight(weights.kv_down)));
    work.linear(params, weights.kv_down, d_latent, &input);
    let (input_norm, d_input_norm) = params.weight_and_grad(weights.input_norm);
    let through_norm = norm::backward(&d_input, &x, input_norm, arch.eps(), d_input_norm);
    add_into(&mut d_residual, &through_norm);
    AttentionBackward { dx: d_residual, balance_loss, work }
}

fn backward_queries(
    weights: &AttentionWeights,
    params: &mut Params,
    d_q: Tensor,
    (latent, normed): (Option<Tensor>, Option<Tensor>),
    input: &Tensor,
    work: &mut WeightWork,
) -> Tensor {
    match (&weights.query, latent.zip(normed)) {
        (Query::Latent { down, norm, up }, Some((latent, normed))) => {
            let d_latent = linear::backward_input(&d_q, params.weight(*up));
            work.linear(params, *up, d_q, &normed);
            let (weight, grad) = params.weight_and_grad(*norm);
            let d_latent = norm::backward(&d_latent, &latent, weight, LATENT_NORM_EPS, grad);
            let d_input = linear::backward_input(&d_latent, params.weight(*down));
            work.linear(params, *down, d_latent, input);
            d_input
        }
        (Query::Direct(projection), _) => {
            let d_input = linear::backward_input(&d_q, params.weight(*projection));
            work.linear(params, *projection, d_q, input);
            d_input
        }
        (Query::Latent { .. }, None) => {
            unreachable!("the forward pass keeps the query latent wherever there is one")
        }
    }
}

/// The key and value path back to the normed input.
struct KvGradient {
    /// Of the up-projected keys and values. **Shapes**: `[T, H * (nope + v)]`.
    kv: Tensor,
    /// Of the rotated shared key. **Shapes**: `[T, rope]`.
    rope_keys: Tensor,
}

fn backward_kv(
    arch: &Architecture,
    weights: &AttentionWeights,
    params: &mut Params,
    gradient: KvGradient,
    (kv_latent, normed): (&Tensor, &Tensor),
    table: &RopeTable,
    work: &mut WeightWork,
) -> Tensor {
    let columns = latent_columns(arch);
    let d_normed = linear::backward_input(&gradient.kv, params.weight(weights.kv_up));
    work.linear(params, weights.kv_up, gradient.kv, normed);
    let mut d_latent = Tensor::for_overwrite(kv_latent.shape());
    let (weight, grad) = params.weight_and_grad(weights.kv_norm);
    norm::backward_cols(&d_normed, kv_latent, columns, weight, LATENT_NORM_EPS, grad, &mut d_latent);
    let mut d_keys = gradient.rope_keys;
    rotate(table, &mut d_keys, 1, 0, true);
    d_latent.set_cols(arch.config.kv_lora_rank, &d_keys.to(d_latent.format()));
    d_latent.to(kv_latent.format())
}
