//! The same functions in f64, for tables and single values: exact to well below an f32's rounding, not fast.
//!
//! They stand in for the standard library's, whose results depend on the host's libm.

use std::f64::consts::{FRAC_2_PI, LOG2_E, SQRT_2};

/// The upper 32 bits of ln 2 and the rest.
const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// e to the `x`, for results in the normal range of f64; 0 below it and infinity above.
pub fn exp_f64(x: f64) -> f64 {
    if x < -708.0 {
        return 0.0;
    }
    if x > 709.0 {
        return f64::INFINITY;
    }
    let exponent = (x * LOG2_E).round_ties_even();
    let r = x - exponent * LN2_HIGH - exponent * LN2_LOW;
    // Taylor: |r| <= 0.347, so the first term left out is below 1e-17.
    let mantissa = (1..=13).rev().fold(1.0, |sum, order| 1.0 + sum * r / f64::from(order));
    mantissa * power_of_two(exponent as i64)
}

/// Natural logarithm of a positive value; minus infinity at 0, NaN below.
pub fn ln_f64(x: f64) -> f64 {
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == f64::INFINITY {
        return x;
    }
    if x < f64::MIN_POSITIVE {
        return ln_f64(x * power_of_two(64)) - 64.0 * (LN2_HIGH + LN2_LOW);
    }
    let exponent = (x.to_bits() >> 52) as i64 - 1023;
    let mantissa = f64::from_bits(x.to_bits() & ((1 << 52) - 1) | 1.0_f64.to_bits());
    let (mantissa, exponent) =
        if mantissa > SQRT_2 { (mantissa / 2.0, exponent + 1) } else { (mantissa, exponent) };
    // ln m = 2 artanh s with |s| <= 0.172: the first term left out is below 1e-19.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..=11).rev().fold(0.0, |sum, term| sum * (s * s) + 1.0 / f64::from(2 * term + 1));
    exponent as f64 * LN2_HIGH + (2.0 * s * series + exponent as f64 * LN2_LOW)
}

/// Sine and cosine of an angle below 2^27 in magnitude.
///
/// **Units**: radians.
pub fn sin_cos(x: f64) -> (f64, f64) {
    // pi/2 in parts of few bits, whose products with the number of quarters are exact; 3e-22 is left out.
    const HIGH: f64 = 1.570_796_251_296_997;
    const MIDDLE: f64 = 7.549_789_415_861_596e-8;
    const LOW: f64 = 5.390_302_529_957_765e-15;
    let quarter = (x * FRAC_2_PI).round_ties_even();
    let r = x - quarter * HIGH - quarter * MIDDLE - quarter * LOW;
    let square = r * r;
    // Taylor: |r| <= pi/4, so the first terms left out are below 1e-17.
    let series = |first: u32| {
        let orders = (0..9).rev().map(|term| first + 2 * term);
        orders.fold(1.0, |sum, order| 1.0 - sum * square / f64::from(order * (order + 1)))
    };
    let (sin, cos) = (r * series(2), series(1));
    match (quarter as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// 2 to the `exponent`, which lies in the normal range.
fn power_of_two(exponent: i64) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}
