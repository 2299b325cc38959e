//! Products of narrow formats: BF16, and E4M3 whose partial sums are promoted (report section 3.3.2).
//!
//! Factors are panels of BF16 pairs, which hold every E4M3 code exactly. Sums are F32; where factors have
//! scales, the sum of each 128 values along K is multiplied by both and added to the result's. On machines without the
//! instruction for pairs of BF16 the factors are widened, scales multiplied in, and go through the F32 kernels: the same
//! products, added up in another order. A study adds up as tensor cores do without promotion. Knows no layers and no gradients.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx512;
mod one_row;
#[cfg(target_arch = "x86_64")]
mod panels;
mod tensor_core;

use std::ops::Range;

use super::gemm;
use crate::{
    format::TILE,
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor, Tile},
    view::{MatMut, Output},
};

/// One factor: some rows of a tensor in a narrow format.
#[derive(Clone)]
pub(crate) struct Factor<'a> {
    tensor: &'a Tensor,
    rows: Range<usize>,
    along: Along,
}

/// What the sum runs over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Along {
    Columns,
    Rows,
}

impl<'a> Factor<'a> {
    /// Each row of the tensor stands for a row, or column, of the output; sums run along its columns.
    pub(crate) fn rows(tensor: &'a Tensor, rows: Range<usize>) -> Factor<'a> {
        Factor { tensor, rows, along: Along::Columns }
    }

    /// Each column of the tensor stands for a row, or column, of the output; sums run along its rows.
    ///
    /// **Errors**: panics if the format has one scale a row: those could not be told apart from the products.
    pub(crate) fn columns(tensor: &'a Tensor, rows: Range<usize>) -> Factor<'a> {
        let is_fit = matches!(tensor.format(), Format::BF16 | Format::E4M3(Tile::Block, _));
        assert!(is_fit, "expected scales that do not change along the sum, got {tensor:?}");
        Factor { tensor, rows, along: Along::Rows }
    }

    fn has_scales(&self) -> bool {
        self.tensor.format() != Format::BF16
    }

    /// Rows or columns of the output that it stands for, and the length of the sums.
    fn dims(&self) -> (usize, usize) {
        match self.along {
            Along::Columns => (self.rows.len(), self.tensor.cols()),
            Along::Rows => (self.tensor.cols(), self.rows.len()),
        }
    }

    /// Its values, if there is one row of the output that they are all of, in BF16.
    fn one_row(&self) -> Option<Tensor> {
        (self.tensor.format() == Format::BF16 && self.along == Along::Columns && self.rows.len() == 1)
            .then(|| self.widened())
    }

    /// Its values as they lie, if they are BF16.
    fn bits(&self) -> Option<&'a [u16]> {
        let (width, codes) = (2 * self.tensor.cols(), self.tensor.codes());
        (self.tensor.format() == Format::BF16)
            .then(|| bytemuck::cast_slice(&codes[width * self.rows.start..width * self.rows.end]))
    }

    /// Some values of one of its rows in BF16: as they lie, or decoded into `codes`.
    #[cfg(target_arch = "x86_64")]
    fn row<'b>(&self, row: usize, values: &Range<usize>, codes: &'b mut Vec<u16>) -> &'b [u16]
    where
        'a: 'b,
    {
        if let Some(bits) = self.bits() {
            let first = row * self.tensor.cols();
            return &bits[first + values.start..first + values.end];
        }
        codes.resize(values.len(), 0);
        self.tensor.decode_row(self.rows.start + row, values.start, codes);
        codes
    }

    /// What the codes of a row, or column, of the output are multiplied by, in this tile along the sum.
    fn scale(&self, lane: usize, tile: usize) -> f32 {
        match self.along {
            Along::Columns => self.tensor.scale_at(self.rows.start + lane, tile),
            Along::Rows => self.tensor.scale_at(self.rows.start + tile * TILE, lane / TILE),
        }
    }

    /// In F32, scales multiplied in.
    fn widened(&self) -> Tensor {
        let mut out = Tensor::for_overwrite(&[self.rows.len(), self.tensor.cols()]);
        let width = self.tensor.cols();
        par::for_each_chunk(out.f32_mut(), width, MIN_PARALLEL / width.max(1), |rows, out| {
            for (row, out) in rows.zip(out.chunks_mut(width.max(1))) {
                self.tensor.widen_row(self.rows.start + row, out);
            }
        });
        out
    }
}

/// `out = a b^T`, or `out += a b^T`, with both factors as [`Factor`] lays them out.
///
/// **Shapes**: factors of M and N rows or columns and sums of one length, `out` `[M, N]`.
/// **Errors**: panics if the shapes do not fit.
pub(crate) fn product(mut out: MatMut, output: Output, a: &Factor, b: &Factor) {
    if a.tensor.format().study().tensor_core_sums {
        return tensor_core::product(out, output, a, b);
    }
    if let (Some(x), Some(w), Along::Columns) = (a.one_row(), b.bits(), b.along) {
        return one_row::product(out.row_mut(0), output, x.f32(), w);
    }
    #[cfg(target_arch = "x86_64")]
    if avx512::is_supported() {
        return panels::multiply(out, output, &panels::Rows::of(a), &panels::Columns::pack(b));
    }
    widened_product(out, output, a, b);
}

fn widened_product(out: MatMut, output: Output, a: &Factor, b: &Factor) {
    let (wide_a, wide_b) = (a.widened(), b.widened());
    let a = if a.along == Along::Columns { wide_a.mat() } else { wide_a.mat().t() };
    let b = if b.along == Along::Columns { wide_b.mat().t() } else { wide_b.mat() };
    gemm(out, output, 1.0, a, b);
}

#[cfg(test)]
mod tests;
