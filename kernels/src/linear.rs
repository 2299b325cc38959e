//! The linear layer without bias, `y = x w^T`, and both of its gradients.
//!
//! Weights are `[out, in]`, as in published checkpoints. It knows no parameter's name and no optimizer; gradients of
//! weights are added to, so that micro-batches sum up in place.
//!
//! Shape letters: T rows; `in` and `out` are the layer's widths.

use crate::{
    gemm::{Into, Mat, MatMut, gemm},
    tensor::Tensor,
};

/// `x w^T`.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, result `[T, out]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Tensor {
    let mut y = Tensor::for_overwrite(&[x.rows(), w.rows()]);
    forward_into(y.mat_mut(), Into::Overwrite, x.mat(), w.mat());
    y
}

/// `residual + x w^T`.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, `residual` and result `[T, out]`.
pub fn forward_add(x: &Tensor, w: &Tensor, residual: &Tensor) -> Tensor {
    let mut y = residual.clone();
    forward_into(y.mat_mut(), Into::Accumulate, x.mat(), w.mat());
    y
}

/// [`forward`] between views, for a range of columns of something wider.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, `y` `[T, out]`.
pub fn forward_into(y: MatMut, into: Into, x: Mat, w: Mat) {
    gemm(y, into, 1.0, x, w.t());
}

/// The gradient of `x`: `dy w`.
///
/// **Shapes**: `dy` `[T, out]`, `w` `[out, in]`, result `[T, in]`.
pub fn backward_input(dy: &Tensor, w: &Tensor) -> Tensor {
    let mut dx = Tensor::for_overwrite(&[dy.rows(), w.cols()]);
    backward_input_into(dx.mat_mut(), Into::Overwrite, dy.mat(), w.mat());
    dx
}

/// [`backward_input`] between views, for a range of columns of something wider.
///
/// **Shapes**: `dy` `[T, out]`, `w` `[out, in]`, `dx` `[T, in]`.
pub fn backward_input_into(dx: MatMut, into: Into, dy: Mat, w: Mat) {
    gemm(dx, into, 1.0, dy, w);
}

/// Adds the gradient of `w` to `dw`: `dy^T x`.
///
/// **Shapes**: `dy` `[T, out]`, `x` `[T, in]`, `dw` `[out, in]`.
pub fn backward_weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    backward_weight_into(dw.mat_mut(), Into::Accumulate, dy.mat(), x.mat());
}

/// [`backward_weight`] between views, for a range of columns of something wider.
///
/// **Shapes**: `dy` `[T, out]`, `x` `[T, in]`, `dw` `[out, in]`.
pub fn backward_weight_into(dw: MatMut, into: Into, dy: Mat, x: Mat) {
    gemm(dw, into, 1.0, dy.t(), x);
}
