//! The end of the last stage: final norm, head, cross-entropy (fused, no full logits kept). And the embedding, its mirror.
//!
//! The loss gradient with respect to head and hidden state is computed together with the loss, chunk by chunk of rows;
//! the backward pass has only the norm left. T tokens, D hidden, V vocabulary.

use contraflow_kernels::cross_entropy::{self, Loss, Targets};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::norm;
use contraflow_kernels::tensor::Tensor;

use super::params::{ParamId, Params};

/// What the backward pass needs.
pub struct SavedHead {
    x: Tensor,
    d_normed: Tensor,
}

/// A norm, the head and the loss behind it.
#[derive(Clone, Copy)]
pub struct LossHead {
    /// The norm before the head.
    pub norm: ParamId,
    /// The head.
    pub head: ParamId,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Loss with gradients: the head gets its gradient now. Also returns the normed hidden state, which MTP resumes from.
///
/// **Shapes**: `x` `[T, D]`, normed `[T, D]`.
pub fn forward(
    head: LossHead,
    params: &mut Params,
    x: Tensor,
    targets: &Targets,
) -> (Loss, Tensor, SavedHead) {
    let normed = norm::forward(&x, params.weight(head.norm), head.eps);
    let (weight, grad) = params.weight_and_grad(head.head);
    let (loss, d_normed) = cross_entropy::forward_backward(&normed, weight, targets, grad);
    (loss, normed, SavedHead { x, d_normed })
}

/// Loss without gradients.
///
/// **Shapes**: `x` `[T, D]`, normed `[T, D]`.
pub fn evaluate(head: LossHead, params: &Params, x: &Tensor, targets: &Targets) -> (Loss, Tensor) {
    let normed = norm::forward(x, params.weight(head.norm), head.eps);
    let loss = cross_entropy::forward(&normed, params.weight(head.head), targets);
    (loss, normed)
}

/// Gradient with respect to `x`. `d_normed_by_mtp` is what MTP adds to the gradient of the normed hidden state.
///
/// **Shapes**: output `[T, D]`.
pub fn backward(
    head: LossHead,
    params: &mut Params,
    saved: SavedHead,
    d_normed_by_mtp: Option<&Tensor>,
) -> Tensor {
    let SavedHead { x, mut d_normed } = saved;
    if let Some(extra) = d_normed_by_mtp {
        add_into(&mut d_normed, extra);
    }
    let (weight, grad) = params.weight_and_grad(head.norm);
    norm::backward(&d_normed, &x, weight, head.eps, grad)
}
