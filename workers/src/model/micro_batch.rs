//! A micro-batch: the tokens of a few sequences and everything the components ask about them.
//!
//! Knows nothing of where the tokens came from.

use std::sync::Arc;

use contraflow_kernels::attention::Span;
use contraflow_kernels::rope::RopeTable;

use super::Architecture;
use crate::data::sequences::Sequences;

/// Divisors and factors of the losses, the same on every rank in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScales {
    /// Sum of the loss weights of the global batch.
    pub denominator: f64,
    /// Sum of the MTP loss weights of the global batch.
    pub mtp_denominator: f64,
    /// Factor of the MTP loss (lambda).
    pub mtp_weight: f64,
    /// Factor of a sequence's balance loss: alpha over the number of sequences of the global batch.
    pub balance: f64,
}

/// One micro-batch, ready for the components.
pub struct MicroBatch {
    /// Tokens. **Shapes**: `[T]`.
    pub ids: Vec<u32>,
    /// Next tokens. **Shapes**: `[T]`.
    pub targets: Vec<u32>,
    /// Loss weights over the global denominator. **Shapes**: `[T]`.
    pub loss_weights: Vec<f32>,
    /// Tokens after next, where there are any. **Shapes**: `[T]`.
    pub mtp_targets: Vec<u32>,
    /// Their loss weights over the global denominator, times lambda. **Shapes**: `[T]`.
    pub mtp_loss_weights: Vec<f32>,
    /// Which keys each query sees: one span per run.
    pub spans: Vec<Span>,
    /// Rotations at the tokens' positions.
    pub rope: Arc<RopeTable>,
    /// Tokens per sequence.
    pub sequence_length: usize,
    /// See [`LossScales::balance`].
    pub balance_scale: f32,
}

impl MicroBatch {
    /// Prepares sequences for the components.
    pub fn new(arch: &Architecture, sequences: Sequences, scales: &LossScales) -> Self {
        let length = sequences.sequence_length;
        let num_tokens = sequences.ids.len();
        let mtp_scale =
            if scales.mtp_denominator > 0.0 { scales.mtp_weight / scales.mtp_denominator } else { 0.0 };
        let mtp_loss_weights =
            sequences.mtp_weights().map(|weight| (f64::from(weight) * mtp_scale) as f32).collect();
        let mut mtp_targets = sequences.targets.clone();
        mtp_targets.rotate_left(1.min(num_tokens));
        let positions: Vec<u32> = sequences.runs.iter().flat_map(|&length| 0..length as u32).collect();
        MicroBatch {
            loss_weights: sequences
                .loss_weights
                .iter()
                .map(|&w| (f64::from(w) / scales.denominator) as f32)
                .collect(),
            ids: sequences.ids,
            targets: sequences.targets,
            mtp_targets,
            mtp_loss_weights,
            spans: spans(&sequences.runs),
            rope: Arc::new(arch.rope.table(&positions)),
            sequence_length: length,
            balance_scale: scales.balance as f32,
        }
    }
}

fn spans(runs: &[usize]) -> Vec<Span> {
    let mut start = 0;
    let span = |&length: &usize| {
        let span = Span { query_start: start, query_len: length, key_start: start, key_len: length };
        start += length;
        span
    };
    runs.iter().map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 9;

    #[test]
    fn documents_of_their_own_see_and_predict_nothing_across_their_ends() {
        // Two sequences of six: a document and a half, then the rest of it and one of a single token.
        let ids = vec![1, 2, END, 3, 4, 5, 6, END, END, 7, 8, END];
        let targets = vec![2, END, 3, 4, 5, 6, END, END, 7, 8, END, 1];
        let whole = Sequences::new(ids, targets, 6);
        assert_eq!(
            (whole.runs.as_slice(), whole.loss_weight(), whole.mtp_loss_weight()),
            (&[6, 6][..], 12.0, 10.0)
        );
        let cut = whole.cut_at(END);
        assert_eq!(cut.runs, [3, 3, 2, 1, 3]);
        assert_eq!(cut.loss_weights, [1., 1., 0., 1., 1., 1., 1., 0., 0., 1., 1., 0.]);
        assert_eq!(cut.mtp_weights().collect::<Vec<_>>(), [1., 0., 0., 1., 1., 0., 0., 0., 0., 1., 0., 0.]);
        let starts: Vec<usize> = spans(&cut.runs).iter().map(|span| span.key_start).collect();
        assert_eq!(starts, [0, 3, 6, 8, 9]);
    }
}
