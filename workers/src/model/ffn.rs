//! The SwiGLU network beside the routed experts: a dense layer's FFN, or the shared experts. Adds the residual.
//!
//! T tokens, D hidden, F inner width.

use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{linear, swiglu};

use super::FfnWeights;
use super::params::Params;
use super::weight_work::WeightWork;

/// What the backward pass needs. The SwiGLU output is recomputed (report section 3.3.3).
pub struct SavedFfn {
    /// **Shapes**: `[T, D]`, shared with the gate.
    normed: Tensor,
    /// **Shapes**: `[T, 2F]`.
    gate_up: Tensor,
}

/// `residual + down(silu(gate(h)) * up(h))`.
///
/// **Shapes**: `normed` and `residual` `[T, D]`, output `[T, D]`.
pub fn forward(
    weights: &FfnWeights,
    params: &Params,
    normed: Tensor,
    residual: &Tensor,
) -> (Tensor, SavedFfn) {
    let gate_up = linear::forward(&normed, params.weight(weights.gate_up));
    let inner = swiglu::forward(&gate_up, None);
    let output = linear::forward_add(&inner, params.weight(weights.down), residual);
    (output, SavedFfn { normed, gate_up })
}

/// Gradient with respect to `normed`; the residual's is `dy` itself.
///
/// **Shapes**: `dy` `[T, D]`, output `[T, D]`.
pub fn backward_input(
    weights: &FfnWeights,
    params: &Params,
    dy: Tensor,
    saved: SavedFfn,
) -> (Tensor, WeightWork) {
    let SavedFfn { normed, gate_up } = saved;
    let inner = swiglu::forward(&gate_up, None);
    let d_inner = linear::backward_input(&dy, params.weight(weights.down));
    let (d_gate_up, _) = swiglu::backward(&d_inner, &gate_up, None);
    let d_normed = linear::backward_input(&d_gate_up, params.weight(weights.gate_up));
    let mut work = WeightWork::default();
    work.linear(params, weights.down, dy, &inner);
    work.linear(params, weights.gate_up, d_gate_up, &normed);
    (d_normed, work)
}
