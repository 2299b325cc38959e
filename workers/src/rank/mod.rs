//! The rank actor: supervisor of one rank's actors. Any failure of a child ends here, with its message.
//!
//! The ranks commit steps among themselves, the orchestrator only learns of them: the order of things within a step is in
//! `stepping`, what goes to disk meanwhile and at the end in `saving`. Knows messages; tensors only pass through its hands.

pub mod build;
pub mod checkpointer;
pub mod expert_shard;
pub mod loader;
pub mod member;
mod saving;
mod stepping;
pub mod worker;

use std::path::PathBuf;
use std::sync::Arc;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::fabric::FabricError;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::Rank;
use contraflow_runtime::trace::{self, SPAN, TraceContext};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tracing::{Span, info_span};

use self::build::{Assignment, Built, build_rank};
use self::member::{JoinedRank, join};
use self::saving::AfterSave;
use crate::comm::address::StepId;
use crate::data::batches::{Batch, Task, TaskKind};
use crate::engine::pipeline::{PipelineEvent, PipelineMessage};
use crate::engine::update::StopOrder;
use crate::error::RankError;
use crate::model::params::{Params, RankParams};

/// Where a rank's events go.
pub type EventSink = Arc<dyn Fn(RankEvent) + Send + Sync>;

/// Messages of the rank actor.
pub enum RankMessage {
    /// Join a job; the answer is [`RankEvent::Ready`].
    Assign(Box<Assignment>),
    /// The model has been made.
    Built(Box<Result<Built, RankError>>),
    /// A command of the orchestrator, and the span that sent it.
    Command(RankCommand, TraceContext),
    /// The loader's answer.
    BatchLoaded {
        /// For which step.
        step: u64,
        /// For which of its tasks.
        kind: TaskKind,
        /// This rank's share.
        batch: Box<Batch>,
    },
    /// The expert shard's answer.
    ExpertsLent(Box<Params>),
    /// An event of the pipeline about the running program.
    Pipeline(PipelineEvent),
    /// The weights are on disk, or not.
    Exported {
        /// The parameters, back again.
        params: Box<RankParams>,
        /// What was written.
        result: Result<ExportedFile, RankError>,
    },
    /// The rank's part of a checkpoint is on disk, or not.
    Saved {
        /// Of which checkpoint.
        position: Position,
        /// State of the stability watch, and what was written.
        result: Box<Result<(StabilityWatch, ShardFile), RankError>>,
    },
    /// The last checkpoint could not be written; it is tried again.
    SaveFailed {
        /// Of which step.
        step: u64,
        /// The cause.
        cause: String,
    },
    /// The save of a step has waited for the one before for long enough.
    SkipSave {
        /// The step.
        step: u64,
    },
    /// The state after the last step of the formation is in memory, here and at the buddy.
    Kept {
        /// The step.
        step: u64,
    },
    /// A part of the rank could not do its work.
    ChildFailed {
        /// What it was doing.
        action: String,
        /// The cause.
        error: RankError,
    },
}

/// What the rank does, and what it still waits for.
enum Status {
    Idle,
    /// A task needs its batch and the experts before it begins.
    Gather {
        id: StepId,
        task: Task,
        batch: Option<Box<Batch>>,
        experts: Option<Box<Params>>,
        /// Lasts until both are there.
        _load: Span,
    },
    /// The programs of a task run.
    Run {
        task: Task,
        /// Targets of the global batch that count.
        tokens: u64,
    },
    /// The checkpoint before this one is still being written: a rank keeps at most one beside its own state.
    AwaitSaved {
        then: AfterSave,
    },
    /// The checkpointer needs the experts before it writes.
    Lend {
        dir: PathBuf,
    },
    Export,
    /// Nothing more will be done.
    Over,
}

