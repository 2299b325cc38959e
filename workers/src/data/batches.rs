//! Which sequences a rank reads in a step, cut into micro-batches, in an order that no layout changes.
//!
//! A step takes the positions [cursor, cursor + global batch) of one seeded permutation. Position p of the batch belongs to
//! column p / (micro-batches x micro-batch size), so every layout sees the same global batch. Pure; knows tokens, no model.

use std::sync::Arc;

use contraflow_runtime::fabric::Phase;
use contraflow_runtime::schedule::Mode;
use contraflow_runtime::stability::evidence::SequenceEvidence;

use super::packing::{PackedDataset, SequencePlace};
use super::sampler::Order;
use super::sequences::Sequences;
use super::tokenizer::Tokenizer;

/// Training and validation sequences.
pub struct Datasets {
    /// What is learnt from.
    pub train: PackedDataset,
    /// What is only measured on.
    pub validation: PackedDataset,
}

/// Which validation sequence is at `place` when `taken` of `available` are read: every split is read evenly, so that
/// a few sequences represent all of it.
pub fn validation_index(place: usize, taken: usize, available: usize) -> usize {
    place * available / taken
}

/// How a batch is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences of the global batch.
    pub global_batch: usize,
    /// Micro-batches of this column.
    pub micro_batches: usize,
    /// Sequences per micro-batch.
    pub micro_batch_size: usize,
}

/// What ranks do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskKind {
    /// Forward, backward, update: on training sequences, from a position of the permutation on.
    Train,
    /// Forward only: on validation sequences, evenly spread over the split.
    Evaluate,
}

impl TaskKind {
    /// Whether a backward pass follows the forward pass of a chunk.
    pub fn has_backward(self) -> bool {
        self.mode() == Mode::Train
    }

    /// Which passes its plan has.
    pub fn mode(self) -> Mode {
        match self {
            TaskKind::Train => Mode::Train,
            TaskKind::Evaluate => Mode::ForwardOnly,
        }
    }

    /// What the frames of its passes are tagged with.
    pub fn phase(self) -> Phase {
        match self {
            TaskKind::Train => Phase::Train,
            TaskKind::Evaluate => Phase::Validate,
        }
    }
}

/// One batch and what is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// What is done.
    pub kind: TaskKind,
    /// How the batch is cut.
    pub shape: BatchShape,
    /// Position of its first sequence: in training those taken in all steps before.
    pub start: u64,
}

/// A rank's share of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// By micro-batch.
    pub micro_batches: Vec<Sequences>,
    /// Sum of the loss weights of the global batch.
    pub denominator: f64,
    /// The same of the MTP loss.
    pub mtp_denominator: f64,
}

/// What one column reads of a batch.
pub struct Share {
    /// By micro-batch.
    pub micro_batches: Vec<Sequences>,
    /// Sums of the column's loss weights, main and MTP.
    pub weights: [f64; 2],
}

/// What every batch of a column is read from: pure, so that any rank and any resumed run reads the same.
pub struct Batches {
    datasets: Arc<Datasets>,
    order: Order,
    dp_rank: usize,
    attend_across_documents: bool,
}

impl Batches {
    /// Those of one column of ranks; `seed` is that of the order.
    pub fn new(datasets: Arc<Datasets>, seed: u64, dp_rank: usize, attend_across_documents: bool) -> Self {
        let order = Order::new(&datasets.train.sources(), seed);
        Batches { datasets, order, dp_rank, attend_across_documents }
    }

    /// Reads a column's share of a batch.
    pub fn load(&self, task: Task) -> Share {
        let BatchShape { global_batch, micro_batches, micro_batch_size } = task.shape;
        let datasets = &*self.datasets;
        let first = self.dp_rank * micro_batches * micro_batch_size;
        let across = self.attend_across_documents;
        let micro_batch = |number: usize| {
            let start = first + number * micro_batch_size;
            let places = start..start + micro_batch_size;
            match task.kind {
                TaskKind::Train => {
                    let ids = places.map(|place| self.order.index_at(task.start + place as u64));
                    read(&datasets.train, ids, across)
                }
                TaskKind::Evaluate => validation(datasets, places, global_batch, across),
            }
        };
        let micro_batches: Vec<Sequences> = (0..micro_batches).map(micro_batch).collect();
        let sum = |weight: fn(&Sequences) -> f64| micro_batches.iter().map(weight).sum();
        let weights = [sum(Sequences::loss_weight), sum(Sequences::mtp_loss_weight)];
        Share { micro_batches, weights }
    }

