//! Multi-token prediction, depth 1: what stands before its block (report section 2.2). The block is an ordinary layer and
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
pub struct Saved {
    embedded: Tensor,
    hidden: Tensor,
}

fn join(weights: &MtpWeights, params: &Params, saved: &Saved, eps: f32) -> Tensor {
    let left = norm::forward(&saved.embedded, params.weight(weights.embedding_norm), eps);
    let right = norm::forward(&saved.hidden, params.weight(weights.hidden_norm), eps);
    let width = left.cols();
    let mut joined = Tensor::for_overwrite(&[left.rows(), 2 * width]);
    for (row, target) in joined.f32_mut().chunks_exact_mut(2 * width).enumerate() {
        target[..width].copy_from_slice(left.row(row));
        target[width..].copy_from_slice(right.row(row));
    }
    joined
}

/// The input of the block.
///
/// **Shapes**: `next_ids` `[T]`, `hidden` `[T, D]`, output `[T, D]`.
pub fn forward(
    weights: &MtpWeights,
    params: &Params,
    next_ids: &[u32],
    hidden: Tensor,
    eps: f32,
) -> (Tensor, Saved) {
    let embedded = embedding::forward(next_ids, params.weight(weights.embedding));
    let saved = Saved { embedded, hidden };
    let joined = join(weights, params, &saved, eps);
    (linear::forward(&joined, params.weight(weights.projection)), saved)
}

/// Gradient with respect to the hidden state; the embedding and the norms get theirs at once.
///
/// **Shapes**: `dy` `[T, D]`, output `[T, D]`.
pub fn backward_input(
    weights: &MtpWeights,
    params: &mut Params,
    dy: Tensor,
    saved: &Saved,
    next_ids: &[u32],
    eps: f32,
) -> (Tensor, WeightWork) {
    let joined = join(weights, params, saved, eps);
    let d_joined = linear::backward_input(&dy, params.weight(weights.projection));
    let mut work = WeightWork::default();
    work.linear(weights.projection, dy, joined);
    let width = saved.hidden.cols();
    let half = |start: usize| {
        let mut part = Tensor::for_overwrite(saved.hidden.shape());
        for (target, row) in
            part.f32_mut().chunks_exact_mut(width).zip(d_joined.f32().chunks_exact(2 * width))
        {
            target.copy_from_slice(&row[start..start + width]);
        }
        part
    };
    let (weight, grad) = params.weight_and_grad(weights.embedding_norm);
    let d_embedded = norm::backward(&half(0), &saved.embedded, weight, eps, grad);
    embedding::backward(&d_embedded, next_ids, params.grad_mut(weights.embedding));
    let (weight, grad) = params.weight_and_grad(weights.hidden_norm);
    (norm::backward(&half(width), &saved.hidden, weight, eps, grad), work)
}
