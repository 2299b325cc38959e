//! Codes against the arithmetic that defines them.

use super::*;

/// All values that a format has, ascending, not counting negative ones.
fn values(num: u32, mantissa: u32, bias: i32) -> Vec<f32> {
    (0..num).map(|code| value_of(code, mantissa, bias, num)).collect()
}

/// The nearest of some ascending values, the one of even index if two are as near.
fn nearest(values: &[f32], value: f32) -> usize {
    let distance = |index: usize| (f64::from(values[index]) - f64::from(value)).abs();
    let above = values.partition_point(|&found| found < value).min(values.len() - 1);
    let below = above.saturating_sub(1);
    match distance(below).total_cmp(&distance(above)) {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => above,
        std::cmp::Ordering::Equal => {
            if below % 2 == 0 {
                below
            } else {
                above
            }
        }
    }
}

/// Around every value, every tie, and beyond both ends.
fn probes(values: &[f32]) -> Vec<f32> {
    let ties = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
    let ends = [f32::MIN_POSITIVE, 1e-40, 1e30, f32::MAX, f32::INFINITY];
    let exact = values.iter().copied().chain(ties).chain(ends);
    exact.flat_map(|value| [value.next_down().max(0.0), value, value.next_up()]).collect()
}

#[test]
fn every_value_and_every_tie_rounds_to_the_nearest_code_of_either_sign() {
    let (e4m3, e5m6) = (values(0x7f, 3, 7), values(0x7ff, 6, 15));
    assert_eq!((e4m3[0x7e], e5m6[0x7fe]), (E4M3_MAX, E5M6_MAX));
    assert_eq!((e4m3[1], e5m6[1]), (2.0_f32.powi(-9), 2.0_f32.powi(-20)));
    for probe in probes(&e4m3) {
        let code = nearest(&e4m3, probe) as u8;
        assert_eq!((e4m3_of(probe), e4m3_of(-probe)), (code, code | 0x80), "{probe:e}");
    }
    for probe in probes(&e5m6) {
        let code = nearest(&e5m6, probe) as u16;
        assert_eq!((e5m6_of(probe), e5m6_of(-probe)), (code, code | 0x800), "{probe:e}");
    }
}

#[test]
fn what_is_no_number_stays_none() {
    for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
        assert_eq!((e4m3_of(nan) & 0x7f, e5m6_of(nan) & 0x7ff), (0x7f, 0x7ff));
        assert!(bf16_value(bf16_of(nan)).is_nan());
    }
    assert!(bf16_value(E4M3_AS_BF16[0x7f]).is_nan() && bf16_value(E5M6_AS_BF16[0xfff]).is_nan());
}

#[test]
fn bf16_rounds_to_the_nearest_even_value() {
    // Half of the last bit of a BF16 is 0x8000 in the bits of an F32.
    for (bits, expected) in [
        (0x3f80_8000, 0x3f80),
        (0x3f80_8001, 0x3f81),
        (0x3f81_8000, 0x3f82),
        (0x3f81_7fff, 0x3f81),
        (0x0000_8001, 0x0001),
        (0x7f7f_8000, 0x7f80),
        (0xff80_0000, 0xff80),
    ] {
        assert_eq!(bf16_of(f32::from_bits(bits)), expected, "{bits:08x}");
    }
}

#[test]
fn every_narrow_value_is_a_bf16_and_comes_back_as_its_code() {
    for code in (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f) {
        assert_eq!(e4m3_of(bf16_value(E4M3_AS_BF16[usize::from(code)])), code);
    }
    for code in (0..0x1000).filter(|code| code & 0x7ff != 0x7ff) {
        assert_eq!(e5m6_of(bf16_value(E5M6_AS_BF16[usize::from(code)])), code);
        assert_eq!(e5m6_pair(e5m6_bytes([code, 0xfff - code])), [code, 0xfff - code]);
    }
}
