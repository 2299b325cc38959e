//! AdamW: one optimizer step on a run of parameters.
//!
//! The optimizer calls it on the runs that make up its shard. It knows neither names nor schedules; the learning rate of the step
//! and the factor of gradient clipping come with the call.

use crate::{
    par::{self, MIN_PARALLEL},
    tensor::{View, ViewMut},
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
}

/// What a step changes, value by value.
///
/// **Shapes**: all of one length.
pub struct State<'a> {
    /// The parameters.
    pub weight: ViewMut<'a>,
    /// Running mean of their gradients.
    pub exp_avg: ViewMut<'a>,
    /// Running mean of their squared gradients.
    pub exp_avg_sq: ViewMut<'a>,
}

/// Updates parameters and moments by the gradient.
///
/// **Shapes**: all of one length.
/// **Errors**: panics if the lengths differ or the step is 0.
pub fn update(state: State, gradient: View, spec: &AdamW) {
    let State { mut weight, mut exp_avg, mut exp_avg_sq } = state;
    let (p, m, v) = (weight.typed_mut(), exp_avg.typed_mut(), exp_avg_sq.typed_mut());
    let g: &[f32] = gradient.typed();
    let lengths = [p.len(), m.len(), v.len()];
    assert_eq!(lengths, [g.len(); 3], "expected parameters and moments of the gradient's length");
    let factors = Factors::new(spec);
    let ranges = par::partition(g.len(), MIN_PARALLEL);
    let moments = par::split(m, 1, &ranges).into_iter().zip(par::split(v, 1, &ranges));
    let state = par::split(p, 1, &ranges).into_iter().zip(moments);
    let parts = ranges.iter().zip(state).map(|(range, (p, (m, v)))| Part { p, g: &g[range.clone()], m, v });
    par::for_each(parts.collect(), |part| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || factors.apply(part),
        );
    });
}

/// What one thread updates.
struct Part<'a> {
    p: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
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
    fn apply(&self, Part { p, g, m, v }: Part) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * self.grad_scale;
            *m = self.beta1 * *m + self.rest1 * g;
            *v = self.beta2 * *v + self.rest2 * (g * g);
            *p = self.keep * *p - self.step_size * (*m / (v.sqrt() * self.root_scale + self.epsilon));
        }
    }
}
