//! The micro-kernel on AVX512-BF16: up to 8 rows by 48 columns of sums, held in registers along K; and what brings pairs into its
//! order.
//!
//! Knows panels alone.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_loadu_si128, _mm_maskz_loadu_epi16, _mm_prefetch,
    _mm256_cvtepu16_epi32, _mm256_or_si256, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_si256,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi16,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;

use crate::format::TILE;

/// Rows of the output that the micro-kernel computes at once, and columns: 24 registers of sums.
pub(super) const ROWS: usize = 8;
pub(super) const COLS: usize = 48;
/// Pairs along K that have one scale.
pub(super) const TILE_PAIRS: usize = TILE / 2;
/// Values in a register.
pub(super) const LANES: usize = 16;
/// Registers for a row of sums.
const REGISTERS: usize = COLS / LANES;

/// Whether this machine has the instructions.
pub(super) fn is_supported() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// A panel of rows of the output: pairs of values, somehow apart, and scales if there are any.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) pairs: &'a [u32],
    /// From a row to the next, and from a pair to the next one along K: 1 or [`ROWS`].
    pub(super) row_step: usize,
    pub(super) pair_step: usize,
    pub(super) scales: &'a [[f32; ROWS]],
}

/// A panel of columns of the output: pairs that follow one another along K, and scales if there are any.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) pairs: &'a [[u32; COLS]],
    pub(super) scales: &'a [[f32; COLS]],
}

/// `sums = a b^T` for the first rows of a panel.
///
/// **Errors**: panics on a machine without the instruction, or if the panels do not fit.
pub(super) fn tile(num_rows: usize, a: &Left, b: &Right, sums: &mut [f32; ROWS * COLS]) {
    assert!(is_supported(), "expected a machine with AVX512-BF16");
    assert!((1..=ROWS).contains(&num_rows), "expected 1 to {ROWS} rows, got {num_rows}");
    let num_scales = if b.scales.is_empty() { 0 } else { b.pairs.len().div_ceil(TILE_PAIRS) };
    assert_eq!(
        (a.scales.len(), b.scales.len()),
        (num_scales, num_scales),
        "expected a scale for each tile, or none"
    );
    assert!(matches!(a.pair_step, 1 | ROWS), "expected pairs 1 or {ROWS} apart, got {}", a.pair_step);
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

#[target_feature(enable = "avx512f,avx512bf16")]
fn panels<const M: usize>(a: &Left, b: &Right, sums: &mut [f32; ROWS * COLS]) {
    if b.scales.is_empty() {
        return store(&inner_of::<M>(a, 0, b.pairs), sums);
    }
    sums[..M * COLS].fill(0.0);
    let tiles = b.pairs.chunks(TILE_PAIRS).enumerate().zip(a.scales.iter().zip(b.scales));
    for ((tile, b), (scales_a, scales_b)) in tiles {
        let found = inner_of::<M>(a, tile * TILE_PAIRS, b);
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

/// Sums of M rows over some pairs, from this one on.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn inner_of<const M: usize>(a: &Left, first: usize, b: &[[u32; COLS]]) -> [[__m512; REGISTERS]; M] {
    let pairs = &a.pairs[first * a.pair_step..];
    if a.pair_step == 1 {
        inner::<M, 1>(pairs, a.row_step, b)
    } else {
        inner::<M, ROWS>(pairs, a.row_step, b)
    }
}

/// Sums of M rows over as many pairs as `b` has, all in registers.
///
/// **Errors**: panics if `a` ends before the last pair of the last row.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn inner<const M: usize, const PAIR_STEP: usize>(
    a: &[u32],
    row_step: usize,
    b: &[[u32; COLS]],
) -> [[__m512; REGISTERS]; M] {
    let last = (M - 1) * row_step + b.len().saturating_sub(1) * PAIR_STEP;
    assert!(b.is_empty() || last < a.len(), "expected {} pairs of each of {M} rows", b.len());
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; M];
    for (pair, b) in b.iter().enumerate() {
        let (columns, _) = b.as_chunks::<LANES>();
        let columns: [__m512bh; REGISTERS] = [load(&columns[0]), load(&columns[1]), load(&columns[2])];
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the last pair of the last row lies in the slice, as just asserted, and none of them behind it.
            let value = unsafe { *a.get_unchecked(row * row_step + pair * PAIR_STEP) };
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

/// Puts rows of BF16 into 16 lanes of a panel, from lane `first` on; what is not there becomes 0. The rows whose turn is next lie
/// `ahead` values behind these.
///
/// **Errors**: panics on a machine without the instructions, or if the panel has fewer pairs than the rows.
pub(super) fn transpose(rows: &[&[u16]; LANES], ahead: usize, first: usize, out: &mut [[u32; COLS]]) {
    assert!(
        is_supported() && first + LANES <= COLS,
        "expected AVX512-BF16 and lanes of a panel, got {first}"
    );
    assert!(
        rows.iter().all(|row| row.len() <= 2 * out.len()),
        "expected rows of at most {} pairs",
        out.len()
    );
    for (block, out) in out.chunks_mut(LANES).enumerate() {
        for row in rows {
            // SAFETY: a prefetch reads nothing.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(2 * LANES * block + ahead).cast())
            }
        }
        // SAFETY: the features were just detected.
        unsafe { transpose_block(rows, 2 * LANES * block, first, out) }
    }
}

/// Up to 16 pairs of each row, from this value on.
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose_block(rows: &[&[u16]; LANES], from: usize, first: usize, out: &mut [[u32; COLS]]) {
    let zero = _mm512_setzero_si512();
    let (mut values, mut pairs) = ([zero; LANES], [zero; LANES]);
    for (value, row) in values.iter_mut().zip(rows) {
        *value = masked(row.get(from..).unwrap_or_default());
    }
    for i in 0..LANES / 2 {
        let [low, high] = [values[2 * i], values[2 * i + 1]];
        (pairs[2 * i], pairs[2 * i + 1]) =
            (_mm512_unpacklo_epi32(low, high), _mm512_unpackhi_epi32(low, high));
    }
    // Then in each quarter of register 4 i + j: pair j of the quarter, of rows 4 i to 4 i + 3.
    for i in 0..LANES / 4 {
        let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
        (values[4 * i], values[4 * i + 1]) = (_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
        (values[4 * i + 2], values[4 * i + 3]) = (_mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d));
    }
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    for j in 0..4 {
        let [a, b, c, d] = [values[j], values[4 + j], values[8 + j], values[12 + j]];
        let (even, odd) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b));
        let (later_even, later_odd) = (_mm512_shuffle_i32x4::<EVEN>(c, d), _mm512_shuffle_i32x4::<ODD>(c, d));
        pairs[j] = _mm512_shuffle_i32x4::<EVEN>(even, later_even);
        pairs[8 + j] = _mm512_shuffle_i32x4::<ODD>(even, later_even);
        pairs[4 + j] = _mm512_shuffle_i32x4::<EVEN>(odd, later_odd);
        pairs[12 + j] = _mm512_shuffle_i32x4::<ODD>(odd, later_odd);
    }
    for (pairs, out) in pairs.iter().zip(out) {
        let out = &mut out[first..first + LANES];
        // SAFETY: the slice holds a register.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *pairs) }
    }
}

