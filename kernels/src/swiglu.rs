//! SwiGLU, `silu(gate) * up`, with each row's routing weight multiplied in, and its gradients.
//!
//! Between the two linear layers of every feed-forward part: dense, shared expert (no weights) and routed experts.
//! Weighting here, not after the last layer, gives the same product and spares a pass. It knows no expert.
//!
//! Shape letters: R rows, F hidden width.

use std::ops::Range;

use crate::{
    linear::of_products,
    math,
    par::{self, MIN_PARALLEL},
    tensor::Tensor,
};

/// `silu(gate) * up * weight`, in BF16 unless gate and up are F32.
///
/// **Shapes**: `gate_up` `[R, 2F]`, gate then up; `weights` `[R]`, 1 if none; result `[R, F]`.
pub fn forward(gate_up: &Tensor, weights: Option<&Tensor>) -> Tensor {
    let weights = weights.map(Tensor::f32);
    let hidden = hidden(gate_up, weights);
    let (format, gate_up) = (of_products(gate_up), gate_up.widened());
    let mut act = Tensor::for_overwrite(&[gate_up.rows(), hidden]);
    par::for_each_chunk(act.f32_mut(), hidden, MIN_PARALLEL / hidden, |rows, act| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (row, act) in rows.zip(act.chunks_exact_mut(hidden)) {
                    let weight = weights.map_or(1.0, |weights| weights[row]);
                    forward_row(act, gate_up.row(row).split_at(hidden), weight);
                }
            },
        );
    });
    act.to(format)
}

/// The gradients of `gate_up`, in BF16 unless that is F32, and of the weights, if there are any.
///
/// **Shapes**: `d_act` `[R, F]`, `gate_up` `[R, 2F]`, `weights` `[R]`; result `([R, 2F], [R])`.
pub fn backward(d_act: &Tensor, gate_up: &Tensor, weights: Option<&Tensor>) -> (Tensor, Option<Tensor>) {
    let weights = weights.map(Tensor::f32);
    let hidden = hidden(gate_up, weights);
    let (format, d_act, gate_up) = (of_products(gate_up), d_act.widened(), gate_up.widened());
    assert_eq!(d_act.shape(), [gate_up.rows(), hidden], "expected one gradient per pair of gate and up");
    let mut d_gate_up = Tensor::for_overwrite(gate_up.shape());
    let mut d_weights = Tensor::for_overwrite(&[gate_up.rows()]);

    let ranges = par::partition(gate_up.rows(), MIN_PARALLEL / hidden);
    let gradients = par::split(d_gate_up.f32_mut(), 2 * hidden, &ranges);
    let outputs = gradients.into_iter().zip(par::split(d_weights.f32_mut(), 1, &ranges));
    let tasks = ranges.iter().cloned().zip(outputs).collect();
    par::for_each(tasks, |(rows, (gradients, d_weights)): (Range<usize>, (&mut [f32], &mut [f32]))| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let outputs = gradients.chunks_exact_mut(2 * hidden).zip(d_weights);
                for (row, (gradient, d_weight)) in rows.zip(outputs) {
                    let gradient = gradient.split_at_mut(hidden);
                    let gate_up = gate_up.row(row).split_at(hidden);
                    *d_weight =
                        backward_row(gradient, d_act.row(row), gate_up, weights.map(|weights| weights[row]));
                }
            },
        );
    });
    (d_gate_up.to(format), weights.map(|_| d_weights))
}

/// F, once the shapes are known to fit.
fn hidden(gate_up: &Tensor, weights: Option<&[f32]>) -> usize {
    assert!(gate_up.cols().is_multiple_of(2), "expected gate and up side by side, got {gate_up:?}");
    if let Some(weights) = weights {
        assert_eq!(weights.len(), gate_up.rows(), "expected one weight per row");
    }
    gate_up.cols() / 2
}

#[inline(always)]
fn forward_row(act: &mut [f32], (gate, up): (&[f32], &[f32]), weight: f32) {
    for ((act, &gate), &up) in act.iter_mut().zip(gate).zip(up) {
        *act = math::silu(gate) * up * weight;
    }
}

/// Writes the gradients of gate and up, and returns that of the weight.
#[inline(always)]
fn backward_row(
    (d_gate, d_up): (&mut [f32], &mut [f32]),
    d_act: &[f32],
    (gate, up): (&[f32], &[f32]),
    weight: Option<f32>,
) -> f32 {
    let outputs = d_gate.iter_mut().zip(d_up.iter_mut());
    for ((((d_gate, d_up), &d_act), &gate), &up) in outputs.zip(d_act).zip(gate).zip(up) {
        let sigmoid = math::sigmoid(gate);
        let silu = gate * sigmoid;
        *d_gate = d_act * up * (sigmoid + silu * (1.0 - sigmoid));
        *d_up = d_act * silu;
    }
    let Some(weight) = weight else { return 0.0 };
    // Before its weight comes in, the gradient of up holds d_act silu(gate): what the weight's own gradient needs.
    let d_weight = math::dot_lanes(d_up, up);
    // One loop each: together they would not be vectorised.
    for gradient in [d_gate, d_up] {
        for value in gradient {
            *value *= weight;
        }
    }
    d_weight
}
