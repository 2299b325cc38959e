//! FP8 weights as DeepSeek publishes them: E4M3 numbers, and beside each matrix one scale per block of 128 x 128.
//!
//! Knows bytes, numbers and shapes; no files.

use contraflow_kernels::tensor::{Format, ScaleRule, Tensor, Tile};

/// Rows and columns that share a scale.
pub const BLOCK: usize = 128;

/// What the name of a matrix gets to name its scales.
pub const SCALES: &str = "_scale_inv";

/// Whole blocks of a matrix: some rows, from a multiple of [`BLOCK`] on, and their scales.
pub struct Blocks {
    /// One E4M3 code a value, row-major.
    pub codes: Vec<u8>,
    /// As [`scales_shape`] says.
    pub scales: Vec<f32>,
}

/// Shape of the scales of a matrix; `None` if it is no matrix.
pub fn scales_shape(shape: &[usize]) -> Option<[usize; 2]> {
    let [rows, cols] = *shape else { return None };
    Some([rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)])
}

/// The blocks of finite values: a scale is the largest magnitude of its block divided by 448, and 1 where that is zero.
///
/// **Shapes**: `values` `[rows, cols]`; what lies beyond the edges counts as zero.
/// **Source**: report section 3.3.2.
pub fn quantize(values: Vec<f32>, cols: usize) -> Blocks {
    let len = values.len();
    let format = Format::E4M3(Tile::Block, ScaleRule::default());
    let tensor = Tensor::from_vec(&[len / cols, cols], values).to(format);
    let mut parts = tensor.parts();
    let mut part = || parts.next().unwrap_or_default();
    let codes = part()[..len].to_vec();
    let scales = part().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    Blocks { codes, scales }
}

/// The numbers of a matrix: each code's, times the scale of its block.
///
/// **Shapes**: `codes` `[rows, cols]`, `scales` as [`scales_shape`] says.
/// **Source**: the published `weight_scale_inv` is what to multiply by (DeepSeek-V3's `weight_dequant`).
pub fn dequantize(Blocks { codes, scales }: &Blocks, cols: usize) -> Vec<f32> {
    let numbers: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
    let mut values = Vec::with_capacity(codes.len());
    for (row, codes) in codes.chunks_exact(cols).enumerate() {
        let scales = &scales[row / BLOCK * cols.div_ceil(BLOCK)..];
        for (codes, scale) in codes.chunks(BLOCK).zip(scales) {
            values.extend(codes.iter().map(|&code| numbers[usize::from(code)] * scale));
        }
    }
    values
}

/// The number of an E4M3 code: four bits of exponent with bias 7, three of mantissa, no infinity, all ones is NaN.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (is_nan(code), exponent) {
        (true, _) => f32::NAN,
        (_, 0) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if code < 128 { magnitude } else { -magnitude }
}

/// Whether a code stands for no number.
pub fn is_nan(code: u8) -> bool {
    code & 127 == 127
}

/// Whether a scale can be one.
pub fn is_scale(value: f32) -> bool {
    value.is_finite() && value > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_numbers_of_the_format() {
        let known =
            [(0, 0.0), (1, 1.0 / 512.0), (7, 7.0 / 512.0), (8, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0)];
        for (code, number) in known {
            assert_eq!((e4m3(code), e4m3(code + 128)), (number, -number), "{code}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!((0..=u8::MAX).filter(|&code| is_nan(code)).collect::<Vec<_>>(), [0x7f, 0xff]);
    }

    #[test]
    fn every_block_has_its_own_scale_and_the_last_ones_may_be_cut() {
        assert_eq!(scales_shape(&[130, 257]), Some([2, 3]));
        assert_eq!(scales_shape(&[130]), None);
        let scales = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let values = dequantize(&Blocks { codes: vec![0x38; 130 * 257], scales }, 257);
        for (at, &value) in values.iter().enumerate() {
            let (row, col) = (at / 257, at % 257);
            assert_eq!(value as usize, 1 + row / 128 * 3 + col / 128, "{row} {col}");
        }
        assert_eq!(values.len(), 130 * 257);
    }
}
