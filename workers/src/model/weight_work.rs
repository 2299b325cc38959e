//! Weight gradients that are still to be computed: what `backward_input` leaves behind and a `W` action consumes.

use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_kernels::{grouped, linear};

use super::params::{ParamId, Params};

/// One deferred product `dw += dy^T x`.
pub enum WeightTask {
    /// One matrix.
    Linear {
        /// Whose gradient.
        param: ParamId,
        /// **Shapes**: `[T, out]`.
        dy: Tensor,
        /// **Shapes**: `[T, in]`.
        x: Tensor,
    },
    /// A stack of experts, rows sorted by expert.
    Grouped {
        /// Whose gradient.
        param: ParamId,
        /// **Shapes**: `[R, out]`.
        dy: Tensor,
        /// **Shapes**: `[R, in]`.
        x: Tensor,
        /// First row of each expert, and the end. **Shapes**: `[E + 1]` in U32.
        offsets: Tensor,
    },
}

/// The deferred products of one component.
#[derive(Default)]
#[must_use = "dropping it loses weight gradients"]
pub struct WeightWork(pub Vec<WeightTask>);

impl WeightWork {
    /// Adds `dw += dy^T x`, where `x` is kept as the product with the weight reads it, but never wider than it is.
    pub fn linear(&mut self, params: &Params, param: ParamId, dy: Tensor, x: &Tensor) {
        let weight = params.weight(param);
        let x = if weight.format() == Format::F32 { x.clone() } else { linear::input(x, weight) };
        self.0.push(WeightTask::Linear { param, dy, x });
    }

    /// Adds `dw += dy^T x` for a stack of experts, as [`linear`](Self::linear) does.
    pub fn grouped(&mut self, params: &Params, param: ParamId, dy: Tensor, x: &Tensor, offsets: Tensor) {
        let x = linear::input(x, params.weight(param));
        self.0.push(WeightTask::Grouped { param, dy, x, offsets });
    }

    /// Computes the gradients, in the order in which they were queued.
    pub fn run(self, params: &mut Params) {
        for task in self.0 {
            match task {
                WeightTask::Linear { param, dy, x } => {
                    linear::backward_weight(&dy, &x, params.grad_mut(param))
                }
                WeightTask::Grouped { param, dy, x, offsets } => {
                    grouped::backward_weight(&dy, &x, &offsets, params.grad_mut(param));
                }
            }
        }
    }
}