/// The actor's state.
pub struct RankState {
    id: Rank,
    myself: ActorRef<RankMessage>,
    events: EventSink,
    joined: Option<JoinedRank>,
    status: Status,
    /// The orchestrator has asked the run to stop between two steps; takes effect until the totals of the running one.
    stop: Arc<StopOrder>,
    /// Spans of the rank's whole life and of what it is about. Never entered: they last until they are dropped.
    life: Span,
    doing: Span,
    /// The span of the last command, until it has set something going.
    commanded: TraceContext,
}

impl RankState {
    fn joined(&mut self) -> Result<&mut JoinedRank, RankError> {
        self.joined.as_mut().ok_or(RankError::ActorGone { actor: "the job" })
    }

    /// The job in lines of the log; 0 in one process, and until it has joined one.
    fn job(&self) -> u64 {
        self.joined.as_ref().map_or(0, |joined| joined.assignment.formation.job.bits())
    }

    /// What the rank is about from now on has a span of its own.
    fn begin(&mut self, span: Span) {
        trace::link(&span, std::mem::take(&mut self.commanded));
        self.doing = span;
    }

    /// Builds the model beside the actor: drawing the weights of a large one takes seconds, in which an abort must be handled.
    fn assign(&mut self, myself: ActorRef<RankMessage>, assignment: Assignment) {
        let id = self.id;
        let Assignment { formation, trace, .. } = assignment;
        let (job, generation) = (formation.job.bits(), formation.generation.number());
        let life = info_span!(target: SPAN, parent: None, "job", job, generation, rank = id.number());
        self.life = trace::below(trace, life);
        let build = info_span!(target: SPAN, parent: &self.life, "build");
        tokio::task::spawn_blocking(move || {
            let _build = build.entered();
            let built = RankError::catch(|| build_rank(id.index(), assignment));
            drop(myself.cast(RankMessage::Built(Box::new(built))));
        });
    }

    /// Starts the children around the model.
    ///
    /// **Errors**: one cannot be started.
    async fn built(
        &mut self,
        myself: &ActorRef<RankMessage>,
        built: Result<Built, RankError>,
    ) -> Result<(), ActorProcessingErr> {
        let built = match built {
            Ok(built) => built,
            Err(error) => {
                self.fail("building the model".into(), &error);
                return Ok(());
            }
        };
        let moved = built.moved;
        let (joined, reports) = join(myself, self.id.index(), built).await?;
        self.joined = Some(joined);
        moved.into_iter().for_each(|moved| (self.events)(RankEvent::StateMoved { rank: self.id, moved }));
        tracing::debug!(job = self.job(), rank = self.id.number(), "model built, waiting for other ranks");
        (self.events)(RankEvent::Ready { rank: self.id });
        reports.into_iter().for_each(|report| (self.events)(RankEvent::StepDone { report }));
        Ok(())
    }

    fn command(&mut self, command: RankCommand, trace: TraceContext) -> Result<(), RankError> {
        self.commanded = trace;
        match command {
            RankCommand::BeginStep { step } => self.begin_step(step),
            RankCommand::Stop { in_memory } => {
                self.stop.give(in_memory);
                Ok(())
            }
            RankCommand::Validate => self.validate(),
            RankCommand::Export { dir } => self.begin_export(dir),
            RankCommand::Abort { reason } => {
                self.abort(reason);
                Ok(())
            }
            RankCommand::Shutdown => Ok(()),
        }
    }

    fn pipeline_event(&mut self, event: PipelineEvent) -> Result<(), RankError> {
        match event {
            PipelineEvent::Done(done) => return self.task_done(*done),
            PipelineEvent::Failed { action, error } => self.fail(action, &error),
            PipelineEvent::Aborted => (self.events)(RankEvent::Aborted { rank: self.id }),
        }
        Ok(())
    }

    fn abort(&mut self, reason: String) {
        self.status = Status::Over;
        let abort = PipelineMessage::Abort { reason };
        let heard = self.joined.as_ref().map(|joined| joined.children.pipeline.cast(abort));
        if !matches!(heard, Some(Ok(()))) {
            // Nothing runs: there is no pipeline yet, or none any more.
            (self.events)(RankEvent::Aborted { rank: self.id });
        }
    }

