//! Element by element: sums of tensors, and what is read off a run of values.
//!
//! Optimizer, inspection and collectives work with these. Cut by size alone, so that any number of threads gives the same
//! bits. It knows no shapes.

use crate::{
    math,
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor, View, ViewMut},
};

/// Values that are summed in f32 before f64 takes over.
const BLOCK: usize = 4096;

/// `target += source`, in the format of the target.
///
/// **Shapes**: of one length.
/// **Errors**: panics if the lengths differ.
pub fn add_into(target: &mut Tensor, source: &Tensor) {
    let format = target.format();
    if format != Format::F32 {
        let mut wide = target.widened();
        add_into(&mut wide, source);
        *target = wide.to(format);
        return;
    }
    add_values(target.f32_mut(), source.widened().f32());
}

pub(crate) fn add_values(target: &mut [f32], source: &[f32]) {
    assert_eq!(target.len(), source.len(), "expected two tensors of one length");
    par::for_each_chunk(target, 1, MIN_PARALLEL, |range, target| {
        let source = &source[range];
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || target.iter_mut().zip(source).for_each(|(target, source)| *target += source),
        );
    });
}

/// Moves each value by a share of what it lacks to the target: `value += share * (target - value)`.
///
/// **Shapes**: of one length, in F32.
/// **Errors**: panics if the lengths differ.
pub fn approach(mut values: ViewMut, target: View, share: f32) {
    let (values, target): (&mut [f32], &[f32]) = (values.typed_mut(), target.typed());
    assert_eq!(values.len(), target.len(), "expected two runs of one length");
    par::for_each_chunk(values, 1, MIN_PARALLEL, |range, values| {
        let target = &target[range];
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || values.iter_mut().zip(target).for_each(|(value, target)| *value += share * (target - *value)),
        );
    });
}

/// Sum of all squares: of blocks first, then of those in their order, the same on any number of threads.
pub fn sum_squares(values: View) -> f64 {
    let values: &[f32] = values.typed();
    let mut sums = vec![0.0; values.len().div_ceil(BLOCK)];
    par::for_each_chunk(&mut sums, 1, MIN_PARALLEL.div_ceil(BLOCK), |range, sums| {
        let blocks = values.chunks(BLOCK).skip(range.start);
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || sums.iter_mut().zip(blocks).for_each(|(sum, block)| *sum = math::dot_lanes(block, block)),
        );
    });
    sums.into_iter().map(f64::from).sum()
}

/// How many values are infinite or not a number.
pub fn count_not_finite(values: View) -> u64 {
    values.typed::<f32>().iter().filter(|value| !value.is_finite()).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{par::Threads, tests::noise};

    fn tensor(len: usize, seed: u32) -> Tensor {
        Tensor::from_vec(&[len], noise(len, seed))
    }

    #[test]
    fn sums_of_squares_of_every_length_agree_with_f64() {
        for len in (0..130).chain([4095, 4096, 4097, 20_000]) {
            let a = tensor(len, 3);
            let exact: f64 = a.f32().iter().map(|&a| f64::from(a) * f64::from(a)).sum();
            // A lane adds up len / 32 squares of a block, then 5 folds.
            let bound = (5 + len.div_ceil(32)) as f64 * 2.0_f64.powi(-24) * exact;
            assert!((sum_squares(a.view(0..len)) - exact).abs() <= bound, "squares of {len}");
            let half = len / 2;
            let expected: f64 = sum_squares(tensor(len, 3).view(half..len));
            assert_eq!(sum_squares(a.view(half..len)), expected);
        }
    }

    #[test]
    fn adding_is_exact_value_by_value_on_any_threads() {
        let (a, b) = (tensor(50_100, 4), tensor(50_100, 5));
        let sums: Vec<f32> = a.f32().iter().zip(b.f32()).map(|(a, b)| a + b).collect();
        for threads in [1, 3].map(Threads::new) {
            let mut target = a.clone();
            threads.run(|| add_into(&mut target, &b));
            assert_eq!(target.f32(), sums);
        }
    }

    #[test]
    fn values_approach_by_a_share_of_what_they_lack() {
        let mut values = Tensor::from_vec(&[4], vec![9.0_f32, 0.0, 4.0, -2.0]);
        let target = Tensor::from_vec(&[3], vec![8.0_f32, 4.0, 2.0]);
        approach(values.view_mut(1..4), target.view(0..3), 0.25);
        assert_eq!(values.f32(), [9.0, 2.0, 4.0, -1.0]);
    }

    #[test]
    fn only_what_is_not_finite_in_the_run_counts() {
        let values = vec![f32::NAN, 1.0, f32::INFINITY, f32::MAX, f32::NEG_INFINITY, f32::NAN];
        assert_eq!(count_not_finite(Tensor::from_vec(&[2, 3], values).view(1..5)), 2);
    }

    #[test]
    #[should_panic(expected = "expected two tensors of one length")]
    fn adding_what_does_not_fit_is_refused() {
        add_into(&mut Tensor::zeros(&[3]), &Tensor::zeros(&[4]));
    }
}
