//! Packing: documents in corpus order become one stream of tokens, and the stream is cut into sequences.
//!
//! It sits between the tokenizer and the sampler. Packing comes first and shuffling second (the sampler
//! permutes sequence indices), so that what a sequence holds depends on the corpus and the sequence length
//! alone, never on a seed.

use super::documents::DocumentEncoder;
use super::shards::Shards;
use super::text::Document;
use super::tokenizer::{END_OF_DOCUMENT, Tokenizer};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

/// One or more streams of tokens, read as sequences of a fixed length. Cloning shares the tokens.
#[derive(Clone, Debug)]
pub struct PackedDataset {
    sources: Vec<WeightedStream>,
    sequence_length: usize,
    end_of_document: u32,
}

/// Where a sequence is in the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequencePlace {
    /// Number of the source.
    pub source: usize,
    /// Numbers of the documents of this part of the source.
    pub documents: RangeInclusive<usize>,
}

/// A stream, and its share in the order of training.
#[derive(Clone, Debug)]
struct WeightedStream {
    tokens: Tokens,
    weight: u32,
    /// Bytes of the text that became the tokens, if that is known.
    text_bytes: Option<u64>,
}

/// Where the tokens of a stream are.
#[derive(Clone, Debug)]
enum Tokens {
    Memory(Arc<[u32]>),
    Mapped(Arc<Shards>),
}

impl Tokens {
    fn len(&self) -> usize {
        match self {
            Self::Memory(tokens) => tokens.len(),
            Self::Mapped(shards) => shards.len(),
        }
    }

    /// How many documents end in a range.
    fn documents_in(&self, range: Range<usize>, end_of_document: u32) -> usize {
        match self {
            Self::Memory(tokens) => tokens[range].iter().filter(|id| **id == end_of_document).count(),
            Self::Mapped(shards) => shards.documents_before(range.end) - shards.documents_before(range.start),
        }
    }

    fn read(&self, range: Range<usize>) -> Vec<u32> {
        match self {
            Self::Memory(tokens) => tokens[range].to_vec(),
            Self::Mapped(shards) => shards.read(range),
        }
    }
}

impl PackedDataset {
    /// Joins `documents` in order as bytes, each followed by an end of document, and cuts sequences of
    /// `sequence_length` targets.
    ///
    /// Sequence i takes the tokens [i S, i S + S]: neighbours share one token, so every token but the very
    /// first is a target exactly once. A tail that fills no whole sequence is dropped; a text shorter than S
    /// + 1 tokens gives none.
    pub fn pack(documents: &[Document], sequence_length: usize) -> Self {
        Self::encode(documents, &DocumentEncoder::plain(Tokenizer::Bytes), sequence_length)
    }

    /// As [`Self::pack`], with any tokenizer.
    pub fn encode(documents: &[Document], encoder: &DocumentEncoder, sequence_length: usize) -> Self {
        let encoded: Vec<Vec<u32>> =
            documents.par_iter().map(|document| encoder.encode(&document.text)).collect();
        let end_of_document = encoder.tokenizer().end_of_document();
        let text_bytes = documents.iter().map(|document| document.text.len() as u64).sum();
        Self::new(Tokens::Memory(encoded.concat().into()), Some(text_bytes), end_of_document, sequence_length)
    }

    /// Cuts a ready stream of tokens, whose end of document is that of bytes.
    pub fn from_tokens(tokens: Vec<u32>, sequence_length: usize) -> Self {
        Self::new(Tokens::Memory(tokens.into()), None, END_OF_DOCUMENT, sequence_length)
    }

    /// Cuts the tokens of a prepared folder.
    pub fn from_shards(shards: Shards, end_of_document: u32, sequence_length: usize) -> Self {
        let text_bytes = shards.text_bytes;
        Self::new(Tokens::Mapped(Arc::new(shards)), text_bytes, end_of_document, sequence_length)
    }

    fn new(tokens: Tokens, text_bytes: Option<u64>, end_of_document: u32, sequence_length: usize) -> Self {
        assert!(sequence_length > 0, "a sequence has at least one token");
        let sources = vec![WeightedStream { tokens, weight: 1, text_bytes }];
        Self { sources, sequence_length, end_of_document }
    }

    /// Puts sources side by side; no sequence reaches from one into the next. `weights` are their shares in the order of
    /// training.
    ///
    /// **Errors**: panics where there is none.
    pub fn join(parts: Vec<Self>, weights: &[u32]) -> Self {
        let (sequence_length, end_of_document) = (parts[0].sequence_length, parts[0].end_of_document);
        let sources = parts.into_iter().flat_map(|part| part.sources).zip(weights);
        let sources = sources.map(|(source, &weight)| WeightedStream { weight, ..source }).collect();
        Self { sources, sequence_length, end_of_document }
    }

