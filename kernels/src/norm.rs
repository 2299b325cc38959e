//! RMSNorm, `y = x / rms(x) * w`, over whole rows or over a range of their columns, and its gradients.
//!
//! The range serves MLA, whose latent lies beside the rotary key in one tensor. Nothing is kept between the passes:
//! the backward pass computes the root mean square again. It knows no layer.
//!
//! Shape letters: T rows, D columns that are normalised.

use std::ops::Range;

use crate::{
    elementwise::add_values,
    math,
    par::{self, MIN_PARALLEL},
    tensor::Tensor,
};

/// `x * rsqrt(mean(x^2) + eps) * w`, row by row.
///
/// **Shapes**: `x` and result `[T, D]`, `w` `[D]`.
pub fn forward(x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
    forward_cols(x, 0..x.cols(), w, eps)
}

/// [`forward`] over a range of the columns of `x`.
///
/// **Shapes**: `x` `[T, ..]`, `w` `[D]` for D columns in the range, result `[T, D]`.
pub fn forward_cols(x: &Tensor, cols: Range<usize>, w: &Tensor, eps: f32) -> Tensor {
    let width = cols.len();
    let (format, x, w) = (x.format(), x.widened(), w.widened());
    let (x, w) = (x.mat().columns(cols), weights(&w, width));
    let mut y = Tensor::for_overwrite(&[x.num_rows(), width]);
    par::for_each_chunk(y.f32_mut(), width, MIN_PARALLEL / width, |rows, y| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (row, y) in rows.zip(y.chunks_exact_mut(width)) {
                    forward_row(y, x.row(row), w, eps);
                }
            },
        );
    });
    y.to(format)
}

/// The gradient of `x` (returned) and of `w` (added to `dw`).
///
/// **Shapes**: `dy`, `x` and result `[T, D]`, `w` and `dw` `[D]`.
pub fn backward(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f32, dw: &mut Tensor) -> Tensor {
    let mut dx = Tensor::for_overwrite(x.shape());
    backward_cols(dy, x, 0..x.cols(), w, eps, dw, &mut dx);
    dx.like(x)
}

/// [`backward`] over a range of the columns of `x`; writes that range of `dx` and leaves its other columns alone.
///
/// **Shapes**: `dy` `[T, D]` for D columns in the range, `x` and `dx` `[T, ..]`, `w` and `dw` `[D]`.
pub fn backward_cols(
    dy: &Tensor,
    x: &Tensor,
    cols: Range<usize>,
    w: &Tensor,
    eps: f32,
    dw: &mut Tensor,
    dx: &mut Tensor,
) {
    let (stride, width) = (x.cols(), cols.len());
    assert_eq!(dx.shape(), x.shape(), "expected the gradient in the input's shape");
    assert_eq!(dy.shape(), [x.rows(), width], "expected an output gradient of the range's columns");
    assert_eq!(dw.len(), width, "expected one weight gradient per column");
    let (dy, x, w) = (dy.widened(), x.widened(), w.widened());
    let (x, w) = (x.mat().columns(cols.clone()), weights(&w, width));

    // Each part of the rows sums up a weight gradient of its own; they are added in the order of the parts.
    let ranges = par::partition(x.num_rows(), MIN_PARALLEL / width);
    let mut partial = Tensor::zeros(&[ranges.len(), width]);
    let outputs = par::split(dx.f32_mut(), stride, &ranges);
    let outputs = outputs.into_iter().zip(partial.f32_mut().chunks_exact_mut(width));
    let tasks = ranges.into_iter().zip(outputs).collect();
    par::for_each(tasks, |(rows, (dx, dw)): (Range<usize>, (&mut [f32], &mut [f32]))| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (row, dx) in rows.zip(dx.chunks_exact_mut(stride)) {
                    backward_row((&mut dx[cols.clone()], dw), dy.row(row), (x.row(row), w, eps));
                }
            },
        );
    });
    for part in 0..partial.rows() {
        add_values(dw.f32_mut(), partial.row(part));
    }
}

fn weights(w: &Tensor, width: usize) -> &[f32] {
    assert_eq!(w.len(), width, "expected one weight per normalised column");
    w.f32()
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (math::dot_lanes(x, x) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn forward_row(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * scale * w;
    }
}

/// With g = dy w and s = 1 / rms: dx = s g - x s^3 <g, x> / D, and dw += dy x s.
#[inline(always)]
fn backward_row((dx, dw): (&mut [f32], &mut [f32]), dy: &[f32], (x, w, eps): (&[f32], &[f32], f32)) {
    let scale = inverse_rms(x, eps);
    for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
        *dx = dy * w;
    }
    let along = scale * scale * scale * math::dot_lanes(dx, x) / x.len() as f32;
    for (((dx, dw), dy), x) in dx.iter_mut().zip(dw).zip(dy).zip(x) {
        *dx = scale * *dx - along * x;
        *dw += dy * (x * scale);
    }
}
