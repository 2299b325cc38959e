//! Multi-token prediction, depth 1: the input of its block (report section 2.2). The block is an ordinary layer and
//! the end is the shared head with a norm of its own.
//!
//! Row i joins the embedding of token i + 1 with the main model's normed hidden state of row i, in the order of the
//! published weights: `[enorm(embedding); hnorm(hidden)]`. T tokens, D hidden.

use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{embedding, linear, norm};

use super::params::Params;
use super::weight_work::WeightWork;
use super::{Architecture, MtpWeights};

/// What the backward pass needs.
pub struct SavedMtp {
    embedded: Tensor,
    hidden: Tensor,
    /// Both normed, as the projection reads them, where norms are kept. **Shapes**: `[T, 2 D]`.
    joined: Option<Tensor>,
}

/// **Shapes**: `embedded` and `hidden` `[T, D]`, output, as the projection reads it, `[T, 2 D]`.
fn join(weights: &MtpWeights, params: &Params, (embedded, hidden): (&Tensor, &Tensor), eps: f32) -> Tensor {
    let left = norm::forward(embedded, params.weight(weights.embedding_norm), eps);
    let right = norm::forward(hidden, params.weight(weights.hidden_norm), eps);
    linear::input(&Tensor::concat_cols(&left, &right), params.weight(weights.projection))
}

/// The input of the block.
///
/// **Shapes**: `next_ids` `[T]` in U32, `hidden` `[T, D]`, output `[T, D]`.
pub fn forward(
    arch: &Architecture,
    weights: &MtpWeights,
    params: &Params,
    next_ids: &Tensor,
    hidden: Tensor,
) -> (Tensor, SavedMtp) {
    let embedded = embedding::forward(next_ids, params.weight(weights.embedding));
    let joined = join(weights, params, (&embedded, &hidden), arch.eps());
    let x = linear::forward(&joined, params.weight(weights.projection)).to(embedded.format());
    (x, SavedMtp { embedded, hidden, joined: (!arch.recompute.norms).then_some(joined) })
}

/// Gradient with respect to the hidden state; the embedding and the norms get theirs at once.
///
/// **Shapes**: `dy` `[T, D]`, output `[T, D]`.
pub fn backward_input(
    weights: &MtpWeights,
    params: &mut Params,
    dy: Tensor,
    mut saved: SavedMtp,
    next_ids: &Tensor,
    eps: f32,
) -> (Tensor, WeightWork) {
    let again = || join(weights, params, (&saved.embedded, &saved.hidden), eps);
    let joined = saved.joined.take().unwrap_or_else(again);
    let d_joined = linear::backward_input(&dy, params.weight(weights.projection));
    let mut work = WeightWork::default();
    work.linear(params, weights.projection, dy, &joined);
    let width = saved.hidden.cols();
    let (weight, grad) = params.weight_and_grad(weights.embedding_norm);
    let d_embedded = norm::backward(&d_joined.slice_cols(0..width), &saved.embedded, weight, eps, grad);
    embedding::backward(&d_embedded, next_ids, params.grad_mut(weights.embedding));
    let (weight, grad) = params.weight_and_grad(weights.hidden_norm);
    (norm::backward(&d_joined.slice_cols(width..2 * width), &saved.hidden, weight, eps, grad), work)
}