    /// Number of sequences and weight of every source.
    pub fn sources(&self) -> Vec<(usize, u32)> {
        self.sources.iter().map(|source| (self.sequences_in(source), source.weight)).collect()
    }

    fn sequences_in(&self, source: &WeightedStream) -> usize {
        source.tokens.len().saturating_sub(1) / self.sequence_length
    }

    /// Number of whole sequences.
    pub fn num_sequences(&self) -> usize {
        self.sources.iter().map(|source| self.sequences_in(source)).sum()
    }

    /// Targets per sequence.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The id that closes documents.
    pub fn end_of_document(&self) -> u32 {
        self.end_of_document
    }

    /// Inputs and targets of one sequence: target t is the token after input t.
    ///
    /// **Shapes**: two lists of `sequence_length` ids. **Errors**: panics where `sequence_id >=
    /// num_sequences()`.
    pub fn sequence(&self, sequence_id: usize) -> (Vec<u32>, Vec<u32>) {
        let mut place = sequence_id;
        for source in &self.sources {
            let num_sequences = self.sequences_in(source);
            if place < num_sequences {
                let start = place * self.sequence_length;
                let mut ids = source.tokens.read(start..start + self.sequence_length + 1);
                let targets = ids[1..].to_vec();
                ids.pop();
                return (ids, targets);
            }
            place -= num_sequences;
        }
        panic!("sequence {sequence_id} of {}", self.num_sequences())
    }

    /// Of which source each of these sequences is, and of which documents it has a part.
    pub fn places(&self, sequences: &[usize]) -> Vec<SequencePlace> {
        let length = self.sequence_length;
        let mut found = Vec::with_capacity(sequences.len());
        for &sequence in sequences {
            let (mut source, mut place) = (0, sequence);
            while place >= self.sequences_in(&self.sources[source]) {
                place -= self.sequences_in(&self.sources[source]);
                source += 1;
            }
            found.push((source, place * length));
        }
        // In one walk over each source, which may be long.
        let mut edges: Vec<(usize, usize)> =
            found.iter().flat_map(|&(source, start)| [(source, start), (source, start + length)]).collect();
        edges.sort_unstable();
        edges.dedup();
        let mut documents = HashMap::new();
        let (mut at, mut before) = ((0, 0), 0);
        for (source, token) in edges {
            if source != at.0 {
                (at, before) = ((source, 0), 0);
            }
            before += self.sources[source].tokens.documents_in(at.1..token, self.end_of_document);
            at.1 = token;
            documents.insert((source, token), before);
        }
        let place = |(source, start): (usize, usize)| SequencePlace {
            source,
            documents: documents[&(source, start)]..=documents[&(source, start + length)],
        };
        found.into_iter().map(place).collect()
    }

    /// What no whole sequence takes: of every source that has such a tail its inputs and targets, which are fewer than a
    /// sequence has. They are measured on, and never trained on.
    pub fn tails(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let tail = |source: &WeightedStream| {
            let start = self.sequences_in(source) * self.sequence_length;
            let mut ids = source.tokens.read(start..source.tokens.len());
            let targets = ids.get(1..).filter(|targets| !targets.is_empty())?.to_vec();
            ids.pop();
            Some((ids, targets))
        };
        self.sources.iter().filter_map(tail).collect()
    }

    /// Bytes of the text that became the tokens, if that is known.
    pub fn text_bytes(&self) -> Option<u64> {
        self.sources.iter().map(|source| source.text_bytes).sum()
    }

    /// Passes all tokens on, a piece at a time, dropped tails included.
    pub fn each_piece(&self, mut take: impl FnMut(&[u32])) {
        const PIECE: usize = 1 << 20;
        for source in &self.sources {
            let len = source.tokens.len();
            (0..len)
                .step_by(PIECE)
                .for_each(|start| take(&source.tokens.read(start..len.min(start + PIECE))));
        }
    }

    /// The whole stream, the dropped tail included, where it is a single one in memory.
    pub fn tokens(&self) -> Option<&[u32]> {
        match &self.sources[..] {
            [WeightedStream { tokens: Tokens::Memory(tokens), .. }] => Some(tokens),
            _ => None,
        }
    }

