//! The loader actor: the rank's sequences of each step, in an order that no layout changes.
//!
//! A step takes the positions [cursor, cursor + global batch) of one seeded permutation. Position p of the batch belongs to
//! column p / (micro-batches x micro-batch size), so every layout sees the same global batch. Knows tokens, no model.

use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::data::packing::PackedDataset;
use crate::data::sampler::Sampler;
use crate::data::tokenizer::END_OF_DOCUMENT;
use crate::model::micro_batch::Sequences;
use crate::probe::{Probe, ProbePoint};
use crate::rank::RankMessage;

/// Training and validation sequences.
pub struct Datasets {
    /// What is learnt from.
    pub train: PackedDataset,
    /// What is only measured on.
    pub validation: PackedDataset,
}

/// Which validation sequence stands at `place` when `taken` of `available` are read: every split is read evenly, so that
/// a few sequences tell about all of it.
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

/// Which sequences a batch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Training sequences from this position of the permutation on.
    Train {
        /// Sequences taken in all steps before.
        cursor: u64,
    },
    /// Validation sequences, evenly spread over the split.
    Validation,
}

/// What the loader hears.
pub enum LoaderMessage {
    /// Load a batch; the answer is [`RankMessage::BatchLoaded`].
    Next {
        /// For which step.
        step: u64,
        /// Which sequences.
        part: Part,
        /// How they are cut.
        shape: BatchShape,
    },
}

/// What the actor is made with.
pub struct LoaderSetup {
    /// Whom to load for.
    pub rank: ActorRef<RankMessage>,
    /// Number of the rank, for probes.
    pub rank_id: usize,
    /// The rank's column.
    pub column: usize,
    /// The sequences.
    pub datasets: Arc<Datasets>,
    /// Seed of the order.
    pub seed: u64,
    /// For tests.
    pub probe: Probe,
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

/// The actor's state.
pub struct LoaderState {
    setup: LoaderSetup,
    sampler: Sampler,
}

impl LoaderState {
    fn new(setup: LoaderSetup) -> Self {
        let sampler = Sampler::new(setup.datasets.train.num_sequences(), setup.seed);
        LoaderState { setup, sampler }
    }

    fn load(&self, part: Part, shape: BatchShape) -> Batch {
        let BatchShape { global_batch, micro_batches, micro_batch_size } = shape;
        let first = self.setup.column * micro_batches * micro_batch_size;
        let dataset = match part {
            Part::Train { .. } => &self.setup.datasets.train,
            Part::Validation => &self.setup.datasets.validation,
        };
        let index = |place: usize| match part {
            Part::Train { cursor } => self.sampler.index_at(cursor + place as u64),
            Part::Validation => validation_index(place, global_batch, dataset.num_sequences()),
        };
        let length = dataset.sequence_length();
        let micro_batch = |number: usize| {
            let (mut ids, mut targets) = (Vec::new(), Vec::new());
            for row in 0..micro_batch_size {
                let (more_ids, more_targets) =
                    dataset.sequence(index(first + number * micro_batch_size + row));
                ids.extend(more_ids);
                targets.extend(more_targets);
            }
            Sequences::new(ids, targets, length)
        };
        let mut batch = Batch {
            micro_batches: (0..micro_batches).map(micro_batch).collect(),
            denominator: (global_batch * length) as f64,
            mtp_denominator: (global_batch * (length - 1)) as f64,
        };
        if part == Part::Validation {
            // Only bytes are predicted: what the baselines are measured on too.
            let is_byte = |target: &u32| *target < END_OF_DOCUMENT;
            for sequences in &mut batch.micro_batches {
                let weights = sequences.targets.iter().map(|target| f32::from(is_byte(target)));
                sequences.loss_weights = weights.collect();
            }
            let bytes = (0..global_batch)
                .map(|place| dataset.sequence(index(place)).1.iter().filter(|t| is_byte(t)).count());
            batch.denominator = bytes.sum::<usize>() as f64;
        }
        batch
    }
}

/// The loader actor.
pub struct Loader;

impl Actor for Loader {
    type Msg = LoaderMessage;
    type State = LoaderState;
    type Arguments = LoaderSetup;

    async fn pre_start(
        &self,
        _myself: ActorRef<LoaderMessage>,
        setup: LoaderSetup,
    ) -> Result<LoaderState, ActorProcessingErr> {
        Ok(LoaderState::new(setup))
    }

    async fn handle(
        &self,
        _myself: ActorRef<LoaderMessage>,
        message: LoaderMessage,
        state: &mut LoaderState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            LoaderMessage::Next { step, part, shape } => {
                let rank = state.setup.rank_id;
                state.setup.probe.at(ProbePoint::Actor { rank, step, name: "loader" });
                let batch = state.load(part, shape);
                state.setup.rank.cast(RankMessage::BatchLoaded { step, batch: Box::new(batch) })?;
            }
        }
        Ok(())
    }
}
