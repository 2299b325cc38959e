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
    let (a_pairs, b_pairs) = (a.0.as_chunks().0, b.0.as_chunks().0);
    let a = (a_pairs, a.1.as_chunks().0);
    let b = (b_pairs, b.1.as_chunks().0);
    // SAFETY: the features were just detected.
    unsafe {
        match num_rows {
            1 => panels::<1>(a, b, sums),
            2 => panels::<2>(a, b, sums),
            3 => panels::<3>(a, b, sums),
            4 => panels::<4>(a, b, sums),
            5 => panels::<5>(a, b, sums),
            6 => panels::<6>(a, b, sums),
            7 => panels::<7>(a, b, sums),
            _ => panels::<ROWS>(a, b, sums),
        }
    }
}

/// Pairs that follow one another along K, each as many as the panel is wide, and as many scales for each tile.
type Chunks<'a, const N: usize> = (&'a [[u32; N]], &'a [[f32; N]]);

#[target_feature(enable = "avx512f,avx512bf16")]
fn panels<const M: usize>(a: Chunks<ROWS>, b: Chunks<COLS>, sums: &mut [f32; ROWS * COLS]) {
    if a.1.is_empty() {
        return store(&inner::<M>(a.0, b.0), sums);
    }
    sums[..M * COLS].fill(0.0);
    let tiles = a.0.chunks(TILE_PAIRS).zip(b.0.chunks(TILE_PAIRS)).zip(a.1.iter().zip(b.1));
    for ((a, b), (scales_a, scales_b)) in tiles {
        let found = inner::<M>(a, b);
        for ((found, scale), sums) in found.iter().zip(scales_a).zip(sums.as_chunks_mut::<COLS>().0) {
            promote(found, *scale, scales_b, sums);
        }
    }
}

/// Adds a row of a tile's sums, times its scale and those of the columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn promote(found: &[__m512; REGISTERS], scale: f32, scales: &[f32; COLS], sums: &mut [f32; COLS]) {
    let scale = _mm512_set1_ps(scale);
    let columns = scales.as_chunks::<LANES>().0.iter().zip(sums.as_chunks_mut::<LANES>().0);
    for (found, (scales, sums)) in found.iter().zip(columns) {
        // SAFETY: both chunks hold a register.
        unsafe {
            let scales = _mm512_mul_ps(scale, _mm512_loadu_ps(scales.as_ptr()));
            let sum = _mm512_fmadd_ps(*found, scales, _mm512_loadu_ps(sums.as_ptr()));
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
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

/// Sums of M rows over some pairs, all in registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn inner<const M: usize>(a: &[[u32; ROWS]], b: &[[u32; COLS]]) -> [[__m512; REGISTERS]; M] {
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; M];
    for (a, b) in a.iter().zip(b) {
        let (columns, _) = b.as_chunks::<LANES>();
        let columns: [__m512bh; REGISTERS] = [load(&columns[0]), load(&columns[1]), load(&columns[2])];
        for (value, sums) in a.iter().zip(&mut sums) {
            let value = as_pairs(_mm512_set1_epi32(value.cast_signed()));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, value, column);
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(pairs: &[u32; LANES]) -> __m512bh {
    // SAFETY: the array holds one register.
    as_pairs(unsafe { _mm512_loadu_si512(pairs.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_pairs(register: __m512i) -> __m512bh {
    // SAFETY: a register of BF16 pairs has the layout of one of integers.
    unsafe { transmute::<__m512i, __m512bh>(register) }
}
