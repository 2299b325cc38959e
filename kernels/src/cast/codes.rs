//! What the codes of narrow formats stand for, value by value: BF16, E4M3, E5M6.
//!
//! Rounding is to nearest, ties to even; what is beyond the largest value of a format becomes that value, except in BF16, which
//! has infinities. Bodies are branch-free and forced inline, as in `math`. Knows neither tensors nor scales.

use std::sync::LazyLock;

/// The largest value of E4M3.
pub(crate) const E4M3_MAX: f32 = 448.0;
/// The largest value of E5M6: all bits set but the last of the mantissa, since all set is not a number.
pub(crate) const E5M6_MAX: f32 = 129_024.0;

/// The bits of the nearest BF16 value.
#[inline(always)]
pub(crate) fn bf16_of(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // Rounding up could turn a NaN into infinity or zero.
    let quiet = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { quiet } else { rounded }
}

/// The value of BF16 bits.
#[inline(always)]
pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The code of the nearest value with `MANTISSA` bits of mantissa and an exponent bias of `BIAS`, sign aside.
#[inline(always)]
fn code_of<const MANTISSA: u32, const BIAS: u32>(value: f32, max: f32, nan: u32) -> u32 {
    let bits = value.to_bits() & 0x7fff_ffff;
    let abs = f32::from_bits(bits);
    let bits = if abs > max { max.to_bits() } else { bits };
    let dropped = 23 - MANTISSA;
    let half = (1 << (dropped - 1)) - 1;
    let normal = ((bits + half + (bits >> dropped & 1)) >> dropped).wrapping_sub((127 - BIAS) << MANTISSA);
    // Adding a power of two whose last bit is worth the smallest value rounds to a multiple of that value.
    let anchor = f32::from_bits((127 + 24 - BIAS - MANTISSA) << 23);
    let subnormal = (f32::from_bits(bits) + anchor).to_bits() - anchor.to_bits();
    let is_normal = bits >= (128 - BIAS) << 23;
    let code = if is_normal { normal } else { subnormal };
    if value.is_nan() { nan } else { code }
}

/// The E4M3 code of the nearest value.
#[inline(always)]
pub(crate) fn e4m3_of(value: f32) -> u8 {
    let sign = value.to_bits() >> 24 & 0x80;
    (code_of::<3, 7>(value, E4M3_MAX, 0x7f) | sign) as u8
}

/// The E5M6 code of the nearest value, in the low 12 bits.
#[inline(always)]
pub(crate) fn e5m6_of(value: f32) -> u16 {
    let sign = value.to_bits() >> 20 & 0x800;
    (code_of::<6, 15>(value, E5M6_MAX, 0x7ff) | sign) as u16
}

fn value_of(code: u32, mantissa: u32, bias: i32, nan: u32) -> f32 {
    let sign_bit = (nan + 1).trailing_zeros();
    let sign = if code >> sign_bit == 1 { -1.0 } else { 1.0 };
    let code = code & nan;
    if code == nan {
        return f32::NAN * sign;
    }
    let (exponent, fraction) = ((code >> mantissa) as i32, (code & ((1 << mantissa) - 1)) as f32);
    let unit = power_of_two(-(mantissa as i32));
    let magnitude = match exponent {
        0 => fraction * unit * power_of_two(1 - bias),
        _ => (1.0 + fraction * unit) * power_of_two(exponent - bias),
    };
    sign * magnitude
}

/// Two to an exponent that an F32 has.
pub(crate) fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// The value of each E4M3 code, as BF16 bits: every one is exact.
pub(crate) static E4M3_AS_BF16: LazyLock<[u16; 256]> =
    LazyLock::new(|| std::array::from_fn(|code| bf16_of(value_of(code as u32, 3, 7, 0x7f))));

/// The value of each E5M6 code, as BF16 bits: every one is exact.
pub(crate) static E5M6_AS_BF16: LazyLock<[u16; 4096]> =
    LazyLock::new(|| std::array::from_fn(|code| bf16_of(value_of(code as u32, 6, 15, 0x7ff))));

/// The two codes in three bytes.
#[inline(always)]
pub(crate) fn e5m6_pair(bytes: [u8; 3]) -> [u16; 2] {
    let [low, middle, high] = bytes.map(u16::from);
    [low | (middle & 0xf) << 8, middle >> 4 | high << 4]
}

/// Three bytes of two codes.
#[inline(always)]
pub(crate) fn e5m6_bytes([first, second]: [u16; 2]) -> [u8; 3] {
    [first as u8, (first >> 8 | (second & 0xf) << 4) as u8, (second >> 4) as u8]
}

#[cfg(test)]
mod tests;
