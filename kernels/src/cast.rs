//! Tensors in another format: rounded, quantised by tiles, and back.
//!
//! Quantising looks at nothing but the tile: no history (report section 3.3.2). A tile that holds a value which is not finite
//! comes back without any that is. Knows no operation.

pub(crate) mod codes;

use std::ops::Range;

use self::codes::{
    E4M3_AS_BF16, E4M3_MAX, E5M6_AS_BF16, E5M6_MAX, bf16_of, bf16_value, e4m3_of, e5m6_bytes, e5m6_of,
    e5m6_pair,
};
use crate::{
    format::TILE,
    par::{self, MIN_PARALLEL},
    tensor::{Format, ScaleRule, Tensor, Tile},
};

/// The largest value below which [`ScaleRule::floor`] does not look.
const FLOOR: f32 = 1e-4;
/// Rows that are transposed together: as many values as a cache line holds.
const LINE: usize = 16;

impl ScaleRule {
    /// The scale of a tile whose largest value has this magnitude, where codes go up to `max`.
    #[inline(always)]
    fn scale(self, largest: f32, max: f32) -> f32 {
        // Not `f32::max`: that would hide what is not a number.
        let largest = if self.floor && largest < FLOOR { FLOOR } else { largest };
        let scale = largest / max;
        // Zero, or so near to it that there is no such scale.
        if scale == 0.0 {
            1.0
        } else if self.power_of_two {
            at_least(scale)
        } else {
            scale
        }
    }
}

/// The smallest power of two that is not below a scale; a normal number, so that products with it are exact.
#[inline(always)]
fn at_least(scale: f32) -> f32 {
    let bits = scale.to_bits();
    let exponent = (bits >> 23) + u32::from(bits & 0x7f_ffff != 0);
    if scale.is_finite() { f32::from_bits(exponent.max(1) << 23) } else { scale }
}

/// The largest magnitude of some values; not finite if one of them is not.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    // Magnitudes are ordered as their bits are, and what is not finite lies above all.
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff)))
}

impl Tensor {
    /// The same values in another format, as near as it comes to them. Shares the memory if it is the same format.
    ///
    /// **Errors**: panics between integers and other formats.
    pub fn to(&self, format: Format) -> Tensor {
        match (self.format(), format) {
            (own, other) if own == other => self.clone(),
            (Format::F32, Format::BF16) => self.rounded(),
            (Format::F32, Format::E4M3(Tile::Row, rule)) => self.in_e4m3_rows(format, rule),
            (Format::F32, Format::E4M3(Tile::Block, rule)) => self.in_e4m3_blocks(format, rule),
            (Format::F32, Format::E5M6) => self.in_e5m6(),
            (Format::BF16 | Format::E4M3(..) | Format::E5M6, Format::F32) => self.widened(),
            (Format::BF16 | Format::E4M3(..) | Format::E5M6, _) if format != Format::U32 => {
                self.widened().to(format)
            }
            (own, other) => panic!("expected formats of real numbers, got {own:?} and {other:?}"),
        }
    }

    /// The same values in the format of another tensor.
    pub(crate) fn like(self, other: &Tensor) -> Tensor {
        if self.format() == other.format() { self } else { self.to(other.format()) }
    }

