//! The SwiGLU network beside the routed experts: a dense layer's FFN, or the shared experts. Adds the residual.
//!
//! T tokens, D hidden, F inner width.

use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{linear, swiglu};

use super::params::Params;
use super::weight_work::WeightWork;
use super::{Architecture, FfnWeights};

/// What the backward pass needs; the input is kept by the attention before it, or computed again from what that keeps.
pub struct SavedFfn(SavedSwiglu);

/// What is kept of a SwiGLU.
pub struct SavedSwiglu {
    /// In the format in which it is kept. **Shapes**: `[T, 2F]`.
    pub gate_up: Tensor,
    /// The output, unless it is computed again. **Shapes**: `[T, F]`.
    inner: Option<Tensor>,
}

impl SavedSwiglu {
    /// SwiGLU for `down`, and what is kept of it: its input as the recipe says (report section 3.3.3).
    ///
    /// **Shapes**: `gate_up` `[T, 2F]`, `routing` `[T]`, output `[T, F]`.
    pub fn forward(
        arch: &Architecture,
        gate_up: Tensor,
        routing: Option<&Tensor>,
        down: &Tensor,
    ) -> (Tensor, SavedSwiglu) {
        let inner = swiglu::forward(&gate_up, routing);
        let kept = gate_up.to(arch.precision.swiglu_input);
        let of_kept = || match kept.format() == gate_up.format() {
            true => linear::input(&inner, down),
            false => linear::input(&swiglu::forward(&kept, routing), down),
        };
        let of_kept = (!arch.recompute.swiglu).then(of_kept);
        (inner, SavedSwiglu { gate_up: kept, inner: of_kept })
    }

    /// The output that belongs to the input that was kept, as `down` reads it: kept or made again.
    ///
    /// **Shapes**: `routing` `[T]`, output `[T, F]`.
    pub fn inner(&mut self, routing: Option<&Tensor>, down: &Tensor) -> Tensor {
        let again = || linear::input(&swiglu::forward(&self.gate_up, routing), down);
        self.inner.take().unwrap_or_else(again)
    }
}

/// `residual + down(silu(gate(h)) * up(h))`.
///
/// **Shapes**: `normed` and `residual` `[T, D]`, output `[T, D]`.
pub fn forward(
    arch: &Architecture,
    weights: &FfnWeights,
    params: &Params,
    normed: &Tensor,
    residual: &Tensor,
) -> (Tensor, SavedFfn) {
    let gate_up = linear::forward(normed, params.weight(weights.gate_up));
    let down = params.weight(weights.down);
    let (inner, saved) = SavedSwiglu::forward(arch, gate_up, None, down);
    (linear::forward_add(&inner, down, residual), SavedFfn(saved))
}

/// Gradient with respect to `normed`; the residual's is `dy` itself.
///
/// **Shapes**: `dy` and `normed`, the input, `[T, D]`, output `[T, D]`.
pub fn backward_input(
    weights: &FfnWeights,
    params: &Params,
    dy: Tensor,
    normed: &Tensor,
    SavedFfn(mut saved): SavedFfn,
) -> (Tensor, WeightWork) {
    let inner = saved.inner(None, params.weight(weights.down));
    let d_inner = linear::backward_input(&dy, params.weight(weights.down));
    let (d_gate_up, _) = swiglu::backward(&d_inner, &saved.gate_up, None);
    let d_normed = linear::backward_input(&d_gate_up, params.weight(weights.gate_up));
    let mut work = WeightWork::default();
    work.linear(params, weights.down, dy, &inner);
    work.linear(params, weights.gate_up, d_gate_up, normed);
    (d_normed, work)
}
