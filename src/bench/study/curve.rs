//! From curves of losses to one number: how far a training run is from another one. Pure.

use serde::Serialize;

/// What a smoothed loss keeps of its last value, as in the report's comparison of precisions (appendix B.1).
const KEEP: f64 = 0.9;

/// How far one run's loss is from another's.
///
/// **Units**: a share: 0.01 is a loss that is higher by 1 %.
pub(in crate::bench) type Gap = f64;

/// Mean over the last fifth of the steps of the relative distance of the smoothed losses.
pub(in crate::bench) fn gap(loss: &[f64], reference: &[f64]) -> Gap {
    let steps = loss.len().min(reference.len());
    let distances = smoothed(&loss[..steps]).zip(smoothed(&reference[..steps])).map(|(a, b)| a / b - 1.0);
    let tail: Vec<f64> = distances.skip(steps - (steps / 5).max(1)).collect();
    tail.iter().sum::<f64>() / tail.len() as f64
}

/// The relative distance of the smoothed losses, step by step.
pub(in crate::bench) fn distances<'a>(
    loss: &'a [f64],
    reference: &'a [f64],
) -> impl Iterator<Item = f64> + 'a {
    smoothed(loss).zip(smoothed(reference)).map(|(a, b)| a / b - 1.0)
}

/// The first values are not drawn towards 0.
fn smoothed(loss: &[f64]) -> impl Iterator<Item = f64> + '_ {
    loss.iter().scan((0.0, 0.0), |(sum, weight), &value| {
        *sum = KEEP * *sum + (1.0 - KEEP) * value;
        *weight = KEEP * *weight + 1.0 - KEEP;
        Some(*sum / *weight)
    })
}

/// Mean over seeds, and how far single ones are from it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(in crate::bench) struct Statistic {
    /// How many.
    pub(in crate::bench) seeds: usize,
    pub(in crate::bench) mean: f64,
    /// Standard deviation of one seed, with n - 1; 0 of a single one.
    pub(in crate::bench) deviation: f64,
}

impl Statistic {
    /// `None` without values.
    pub(in crate::bench) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let seeds = values.len();
        let mean = values.iter().sum::<f64>() / seeds as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (squares / seeds.saturating_sub(1).max(1) as f64).sqrt();
        (seeds > 0).then_some(Statistic { seeds, mean, deviation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_that_of_the_last_fifth() {
        let reference = vec![2.0; 100];
        // Twice as high at first: forgotten long before the last fifth, but for 0.9 to the power of 60.
        let mut loss = vec![4.0; 20];
        loss.extend(vec![2.02; 80]);
        assert!((gap(&loss, &reference) - 0.01).abs() < 0.9_f64.powi(60));
        assert_eq!(gap(&reference, &reference), 0.0);
        // The shorter one says how far they are compared.
        assert_eq!(gap(&[2.0, 3.0], &[2.0, 3.0, 9.0]), 0.0);
    }

    #[test]
    fn one_seed_has_no_deviation_and_none_no_mean() {
        let one = Statistic::of([3.0]).unwrap();
        assert_eq!((one.seeds, one.mean, one.deviation), (1, 3.0, 0.0));
        let three = Statistic::of([1.0, 2.0, 3.0]).unwrap();
        assert_eq!((three.seeds, three.mean, three.deviation), (3, 2.0, 1.0));
        assert!(Statistic::of([]).is_none());
    }
}
