//! The loader actor: reads the rank's sequences of each step, beside the step before it.
//!
//! Each rank reads the share of its dp_rank. Where not every target counts, the counts are summed over the group, so that no
//! rank reads the share of another. Which sequences those are is [`crate::data::batches`]' business. Knows tokens, no model.

use std::sync::Arc;

use contraflow_runtime::fabric::{Endpoint, FabricError};
use contraflow_runtime::topology::FormationId;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::RankMessage;
use crate::comm::address::StepId;
use crate::comm::collectives::Collectives;
use crate::data::batches::{Batch, Batches, Datasets, Task};
use crate::engine::probe::{Probe, ProbePoint};
use crate::error::RankError;

/// The only all-reduce of a program's phase; those of the update have a phase of their own.
const LOSS_WEIGHTS: usize = 0;

/// What the loader does.
pub enum LoaderMessage {
    /// Load a batch; the answer is [`RankMessage::BatchLoaded`], or [`RankMessage::ChildFailed`].
    Load {
        /// For which step.
        step: u64,
        /// Which sequences, and how they are cut.
        task: Task,
    },
}

/// What the actor is made with.
pub struct LoaderSetup {
    /// Whom to load for.
    pub rank: ActorRef<RankMessage>,
    /// The rank's end of the fabric.
    pub endpoint: Endpoint,
    /// Job number and generation.
    pub formation: FormationId,
    /// The rank's column.
    pub dp_rank: usize,
    /// One rank of each column: those at this rank's position of the pipeline.
    pub dp_group: Vec<usize>,
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
    probe: Probe,
    source: Arc<BatchSource>,
}

/// What loads a batch, on a thread of its own.
struct BatchSource {
    endpoint: Endpoint,
    formation: FormationId,
    dp_group: Vec<usize>,
    batches: Batches,
}

impl BatchSource {
    /// Reads this data-parallel rank's share, and sums the loss weights over the group where the shapes do not determine them.
    fn load(&self, step: u64, task: Task) -> Result<Batch, FabricError> {
        let reading = self.endpoint.use_storage();
        let share = self.batches.load(task);
        drop(reading);
        let _at_work = self.endpoint.work();
        let weights = match self.batches.known_weights(task) {
            Some(weights) => weights,
            None => self.sum(step, task, share.weights)?,
        };
        let [denominator, mtp_denominator] = weights;
        Ok(Batch { micro_batches: share.micro_batches, denominator, mtp_denominator })
    }

    /// Counts of targets: whole numbers, so the order of the sum changes nothing.
    fn sum(&self, step: u64, task: Task, own: [f64; 2]) -> Result<[f64; 2], FabricError> {
        let id = StepId { formation: self.formation, phase: task.kind.phase(), step };
        let collectives = Collectives { endpoint: &self.endpoint, id };
        let sums = collectives.all_reduce(&self.dp_group, LOSS_WEIGHTS, own.to_vec())?;
        Ok([sums[0], sums[1]])
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
        let LoaderSetup { rank, endpoint, formation, dp_rank, dp_group, datasets, seed, .. } = setup;
        let batches = Batches::new(datasets, seed, dp_rank, setup.attend_across_documents);
        let source = Arc::new(BatchSource { endpoint, formation, dp_group, batches });
        Ok(LoaderState { rank, probe: setup.probe, source })
    }

    async fn handle(
        &self,
        _myself: ActorRef<LoaderMessage>,
        message: LoaderMessage,
        state: &mut LoaderState,
    ) -> Result<(), ActorProcessingErr> {
        let LoaderMessage::Load { step, task } = message;
        state.probe.at(ProbePoint::Actor { rank: state.source.endpoint.rank(), step, name: "loader" });
        let (rank, source) = (state.rank.clone(), state.source.clone());
        tokio::task::spawn_blocking(move || {
            let answer = match RankError::catch(|| Ok(source.load(step, task)?)) {
                Ok(batch) => RankMessage::BatchLoaded { step, kind: task.kind, batch: Box::new(batch) },
                Err(error) => RankMessage::ChildFailed { action: format!("loading step {step}"), error },
            };
            // The rank may be gone if the job has ended.
            drop(rank.cast(answer));
        });
        Ok(())
    }
}
