//! The loss: head projection and cross-entropy in one, a block of rows at a time.
//!
//! Last component of the last stage (and of the multi-token-prediction module). The logits of a block live in one
//! buffer, where they turn into their own gradient; no full logits are kept. It knows neither what the
//! weights mean nor the global denominator that they were divided by.
//!
//! Shape letters: T tokens, D hidden, V vocabulary.

use std::ops::Range;

use crate::{
    gemm::{
        gemm,
        narrow::{Factor, product},
    },
    linear, math, par, softmax,
    tensor::{Format, Tensor},
    view::Output,
};

/// Logits held at once (16 MiB): enough to stay in a last-level cache, unless `MIN_ROWS` asks for more.
const BLOCK_LOGITS: usize = 1 << 22;
/// Each block reads and writes the whole gradient of the head once; below this many rows that traffic, not the
/// arithmetic, sets the time.
const MIN_ROWS: usize = 64;
/// Beyond this many rows a block gains nothing.
const MAX_ROWS: usize = 256;

/// What each row should predict and how much its loss counts.
///
/// **Shapes**: both `[T]`.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// The next token of each row, in U32; in range also where the weight is 0.
    pub ids: &'a Tensor,
    /// Factor on each row's loss, already divided by the global denominator; 0 keeps a row out of loss and gradient.
    pub weights: &'a Tensor,
}

/// The loss of a micro-batch.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Sum over rows of weight times minus log-probability of the target.
    pub sum: f64,
    /// Log-probability of each row's target, rows of weight 0 included.
    ///
    /// **Shapes**: `[T]`.
    pub log_probs: Tensor,
}

/// Loss only, for validation.
///
/// **Shapes**: `h` `[T, D]`, `head` `[V, D]`.
/// **Errors**: panics if a target is not below V.
pub fn forward(h: &Tensor, head: &Tensor, targets: &Targets) -> Loss {
    over_blocks(h, head, targets, |_, _| {})
}

/// Loss, gradient of `h` (returned) and gradient of the head (added to `d_head`).
///
/// **Shapes**: `h` and result `[T, D]`, `head` and `d_head` `[V, D]`.
/// **Errors**: panics if a target is not below V.
pub fn forward_backward(h: &Tensor, head: &Tensor, targets: &Targets, d_head: &mut Tensor) -> (Loss, Tensor) {
    assert_eq!(d_head.shape(), head.shape(), "expected the gradient of the head in the head's shape");
    let (format, h) = (h.format(), &linear::input(h, head));
    let mut dh = Tensor::zeros(h.shape());
    let loss = over_blocks(h, head, targets, |rows, d_logits| {
        if targets.weights.f32()[rows.clone()].iter().all(|&weight| weight == 0.0) {
            return;
        }
        if head.format() == Format::F32 {
            let d_logits = d_logits.mat();
            gemm(dh.mat_mut().rows_range(rows.clone()), Output::Overwrite, 1.0, d_logits, head.mat());
            gemm(d_head.mat_mut(), Output::Accumulate, 1.0, d_logits.t(), h.mat().rows_range(rows));
        } else {
            let (d_logits, h) = (d_logits.to(Format::BF16), h.slice_rows(rows.clone()));
            let dh = dh.mat_mut().rows_range(rows);
            let head = Factor::columns(head, 0..head.rows());
            product(dh, Output::Overwrite, &Factor::rows(&d_logits, 0..d_logits.rows()), &head);
            linear::backward_weight(&d_logits, &h, d_head);
        }
    });
    (loss, dh.to(format))
}

/// All logits at once: for parity checks and generation, not for training.
///
/// **Shapes**: `h` `[T, D]`, `head` `[V, D]`, result `[T, V]` in F32.
pub fn logits(h: &Tensor, head: &Tensor) -> Tensor {
    let mut logits = Tensor::for_overwrite(&[h.rows(), head.rows()]);
    linear::add_product(logits.mat_mut(), Output::Overwrite, h, head, 0..head.rows());
    logits
}

/// Computes each block's logits, turns them into their weighted gradient and hands that to `then`.
fn over_blocks(
    h: &Tensor,
    head: &Tensor,
    targets: &Targets,
    mut then: impl FnMut(Range<usize>, &Tensor),
) -> Loss {
    let (num_rows, vocabulary) = (h.rows(), head.rows());
    let (ids, weights) = (targets.ids.u32(), targets.weights.f32());
    assert_eq!(ids.len(), num_rows, "expected one target per row");
    assert_eq!(weights.len(), num_rows, "expected one weight per row");
    let block_rows = (BLOCK_LOGITS / vocabulary).clamp(MIN_ROWS, MAX_ROWS).min(num_rows);
    let mut log_probs = Tensor::for_overwrite(&[num_rows]);
    for start in (0..num_rows).step_by(block_rows.max(1)) {
        let rows = start..num_rows.min(start + block_rows);
        // The memory of the last block comes back from the pool.
        let mut block = logits(&h.slice_rows(rows.clone()), head);
        let targets = (&ids[rows.clone()], &weights[rows.clone()]);
        logits_to_gradients(block.f32_mut(), targets, &mut log_probs.f32_mut()[rows.clone()]);
        then(rows, &block);
    }
    let weighted = weights.iter().zip(log_probs.f32()).filter(|&(&weight, _)| weight != 0.0);
    let sum = weighted.map(|(&weight, &log_prob)| -f64::from(weight) * f64::from(log_prob)).sum();
    Loss { sum, log_probs }
}

/// Rows are independent, so how they are shared among threads changes no bit.
fn logits_to_gradients(block: &mut [f32], (ids, weights): (&[u32], &[f32]), log_probs: &mut [f32]) {
    let vocabulary = block.len() / ids.len();
    let work = block.chunks_exact_mut(vocabulary).zip(ids.iter().zip(weights)).zip(log_probs).collect();
    par::for_each(work, |((row, (&target, &weight)), log_prob)| {
        *log_prob = logits_to_gradient(row, target as usize, weight);
    });
}

/// Turns one row of logits into weight * (softmax - onehot) and returns the target's log-probability.
fn logits_to_gradient(row: &mut [f32], target: usize, weight: f32) -> f32 {
    assert!(target < row.len(), "expected a target id below {}, got {target}", row.len());
    let logit = row[target];
    let (max, sum) = pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let max = softmax::max(row);
            let sum = softmax::exp_and_sum(row, max);
            let factor = weight / sum;
            for value in row.iter_mut() {
                *value *= factor;
            }
            (max, sum)
        },
    );
    if weight == 0.0 {
        // Not merely a product with 0: a row that overflows but does not count must not spoil the gradients.
        row.fill(0.0);
    } else {
        row[target] -= weight;
    }
    logit - max - math::ln(sum)
}

#[cfg(test)]
mod tests;
