//! The row arithmetic that attention and cross-entropy share: the maximum, and exponentials with their sum.
//!
//! Both run inside a `pulp` dispatch of the caller, hence the forced inlining. Sixteen lanes and a fixed order of
//! folding them make a row's result depend on its values and length alone.

use crate::math;

const LANES: usize = 16;

/// The largest value, or minus infinity for an empty row. A NaN is ignored: it reaches the sum instead.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane = if value > *lane { value } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |most, value| if value > most { value } else { most })
}

/// Replaces each value by `exp(value - shift)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_and_sum(values: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, tail) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        exp_lanes(chunk, shift);
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += *value;
        }
    }
    if !tail.is_empty() {
        let mut chunk = [f32::NEG_INFINITY; LANES];
        chunk[..tail.len()].copy_from_slice(tail);
        exp_lanes(&mut chunk, shift);
        tail.copy_from_slice(&chunk[..tail.len()]);
        for (sum, value) in sums.iter_mut().zip(tail) {
            *sum += *value;
        }
    }
    fold(sums)
}

#[inline(always)]
fn exp_lanes(chunk: &mut [f32; LANES], shift: f32) {
    for value in chunk {
        *value = math::exp(*value - shift);
    }
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_of_tail_gives_the_sum_and_the_maximum() {
        for len in 0..70_usize {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37 % 71) as f32 - 35.0) / 8.0).collect();
            let most = row.iter().fold(f64::NEG_INFINITY, |most, &value| most.max(f64::from(value)));
            assert_eq!(f64::from(max(&row)), most);

            let shift = if len == 0 { 0.0 } else { most };
            let expected: Vec<f64> = row.iter().map(|&value| (f64::from(value) - shift).exp()).collect();
            let mut found = row.clone();
            let sum = exp_and_sum(&mut found, shift as f32);

            let total: f64 = expected.iter().sum();
            assert!((f64::from(sum) - total).abs() <= 1e-6 * total, "length {len}: {sum} {total}");
            for (found, expected) in found.iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected, "length {len}");
            }
        }
    }
}
