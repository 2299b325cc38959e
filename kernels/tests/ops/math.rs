//! Elementary functions against f64 over their range.

use contraflow_kernels::math;

/// Distance from the truth in units of the last place of the result.
fn ulps(found: f32, expected: f64) -> f64 {
    let exponent = expected.abs().log2().floor().max(-126.0) as i32;
    (f64::from(found) - expected).abs() / 2.0_f64.powi(exponent - 23)
}

/// Every `step`th float between two of one sign.
fn floats(from: f32, to: f32, step: usize) -> impl Iterator<Item = f32> {
    let (from, to) = (from.to_bits(), to.to_bits());
    (from.min(to)..=from.max(to)).step_by(step).map(f32::from_bits)
}

fn range_of_exp() -> impl Iterator<Item = f32> {
    floats(1e-10, 88.722_83, 997)
        .chain(floats(-1e-10, -87.336_54, 997))
        .chain([0.0, -0.0, 88.722_83, -87.336_54])
}

#[test]
fn exp_is_within_two_ulp_over_its_range() {
    let worst = range_of_exp().map(|x| (ulps(math::exp(x), f64::from(x).exp()), x));
    let worst = worst.fold((0.0, 0.0), |worst, next| if next.0 > worst.0 { next } else { worst });
    assert!(worst.0 <= 2.0, "{} ulp at {}", worst.0, worst.1);
}

#[test]
fn exp_has_the_right_ends() {
    assert_eq!(math::exp(0.0), 1.0);
    assert_eq!(math::exp(88.722_84), f32::INFINITY);
    assert_eq!(math::exp(1e30), f32::INFINITY);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(math::exp(-87.336_55), 0.0);
    assert_eq!(math::exp(-1e30), 0.0);
    assert_eq!(math::exp(f32::NEG_INFINITY), 0.0);
    assert!(math::exp(f32::NAN).is_nan());
}

#[test]
fn sigmoid_and_silu_are_within_four_ulp_where_they_are_normal() {
    for x in range_of_exp() {
        let sigmoid = 1.0 / (1.0 + (-f64::from(x)).exp());
        // Below, e^-x overflows: both are 0 there, as they are in the limit.
        if x > -87.0 {
            assert!(ulps(math::sigmoid(x), sigmoid) <= 4.0, "sigmoid({x})");
            assert!(ulps(math::silu(x), f64::from(x) * sigmoid) <= 4.0, "silu({x})");
        }
    }
    assert_eq!((math::sigmoid(-200.0), math::sigmoid(200.0)), (0.0, 1.0));
    assert_eq!((math::silu(-200.0), math::silu(200.0)), (0.0, 200.0));
    assert!(math::sigmoid(f32::NAN).is_nan() && math::silu(f32::NAN).is_nan());
}

#[test]
fn ln_is_correctly_rounded_but_for_ties() {
    for x in floats(f32::from_bits(1), f32::MAX, 9973) {
        assert!(ulps(math::ln(x), f64::from(x).ln()) <= 0.5001, "ln({x})");
    }
    assert_eq!(math::ln(0.0), f32::NEG_INFINITY);
    assert_eq!(math::ln(1.0), 0.0);
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
    assert!(math::ln(-1.0).is_nan() && math::ln(f32::NAN).is_nan());
}
