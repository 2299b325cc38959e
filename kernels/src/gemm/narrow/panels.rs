//! Factors as the micro-kernel reads them, and the loop over its tiles.
//!
//! Columns of the output come in panels in which the pairs of 48 of them lie side by side, so that a register is one load. Of rows of
//! the output one pair at a time is spread over a register: they are read where they lie if pairs lie together, and packed where the
//! sum runs across them. Knows no instruction.

use std::ops::Range;

use super::{
    Along, Factor,
    avx512::{self, COLS, LANES, Left, ROWS, ROWS_AT_ONCE, Right, TILE_PAIRS},
};
use crate::{
    format::TILE,
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor},
    view::{MatMut, Output},
};

/// Two BF16 values that follow one another along the sum, of every lane.
enum Pairs<'a> {
    Borrowed(&'a [u32]),
    Packed(Tensor),
}

impl Pairs<'_> {
    fn as_slice(&self) -> &[u32] {
        match self {
            Pairs::Borrowed(pairs) => pairs,
            Pairs::Packed(tensor) => tensor.u32(),
        }
    }
}

/// The factor whose lanes are rows of the output.
pub(super) struct Rows<'a> {
    num_lanes: usize,
    num_pairs: usize,
    /// **Shapes**: `[lanes, pairs]`, or `[panels, pairs, ROWS]` if the sum runs along rows.
    pairs: Pairs<'a>,
    along: Along,
    /// **Shapes**: `[panels, tiles, ROWS]`.
    scales: Option<Tensor>,
}

impl<'a> Rows<'a> {
    pub(super) fn of(factor: &Factor<'a>) -> Rows<'a> {
        let (num_lanes, len) = factor.dims();
        let num_pairs = len.div_ceil(2);
        let pairs = match (factor.along, factor.bits()) {
            (Along::Rows, _) => Pairs::Packed(interleaved::<ROWS>(factor)),
            (Along::Columns, Some(bits)) if len.is_multiple_of(2) => {
                Pairs::Borrowed(bytemuck::cast_slice(bits))
            }
            (Along::Columns, _) => Pairs::Packed(decoded(factor, num_pairs)),
        };
        let scales = factor.has_scales().then(|| scales(factor, ROWS));
        Rows { num_lanes, num_pairs, pairs, along: factor.along, scales }
    }

    fn panel(&self, panel: usize) -> Left<'_> {
        let pairs = &self.pairs.as_slice()[panel * ROWS * self.num_pairs..];
        let (row_step, pair_step) = match self.along {
            Along::Columns => (self.num_pairs, 1),
            Along::Rows => (1, ROWS),
        };
        Left { pairs, row_step, pair_step, scales: panel_scales(self.scales.as_ref(), panel) }
    }
}

/// The factor whose lanes are columns of the output, packed.
pub(super) struct Columns {
    num_lanes: usize,
    num_pairs: usize,
    /// **Shapes**: `[panels, pairs, COLS]`.
    pairs: Tensor,
    /// **Shapes**: `[panels, tiles, COLS]`.
    scales: Option<Tensor>,
}

impl Columns {
    pub(super) fn pack(factor: &Factor) -> Columns {
        let (num_lanes, len) = factor.dims();
        let pairs = match factor.along {
            Along::Columns => transposed(factor),
            Along::Rows => interleaved::<COLS>(factor),
        };
        let scales = factor.has_scales().then(|| scales(factor, COLS));
        Columns { num_lanes, num_pairs: len.div_ceil(2), pairs, scales }
    }

    fn panel(&self, panel: usize) -> Right<'_> {
        let len = self.num_pairs * COLS;
        let pairs = self.pairs.u32()[panel * len..(panel + 1) * len].as_chunks().0;
        Right { pairs, scales: panel_scales(self.scales.as_ref(), panel) }
    }
}

/// The scale of each lane and tile; zero where a panel is wider than what is left.
fn scales(factor: &Factor, width: usize) -> Tensor {
    let (num_lanes, len) = factor.dims();
    let (num_panels, num_tiles) = (num_lanes.div_ceil(width), len.div_ceil(TILE));
    let mut scales = Tensor::zeros(&[num_panels, num_tiles, width]);
    for (row, scales) in scales.f32_mut().chunks_exact_mut(width).enumerate() {
        let (panel, tile) = (row / num_tiles, row % num_tiles);
        for (lane, scale) in (panel * width..num_lanes).zip(scales) {
            *scale = factor.scale(lane, tile);
        }
    }
    scales
}

