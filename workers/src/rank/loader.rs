//! The loader actor: reads the rank's sequences of each step.
//!
//! Which ones those are is [`crate::data::batches`]' business. Knows tokens, no model.

use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::RankMessage;
use crate::data::batches::{BatchShape, Batches, Datasets, Part};
use crate::engine::probe::{Probe, ProbePoint};

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
    /// Whether tokens see the documents before their own in a sequence.
    pub attend_across_documents: bool,
    /// For tests.
    pub probe: Probe,
}

/// The actor's state.
pub struct LoaderState {
    rank: ActorRef<RankMessage>,
    rank_id: usize,
    probe: Probe,
    batches: Batches,
}

impl LoaderState {
    fn new(setup: LoaderSetup) -> Self {
        let LoaderSetup { rank, rank_id, column, datasets, seed, attend_across_documents, probe } = setup;
        let batches = Batches::new(datasets, seed, column, attend_across_documents);
        LoaderState { rank, rank_id, probe, batches }
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
                let rank = state.rank_id;
                state.probe.at(ProbePoint::Actor { rank, step, name: "loader" });
                let batch = state.batches.load(part, shape);
                state.rank.cast(RankMessage::BatchLoaded { step, batch: Box::new(batch) })?;
            }
        }
        Ok(())
    }
}
