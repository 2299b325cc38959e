//! The job actor: carries events of the ranks to the job's state machine and its effects to where they belong.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::checkpoint::{CheckpointFolder, Companions, Manifest, Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::publish::publish_weights;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::Rank;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use crate::job::{Job, JobEffect, JobSetup, Outcome};
use crate::metrics::record::JobConstants;
use crate::metrics::{Metrics, MetricsMessage, Subscriber};

/// How long a rank may take to answer an abort before the job ends without it.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the subscribers may take for the last records.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);

/// Takes a command to a rank.
pub type SendCommand = Arc<dyn Fn(Rank, RankCommand) + Send + Sync>;

/// Messages of the job actor.
pub enum JobMessage {
    /// An event of a rank.
    Event(RankEvent),
    /// Finish the running step, keep it, and end.
    Stop,
    /// A checkpoint has been committed, or not.
    Committed {
        /// Step of the checkpoint.
        step: u64,
        /// Whether it stands.
        result: Result<(), String>,
    },
    /// The exported weights have been put in place, or not.
    WeightsPublished {
        /// The error, if it failed.
        result: Result<(), String>,
    },
    /// End at once.
    Cancel {
        /// Shown as the outcome of the job.
        reason: String,
    },
    /// Time is up for the answers to an abort.
    Tick,
}

/// How checkpoints are committed.
#[derive(Clone, Debug)]
pub struct Commits {
    /// Where checkpoints are committed.
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
    /// Subscribers to the record of every step.
    pub subscribers: Vec<Subscriber>,
    /// Sent once, at the end.
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
    fn apply_effects(&mut self, myself: &ActorRef<JobMessage>, effects: Vec<JobEffect>) {
        let is_abort = |effect: &JobEffect| {
            matches!(effect, JobEffect::Command { command: RankCommand::Abort { .. }, .. })
        };
        if effects.iter().any(is_abort) {
            myself.send_after(ABORT_TIMEOUT, || JobMessage::Tick);
        }
        for effect in effects {
            match effect {
                JobEffect::Command { rank, command } => (self.send)(rank, command),
                // If the metrics actor dies, the job learns of it as its supervisor.
                JobEffect::Record(report) => {
                    drop(self.metrics.cast(MetricsMessage::Record(Box::new(report))))
                }
                JobEffect::CommitCheckpoint { position, watch, shards } => {
                    self.commit_checkpoint(myself.clone(), position, (watch, shards));
                }
                JobEffect::PublishWeights { dir, files } => self.publish_weights(myself.clone(), dir, files),
                JobEffect::End(outcome) => {
                    if let Some(ended) = self.ended.take() {
                        tell(ended, outcome, &self.metrics);
                    }
                }
            }
        }
    }
}

/// Tells the outcome once the records of all steps are with the subscribers: who hears of the end may end the process.
fn tell(ended: oneshot::Sender<Outcome>, outcome: Outcome, metrics: &ActorRef<MetricsMessage>) {
    let (done, flushed) = oneshot::channel();
    drop(metrics.cast(MetricsMessage::Flush(done)));
    tokio::spawn(async move {
        let is_failed = matches!(outcome, Outcome::Failed { .. });
        let outcome = match tokio::time::timeout(FLUSH_TIMEOUT, flushed).await {
            Ok(Err(_)) if !is_failed => {
                let message = "the metrics actor failed before it had the last records".to_owned();
                Outcome::Failed { message, kind: ErrorKind::Lost }
            }
            Ok(_) => outcome,
            Err(_) => {
                let seconds = FLUSH_TIMEOUT.as_secs();
                tracing::warn!(
                    "the records of the last steps are not taken after {seconds} s; the run ends without them"
                );
                outcome
            }
        };
        // The receiver may be gone.
        let _ = ended.send(outcome);
    });
}

impl JobActorState {
    /// Syncing files takes its time, in which the job must serve its ranks: not on the actor's own thread.
    fn commit_checkpoint(
        &self,
        myself: ActorRef<JobMessage>,
        position: Position,
        (watch, shards): (StabilityWatch, Vec<ShardFile>),
    ) {
        let Some(Commits { folder, keep, manifest, companions }) = self.checkpoints.clone() else { return };
        tokio::task::spawn_blocking(move || {
            let manifest = Manifest { position, watch, shards, ..manifest };
            let result = folder.commit(&manifest, &companions, keep).map_err(|error| error.to_string());
            // The job may be gone.
            drop(myself.cast(JobMessage::Committed { step: position.step, result }));
        });
    }

    /// As [`Self::commit_checkpoint`]: a slow disk must not delay an abort.
    fn publish_weights(&self, myself: ActorRef<JobMessage>, dir: PathBuf, files: Vec<ExportedFile>) {
        let model_config = self.model_config.clone();
        tokio::task::spawn_blocking(move || {
            let placed = publish_weights(&dir, &files, &model_config);
            let result = placed.map_err(|error| format!("{}: {error}", dir.display()));
            drop(myself.cast(JobMessage::WeightsPublished { result }));
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
            JobMessage::Stop => state.job.stop(false),
            JobMessage::Committed { step, result } => {
                if let Err(cause) = &result {
                    tracing::warn!(step, "the checkpoint could not be committed: {cause}");
                }
                state.job.committed(step, result)
            }
            JobMessage::WeightsPublished { result } => state.job.weights_published(result),
            JobMessage::Cancel { reason } => state.job.cancel(&reason),
            JobMessage::Tick => state.job.give_up_waiting(),
        };
        state.apply_effects(&myself, effects);
        Ok(())
    }

    /// The default would end the job silently when the metrics actor fails.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<JobMessage>,
        event: SupervisionEvent,
        state: &mut JobActorState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, cause) = event {
            let effects = state.job.cancel(&format!("the metrics actor failed: {cause}"));
            state.apply_effects(&myself, effects);
        }
        Ok(())
    }
}