fn panel_scales<const WIDTH: usize>(scales: Option<&Tensor>, panel: usize) -> &[[f32; WIDTH]] {
    let Some(scales) = scales else { return &[] };
    let num_tiles = scales.shape()[1];
    &scales.f32().as_chunks().0[panel * num_tiles..(panel + 1) * num_tiles]
}

/// Rows in BF16, the last one of an odd number of values beside a zero.
///
/// **Shapes**: result `[lanes, pairs]`.
fn decoded(factor: &Factor, num_pairs: usize) -> Tensor {
    let (num_lanes, len) = factor.dims();
    let mut pairs = Tensor::zeros_in(Format::U32, &[num_lanes, num_pairs]);
    par::for_each_chunk(pairs.u32_mut(), num_pairs, MIN_PARALLEL / num_pairs.max(1), |lanes, out| {
        for (lane, out) in lanes.zip(out.chunks_exact_mut(num_pairs.max(1))) {
            let bits: &mut [u16] = bytemuck::cast_slice_mut(out);
            factor.tensor.decode_row(factor.rows.start + lane, 0, &mut bits[..len]);
        }
    });
    pairs
}

/// Panels of a factor along whose rows the sum runs. Tile by tile, so that what is written to from all rows stays in the nearest
/// cache.
///
/// **Shapes**: result `[panels, pairs, COLS]`.
fn transposed(factor: &Factor) -> Tensor {
    let (num_lanes, len) = factor.dims();
    in_panels(num_lanes, len, COLS, |panels, out| {
        let mut codes: [Vec<u16>; LANES] = Default::default();
        for (panel, out) in panels.zip(out.chunks_exact_mut((len.div_ceil(2) * COLS).max(1))) {
            for (first, out) in (0..len).step_by(TILE).zip(out.chunks_mut(TILE_PAIRS * COLS)) {
                let values = first..len.min(first + TILE);
                for group in (0..COLS).step_by(LANES) {
                    let mut rows: [&[u16]; LANES] = [&[]; LANES];
                    let places = rows.iter_mut().zip(&mut codes).zip(panel * COLS + group..num_lanes);
                    places.for_each(|((row, codes), lane)| *row = factor.row(lane, &values, codes));
                    avx512::transpose(&rows, COLS * len, group, out.as_chunks_mut().0);
                }
            }
        }
    })
}

/// Panels of a factor along whose columns lanes lie: two rows of the tensor are interleaved. Some rows for all panels at once, so
/// that what is read stays in the nearest cache.
///
/// **Shapes**: result `[panels, pairs, WIDTH]`.
fn interleaved<const WIDTH: usize>(factor: &Factor) -> Tensor {
    let (num_lanes, len) = factor.dims();
    let panel_len = len.div_ceil(2) * WIDTH;
    in_panels(num_lanes, len, WIDTH, |panels, out| {
        let lanes = panels.start * WIDTH..num_lanes.min(panels.end * WIDTH);
        let mut codes: [Vec<u16>; ROWS_AT_ONCE] = Default::default();
        for first in (0..len).step_by(ROWS_AT_ONCE) {
            let mut rows: [&[u16]; ROWS_AT_ONCE] = [&[]; ROWS_AT_ONCE];
            let places = rows.iter_mut().zip(&mut codes).zip(first..len);
            places.for_each(|((row, codes), index)| *row = factor.row(index, &lanes, codes));
            avx512::interleave::<WIDTH>(
                &rows,
                ROWS_AT_ONCE * num_lanes,
                panel_len,
                &mut out[first / 2 * WIDTH..],
            );
        }
    })
}

/// Memory for panels, filled on the pool it is called from.
fn in_panels(
    num_lanes: usize,
    len: usize,
    width: usize,
    fill: impl Fn(Range<usize>, &mut [u32]) + Send + Sync,
) -> Tensor {
    let (num_panels, num_pairs) = (num_lanes.div_ceil(width), len.div_ceil(2));
    let mut pairs = Tensor::for_overwrite_in(Format::U32, &[num_panels, num_pairs, width]);
    let panel_len = num_pairs * width;
    par::for_each_chunk(pairs.u32_mut(), panel_len, MIN_PARALLEL / panel_len.max(1), fill);
    pairs
}

/// Multiplies, on all threads of the pool it is called from.
pub(super) fn multiply(out: MatMut, output: Output, a: &Rows, b: &Columns) {
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
                avx512::tile(num_rows, &a.panel(panel_a), &b.panel(panel_b), &mut sums);
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