    /// The loss weights of the global batch, main and MTP, where every target counts and so nothing has to be read for them.
    pub fn known_weights(&self, task: Task) -> Option<[f64; 2]> {
        let length = self.datasets.train.sequence_length();
        let all = task.shape.global_batch * length;
        let every_target_counts = task.kind == TaskKind::Train && self.attend_across_documents;
        every_target_counts.then(|| [all as f64, (all - task.shape.global_batch) as f64])
    }
}

/// The sequences of a training batch, in the order of the batch, with their documents: what to look for where a step went wrong.
pub fn batch_evidence(datasets: &Datasets, seed: u64, task: Task) -> Vec<SequenceEvidence> {
    let order = Order::new(&datasets.train.sources(), seed);
    let BatchShape { global_batch, micro_batches, micro_batch_size } = task.shape;
    let ids: Vec<usize> = (0..global_batch as u64).map(|place| order.index_at(task.start + place)).collect();
    let places = datasets.train.places(&ids);
    let evidence =
        |(place, (sequence, SequencePlace { source, documents })): (usize, (usize, SequencePlace))| {
            SequenceEvidence {
                dp_rank: place / (micro_batches * micro_batch_size),
                micro_batch: place / micro_batch_size % micro_batches,
                sequence,
                source,
                documents: [*documents.start(), *documents.end()],
            }
        };
    ids.into_iter().zip(places).enumerate().map(evidence).collect()
}

/// Sequences with these numbers.
fn read(dataset: &PackedDataset, ids: impl Iterator<Item = usize>, across: bool) -> Sequences {
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for id in ids {
        let (more_tokens, more_targets) = dataset.sequence(id);
        tokens.extend(more_tokens);
        targets.extend(more_targets);
    }
    let sequences = Sequences::new(tokens, targets, dataset.sequence_length());
    if across { sequences } else { sequences.cut_at(dataset.end_of_document()) }
}

/// The validation sequences at `places` of the `taken`.
fn validation(datasets: &Datasets, places: std::ops::Range<usize>, taken: usize, across: bool) -> Sequences {
    let dataset = &datasets.validation;
    let ids = places.map(|place| validation_index(place, taken, dataset.num_sequences()));
    measured(dataset, ids, across)
}

/// Sequences with these numbers to be measured on: only text is predicted, not the ends of documents, as the baselines do
/// it. `across` says whether tokens see the documents before their own.
pub fn measured(dataset: &PackedDataset, ids: impl Iterator<Item = usize>, across: bool) -> Sequences {
    without_ends(dataset, read(dataset, ids, across))
}

/// What no whole sequence takes, to be measured on: each tail a sequence of its own length.
pub fn measured_tails(dataset: &PackedDataset, across: bool) -> Vec<Sequences> {
    let tail = |(ids, targets): (Vec<u32>, Vec<u32>)| {
        let length = ids.len();
        let sequences = Sequences::new(ids, targets, length);
        let sequences = if across { sequences } else { sequences.cut_at(dataset.end_of_document()) };
        without_ends(dataset, sequences)
    };
    dataset.tails().into_iter().map(tail).collect()
}

/// Ends of documents are read and not predicted.
fn without_ends(dataset: &PackedDataset, mut sequences: Sequences) -> Sequences {
    for (weight, target) in sequences.loss_weights.iter_mut().zip(&sequences.targets) {
        if *target == dataset.end_of_document() {
            *weight = 0.0;
        }
    }
    sequences
}

/// How much text some sequences predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Predicted {
    /// Targets that count: the loss is their mean.
    pub tokens: usize,
    /// Bytes of text that they stand for.
    pub bytes: usize,
}

impl Predicted {
    /// Counts what the loader would give weight of `taken` validation sequences.
    pub fn count(datasets: &Datasets, taken: usize, tokenizer: &Tokenizer, across: bool) -> Self {
        let mut predicted = Self::default();
        for place in 0..taken {
            predicted.add(&validation(datasets, place..place + 1, taken, across), tokenizer);
        }
        predicted.of_text(&datasets.validation, tokenizer)
    }

    /// Adds sequences, with the bytes that their tokens stand for by themselves.
    pub fn add(&mut self, sequences: &Sequences, tokenizer: &Tokenizer) {
        let targets = sequences.targets.iter().zip(&sequences.loss_weights);
        for (&target, _) in targets.filter(|(_, weight)| **weight > 0.0) {
            self.tokens += 1;
            self.bytes += tokenizer.byte_length(target);
        }
    }

