//! Sequences of tokens with their targets, and which tokens see one another.
//!
//! Knows nothing of files, of the model or of ranks.

use super::packing::document_lengths;

/// Sequences of tokens as they come from a loader.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequences {
    /// Tokens, sequence after sequence. **Shapes**: `[num_sequences * sequence_length]`.
    pub ids: Vec<u32>,
    /// The token after each of them. **Shapes**: as `ids`.
    pub targets: Vec<u32>,
    /// Weight of each target's loss; 0 where there is none. **Shapes**: as `ids`.
    pub loss_weights: Vec<f32>,
    /// Tokens per sequence.
    pub sequence_length: usize,
    /// Lengths of the runs of tokens that see one another, in order; positions count from the start of each.
    pub runs: Vec<usize>,
}

impl Sequences {
    /// Sequences in which every position has a target that counts.
    pub fn new(ids: Vec<u32>, targets: Vec<u32>, sequence_length: usize) -> Self {
        let loss_weights = vec![1.0; ids.len()];
        let runs = vec![sequence_length; ids.len().checked_div(sequence_length).unwrap_or(0)];
        Sequences { ids, targets, loss_weights, sequence_length, runs }
    }

    /// The same sequences with every document on its own: what follows an `end_of_document` sees nothing before it, and
    /// is not predicted from it.
    pub fn cut_at(mut self, end_of_document: u32) -> Self {
        let sequences = self.ids.chunks(self.sequence_length);
        self.runs = sequences.flat_map(|ids| document_lengths(ids, end_of_document)).collect();
        for (weight, id) in self.loss_weights.iter_mut().zip(&self.ids) {
            if *id == end_of_document {
                *weight = 0.0;
            }
        }
        self
    }

    /// What the main loss is divided by: the sum of its weights.
    pub fn loss_weight(&self) -> f64 {
        self.loss_weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// What the MTP loss is divided by: the sum of the weights that the token after next has.
    pub fn mtp_loss_weight(&self) -> f64 {
        self.mtp_weights().map(f64::from).sum()
    }

    /// Row i of MTP predicts the target of row i + 1; the last row of a run has none.
    pub fn mtp_weights(&self) -> impl Iterator<Item = f32> {
        let mut end = 0;
        self.runs.iter().flat_map(move |length| {
            let start = end;
            end += length;
            let last = end;
            (start + 1..=last).map(move |next| if next == last { 0.0 } else { self.loss_weights[next] })
        })
    }
}
