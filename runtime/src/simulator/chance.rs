//! What is left to chance in a simulation: how unevenly tokens choose experts, and how much durations scatter. Drawn from a seed and a
//! place, so that neither the order of a simulation nor anything else of it matters.

use super::cluster::Chance;
use crate::random::{SplitMix64, mix};

/// How much more the rank with the most work has than the mean, over the ranks of an expert group: experts are chosen with
/// log-normal frequencies, and lie on the ranks in order.
pub(super) fn largest_load(
    chance: Chance,
    experts: usize,
    ranks: usize,
    (layer, micro_batch): (usize, usize),
) -> f64 {
    if chance.expert_cv == 0.0 || ranks < 2 {
        return 1.0;
    }
    let sigma = chance.expert_cv.powi(2).ln_1p().sqrt();
    let mut random = SplitMix64::new(seed(chance, &[layer as u64, micro_batch as u64]));
    let mut loads = vec![0.0; ranks];
    for expert in 0..experts {
        loads[expert * ranks / experts] += (sigma * normal(&mut random)).exp();
    }
    let mean = loads.iter().sum::<f64>() / ranks as f64;
    loads.into_iter().fold(0.0, f64::max) / mean
}

/// By what the slowest of some ranks that do the same is slower than they should be.
pub(super) fn slowest(chance: Chance, ranks: usize, place: [u64; 5]) -> f64 {
    if chance.jitter_cv == 0.0 {
        return 1.0;
    }
    let mut random = SplitMix64::new(seed(chance, &place));
    let largest = (0..ranks).map(|_| normal(&mut random)).fold(f64::NEG_INFINITY, f64::max);
    1.0 + chance.jitter_cv * largest.max(0.0)
}

fn seed(chance: Chance, place: &[u64]) -> u64 {
    place.iter().fold(mix(chance.seed), |seed, &part| {
        mix(seed ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1))
    })
}

/// Box and Muller's transform of two uniform numbers.
fn normal(random: &mut SplitMix64) -> f64 {
    let radius = (-2.0 * (1.0 - random.next_f64()).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.next_f64()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANCE: Chance = Chance { expert_cv: 0.5, jitter_cv: 0.1, seed: 7 };

    #[test]
    fn loads_scatter_as_asked_and_even_ones_not_at_all() {
        let loads: Vec<f64> = (0..200).map(|at| largest_load(CHANCE, 256, 64, (at, 1))).collect();
        let mean = loads.iter().sum::<f64>() / 200.0;
        // The largest of 64 means of four draws with this variation: 2.4 standard deviations of 0.25, and a little for the long tail.
        assert!((1.5..1.9).contains(&mean), "{mean}");
        let same = largest_load(CHANCE, 256, 64, (3, 1));
        assert_eq!(same.to_bits(), loads[3].to_bits());
        assert_eq!(largest_load(Chance { expert_cv: 0.0, ..CHANCE }, 256, 64, (3, 1)), 1.0);
        assert_eq!(largest_load(CHANCE, 256, 1, (3, 1)), 1.0);
    }

    #[test]
    fn the_slowest_of_many_is_slower() {
        let mean =
            |ranks: usize| (0..500).map(|at| slowest(CHANCE, ranks, [0, 1, 2, 3, at])).sum::<f64>() / 500.0;
        // The largest of 64 normal numbers is 2.34 on average.
        assert!((mean(64) - 1.234).abs() < 0.01, "{}", mean(64));
        assert!(mean(1) < mean(8) && mean(8) < mean(64));
    }
}
