//! A micro-batch: the tokens of a few sequences and everything the components ask about them.
//!
//! Knows nothing of where the tokens came from.

use std::sync::Arc;

use contraflow_kernels::attention::Spans;
use contraflow_kernels::rope::RopeTable;
use contraflow_kernels::tensor::{Element, Tensor};

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
    /// Factor of the balance loss over a whole micro-batch: alpha over the number of micro-batches of the global batch.
    pub batch_balance: f64,
}

/// A balance loss over groups of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalanceScale {
    /// Tokens of a group: those of a sequence, or of the micro-batch.
    pub tokens: usize,
    /// Factor of the loss of each group.
    pub scale: f32,
}

/// One micro-batch, ready for the components.
pub struct MicroBatch {
    /// Tokens. **Shapes**: `[T]` in U32.
    pub ids: Tensor,
    /// Next tokens. **Shapes**: `[T]` in U32.
    pub targets: Tensor,
    /// Loss weights over the global denominator. **Shapes**: `[T]`.
    pub loss_weights: Tensor,
    /// Tokens after next, where there are any. **Shapes**: `[T]` in U32.
    pub mtp_targets: Tensor,
    /// Their loss weights over the global denominator, times lambda. **Shapes**: `[T]`.
    pub mtp_loss_weights: Tensor,
    /// Which keys each query sees: one span per run.
    pub spans: Spans,
    /// Rotations at the tokens' positions.
    pub rope: Arc<RopeTable>,
    /// Tokens per sequence.
    pub sequence_length: usize,
    balance: f32,
    batch_balance: f32,
}

impl MicroBatch {
    /// Prepares sequences for the components.
    pub fn new(arch: &Architecture, sequences: Sequences, scales: &LossScales) -> Self {
        let Sequences { sequence_length, ref runs, .. } = sequences;
        let num_tokens = sequences.ids.len();
        let mtp_scale =
            if scales.mtp_denominator > 0.0 { scales.mtp_weight / scales.mtp_denominator } else { 0.0 };
        let mtp_loss_weights = sequences.mtp_weights();
        let mtp_loss_weights =
            mtp_loss_weights.map(|weight| (f64::from(weight) * mtp_scale) as f32).collect();
        let loss_weights = sequences.loss_weights.iter();
        let loss_weights =
            loss_weights.map(|&weight| (f64::from(weight) / scales.denominator) as f32).collect();
        let mut mtp_targets = sequences.targets.clone();
        mtp_targets.rotate_left(1.min(num_tokens));
        let positions: Vec<u32> = runs.iter().flat_map(|&length| 0..length as u32).collect();
        MicroBatch {
            spans: Spans::of_runs(runs.iter().copied()),
            rope: Arc::new(arch.rope.table(&vector(positions))),
            ids: vector(sequences.ids),
            targets: vector(sequences.targets),
            loss_weights: vector(loss_weights),
            mtp_targets: vector(mtp_targets),
            mtp_loss_weights: vector(mtp_loss_weights),
            sequence_length,
            balance: scales.balance as f32,
            batch_balance: scales.batch_balance as f32,
        }
    }

    /// The balance losses that count.
    pub fn balance_scales(&self) -> impl Iterator<Item = BalanceScale> {
        let by_sequence = BalanceScale { tokens: self.sequence_length, scale: self.balance };
        let by_batch = BalanceScale { tokens: self.ids.len(), scale: self.batch_balance };
        [by_sequence, by_batch].into_iter().filter(|balance| balance.scale != 0.0)
    }
}

fn vector<T: Element>(values: Vec<T>) -> Tensor {
    Tensor::from_vec(&[values.len()], values)
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
    }
}