    /// The same in bytes of the text as it was given. A tokenizer may add white space, drop some, or change characters; what its
    /// tokens seem to stand for is scaled so that all of them together stand for all of the text.
    pub fn of_text(self, dataset: &PackedDataset, tokenizer: &Tokenizer) -> Self {
        let Some(text_bytes) = dataset.text_bytes() else { return self };
        let end = dataset.end_of_document();
        let length = |id: usize| tokenizer.byte_length(u32::try_from(id).unwrap_or(end)) as u64;
        let lengths: Vec<u64> = (0..tokenizer.id_limit()).map(length).collect();
        let (mut num_tokens, mut token_bytes) = (0, 0);
        dataset.each_piece(|ids| {
            for &id in ids.iter().filter(|id| **id != end) {
                num_tokens += 1;
                token_bytes += lengths.get(id as usize).copied().unwrap_or(0);
            }
        });
        // Where no token stands for a byte, as unknown ones do not, all count alike.
        let (part, whole) = match token_bytes {
            0 => (self.tokens as u64, num_tokens),
            _ => (self.bytes as u64, token_bytes),
        };
        if whole == 0 || (whole == text_bytes && token_bytes > 0) {
            return self;
        }
        let bytes = (u128::from(text_bytes) * u128::from(part) + u128::from(whole) / 2) / u128::from(whole);
        Predicted { bytes: bytes as usize, ..self }
    }

