//! Multi-token prediction, depth 1: the input of its block (report section 2.2). The block is an ordinary layer and
//! the end is the shared head with a norm of its own.
//!
//! Row i joins the embedding of token i + 1 with the main model's normed hidden state of row i, in the order of the
//! published weights: `[enorm(embedding); hnorm(hidden)]`. T tokens, D hidden.

use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{embedding, linear, norm};

use super::MtpWeights;
use super::params::Params;
use super::weight_work::WeightWork;

/// What the backward pass needs.
pub struct SavedMtp {
    embedded: Tensor,
    hidden: Tensor,
}

fn join(weights: &MtpWeights, params: &Params, saved: &SavedMtp, eps: f32) -> Tensor {
    let left = norm::forward(&saved.embedded, params.weight(weights.embedding_norm), eps);
    let right = norm::forward(&saved.hidden, params.weight(weights.hidden_norm), eps);
    Tensor::concat_cols(&left, &right)
}

/// The input of the block.
///
/// **Shapes**: `next_ids` `[T]` in U32, `hidden` `[T, D]`, output `[T, D]`.
pub fn forward(
    weights: &MtpWeights,
    params: &Params,
    next_ids: &Tensor,
    hidden: Tensor,
    eps: f32,
) -> (Tensor, SavedMtp) {
    let embedded = embedding::forward(next_ids, params.weight(weights.embedding));
    let saved = SavedMtp { embedded, hidden };
    let joined = join(weights, params, &saved, eps);
    let x = linear::forward(&joined, params.weight(weights.projection));
    (x.to(saved.embedded.format()), saved)
}

/// Gradient with respect to the hidden state; the embedding and the norms get theirs at once.
///
/// **Shapes**: `dy` `[T, D]`, output `[T, D]`.
pub fn backward_input(
    weights: &MtpWeights,
    params: &mut Params,
    dy: Tensor,
    saved: &SavedMtp,
    next_ids: &Tensor,
    eps: f32,
) -> (Tensor, WeightWork) {
    let joined = join(weights, params, saved, eps);
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
