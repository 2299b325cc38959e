//! Products of narrow formats: BF16, and E4M3 whose partial sums are promoted (report section 3.3.2).
//!
//! Both factors are packed into panels of BF16 pairs, which hold every E4M3 code exactly. Sums are F32; where factors have
//! scales, the sum of each 128 values along K is multiplied by both and added to the result's. On machines without the
//! instruction for pairs of BF16 the factors are widened, scales multiplied in, and go through the F32 kernels: the same
//! products, added up in another order. A study adds up as tensor cores do without promotion. Knows no layers and no gradients.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx512;
mod tensor_core;

use std::ops::Range;

use super::gemm;
use crate::{
    format::TILE,
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor, Tile},
    view::{MatMut, Output},
};

/// Rows of the output that a micro-kernel computes at once, and columns: 24 registers of sums.
const ROWS: usize = 8;
const COLS: usize = 48;
/// Pairs along K that have one scale.
const TILE_PAIRS: usize = TILE / 2;

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
pub(crate) fn product(out: MatMut, output: Output, a: &Factor, b: &Factor) {
    if a.tensor.format().study().tensor_core_sums {
        return tensor_core::product(out, output, a, b);
    }
    #[cfg(target_arch = "x86_64")]
    if avx512::is_supported() {
        return multiply(out, output, &Panels::pack(a, ROWS), &Panels::pack(b, COLS));
    }
    widened_product(out, output, a, b);
}

fn widened_product(out: MatMut, output: Output, a: &Factor, b: &Factor) {
    let (wide_a, wide_b) = (a.widened(), b.widened());
    let a = if a.along == Along::Columns { wide_a.mat() } else { wide_a.mat().t() };
    let b = if b.along == Along::Columns { wide_b.mat().t() } else { wide_b.mat() };
    gemm(out, output, 1.0, a, b);
}

/// A factor, packed: panels of as many rows or columns of the output as the micro-kernel takes.
pub(crate) struct Panels {
    num_lanes: usize,
    num_pairs: usize,
    width: usize,
    /// Two BF16 values that follow one another along the sum. **Shapes**: `[panels, pairs, width]` in U32.
    pairs: Tensor,
    /// **Shapes**: `[panels, tiles, width]`.
    scales: Option<Tensor>,
}

impl Panels {
    pub(crate) fn pack(factor: &Factor, width: usize) -> Panels {
        let (num_lanes, len) = factor.dims();
        let (num_panels, num_pairs) = (num_lanes.div_ceil(width), len.div_ceil(2));
        let mut pairs = Tensor::for_overwrite_in(Format::U32, &[num_panels, num_pairs, width]);
        let panel_len = num_pairs * width;
        par::for_each_chunk(pairs.u32_mut(), panel_len, MIN_PARALLEL / panel_len.max(1), |panels, out| {
            for (panel, out) in panels.zip(out.chunks_mut(panel_len.max(1))) {
                let lanes = panel * width..num_lanes.min((panel + 1) * width);
                match factor.along {
                    Along::Columns => pack_rows(factor, lanes, out, width),
                    Along::Rows => pack_columns(factor, lanes, out, width),
                }
            }
        });
        let scales = factor.has_scales().then(|| scales(factor, width, num_panels, len.div_ceil(TILE)));
        Panels { num_lanes, num_pairs, width, pairs, scales }
    }

    fn panel(&self, panel: usize) -> (&[u32], &[f32]) {
        let len = self.num_pairs * self.width;
        let pairs = &self.pairs.u32()[panel * len..(panel + 1) * len];
        let len = self.num_pairs.div_ceil(TILE_PAIRS) * self.width;
        let scales =
            self.scales.as_ref().map_or(&[][..], |scales| &scales.f32()[panel * len..(panel + 1) * len]);
        (pairs, scales)
    }
}

