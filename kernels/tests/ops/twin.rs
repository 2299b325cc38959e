//! What the twins share: random values, central differences and comparison.

use contraflow_kernels::tensor::Tensor;

/// Repeatable values, uniform in [-1, 1).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        // SplitMix64: every seed, 0 too, gives a good sequence.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }

    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        Tensor::from_vec(shape, self.values(shape.iter().product()))
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The gradient of `f` at a point by central differences. With inputs and derivatives around 1, cutting off the
/// series and cancellation both cost about 1e-10.
pub fn gradient(f: impl Fn(&[f64]) -> f64, at: &[f32]) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut point = wide(at);
    let mut derivative = |index: usize| {
        let middle = point[index];
        point[index] = middle + STEP;
        let above = f(&point);
        point[index] = middle - STEP;
        let below = f(&point);
        point[index] = middle;
        (above - below) / (2.0 * STEP)
    };
    (0..at.len()).map(&mut derivative).collect()
}

/// Rounding of a value of order 1 through the few dozen operations that the tested shapes take, with room: 2^-24 each.
pub const TOLERANCE: f64 = 4e-6;

/// Asserts agreement within [`TOLERANCE`] of the largest magnitude.
#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= TOLERANCE * largest, "{what}[{index}]: found {found}, expected {expected}");
    }
}
