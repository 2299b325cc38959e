//! FP8 weights as DeepSeek publishes them: E4M3 numbers, and beside each matrix one scale per block of 128 x 128.
//!
//! Knows bytes, numbers and shapes; no files.

/// Rows and columns that share a scale.
pub const BLOCK: usize = 128;

/// What the name of a matrix gets to name its scales.
pub const SCALES: &str = "_scale_inv";

/// Shape of the scales of a matrix; `None` if it is no matrix.
pub fn scales_shape(shape: &[usize]) -> Option<[usize; 2]> {
    let [rows, cols] = *shape else { return None };
    Some([rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)])
}

/// The numbers of a matrix: each code's, times the scale of its block.
///
/// **Shapes**: `codes` `[rows, cols]`, `scales` as [`scales_shape`] says.
/// **Source**: the published `weight_scale_inv` is what to multiply by (DeepSeek-V3's `weight_dequant`).
pub fn dequantize(codes: &[u8], cols: usize, scales: &[f32]) -> Vec<f32> {
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
    let magnitude = match (code & 127, exponent) {
        (127, _) => f32::NAN,
        (_, 0) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if code < 128 { magnitude } else { -magnitude }
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
    }

    #[test]
    fn every_block_has_its_own_scale_and_the_last_ones_may_be_cut() {
        assert_eq!(scales_shape(&[130, 257]), Some([2, 3]));
        assert_eq!(scales_shape(&[130]), None);
        let values = dequantize(&[0x38; 130 * 257], 257, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for (at, &value) in values.iter().enumerate() {
            let (row, col) = (at / 257, at % 257);
            assert_eq!(value as usize, 1 + row / 128 * 3 + col / 128, "{row} {col}");
        }
        assert_eq!(values.len(), 130 * 257);
    }
}
