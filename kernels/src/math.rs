//! Elementary functions and whole-slice arithmetic in f32.
//!
//! The functions are our own, so that results depend neither on the host's libm nor on the width of its registers:
//! only IEEE additions, multiplications and divisions in a fixed order. Bodies are branch-free and forced inline;
//! `pulp` compiles them once per instruction set and picks at run time. Reductions keep a fixed number of partial
//! sums and fold them in a fixed order.

mod double;

use std::array;

pub use double::{exp_f64, ln_f64, sin_cos};

use crate::{par, tensor::Tensor};

/// Partial sums of a reduction: two AVX-512 registers, to hide the latency of an addition.
const LANES: usize = 32;
/// Values that are summed in f32 before f64 takes over.
const BLOCK: usize = 4096;
/// Fewer values than this are not worth a second thread.
pub(crate) const MIN_PARALLEL: usize = 1 << 14;

/// e to the `x`, within 2 ulp; 0 where the result would be subnormal, infinity on overflow, NaN kept.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer and leaves that integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// The upper bits of ln 2, few enough that any exponent times them is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.336_54;
    const LARGEST: f32 = 88.722_83;

    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let exponent = shifted - ROUND;
    let r = x - exponent * LN2_HIGH - exponent * LN2_LOW;
    // e^r = 1 + r + r^2 q(r) with q interpolated at Chebyshev nodes of |r| <= ln(2)/2: 0.18 ulp.
    let q = 1.392_618_4e-3_f32;
    let q = q * r + 8.363_179e-3;
    let q = q * r + 4.166_655_6e-2;
    let q = q * r + 0.166_665_76;
    let q = q * r + 0.5;
    let mantissa = q * (r * r) + r + 1.0;
    // The integer's upper bits and the constant fall out of the shift.
    let result = f32::from_bits(mantissa.to_bits().wrapping_add(shifted.to_bits() << 23));
    let result = if x < SMALLEST { 0.0 } else { result };
    if x <= LARGEST { result } else { x + f32::INFINITY }
}

/// Natural logarithm, rounded from f64; minus infinity at 0, NaN below.
pub fn ln(x: f32) -> f32 {
    ln_f64(f64::from(x)) as f32
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Inner product.
///
/// **Errors**: panics if the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "expected two vectors of one length");
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || dot_lanes(a, b),
    )
}

/// Sum of all values.
pub fn sum(values: &[f32]) -> f64 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || values.chunks(BLOCK).map(|block| f64::from(sum_lanes(block))).sum(),
    )
}

/// Sum of all squares: of blocks first, then of those in their order, the same on any number of threads.
pub fn sum_squares(values: &[f32]) -> f64 {
    let mut sums = vec![0.0; values.len().div_ceil(BLOCK)];
    par::for_each_chunk(&mut sums, 1, MIN_PARALLEL.div_ceil(BLOCK), |range, sums| {
        let blocks = values.chunks(BLOCK).skip(range.start);
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || sums.iter_mut().zip(blocks).for_each(|(sum, block)| *sum = dot_lanes(block, block)),
        );
    });
    sums.into_iter().map(f64::from).sum()
}

/// `target += source`.
///
/// **Errors**: panics if the lengths differ.
pub fn add_into(target: &mut [f32], source: &[f32]) {
    assert_eq!(target.len(), source.len(), "expected two vectors of one length");
    par::for_each_chunk(target, 1, MIN_PARALLEL, |range, target| {
        let source = &source[range];
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || target.iter_mut().zip(source).for_each(|(target, source)| *target += source),
        );
    });
}

/// `values *= factor`.
pub fn scale(values: &mut [f32], factor: f32) {
    par::for_each_chunk(values, 1, MIN_PARALLEL, |_, values| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || values.iter_mut().for_each(|value| *value *= factor),
        );
    });
}

/// `a + b`.
///
/// **Errors**: panics if the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.shape(), b.shape(), "expected two tensors of one shape");
    let mut out = Tensor::for_overwrite(a.shape());
    let (a, b) = (a.f32(), b.f32());
    par::for_each_chunk(out.f32_mut(), 1, MIN_PARALLEL, |range, out| {
        let inputs = a[range.clone()].iter().zip(&b[range]);
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || out.iter_mut().zip(inputs).for_each(|(out, (a, b))| *out = a + b),
        );
    });
    out
}

/// [`dot`] for a body that is already compiled for the instruction set at hand.
#[inline(always)]
pub(crate) fn dot_lanes(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        sums = array::from_fn(|lane| sums[lane] + a[lane] * b[lane]);
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_tail).zip(b_tail) {
        *sum += a * b;
    }
    fold(sums)
}

/// [`sum`], in f32, for a body that is already compiled for the instruction set at hand.
#[inline(always)]
pub(crate) fn sum_lanes(values: &[f32]) -> f32 {
    let (chunks, tail) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        sums = array::from_fn(|lane| sums[lane] + chunk[lane]);
    }
    for (sum, value) in sums.iter_mut().zip(tail) {
        *sum += value;
    }
    fold(sums)
}

#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}
