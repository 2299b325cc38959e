//! The micro-kernel on AVX512-BF16: up to 8 rows by 48 columns of sums, held in registers along K.
//!
//! Knows packed panels alone.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::{COLS, ROWS, TILE_PAIRS};

/// Values in a register.
const LANES: usize = 16;
/// Registers for a row of sums.
const REGISTERS: usize = COLS / LANES;

/// Whether this machine has the instruction.
pub(super) fn is_supported() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// A panel: pairs of values, and scales if there are any.
type Panel<'a> = (&'a [u32], &'a [f32]);

/// `sums = a b^T` for the first rows of a panel.
///
/// **Errors**: panics on a machine without the instruction, or if the panels do not fit.
pub(super) fn tile(num_rows: usize, a: Panel, b: Panel, sums: &mut [f32; ROWS * COLS]) {
    let num_pairs = a.0.len() / ROWS;
    assert!(is_supported(), "expected a machine with AVX512-BF16");
    assert_eq!((num_pairs * ROWS, num_pairs * COLS), (a.0.len(), b.0.len()), "expected panels of one length");
    let num_tiles = num_pairs.div_ceil(TILE_PAIRS);
    let num_scales = if a.1.is_empty() { (0, 0) } else { (num_tiles * ROWS, num_tiles * COLS) };
    assert_eq!((a.1.len(), b.1.len()), num_scales, "expected a scale for each tile of both panels, or none");
    // SAFETY: the features were just detected, and the lengths are those that the kernels read and write.
    unsafe {
        match num_rows {
            1 => panels::<1>(num_pairs, a, b, sums),
            2 => panels::<2>(num_pairs, a, b, sums),
            3 => panels::<3>(num_pairs, a, b, sums),
            4 => panels::<4>(num_pairs, a, b, sums),
            5 => panels::<5>(num_pairs, a, b, sums),
            6 => panels::<6>(num_pairs, a, b, sums),
            7 => panels::<7>(num_pairs, a, b, sums),
            _ => panels::<ROWS>(num_pairs, a, b, sums),
        }
    }
}

/// # Safety
///
/// The machine has the features; both panels hold `num_pairs` pairs of their widths, and scales for each tile or none.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn panels<const M: usize>(num_pairs: usize, a: Panel, b: Panel, sums: &mut [f32; ROWS * COLS]) {
    if a.1.is_empty() {
        // SAFETY: all pairs lie in the panels.
        let found = unsafe { inner::<M>(a.0.as_ptr(), b.0.as_ptr(), num_pairs) };
        return store(&found, sums);
    }
    sums[..M * COLS].fill(0.0);
    for (tile, first) in (0..num_pairs).step_by(TILE_PAIRS).enumerate() {
        let len = TILE_PAIRS.min(num_pairs - first);
        // SAFETY: the pairs from `first` on lie in the panels, and there are scales for each tile.
        unsafe {
            let found = inner::<M>(a.0.as_ptr().add(first * ROWS), b.0.as_ptr().add(first * COLS), len);
            for (row, found) in found.iter().enumerate() {
                let scale = _mm512_set1_ps(a.1[tile * ROWS + row]);
                for (register, found) in found.iter().enumerate() {
                    let at = sums.as_mut_ptr().add(row * COLS + register * LANES);
                    let scales_b = _mm512_loadu_ps(b.1.as_ptr().add(tile * COLS + register * LANES));
                    let scales = _mm512_mul_ps(scale, scales_b);
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(*found, scales, _mm512_loadu_ps(at)));
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn store<const M: usize>(found: &[[__m512; REGISTERS]; M], sums: &mut [f32; ROWS * COLS]) {
    for (row, sums) in found.iter().zip(sums.chunks_exact_mut(COLS)) {
        for (register, sums) in row.iter().zip(sums.chunks_exact_mut(LANES)) {
            // SAFETY: the chunk holds one register.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *register) }
        }
    }
}

/// A register of pairs.
///
/// # Safety
///
/// The machine has the feature; 16 pairs can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pairs(at: *const u32) -> __m512bh {
    // SAFETY: as the caller promises; a register of BF16 pairs has the layout of one of integers.
    unsafe { transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
}

/// # Safety
///
/// The machine has the features; `num_pairs` times 8 and 48 values can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn inner<const M: usize>(
    mut a: *const u32,
    mut b: *const u32,
    num_pairs: usize,
) -> [[__m512; REGISTERS]; M] {
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; M];
    for _ in 0..num_pairs {
        // SAFETY: as the caller promises; a register of BF16 pairs has the layout of one of integers.
        unsafe {
            let columns: [__m512bh; REGISTERS] = [pairs(b), pairs(b.add(LANES)), pairs(b.add(2 * LANES))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_epi32(a.add(row).read().cast_signed());
                let value = transmute::<__m512i, __m512bh>(value);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, value, column);
                }
            }
            a = a.add(ROWS);
            b = b.add(COLS);
        }
    }
    sums
}
