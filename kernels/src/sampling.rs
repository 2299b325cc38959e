//! The choice of the next token from logits.
//!
//! Called by generation, one token at a time. It draws nothing itself: the random number comes with the call.
//!
//! Shape letters: V vocabulary.

use crate::{math, tensor::View};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest token; 1: as the model says; more: flatter.
    pub temperature: f32,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: f32,
}

/// Chooses a token id. `uniform` is a random number in [0, 1).
///
/// **Shapes**: `logits` `[V]`.
/// **Errors**: panics if V is 0.
pub fn sample(logits: View, sampling: Sampling, uniform: f64) -> u32 {
    let logits: &[f32] = logits.typed();
    let likelier_first =
        |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if sampling.temperature <= 0.0 {
        let likeliest = (0..logits.len() as u32).min_by(likelier_first);
        return likeliest.expect("a vocabulary has at least one token");
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(likelier_first);
    let largest = logits[order[0] as usize];
    let weight = |&id: &u32| f64::from(math::exp((logits[id as usize] - largest) / sampling.temperature));
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let kept_until = |limit: f64| {
        let mut sum = 0.0;
        weights.iter().position(|weight| {
            sum += weight;
            sum >= limit
        })
    };
    let num_kept = kept_until(total * f64::from(sampling.top_p)).map_or(weights.len(), |last| last + 1);
    let kept: f64 = weights[..num_kept].iter().sum();
    let chosen = kept_until(kept * uniform).unwrap_or(0).min(num_kept - 1);
    order[chosen]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    const LOGITS: [f32; 4] = [0.0, 3.0, 1.0, 2.0];

    fn choose(logits: &[f32], sampling: Sampling, uniform: f64) -> u32 {
        let logits = Tensor::from_vec(&[logits.len()], logits.to_vec());
        sample(logits.view(0..logits.len()), sampling, uniform)
    }

    #[test]
    fn temperature_zero_is_greedy_and_ties_go_to_the_lower_id() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0 };
        assert_eq!(choose(&LOGITS, greedy, 0.99), 1);
        assert_eq!(choose(&[1.0, 2.0, 2.0], greedy, 0.5), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_and_top_p_cuts_the_tail() {
        let draw = |top_p: f32| {
            let sampling = Sampling { temperature: 1.0, top_p };
            let mut counts = [0_usize; 4];
            (0..1000)
                .for_each(|i| counts[choose(&LOGITS, sampling, (f64::from(i) + 0.5) / 1000.0) as usize] += 1);
            counts
        };
        let sum: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        for (id, count) in draw(1.0).into_iter().enumerate() {
            assert!((count as f32 - 1000.0 * LOGITS[id].exp() / sum).abs() <= 1.5, "{id}: {count}");
        }
        // 3 alone has 64 %, 3 and 2 together 88 %.
        assert_eq!(draw(0.5), [0, 1000, 0, 0]);
        assert_eq!(draw(0.8).iter().filter(|&&count| count > 0).count(), 2);
    }
}