    /// The experts are here, for an export or for a program.
    fn experts_lent(&mut self, lent: Box<Params>) -> Result<(), RankError> {
        match &mut self.status {
            Status::Lend { dir } => {
                let dir = std::mem::take(dir);
                self.export(dir, *lent)
            }
            _ => self.experts_gathered(lent),
        }
    }

    /// What the rank is doing.
    fn doing(&self) -> String {
        match &self.status {
            Status::Idle => "waiting for a command".into(),
            Status::Gather { id, .. } => format!("gathering step {}", id.step),
            Status::Run { .. } => "running a step".into(),
            Status::AwaitSaved { .. } => "waiting for a checkpoint to be written".into(),
            Status::Lend { .. } | Status::Export => "writing the weights".into(),
            Status::Over => "ending".into(),
        }
    }

    /// Reports the first failure and aborts every wait; later ones are its consequences.
    fn fail(&mut self, action: String, error: &RankError) {
        let by_command = matches!(error, RankError::Fabric(FabricError::Aborted { .. }));
        if matches!(self.status, Status::Over) || by_command {
            return;
        }
        self.status = Status::Over;
        (self.events)(RankEvent::Failed {
            rank: self.id,
            action,
            cause: error.to_string(),
            kind: error.kind(),
            peer: error.peer(),
        });
        if let Some(joined) = &self.joined {
            joined.assignment.endpoint.abort(&format!("rank {} failed", self.id));
        }
    }
}

/// The rank actor.
pub struct RankActor;

impl Actor for RankActor {
    type Msg = RankMessage;
    type State = RankState;
    type Arguments = (Rank, EventSink);

    async fn pre_start(
        &self,
        myself: ActorRef<RankMessage>,
        (id, events): (Rank, EventSink),
    ) -> Result<RankState, ActorProcessingErr> {
        let (life, doing, commanded) = (Span::none(), Span::none(), TraceContext::default());
        Ok(RankState {
            id,
            myself,
            events,
            joined: None,
            status: Status::Idle,
            stop: Arc::default(),
            life,
            doing,
            commanded,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<RankMessage>,
        message: RankMessage,
        state: &mut RankState,
    ) -> Result<(), ActorProcessingErr> {
        let done = match message {
            RankMessage::Assign(assignment) => {
                state.assign(myself, *assignment);
                Ok(())
            }
            RankMessage::Built(built) => {
                state.built(&myself, *built).await?;
                Ok(())
            }
            RankMessage::Command(RankCommand::Shutdown, _) => {
                myself.stop_children(None);
                myself.stop(None);
                Ok(())
            }
            RankMessage::Command(command, trace) => state.command(command, trace),
            RankMessage::BatchLoaded { step, kind, batch } => state.batch_loaded(step, kind, batch),
            RankMessage::ExpertsLent(experts) => state.experts_lent(experts),
            RankMessage::Pipeline(event) => state.pipeline_event(event),
            RankMessage::Exported { params, result } => state.exported(*params, result),
            RankMessage::Saved { position, result } => state.saved(position, *result),
            RankMessage::SaveFailed { step, cause } => {
                state.save_failed(step, cause);
                Ok(())
            }
            RankMessage::SkipSave { step } => state.skip_save(step),
            RankMessage::Kept { step } => state.kept(step),
            RankMessage::ChildFailed { action, error } => {
                state.fail(action, &error);
                Ok(())
            }
        };
        if let Err(error) = done {
            let action = state.doing();
            state.fail(action, &error);
        }
        Ok(())
    }

    /// The default would stop the rank when any child ends; here a child's end is reported and the rank stays to answer.
    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<RankMessage>,
        event: SupervisionEvent,
        state: &mut RankState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, cause) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell, reason.unwrap_or_else(|| "it ended".into()))
            }
            _ => return Ok(()),
        };
        let name = state.joined.as_ref().map_or("a starting actor", |joined| joined.children.name_of(&cell));
        let action = format!("{} in {name}", state.doing());
        state.fail(action, &RankError::Panic { message: cause });
        Ok(())
    }
}