/// The scale of each lane and tile; zero where a panel is wider than what is left.
fn scales(factor: &Factor, width: usize, num_panels: usize, num_tiles: usize) -> Tensor {
    let num_lanes = factor.dims().0;
    let mut scales = Tensor::zeros(&[num_panels, num_tiles, width]);
    for (row, scales) in scales.f32_mut().chunks_exact_mut(width).enumerate() {
        let (panel, tile) = (row / num_tiles, row % num_tiles);
        for (lane, scale) in (panel * width..num_lanes).zip(scales) {
            *scale = factor.scale(lane, tile);
        }
    }
    scales
}

/// A panel of rows: their values follow one another in memory as they do along the sum.
fn pack_rows(factor: &Factor, lanes: Range<usize>, out: &mut [u32], width: usize) {
    let mut bits = [0_u16; TILE];
    if lanes.len() < width {
        out.fill(0);
    }
    let len = factor.tensor.cols();
    for (lane, row) in lanes.enumerate() {
        for first in (0..len).step_by(TILE) {
            let bits = &mut bits[..TILE.min(len - first)];
            factor.tensor.decode_row(factor.rows.start + row, first, bits);
            let (whole, rest) = bits.as_chunks::<2>();
            let slots = out[first / 2 * width..].iter_mut().skip(lane).step_by(width);
            let pairs = whole.iter().copied().chain(rest.first().map(|&last| [last, 0]));
            slots.zip(pairs).for_each(|(slot, [low, high])| *slot = u32::from(low) | u32::from(high) << 16);
        }
    }
}

/// A panel of columns: two rows of the tensor are interleaved.
fn pack_columns(factor: &Factor, lanes: Range<usize>, out: &mut [u32], width: usize) {
    let (mut low, mut high) = ([0_u16; COLS], [0_u16; COLS]);
    let (low, high) = (&mut low[..lanes.len()], &mut high[..lanes.len()]);
    for (pair, out) in out.chunks_exact_mut(width).enumerate() {
        let row = factor.rows.start + 2 * pair;
        factor.tensor.decode_row(row, lanes.start, low);
        if row + 1 < factor.rows.end {
            factor.tensor.decode_row(row + 1, lanes.start, high);
        } else {
            high.fill(0);
        }
        out[lanes.len()..].fill(0);
        for ((out, &low), &high) in out.iter_mut().zip(&*low).zip(&*high) {
            *out = u32::from(low) | u32::from(high) << 16;
        }
    }
}

/// Multiplies packed factors, on all threads of the pool it is called from.
#[cfg(target_arch = "x86_64")]
pub(crate) fn multiply(out: MatMut, output: Output, a: &Panels, b: &Panels) {
    assert!(
        (out.num_rows(), out.num_cols()) == (a.num_lanes, b.num_lanes) && a.num_pairs == b.num_pairs,
        "expected factors of a [{}, {}] matrix, got {} and {} rows of {} and {} pairs",
        out.num_rows(),
        out.num_cols(),
        a.num_lanes,
        b.num_lanes,
        a.num_pairs,
        b.num_pairs
    );
    assert_eq!(a.scales.is_some(), b.scales.is_some(), "expected scales on both factors or on none");
    let width = b.num_lanes;
    let panels: Vec<Range<usize>> = par::partition(a.num_lanes.div_ceil(ROWS), 1);
    let rows = |panels: &Range<usize>| panels.start * ROWS..a.num_lanes.min(panels.end * ROWS);
    let parts = out.split_rows(&panels.iter().map(rows).collect::<Vec<_>>());
    par::for_each(panels.into_iter().zip(parts).collect(), |(panels, mut out): (Range<usize>, MatMut)| {
        let mut sums = [0.0; ROWS * COLS];
        for panel_b in 0..width.div_ceil(COLS) {
            let cols = panel_b * COLS..width.min((panel_b + 1) * COLS);
            for panel_a in panels.clone() {
                let first = (panel_a - panels.start) * ROWS;
                let num_rows = ROWS.min(out.num_rows() - first);
                avx512::tile(num_rows, a.panel(panel_a), b.panel(panel_b), &mut sums);
                for row in 0..num_rows {
                    let sums = &sums[row * COLS..][..cols.len()];
                    let out = &mut out.row_mut(first + row)[cols.clone()];
                    match output {
                        Output::Overwrite => out.copy_from_slice(sums),
                        Output::Accumulate => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests;
