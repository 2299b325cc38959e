//! Initial weights: normal with the configured deviation, drawn per published name, so that every layout starts from the
//! same model (report section 4.2).
//!
//! A sample is the sum of twelve uniform numbers less six: variance 1, tails to six deviations, and nothing but additions,
//! so that it does not depend on a mathematical library.

use contraflow_runtime::random::SplitMix64;

use std::convert::Infallible;

use super::params::{Param, Params};

/// Draws every weight: norms are one, gate biases stay zero, all else is normal.
pub fn initialise(params: &mut Params, seed: u64, deviation: f64) {
    for param in params.iter_mut() {
        initialise_param(param, seed, deviation);
    }
}

fn initialise_param(param: &mut Param, seed: u64, deviation: f64) {
    let is_norm = !param.is_matrix();
    let Ok(()) = param.fill::<Infallible>(|part, mut values| {
        if is_norm {
            values.fill_with(|| 1.0);
        } else {
            let mut stream = Stream::new(seed, &part.name);
            values.fill_with(|| (stream.normal() * deviation) as f32);
        }
        Ok(())
    });
}

/// 64 bits that stand for a name.
pub fn name_bits(name: &str) -> u64 {
    let digest = blake3::hash(name.as_bytes());
    let (head, _) = digest.as_bytes().split_at(8);
    head.iter().fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

/// A stream of random numbers that belongs to a name.
struct Stream(SplitMix64);

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        Stream(SplitMix64::new(name_bits(name) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn normal(&mut self) -> f64 {
        // Three 21-bit uniforms from one draw, four draws.
        let mask = (1_u64 << 21) - 1;
        let sum: u64 = (0..4)
            .map(|_| self.0.next_u64())
            .map(|bits| (bits & mask) + (bits >> 21 & mask) + (bits >> 42 & mask))
            .sum();
        sum as f64 / (1_u64 << 21) as f64 - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_standard_normal_and_belong_to_the_name() {
        let mut stream = Stream::new(1, "lm_head.weight");
        let samples: Vec<f64> = (0..100_000).map(|_| stream.normal()).collect();
        let mean = samples.iter().sum::<f64>() / 1e5;
        let variance = samples.iter().map(|x| x * x).sum::<f64>() / 1e5;
        // Standard errors: 0.0032 of the mean, 0.0042 of the variance (kurtosis 2.9): five of each.
        assert!(mean.abs() < 0.016 && (variance - 1.0).abs() < 0.021, "{mean} {variance}");
        assert_ne!(Stream::new(1, "a").0.next_u64(), Stream::new(1, "b").0.next_u64());
        assert_ne!(Stream::new(1, "a").0.next_u64(), Stream::new(2, "a").0.next_u64());
    }
}