    /// Number of tokens, dropped tails included.
    pub fn num_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.tokens.len()).sum()
    }

    /// Where in [`Self::tokens`] the targets of a sequence stand.
    pub fn target_positions(&self, sequence_id: usize) -> Range<usize> {
        let first = sequence_id * self.sequence_length + 1;
        first..first + self.sequence_length
    }
}

/// Lengths of the documents, or parts of them, in `ids`. The end of a document still belongs to the document
/// that it closes.
pub fn document_lengths(ids: &[u32], end_of_document: u32) -> Vec<usize> {
    ids.split_inclusive(|&id| id == end_of_document).map(<[u32]>::len).collect()
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
        assert_eq!(packed.sequence(0), (vec![97, 98], vec![98, END]));
        assert_eq!(packed.sequence(1), (vec![END, 99], vec![99, 100]));
        assert_eq!(packed.sequence(2), (vec![100, 101], vec![101, END]));
        assert_eq!(PackedDataset::pack(&documents(&["ab", "cde"]), 4).num_sequences(), 1);
        assert_eq!(PackedDataset::pack(&documents(&["ab", "cde"]), 7).num_sequences(), 0);
        assert_eq!(PackedDataset::pack(&[], 1).num_sequences(), 0);
    }

    #[test]
    fn every_token_but_the_first_is_a_target_once() {
        let packed = PackedDataset::pack(&documents(&["one", "", "three", "x"]), 3);
        let targets: Vec<u32> = (0..packed.num_sequences()).flat_map(|i| packed.sequence(i).1).collect();
        let tokens = packed.tokens().unwrap();
        assert_eq!(targets, tokens[1..=targets.len()]);
        assert!(tokens.len() - 1 - targets.len() < 3);
        for i in 0..packed.num_sequences() {
            assert_eq!(tokens[packed.target_positions(i)], packed.sequence(i).1);
        }
    }

    #[test]
    fn sequences_and_tails_together_predict_every_token_but_the_first() {
        for length in 1..12 {
            let packed = PackedDataset::pack(&documents(&["one", "", "three", "x"]), length);
            let whole = (0..packed.num_sequences()).flat_map(|i| packed.sequence(i).1);
            let tails = packed.tails();
            assert!(tails.iter().all(|(ids, targets)| ids.len() == targets.len() && ids.len() < length));
            let targets: Vec<u32> = whole.chain(tails.into_iter().flat_map(|tail| tail.1)).collect();
            assert_eq!(targets, packed.tokens().unwrap()[1..]);
        }
        assert_eq!(PackedDataset::pack(&[], 3).tails(), []);
        assert_eq!(PackedDataset::from_tokens(vec![7], 3).tails(), []);
        assert_eq!(PackedDataset::pack(&documents(&["one", "caf\u{e9}"]), 3).text_bytes(), Some(8));
    }

    #[test]
    fn documents_end_with_their_end() {
        assert_eq!(document_lengths(&[1, 2, END, 3, END, END, 4], END), [3, 2, 1, 1]);
        assert_eq!(document_lengths(&[1, END], END), [2]);
    }

    #[test]
    fn a_sequence_knows_its_source_and_documents() {
        // a b END c d e END | f END g END: sequences of two with the token behind them.
        let (one, two) = (
            PackedDataset::pack(&documents(&["ab", "cde"]), 2),
            PackedDataset::pack(&documents(&["f", "g"]), 3),
        );
        let places = one.places(&[2, 0, 1, 0]);
        assert_eq!(
            places.iter().map(|place| place.documents.clone()).collect::<Vec<_>>(),
            [1..=1, 0..=0, 0..=1, 0..=0]
        );
        let joined =
            PackedDataset::join(vec![one.clone(), PackedDataset { sequence_length: 2, ..two }], &[1, 1]);
        let place = |source, documents| SequencePlace { source, documents };
        assert_eq!(joined.places(&[3, 1]), [place(1, 0..=1), place(0, 0..=1)]);
    }

    #[test]
    fn sources_stand_side_by_side_and_no_sequence_reaches_over() {
        let (one, two) =
            (PackedDataset::pack(&documents(&["abcd"]), 2), PackedDataset::pack(&documents(&["ef"]), 2));
        let joined = PackedDataset::join(vec![one.clone(), two.clone()], &[3, 1]);
        assert_eq!(joined.sources(), [(2, 3), (1, 1)]);
        let expected = [one.sequence(0), one.sequence(1), two.sequence(0)];
        assert_eq!((0..joined.num_sequences()).map(|id| joined.sequence(id)).collect::<Vec<_>>(), expected);
    }
}