/// Up to 32 values; zeros behind the last one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn masked(values: &[u16]) -> __m512i {
    if values.is_empty() {
        // As in `widened`.
        return _mm512_setzero_si512();
    }
    let mask = u32::MAX >> (2 * LANES).saturating_sub(values.len());
    // SAFETY: only values in the slice are read.
    unsafe { _mm512_maskz_loadu_epi16(mask, values.as_ptr().cast()) }
}

/// Rows of which pairs are made at once.
pub(super) const ROWS_AT_ONCE: usize = 16;

/// Makes pairs of rows of BF16 that follow one another, for panels of `WIDTH` lanes beside one another; what is not there becomes 0.
/// `out` begins with the first pair of the first panel; to the next panel it is `panel_len` pairs. The rows whose turn is
/// next lie `ahead` values behind these.
///
/// **Errors**: panics on a machine without the instructions.
pub(super) fn interleave<const WIDTH: usize>(
    rows: &[&[u16]; ROWS_AT_ONCE],
    ahead: usize,
    panel_len: usize,
    out: &mut [u32],
) {
    assert!(is_supported(), "expected a machine with AVX512-BF16");
    const { assert!(WIDTH.is_multiple_of(ROWS)) };
    // SAFETY: the features were just detected.
    unsafe { interleave_rows::<WIDTH>(rows, ahead, panel_len, out) }
}

/// Lanes whose values fill whole cache lines: each is read once, whatever lies in the same place of the cache.
const LANES_AT_ONCE: usize = 96;
/// Values in a cache line.
const LINE: usize = 32;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleave_rows<const WIDTH: usize>(
    rows: &[&[u16]; ROWS_AT_ONCE],
    ahead: usize,
    panel_len: usize,
    out: &mut [u32],
) {
    let num_pairs = rows.iter().filter(|row| !row.is_empty()).count().div_ceil(2);
    let num_lanes = out.len().div_ceil(panel_len) * WIDTH;
    for lanes in (0..num_lanes).step_by(LANES_AT_ONCE) {
        for (pair, rows) in rows.as_chunks::<2>().0[..num_pairs].iter().enumerate() {
            for row in rows {
                // Steps from row to row are no stream that the machine would read ahead by itself.
                for lane in (lanes..num_lanes.min(lanes + LANES_AT_ONCE)).step_by(LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(lane + ahead).cast());
                }
            }
            for lane in (lanes..num_lanes.min(lanes + LANES_AT_ONCE)).step_by(ROWS) {
                let (low, high) = (widened(rows[0], lane), widened(rows[1], lane));
                let pairs = _mm256_or_si256(low, _mm256_slli_epi32::<16>(high));
                let out = &mut out[lane / WIDTH * panel_len + pair * WIDTH + lane % WIDTH..][..ROWS];
                // SAFETY: the slice holds eight pairs.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), pairs) }
            }
        }
    }
}

/// Eight values from `first` on; zeros behind the last one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widened(row: &[u16], first: usize) -> __m256i {
    let row = row.get(first..).unwrap_or_default();
    if row.is_empty() {
        // A load that is masked whole and leads nowhere is right, and hundreds of times as slow.
        return _mm256_setzero_si256();
    }
    // SAFETY: only values in the slice are read.
    _mm256_cvtepu16_epi32(unsafe {
        if row.len() >= ROWS {
            _mm_loadu_si128(row.as_ptr().cast())
        } else {
            _mm_maskz_loadu_epi16((1 << row.len()) - 1, row.as_ptr().cast())
        }
    })
}