    fn rounded(&self) -> Tensor {
        let mut out = Tensor::for_overwrite_in(Format::BF16, self.shape());
        let source = self.f32();
        par::for_each_chunk(out.typed_mut::<u16>(), 1, MIN_PARALLEL, |range, out| {
            let source = &source[range];
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || out.iter_mut().zip(source).for_each(|(out, value)| *out = bf16_of(*value)),
            );
        });
        out
    }

    fn in_e4m3_rows(&self, format: Format, rule: ScaleRule) -> Tensor {
        let mut out = Tensor::for_overwrite_in(format, self.shape());
        self.write_tiles(&mut out, self.cols(), |values, codes| {
            let scale = rule.scale(largest(values), E4M3_MAX);
            codes.iter_mut().zip(values).for_each(|(code, value)| *code = e4m3_of(value / scale));
            scale
        });
        out
    }

    fn in_e5m6(&self) -> Tensor {
        assert!(self.cols().is_multiple_of(2), "expected an even number of columns, got {}", self.cols());
        let mut out = Tensor::for_overwrite_in(Format::E5M6, self.shape());
        let rule = ScaleRule { power_of_two: true, ..ScaleRule::default() };
        self.write_tiles(&mut out, self.cols() / 2 * 3, |values, codes| {
            let scale = rule.scale(largest(values), E5M6_MAX);
            let pairs = values.as_chunks::<2>().0;
            for (bytes, pair) in codes.as_chunks_mut::<3>().0.iter_mut().zip(pairs) {
                *bytes = e5m6_bytes(pair.map(|value| e5m6_of(value / scale)));
            }
            scale
        });
        out
    }

    /// Hands each run of up to 128 columns and the bytes of its codes to `work`, which returns its scale.
    fn write_tiles(
        &self,
        out: &mut Tensor,
        row_bytes: usize,
        work: impl Fn(&[f32], &mut [u8]) -> f32 + Copy + Send + Sync,
    ) {
        let (cols, source) = (self.cols(), self.f32());
        let (tile_bytes, num_tiles) = (out.format().value_bytes(TILE), cols.div_ceil(TILE));
        let ranges = par::partition(self.rows(), MIN_PARALLEL / cols.max(1));
        let (codes, scales) = out.codes_and_scales_mut();
        let parts =
            par::split(codes, row_bytes, &ranges).into_iter().zip(par::split(scales, num_tiles, &ranges));
        par::for_each(ranges.into_iter().zip(parts).collect(), |(rows, (codes, scales))| {
            let values = &source[rows.start * cols..rows.end * cols];
            let tiles = codes.chunks_mut(row_bytes.max(1)).flat_map(|row| row.chunks_mut(tile_bytes));
            let values = values.chunks(cols.max(1)).flat_map(|row| row.chunks(TILE));
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((values, codes), scale) in values.zip(tiles).zip(scales) {
                        *scale = work(values, codes);
                    }
                },
            );
        });
    }

    fn in_e4m3_blocks(&self, format: Format, rule: ScaleRule) -> Tensor {
        let mut out = Tensor::for_overwrite_in(format, self.shape());
        let (cols, source) = (self.cols(), self.f32());
        let height = self.shape().iter().rev().nth(1).copied().unwrap_or(1);
        let strips = strips(self.rows(), height);
        let (codes, scales) = out.codes_and_scales_mut();
        let codes = par::split(codes, cols, &strips);
        let tasks = strips.into_iter().zip(codes).zip(scales.chunks_mut(cols.div_ceil(TILE).max(1)));
        par::for_each(tasks.collect(), |((rows, codes), scales)| {
            let values = &source[rows.start * cols..rows.end * cols];
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || quantise_strip(values, codes, scales, cols, rule),
            );
        });
        out
    }

    /// The values in F32: the tensor itself if it is that already.
    pub(crate) fn widened(&self) -> Tensor {
        if self.format() == Format::F32 {
            return self.clone();
        }
        let mut out = Tensor::for_overwrite(self.shape());
        let cols = self.cols();
        par::for_each_chunk(out.f32_mut(), cols, MIN_PARALLEL / cols.max(1), |rows, out| {
            for (row, out) in rows.zip(out.chunks_mut(cols.max(1))) {
                self.widen_row(row, out);
            }
        });
        out
    }

    /// Some of the rows, in F32, as columns.
    ///
    /// **Shapes**: result `[cols, R]` for R rows in the range.
    pub(crate) fn transposed_rows(&self, rows: Range<usize>) -> Tensor {
        let (height, width) = (rows.len(), self.cols());
        let mut part = Tensor::for_overwrite(&[height, width]);
        for (row, out) in rows.zip(part.f32_mut().chunks_mut(width.max(1))) {
            match self.format() {
                Format::F32 => out.copy_from_slice(self.row(row)),
                _ => self.widen_row(row, out),
            }
        }
        let mut out = Tensor::for_overwrite(&[width, height]);
        let source = part.f32();
        par::for_each_chunk(out.f32_mut(), height, MIN_PARALLEL / height.max(1), |columns, out| {
            // By squares that stay in the first-level cache.
            for first in (0..height).step_by(LINE) {
                for (column, out) in columns.clone().zip(out.chunks_mut(height.max(1))) {
                    let rows = first..height.min(first + LINE);
                    for (out, row) in out[rows.clone()].iter_mut().zip(rows) {
                        *out = source[row * width + column];
                    }
                }
            }
        });
        out
    }

    /// Writes one row in F32.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let mut bits = [0; TILE];
        for (tile, out) in out.chunks_mut(TILE).enumerate() {
            let bits = &mut bits[..out.len()];
            self.decode_row(row, tile * TILE, bits);
            let scale = self.scale_at(row, tile);
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || out.iter_mut().zip(&*bits).for_each(|(out, &bits)| *out = bf16_value(bits) * scale),
            );
        }
    }

    /// What the values of a tile are to be multiplied by; 1 in a format without scales.
    #[inline]
    pub(crate) fn scale_at(&self, row: usize, tile: usize) -> f32 {
        let num_tiles = self.cols().div_ceil(TILE);
        match self.format() {
            Format::E4M3(Tile::Block, _) => {
                let height = self.shape().iter().rev().nth(1).copied().unwrap_or(1);
                let strip = row / height * height.div_ceil(TILE) + row % height / TILE;
                self.scales()[strip * num_tiles + tile]
            }
            Format::E4M3(Tile::Row, _) | Format::E5M6 => self.scales()[row * num_tiles + tile],
            Format::F32 | Format::U32 | Format::BF16 => 1.0,
        }
    }

    /// The codes of a row from a column on, as BF16 bits: exact in every narrow format, scales aside.
    pub(crate) fn decode_row(&self, row: usize, first: usize, out: &mut [u16]) {
        let start = row * self.cols() + first;
        match self.format() {
            Format::BF16 => {
                let bits: &[u16] = bytemuck::cast_slice(&self.codes()[2 * start..2 * (start + out.len())]);
                out.copy_from_slice(bits);
            }
            Format::E4M3(..) => {
                let values = &*E4M3_AS_BF16;
                let codes = &self.codes()[start..start + out.len()];
                out.iter_mut().zip(codes).for_each(|(out, &code)| *out = values[usize::from(code)]);
            }
            Format::E5M6 => {
                let values = &*E5M6_AS_BF16;
                let bytes = &self.codes()[start / 2 * 3..][..out.len() / 2 * 3];
                let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(bytes.as_chunks::<3>().0);
                pairs.for_each(|(out, &bytes)| *out = e5m6_pair(bytes).map(|code| values[usize::from(code)]));
            }
            Format::F32 | Format::U32 => panic!("expected a narrow format, got {:?}", self.format()),
        }
    }
}

