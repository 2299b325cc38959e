//! The job actor: carries events of the ranks to the job's state machine and its effects to where they belong.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::checkpoint::{CheckpointFolder, Companions, Manifest, Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::placed_weights::place_weights;
use contraflow_runtime::topology::Rank;
use contraflow_runtime::watch::Watch;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use crate::job::{Effect, Job, JobSetup, Outcome};
use crate::metrics::record::JobConstants;
use crate::metrics::{Metrics, MetricsMessage, Subscriber};

/// How long a rank may take to answer an abort before the job ends without it.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// Takes a command to a rank.
pub type SendCommand = Arc<dyn Fn(Rank, RankCommand) + Send + Sync>;

/// What the job hears.
pub enum JobMessage {
    /// A rank has something to say.
    Event(RankEvent),
    /// Finish the running step, keep it, and end.
    Stop,
    /// A checkpoint has been committed, or not.
    Committed {
        /// Which one.
        step: u64,
        /// Whether it stands.
        result: Result<(), String>,
    },
    /// The exported weights have been put in place, or not.
    WeightsPlaced {
        /// Why not, in words.
        result: Result<(), String>,
    },
    /// End at once.
    Cancel {
        /// Why.
        reason: String,
    },
    /// Time is up for the answers to an abort.
    Tick,
}

/// How checkpoints are committed.
#[derive(Clone, Debug)]
pub struct Commits {
    /// Where.
    pub folder: CheckpointFolder,
    /// How many of the newest are kept.
    pub keep: usize,
    /// What a manifest says beside position and shards.
    pub manifest: Manifest,
    /// What stands beside it.
    pub companions: Companions,
}

/// What the actor is made with.
pub struct JobActorSetup {
    /// The job.
    pub job: JobSetup,
    /// The model's `config.json`, to be put beside exported weights.
    pub model_config: String,
    /// Where checkpoints are committed, if anywhere.
    pub checkpoints: Option<Commits>,
    /// What step records need beside the ranks' reports.
    pub constants: JobConstants,
    /// The way to the ranks.
    pub send: SendCommand,
    /// Who hears the record of every step.
    pub subscribers: Vec<Subscriber>,
    /// Told once, at the end.
    pub ended: oneshot::Sender<Outcome>,
}

/// The actor's state.
pub struct JobActorState {
    job: Job,
    model_config: String,
    checkpoints: Option<Commits>,
    send: SendCommand,
    metrics: ActorRef<MetricsMessage>,
    ended: Option<oneshot::Sender<Outcome>>,
}

impl JobActorState {
    fn carry_out(&mut self, myself: &ActorRef<JobMessage>, effects: Vec<Effect>) {
        let is_abort =
            |effect: &Effect| matches!(effect, Effect::Command { command: RankCommand::Abort { .. }, .. });
        if effects.iter().any(is_abort) {
            myself.send_after(ABORT_PATIENCE, || JobMessage::Tick);
        }
        for effect in effects {
            match effect {
                Effect::Command { rank, command } => (self.send)(rank, command),
                // If the metrics actor is gone the job hears of it as its supervisor.
                Effect::Record(report) => drop(self.metrics.cast(MetricsMessage::Record(report))),
                Effect::CommitCheckpoint { position, watch, shards } => {
                    self.commit_checkpoint(myself.clone(), position, (watch, shards));
                }
                Effect::PlaceWeights { dir, files } => self.place_weights(myself.clone(), dir, files),
                Effect::End(outcome) => {
                    if let Some(ended) = self.ended.take() {
                        // Whoever waited for the end may have left.
                        let _ = ended.send(outcome);
                    }
                }
            }
        }
    }
}

impl JobActorState {
    /// Syncing files takes its time, in which the job must hear its ranks: not on the actor's own thread.
    fn commit_checkpoint(
        &self,
        myself: ActorRef<JobMessage>,
        position: Position,
        (watch, shards): (Watch, Vec<ShardFile>),
    ) {
        let Some(Commits { folder, keep, manifest, companions }) = self.checkpoints.clone() else { return };
        tokio::task::spawn_blocking(move || {
            let manifest = Manifest { position, watch, shards, ..manifest };
            let result = folder.commit(&manifest, &companions, keep).map_err(|error| error.to_string());
            // If the job is gone nobody asks any more.
            drop(myself.cast(JobMessage::Committed { step: position.step, result }));
        });
    }

    /// As [`Self::commit_checkpoint`]: a slow disk must not keep an abort from being heard.
    fn place_weights(&self, myself: ActorRef<JobMessage>, dir: PathBuf, files: Vec<ExportedFile>) {
        let model_config = self.model_config.clone();
        tokio::task::spawn_blocking(move || {
            let placed = place_weights(&dir, &files, &model_config);
            let result = placed.map_err(|error| format!("{}: {error}", dir.display()));
            drop(myself.cast(JobMessage::WeightsPlaced { result }));
        });
    }
}

/// The job actor.
pub struct JobActor;

impl Actor for JobActor {
    type Msg = JobMessage;
    type State = JobActorState;
    type Arguments = JobActorSetup;

    async fn pre_start(
        &self,
        myself: ActorRef<JobMessage>,
        setup: JobActorSetup,
    ) -> Result<JobActorState, ActorProcessingErr> {
        let JobActorSetup { job, model_config, checkpoints, constants, send, subscribers, ended } = setup;
        let (metrics, _) = Actor::spawn_linked(None, Metrics, constants, myself.get_cell()).await?;
        for subscriber in subscribers {
            metrics.cast(MetricsMessage::Subscribe(subscriber))?;
        }
        let job = Job::new(job);
        Ok(JobActorState { job, model_config, checkpoints, send, metrics, ended: Some(ended) })
    }

    async fn handle(
        &self,
        myself: ActorRef<JobMessage>,
        message: JobMessage,
        state: &mut JobActorState,
    ) -> Result<(), ActorProcessingErr> {
        let effects = match message {
            JobMessage::Event(event) => state.job.step(event),
            JobMessage::Stop => state.job.stop(),
            JobMessage::Committed { step, result } => state.job.committed(step, result),
            JobMessage::WeightsPlaced { result } => state.job.weights_placed(result),
            JobMessage::Cancel { reason } => state.job.cancel(&reason),
            JobMessage::Tick => state.job.give_up_waiting(),
        };
        state.carry_out(&myself, effects);
        Ok(())
    }

    /// The default would end the job without a word when the metrics actor fails.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<JobMessage>,
        event: SupervisionEvent,
        state: &mut JobActorState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, cause) = event {
            let effects = state.job.cancel(&format!("the metrics actor failed: {cause}"));
            state.carry_out(&myself, effects);
        }
        Ok(())
    }
}
