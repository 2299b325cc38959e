//! The linear layer without bias, `y = x w^T`, and both of its gradients.
//!
//! Weights are `[out, in]`, as in published checkpoints. It knows no parameter's name and no optimizer; gradients of
//! weights are added to, so that micro-batches sum up in place.
//!
//! Shape letters: T rows; `in` and `out` are the layer's widths.

use std::ops::Range;

use crate::{
    gemm::{
        gemm,
        narrow::{Factor, product},
    },
    tensor::{Format, ScaleRule, Tensor, Tile},
    view::{MatMut, Output},
};

/// What a product with `w` reads of `x`, and what its gradient is computed from: in E4M3 if the weights are, else as wide as
/// they are. Returns `x` itself if it is that already.
///
/// **Shapes**: `x` and result `[T, in]`.
pub fn input(x: &Tensor, w: &Tensor) -> Tensor {
    match w.format() {
        Format::E4M3(_, rule) => match x.format() {
            Format::E4M3(Tile::Row, _) => x.in_study(rule.study),
            _ => x.to(Format::E4M3(Tile::Row, rule)),
        },
        format => x.to(format),
    }
}

/// What a product with `w` reads of the gradient `dy`: as [`input`], but for a study of scales by block.
///
/// **Shapes**: `dy` and result `[T, out]`.
pub(crate) fn gradient(dy: &Tensor, w: &Tensor) -> Tensor {
    match w.format() {
        Format::E4M3(_, rule) if rule.study.gradient_blocks => dy.to(Format::E4M3(Tile::Block, rule)),
        _ => input(dy, w),
    }
}

/// The format of a product: BF16 for all that is narrower.
pub(crate) fn of_products(w: &Tensor) -> Format {
    if w.format() == Format::F32 { Format::F32 } else { Format::BF16 }
}

/// `x w^T`, in BF16 unless the weights are F32.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, result `[T, out]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Tensor {
    let mut y = Tensor::for_overwrite(&[x.rows(), w.rows()]);
    add_product(y.mat_mut(), Output::Overwrite, x, w, 0..w.rows());
    y.to(of_products(w))
}

/// `residual + x w^T`, in the format of the residual.
///
/// **Shapes**: `x` `[T, in]`, `w` `[out, in]`, `residual` and result `[T, out]`.
pub fn forward_add(x: &Tensor, w: &Tensor, residual: &Tensor) -> Tensor {
    let mut y = residual.widened();
    add_product(y.mat_mut(), Output::Accumulate, x, w, 0..w.rows());
    y.like(residual)
}

/// `out = x w^T` over some rows of `w`, or `out += x w^T`.
pub(crate) fn add_product(out: MatMut, output: Output, x: &Tensor, w: &Tensor, rows: Range<usize>) {
    let x = input(x, w);
    match w.format() {
        Format::F32 => gemm(out, output, 1.0, x.mat(), w.mat().rows_range(rows).t()),
        _ => product(out, output, &Factor::rows(&x, 0..x.rows()), &Factor::rows(w, rows)),
    }
}

/// The gradient of `x`: `dy w`, in BF16 unless the weights are F32.
///
/// **Shapes**: `dy` `[T, out]`, `w` `[out, in]`, result `[T, in]`.
pub fn backward_input(dy: &Tensor, w: &Tensor) -> Tensor {
    let mut dx = Tensor::for_overwrite(&[dy.rows(), w.cols()]);
    let dy = gradient(dy, w);
    match w.format() {
        Format::F32 => gemm(dx.mat_mut(), Output::Overwrite, 1.0, dy.mat(), w.mat()),
        _ => product(
            dx.mat_mut(),
            Output::Overwrite,
            &Factor::rows(&dy, 0..dy.rows()),
            &Factor::columns(w, 0..w.rows()),
        ),
    }
    dx.to(of_products(w))
}

/// Adds the gradient of `w` to `dw`: `dy^T x`. If `x` is narrower than BF16, both are tiled anew along T (report section 3.3.2).
///
/// **Shapes**: `dy` `[T, out]`, `x` as [`input`] gave it `[T, in]`, `dw` `[out, in]` in F32.
pub fn backward_weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    add_weight_product(dw.mat_mut(), dy, x, 0..x.rows());
}

/// [`backward_weight`] over some of the tokens.
pub(crate) fn add_weight_product(dw: MatMut, dy: &Tensor, x: &Tensor, tokens: Range<usize>) {
    match (dy.format(), x.format()) {
        (Format::BF16, Format::BF16) => {
            let (dy, x) = (Factor::columns(dy, tokens.clone()), Factor::columns(x, tokens));
            product(dw, Output::Accumulate, &dy, &x);
        }
        (_, Format::E4M3(_, rule)) => tiled_along_tokens(dw, dy, x, tokens, rule),
        (_, Format::E5M6) => {
            let rule = ScaleRule { power_of_two: true, ..ScaleRule::default() };
            tiled_along_tokens(dw, dy, x, tokens, rule);
        }
        _ => {
            let (dy, x) = (dy.widened(), x.widened());
            let [dy, x] = [dy.mat(), x.mat()].map(|mat| mat.rows_range(tokens.clone()));
            gemm(dw, Output::Accumulate, 1.0, dy.t(), x);
        }
    }
}

fn tiled_along_tokens(dw: MatMut, dy: &Tensor, x: &Tensor, tokens: Range<usize>, rule: ScaleRule) {
    let of_gradient = if rule.study.gradient_blocks { Tile::Block } else { Tile::Row };
    let [dy, x] = [(dy, of_gradient), (x, Tile::Row)]
        .map(|(tensor, tile)| tensor.transposed_rows(tokens.clone()).to(Format::E4M3(tile, rule)));
    product(dw, Output::Accumulate, &Factor::rows(&dy, 0..dy.rows()), &Factor::rows(&x, 0..x.rows()));
}
