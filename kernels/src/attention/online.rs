//! The softmax arithmetic of one block, a query per vector lane.
//!
//! Part of `attention`; knows neither spans nor heads. Lanes without a query hold anything and harm nothing.

use crate::math;

/// Queries per block: what lies above the diagonal inside a block is computed in vain, but smaller blocks starve
/// the GEMM.
pub(super) const QUERY_BLOCK: usize = 64;

/// One value for each query of a block.
pub(super) type Lanes = [f32; QUERY_BLOCK];

/// The softmax of a block of queries so far: largest scores, and sums of exponentials relative to them.
pub(super) struct Running {
    pub(super) max: Lanes,
    pub(super) sum: Lanes,
}

impl Running {
    pub(super) const START: Running =
        Running { max: [f32::NEG_INFINITY; QUERY_BLOCK], sum: [0.0; QUERY_BLOCK] };

    /// Takes in a block of scores and leaves exponentials in it. Returns the factors that bring what was summed
    /// before to the new maxima.
    pub(super) fn absorb(&mut self, scores: &mut [Lanes]) -> Lanes {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let mut max = self.max;
                for row in scores.iter() {
                    for lane in 0..QUERY_BLOCK {
                        max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
                    }
                }
                let mut decay = [0.0; QUERY_BLOCK];
                for lane in 0..QUERY_BLOCK {
                    decay[lane] = math::exp(self.max[lane] - max[lane]);
                }
                let mut sum = [0.0; QUERY_BLOCK];
                for row in scores {
                    for lane in 0..QUERY_BLOCK {
                        row[lane] = math::exp(row[lane] - max[lane]);
                        sum[lane] += row[lane];
                    }
                }
                for lane in 0..QUERY_BLOCK {
                    self.sum[lane] = self.sum[lane] * decay[lane] + sum[lane];
                }
                self.max = max;
                decay
            },
        )
    }
}

/// Turns scores into probabilities and the gradient of probabilities into that of unscaled scores.
pub(super) fn differentiate(
    scores: &mut [Lanes],
    d_probs: &mut [Lanes],
    lse: &Lanes,
    delta: &Lanes,
    scale: f32,
) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (probs, gradient) in scores.iter_mut().zip(d_probs) {
                for lane in 0..QUERY_BLOCK {
                    probs[lane] = math::exp(probs[lane] - lse[lane]);
                    gradient[lane] = probs[lane] * (gradient[lane] - delta[lane]) * scale;
                }
            }
        },
    );
}
