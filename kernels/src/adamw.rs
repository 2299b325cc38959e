//! AdamW: one optimizer step on a run of parameters.
//!
//! The optimizer calls it on the runs that make up its shard. It knows neither names nor schedules; the learning rate of the step
//! and the factor of gradient clipping come with the call.

use std::ops::Range;

use crate::{
    cast::codes::{bf16_of, bf16_value},
    par::{self, MIN_PARALLEL},
    tensor::{Element, Format, View, ViewMut},
};

/// The numbers of one step.
///
/// **Source**: Loshchilov and Hutter 2019, algorithm 2, with epsilon outside the root.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the root of the latter.
    pub epsilon: f32,
    /// Decoupled weight decay; takes effect times `lr`, before the step.
    pub weight_decay: f32,
    /// Number of this step, from 1 on.
    pub step: u64,
    /// Factor on every gradient: below 1 where clipping takes effect.
    pub grad_scale: f32,
    /// How moments in BF16 are rounded; those in F32 are not.
    pub rounding: Rounding,
}

/// How a number becomes one of the two BF16 values next to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// The nearer one, ties to even.
    Nearest,
    /// Either, with a chance in proportion, so that the mean is the number itself: what is too small to reach the next value is
    /// not lost. Chance follows from the key and the index of the element alone.
    Stochastic {
        /// One for each tensor and step.
        key: u64,
        /// Index of the first element in its tensor.
        first: usize,
    },
}

/// What a step changes, value by value.
///
/// **Shapes**: all of one length.
pub struct State<'a> {
    /// The parameters.
    pub weight: ViewMut<'a>,
    /// Running mean of their gradients, in F32 or BF16.
    pub exp_avg: ViewMut<'a>,
    /// Running mean of their squared gradients, in the same format.
    pub exp_avg_sq: ViewMut<'a>,
}

/// Updates parameters and moments by the gradient.
///
/// **Shapes**: all of one length.
/// **Errors**: panics if the lengths differ or the step is 0.
pub fn update(state: State, gradient: View, spec: &AdamW) {
    match (state.exp_avg.format(), spec.rounding) {
        (Format::BF16, Rounding::Nearest) => {
            update_with(state, gradient, spec, bf16_value, |value, _, _| bf16_of(value));
        }
        (Format::BF16, Rounding::Stochastic { key, first }) => {
            let round = |value, index: usize, moment: u32| {
                bf16_at_random(value, noise(key, first + index) >> (16 * moment) & 0xffff)
            };
            update_with(state, gradient, spec, bf16_value, round);
        }
        _ => update_with(state, gradient, spec, |value: f32| value, |value, _, _| value),
    }
}

/// 32 bits that look random and follow from key and index: two rounds of multiplying and folding.
#[inline(always)]
fn noise(key: u64, index: usize) -> u32 {
    let mut bits = (index as u32).wrapping_mul(0x9e37_79b9) ^ key as u32;
    bits = (bits ^ bits >> 16).wrapping_mul(0x7feb_352d) ^ (key >> 32) as u32;
    bits = (bits ^ bits >> 15).wrapping_mul(0x846c_a68b);
    bits ^ bits >> 16
}

/// One of the two BF16 values next to a number, the upper one in magnitude if `noise`, 16 bits, lifts the rest over its edge.
#[inline(always)]
fn bf16_at_random(value: f32, noise: u32) -> u16 {
    let lifted = (value.to_bits().wrapping_add(noise) >> 16) as u16;
    if value.is_finite() { lifted } else { bf16_of(value) }
}

/// [`update`] with moments as `load` reads them and `store` rounds them: a value, the index of its element in the run, and 0 for
/// the first moment and 1 for the second.
fn update_with<M: Element>(
    state: State,
    gradient: View,
    spec: &AdamW,
    load: impl Fn(M) -> f32 + Copy + Send + Sync,
    store: impl Fn(f32, usize, u32) -> M + Copy + Send + Sync,
) {
    let State { mut weight, mut exp_avg, mut exp_avg_sq } = state;
    let p: &mut [f32] = weight.typed_mut();
    let (m, v): (&mut [M], &mut [M]) = (exp_avg.typed_mut(), exp_avg_sq.typed_mut());
    let g: &[f32] = gradient.typed();
    let lengths = [p.len(), m.len(), v.len()];
    assert_eq!(lengths, [g.len(); 3], "expected parameters and moments of the gradient's length");
    let factors = Factors::new(spec);
    let ranges = par::partition(g.len(), MIN_PARALLEL);
    let moments = par::split(m, 1, &ranges).into_iter().zip(par::split(v, 1, &ranges));
    let state = par::split(p, 1, &ranges).into_iter().zip(moments);
    let part = |(range, (p, (m, v))): (&Range<usize>, _)| {
        let g = &g[range.clone()];
        Part { first: range.start, p, g, m, v }
    };
    let parts = ranges.iter().zip(state).map(part);
    par::for_each(parts.collect(), |part| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || factors.apply(part, load, store),
        );
    });
}

/// What one thread updates.
struct Part<'a, M> {
    /// Index of its first element in the run.
    first: usize,
    p: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [M],
    v: &'a mut [M],
}

/// What is the same for all parameters. Computed in f64: 1 - beta^step would lose digits in f32.
struct Factors {
    grad_scale: f32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    /// lr over the bias correction of the first moment.
    step_size: f32,
    /// One over the root of the bias correction of the second moment.
    root_scale: f32,
    epsilon: f32,
}

impl Factors {
    fn new(spec: &AdamW) -> Factors {
        assert!(spec.step > 0, "expected a step from 1 on, got 0");
        let (lr, beta1, beta2) = (f64::from(spec.lr), f64::from(spec.beta1), f64::from(spec.beta2));
        let correction = |beta: f64| 1.0 - libm::exp(spec.step as f64 * libm::log(beta));
        Factors {
            grad_scale: spec.grad_scale,
            keep: (1.0 - lr * f64::from(spec.weight_decay)) as f32,
            beta1: spec.beta1,
            beta2: spec.beta2,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            step_size: (lr / correction(beta1)) as f32,
            root_scale: (1.0 / correction(beta2).sqrt()) as f32,
            epsilon: spec.epsilon,
        }
    }

    #[inline(always)]
    fn apply<M: Element>(
        &self,
        Part { first, p, g, m, v }: Part<M>,
        load: impl Fn(M) -> f32,
        store: impl Fn(f32, usize, u32) -> M,
    ) {
        for (index, (((p, g), m), v)) in p.iter_mut().zip(g).zip(m).zip(v).enumerate() {
            let g = g * self.grad_scale;
            let mean = self.beta1 * load(*m) + self.rest1 * g;
            let square = self.beta2 * load(*v) + self.rest2 * (g * g);
            (*m, *v) = (store(mean, first + index, 0), store(square, first + index, 1));
            *p = self.keep * *p - self.step_size * (mean / (square.sqrt() * self.root_scale + self.epsilon));
        }
    }
}
