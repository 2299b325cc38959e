//! Packing: documents in corpus order become one stream of tokens, and the stream is cut into sequences.
//!
//! It sits between the tokenizer and the sampler. Packing comes first and shuffling second (the sampler
//! permutes sequence indices), so that what a sequence holds depends on the corpus and the sequence length
//! alone, never on a seed.

use super::corpus::Document;
use super::tokenizer::END_OF_DOCUMENT;
use std::ops::Range;
use std::sync::Arc;

/// One stream of tokens, read as sequences of a fixed length. Cloning shares the tokens.
#[derive(Clone, Debug)]
pub struct PackedDataset {
    tokens: Arc<[u32]>,
    sequence_length: usize,
}

impl PackedDataset {
    /// Joins `documents` in order, each followed by an end of document, and cuts sequences of
    /// `sequence_length` targets.
    ///
    /// Sequence i takes the tokens [i S, i S + S]: neighbours share one token, so every token but the very
    /// first is a target exactly once. A tail that fills no whole sequence is dropped; a text shorter than S
    /// + 1 tokens gives none.
    pub fn pack(documents: &[Document], sequence_length: usize) -> Self {
        let num_tokens = documents.iter().map(|document| document.text.len() + 1).sum();
        let mut tokens = Vec::with_capacity(num_tokens);
        for document in documents {
            tokens.extend(document.text.iter().map(|&byte| u32::from(byte)));
            tokens.push(END_OF_DOCUMENT);
        }
        Self::from_tokens(tokens, sequence_length)
    }

    /// Cuts a ready stream of tokens.
    pub fn from_tokens(tokens: Vec<u32>, sequence_length: usize) -> Self {
        assert!(sequence_length > 0, "a sequence has at least one token");
        Self { tokens: tokens.into(), sequence_length }
    }

    /// Number of whole sequences.
    pub fn num_sequences(&self) -> usize {
        self.tokens.len().saturating_sub(1) / self.sequence_length
    }

    /// Targets per sequence.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// Inputs and targets of one sequence: target t is the token after input t.
    ///
    /// **Shapes**: two slices of `sequence_length` ids. **Errors**: panics where `sequence_id >=
    /// num_sequences()`.
    pub fn sequence(&self, sequence_id: usize) -> (&[u32], &[u32]) {
        let start = sequence_id * self.sequence_length;
        let end = start + self.sequence_length;
        (&self.tokens[start..end], &self.tokens[start + 1..=end])
    }

    /// The whole stream, the dropped tail included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Where in [`Self::tokens`] the targets of a sequence stand.
    pub fn target_positions(&self, sequence_id: usize) -> Range<usize> {
        let first = sequence_id * self.sequence_length + 1;
        first..first + self.sequence_length
    }
}

/// For each token the number of documents that ended before it in `ids`: tokens with equal numbers share a
/// document.
///
/// The end of a document still belongs to the document that it closes.
pub fn segments(ids: &[u32]) -> Vec<u32> {
    let mut segment = 0;
    ids.iter()
        .map(|&id| {
            let own = segment;
            segment += u32::from(id == END_OF_DOCUMENT);
            own
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[&str]) -> Vec<Document> {
        texts.iter().map(|text| Document { name: String::new(), text: text.as_bytes().to_vec() }).collect()
    }

    const END: u32 = END_OF_DOCUMENT;

    #[test]
    fn documents_are_joined_cut_at_the_stride_and_the_tail_is_dropped() {
        // Stream: a b END c d e END, seven tokens; S = 2 gives three sequences and no tail, S = 4 one and a
        // tail of two.
        let packed = PackedDataset::pack(&documents(&["ab", "cde"]), 2);
        assert_eq!(packed.num_sequences(), 3);
        assert_eq!(packed.sequence(0), (&[97, 98][..], &[98, END][..]));
        assert_eq!(packed.sequence(1), (&[END, 99][..], &[99, 100][..]));
        assert_eq!(packed.sequence(2), (&[100, 101][..], &[101, END][..]));
        assert_eq!(PackedDataset::pack(&documents(&["ab", "cde"]), 4).num_sequences(), 1);
        assert_eq!(PackedDataset::pack(&documents(&["ab", "cde"]), 7).num_sequences(), 0);
        assert_eq!(PackedDataset::pack(&[], 1).num_sequences(), 0);
    }

    #[test]
    fn every_token_but_the_first_is_a_target_once() {
        let packed = PackedDataset::pack(&documents(&["one", "", "three", "x"]), 3);
        let targets: Vec<u32> =
            (0..packed.num_sequences()).flat_map(|i| packed.sequence(i).1.to_vec()).collect();
        assert_eq!(targets, packed.tokens[1..=targets.len()]);
        assert!(packed.tokens().len() - 1 - targets.len() < 3);
        for i in 0..packed.num_sequences() {
            assert_eq!(packed.tokens()[packed.target_positions(i)], *packed.sequence(i).1);
        }
    }

    #[test]
    fn segments_follow_the_ends_of_documents() {
        assert_eq!(segments(&[1, 2, END, 3, END, END, 4]), [0, 0, 0, 1, 1, 2, 3]);
    }
}