/// The rows of each strip of blocks: up to 128 of one matrix.
fn strips(num_rows: usize, height: usize) -> Vec<Range<usize>> {
    let matrices = (0..num_rows).step_by(height.max(1));
    matrices
        .flat_map(|first| {
            let end = first + height;
            (first..end).step_by(TILE).map(move |start| start..end.min(start + TILE))
        })
        .collect()
}

#[inline(always)]
fn quantise_strip(values: &[f32], codes: &mut [u8], scales: &mut [f32], cols: usize, rule: ScaleRule) {
    scales.fill(0.0);
    for row in values.chunks_exact(cols) {
        for (most, values) in scales.iter_mut().zip(row.chunks(TILE)) {
            let (bits, found) = (most.to_bits(), largest(values).to_bits());
            *most = f32::from_bits(bits.max(found));
        }
    }
    scales.iter_mut().for_each(|scale| *scale = rule.scale(*scale, E4M3_MAX));
    for (values, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)) {
        let tiles = values.chunks(TILE).zip(codes.chunks_mut(TILE)).zip(&*scales);
        for ((values, codes), &scale) in tiles {
            codes.iter_mut().zip(values).for_each(|(code, value)| *code = e4m3_of(value / scale));
        }
    }
}

#[cfg(test)]
mod tests;