    /// Bits per byte of a mean loss in nats per token. `None` where no byte is predicted.
    pub fn bits_per_byte(&self, loss: f64) -> Option<f64> {
        (self.bytes > 0).then(|| loss * self.tokens as f64 / self.bytes as f64 / std::f64::consts::LN_2)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: usize = 3;

    /// Sequences that encode their number: sequence i begins with the token 3 i.
    fn numbered(num_sequences: usize) -> PackedDataset {
        PackedDataset::from_tokens((0..=(num_sequences * LENGTH) as u32).collect(), LENGTH)
    }

    fn batches(train: PackedDataset, dp_rank: usize, seed: u64, across: bool) -> Batches {
        let datasets = Arc::new(Datasets { validation: train.clone(), train });
        Batches::new(datasets, seed, dp_rank, across)
    }

    /// Numbers of the sequences that all columns together read in a step, in the order of the batch.
    fn read_by_all(
        num_sequences: usize,
        seed: u64,
        cursor: u64,
        dp_size: usize,
        cut: (usize, usize),
    ) -> Vec<usize> {
        let (micro_batches, micro_batch_size) = cut;
        let global_batch = dp_size * micro_batches * micro_batch_size;
        let shape = BatchShape { global_batch, micro_batches, micro_batch_size };
        (0..dp_size)
            .flat_map(|dp_rank| {
                let own = batches(numbered(num_sequences), dp_rank, seed, true);
                own.load(Task { kind: TaskKind::Train, shape, start: cursor }).micro_batches
            })
            .flat_map(|sequences| {
                sequences.ids.chunks(LENGTH).map(|ids| ids[0] as usize / LENGTH).collect::<Vec<_>>()
            })
            .collect()
    }

    proptest! {
        #[test]
        fn any_resumes_and_layouts_use_each_index_once_an_epoch_in_the_order_of_the_permutation(
            num_sequences in 1usize..60,
            seed: u64,
            // A run is a list of stretches, each in a layout of its own: columns, micro-batches, their size, steps.
            stretches in prop::collection::vec((1usize..5, 1usize..4, 1usize..4, 1usize..4), 1..6),
        ) {
            let mut drawn: Vec<usize> = Vec::new();
            for (dp_size, micro_batches, size, steps) in stretches {
                for _ in 0..steps {
                    // All that a resumed run knows is how many sequences the committed steps have used.
                    let cursor = drawn.len() as u64;
                    drawn.extend(read_by_all(num_sequences, seed, cursor, dp_size, (micro_batches, size)));
                }
            }
            for epoch in drawn.chunks(num_sequences) {
                let distinct: std::collections::BTreeSet<&usize> = epoch.iter().collect();
                prop_assert_eq!(distinct.len(), epoch.len());
            }
            let order = crate::data::Sampler::new(num_sequences, seed);
            prop_assert_eq!(&drawn, &order.batch(0, drawn.len()));
        }
    }

    #[test]
    fn the_evidence_of_a_batch_names_what_the_ranks_have_read() {
        let datasets = Datasets { train: numbered(20), validation: numbered(1) };
        let shape = BatchShape { global_batch: 8, micro_batches: 2, micro_batch_size: 2 };
        let evidence = batch_evidence(&datasets, 7, Task { kind: TaskKind::Train, shape, start: 16 });
        let sequences: Vec<usize> = evidence.iter().map(|found| found.sequence).collect();
        assert_eq!(sequences, read_by_all(20, 7, 16, 2, (2, 2)));
        let places: Vec<(usize, usize)> =
            evidence.iter().map(|found| (found.dp_rank, found.micro_batch)).collect();
        assert_eq!(places, [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]);
        assert!(evidence.iter().all(|found| (found.source, found.documents) == (0, [0, 0])));
    }

    #[test]
    fn the_columns_together_know_what_counts_in_the_whole_batch() {
        const END: u32 = crate::data::tokenizer::END_OF_DOCUMENT;
        // Two sequences of four: `1 2 END 3 | 4 5 6 7` with targets `2 END 3 4 | 5 6 7 8`.
        let train = PackedDataset::from_tokens(vec![1, 2, END, 3, 4, 5, 6, 7, 8], 4);
        let shape = BatchShape { global_batch: 2, micro_batches: 1, micro_batch_size: 1 };
        let task = |kind| Task { kind, shape, start: 0 };
        let total = |across, kind| {
            let by_dp_rank = [0, 1].map(|dp_rank| batches(train.clone(), dp_rank, 1, across));
            let shares = by_dp_rank.each_ref().map(|batches| batches.load(task(kind)).weights);
            let sum = [0, 1].map(|loss| shares[0][loss] + shares[1][loss]);
            // What is known without reading is what reading would give.
            assert!(by_dp_rank[0].known_weights(task(kind)).is_none_or(|known| known == sum));
            sum
        };
        assert_eq!(total(true, TaskKind::Train), [8.0, 6.0]);
        // The target of END does not count; of MTP those of 2, END and 3 do not, and the last.
        assert_eq!(total(false, TaskKind::Train), [7.0, 4.0]);
        // Nor do ends of documents where it is measured.
        assert_eq!(total(true, TaskKind::Evaluate), [7.0, 5.0]);
        assert_eq!(total(false, TaskKind::Evaluate), [6.0, 3.0]);
        let known = batches(train, 0, 1, true).known_weights(task(TaskKind::Train));
        assert_eq!(known, Some([8.0, 6.0]));
    }

    #[test]
    fn bits_per_byte_are_nats_per_token_over_bytes() {
        let datasets = Datasets { train: numbered(1), validation: numbered(4) };
        let predicted = Predicted::count(&datasets, 2, &Tokenizer::Bytes, true);
        assert_eq!(predicted, Predicted { tokens: 6, bytes: 6 });
        assert_eq!(
            Predicted { tokens: 10, bytes: 40 }.bits_per_byte(4.0 * std::f64::consts::LN_2),
            Some(1.0)
        );
        assert_eq!(Predicted::default().bits_per_byte(1.0), None);
    }

    #[test]
    fn bytes_are_those_of_the_text_whatever_the_tokens_seem_to_stand_for() {
        use crate::data::documents::DocumentEncoder;
        use crate::data::{Document, hf_tokenizer};
        let tokenizer = hf_tokenizer::tests::trained();
        let encoder = DocumentEncoder::plain(tokenizer.clone());
        let texts = ["some text", "caf\u{e9} and more", "end"];
        let documents = texts.map(|text| Document { name: String::new(), text: text.as_bytes().to_vec() });
        let packed = PackedDataset::encode(&documents, &encoder, 4);
        let mut predicted = Predicted::default();
        let whole = (0..packed.num_sequences()).map(|id| measured(&packed, id..id + 1, true));
        for sequences in whole.chain(measured_tails(&packed, true)) {
            predicted.add(&sequences, &tokenizer);
        }
        let first = tokenizer.byte_length(packed.tokens().unwrap()[0]);
        let bytes = texts.iter().map(|text| text.len()).sum::<usize>();
        assert_eq!(predicted.bytes, bytes - first);
        // Known exactly: nothing is scaled. Without the text nothing is known.
        assert_eq!(predicted.of_text(&packed, &tokenizer), predicted);
        let tokens = PackedDataset::from_tokens(packed.tokens().unwrap().to_vec(), 4);
        assert_eq!(predicted.of_text(&tokens, &tokenizer), predicted);
    }
}
