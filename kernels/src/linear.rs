//! The linear layer without bias, `y = x w^T`, and both of its gradients.
//!
//! Weights are `[out, in]`, as in published checkpoints. It knows no parameter's name and no optimizer; gradients of
//! weights are added to, so that micro-batches sum up in place.
//!
//! Shape letters: T rows; `in` and `out` are the layer's widths.

use crate::{gemm::gemm, tensor::Tensor, view::Output};

/// `x w^T`.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, result `[T, out]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Tensor {
    let mut y = Tensor::for_overwrite(&[x.rows(), w.rows()]);
    gemm(y.mat_mut(), Output::Overwrite, 1.0, x.mat(), w.mat().t());
    y
}

/// `residual + x w^T`.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, `residual` and result `[T, out]`.
pub fn forward_add(x: &Tensor, w: &Tensor, residual: &Tensor) -> Tensor {
    let mut y = residual.clone();
    gemm(y.mat_mut(), Output::Accumulate, 1.0, x.mat(), w.mat().t());
    y
}

/// The gradient of `x`: `dy w`.
///
/// **Shapes**: `dy` `[T, out]`, `w` `[out, in]`, result `[T, in]`.
pub fn backward_input(dy: &Tensor, w: &Tensor) -> Tensor {
    let mut dx = Tensor::for_overwrite(&[dy.rows(), w.cols()]);
    gemm(dx.mat_mut(), Output::Overwrite, 1.0, dy.mat(), w.mat());
    dx
}

/// Adds the gradient of `w` to `dw`: `dy^T x`.
///
/// **Shapes**: `dy` `[T, out]`, `x` `[T, in]`, `dw` `[out, in]`.
pub fn backward_weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    gemm(dw.mat_mut(), Output::Accumulate, 1.0, dy.mat().t(), x.mat());
}
