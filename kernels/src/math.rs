//! Elementary functions and reductions in f32.
//!
//! The functions are our own, so that results depend neither on the host's C library nor on the width of its registers:
//! only IEEE additions, multiplications and divisions in a fixed order; those in f64, for tables and single values, are the
//! crate libm's, for the same reason. Bodies are branch-free and forced inline;
//! `pulp` compiles them once per instruction set and picks at run time. Reductions keep a fixed number of partial
//! sums and fold them in a fixed order.

use std::array;

/// Partial sums of a reduction: two AVX-512 registers, to hide the latency of an addition.
const LANES: usize = 32;

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
    libm::log(f64::from(x)) as f32
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
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "expected two vectors of one length");
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || dot_lanes(a, b),
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::noise;

    #[test]
    fn inner_products_of_every_length_agree_with_f64() {
        for len in (0..130).chain([4095, 4096, 4097, 20_000]) {
            let (a, b) = (noise(len, 1), noise(len, 2));
            let products: Vec<f64> = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).collect();
            let magnitude: f64 = products.iter().map(|product| product.abs()).sum();
            // A lane adds up len / 32 products, then 5 folds.
            let bound = (5 + len.div_ceil(32)) as f64 * 2.0_f64.powi(-24) * magnitude;
            assert!((f64::from(dot(&a, &b)) - products.iter().sum::<f64>()).abs() <= bound, "dot of {len}");
        }
    }
}
