//! The routed experts a rank owns: grouped GEMMs over the rows it received.
//!
//! The routing weight scales SwiGLU's output before the down projection; that is what lets a token travel once to a rank
//! and come back as one sum. N received rows, R (row, expert) pairs, D hidden, F expert width.

use contraflow_kernels::permute::{self, Permutation};
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{grouped, swiglu};

use super::ffn::SavedSwiglu;
use super::params::Params;
use super::weight_work::WeightWork;
use super::{Architecture, FfnWeights};

/// What arrives at the experts of a rank: rows, and which experts each of them goes to.
pub struct Arrivals {
    /// **Shapes**: `[N, D]`.
    pub rows: Tensor,
    /// Row and local expert of each pair. **Shapes**: `[P, 2]` in U32.
    pub pairs: Tensor,
    /// Routing weight of each pair. **Shapes**: `[P]`.
    pub weights: Tensor,
}

/// What the backward pass needs. Rows are kept once, not once per expert.
pub struct SavedExperts {
    rows: Tensor,
    permutation: Permutation,
    /// Routing weights in permuted order. **Shapes**: `[R]`.
    weights: Tensor,
    /// Of R rows.
    swiglu: SavedSwiglu,
}

/// Sum over each row's experts of the weighted expert output.
///
/// **Shapes**: output `[N, D]`.
pub fn forward(
    arch: &Architecture,
    weights: &FfnWeights,
    experts: &Params,
    arrivals: Arrivals,
) -> (Tensor, SavedExperts) {
    let Arrivals { rows, pairs, weights: pair_weights } = arrivals;
    let num_experts = experts.weight(weights.gate_up).shape()[0];
    let permutation = permute::by_expert(&pairs, num_experts);
    let routing = permute::gather(&pair_weights, &permutation.slots);
    let gathered = permute::gather(&rows, &permutation.rows);
    let gate_up = grouped::forward(&gathered, &permutation.offsets, experts.weight(weights.gate_up));
    drop(gathered);
    let down = experts.weight(weights.down);
    let (inner, swiglu) = SavedSwiglu::forward(arch, gate_up, Some(&routing), down);
    let outputs = grouped::forward(&inner, &permutation.offsets, down);
    drop(inner);
    let mut sums = Tensor::zeros(&[rows.rows(), rows.cols()]);
    permute::scatter_add(&outputs, &permutation.rows, &mut sums);
    (sums, SavedExperts { rows, permutation, weights: routing, swiglu })
}

/// Gradients with respect to the rows and to the routing weight of each pair, in the order in which the pairs arrived.
///
/// **Shapes**: `dy` `[N, D]`, output `[N, D]` and `[P]`.
pub fn backward_input(
    weights: &FfnWeights,
    experts: &Params,
    dy: &Tensor,
    saved: SavedExperts,
) -> (Tensor, Tensor, WeightWork) {
    let SavedExperts { rows, permutation, weights: routing, swiglu: mut saved } = saved;
    let Permutation { offsets, rows: row_of, slots } = permutation;
    let d_outputs = permute::gather(dy, &row_of);
    let inner = saved.inner(Some(&routing), experts.weight(weights.down));
    let d_inner = grouped::backward_input(&d_outputs, &offsets, experts.weight(weights.down));
    let (d_gate_up, d_routing) = swiglu::backward(&d_inner, &saved.gate_up, Some(&routing));
    drop((d_inner, saved));
    let d_gathered = grouped::backward_input(&d_gate_up, &offsets, experts.weight(weights.gate_up));
    let mut d_rows = Tensor::zeros(&[rows.rows(), rows.cols()]);
    permute::scatter_add(&d_gathered, &row_of, &mut d_rows);
    let d_routing = d_routing.expect("SwiGLU was weighted");
    let mut d_weights = Tensor::for_overwrite(d_routing.shape());
    permute::scatter(&d_routing, &slots, &mut d_weights);
    let gathered = permute::gather(&rows, &row_of);
    let mut work = WeightWork::default();
    work.grouped(experts, weights.down, d_outputs, &inner, offsets.clone());
    work.grouped(experts, weights.gate_up, d_gate_up, &gathered, offsets);
    (d_rows, d_weights, work)
}
