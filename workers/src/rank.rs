//! The rank actor: supervisor of one rank's actors, and the order of things within a step.
//!
//! Load a batch, borrow the experts, run the plan, update, report, next step: the ranks commit steps among themselves, the
//! orchestrator only hears of them. Any failure of a child ends here, with the words for it. Knows messages; tensors
//! only pass through its hands.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::fabric::{AtWork, FabricError, Phase};
use contraflow_runtime::schedule::Mode;
use contraflow_runtime::trace::{self, SPAN, TraceContext};
use contraflow_runtime::watch::{Divergence, Watch};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tracing::{Span, info_span};

use crate::buckets::RankParams;
use crate::checkpoint::Snapshot;
use crate::checkpointer::CheckpointerMessage;
use crate::error::RankError;
use crate::expert_shard::ExpertShardMessage;
use crate::loader::{Batch, BatchShape, LoaderMessage, Part};
use crate::membership::{Assignment, Built, Member, Tell, build_rank, gone, join};
use crate::model::micro_batch::LossScales;
use crate::optimizer::{OptimizerMessage, UpdateDone};
use crate::params::Params;
use crate::pipeline::{PipelineMessage, PipelineOrder, PlanDone};
use crate::plans::{train_shape, validation_shape};
use crate::probe::ProbePoint;
use crate::step::StepId;
use crate::update::UpdateOrder;

/// What the rank hears.
pub enum RankMessage {
    /// Join a job; the answer is [`RankEvent::Ready`].
    Assign(Box<Assignment>),
    /// The model has been made.
    Built(Box<Result<Built, RankError>>),
    /// The orchestrator's word, and the span that says it.
    Command(RankCommand, TraceContext),
    /// The loader's answer.
    BatchLoaded {
        /// For which step.
        step: u64,
        /// This rank's share.
        batch: Box<Batch>,
    },
    /// The expert shard's answer.
    ExpertsLent(Box<Params>),
    /// A program has ended.
    PlanDone(Box<PlanDone>),
    /// The optimizer has ended.
    UpdateDone(Box<UpdateDone>),
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
        /// What the watch remembers, and what was written.
        result: Box<Result<(Watch, ShardFile), RankError>>,
    },
    /// A child could not do its part.
    ChildFailed {
        /// What it was doing, in words.
        action: String,
        /// The cause.
        error: RankError,
    },
    /// Every wait of the running program has ended.
    PipelineAborted,
}

/// What the rank is about, and what it still waits for.
enum Task {
    Idle,
    /// A program needs its batch and the experts before it begins.
    Gather {
        id: StepId,
        shape: BatchShape,
        batch: Option<Batch>,
        experts: Option<Params>,
        /// Last until both are there.
        _load: (Span, AtWork),
    },
    /// The program runs, then perhaps the update.
    Run {
        shape: BatchShape,
        denominators: (f64, f64),
        bubble_s: f64,
        peak_live_chunks: usize,
    },
    /// The checkpoint before this one is still being written: a rank keeps at most one beside its own state.
    AwaitSaved {
        then: Then,
        _at_work: AtWork,
    },
    /// The checkpointer needs the experts before it writes.
    Lend {
        dir: std::path::PathBuf,
    },
    Export,
    /// Nothing more will be done.
    Over,
}

/// What a rank does once a checkpoint is written.
enum Then {
    /// Save the next one, and go on with the run or not.
    Save { snapshot: Box<Snapshot>, goes_on: bool },
    /// Tell that the watch has stopped the step: whoever hears it may count on the checkpoint.
    Diverge { divergence: Box<Divergence>, cursor: u64 },
}

/// The actor's state.
pub struct RankState {
    id: usize,
    tell: Tell,
    member: Option<Member>,
    task: Task,
    /// The orchestrator wants the run to stop between two steps.
    stop: bool,
    /// Spans of the rank's whole life and of what it is about. Never entered: they last until they are dropped.
    life: Span,
    doing: Span,
    /// The span of the last command, until it has set something going.
    commanded: TraceContext,
}

impl RankState {
    fn member(&mut self) -> Result<&mut Member, RankError> {
        self.member.as_mut().ok_or(RankError::ActorGone { actor: "the job" })
    }

    /// What the rank is about from now on has a span of its own.
    fn begin(&mut self, span: Span) {
        trace::link(&span, std::mem::take(&mut self.commanded));
        self.doing = span;
    }

    fn command(&mut self, command: RankCommand, trace: TraceContext) -> Result<(), RankError> {
        self.commanded = trace;
        match command {
            RankCommand::BeginStep { step } => self.begin_step(step),
            RankCommand::Stop => {
                self.stop = true;
                Ok(())
            }
            RankCommand::Validate => self.validate(),
            RankCommand::Export { dir } => {
                self.begin(info_span!(target: SPAN, parent: &self.life, "export", rank = self.id));
                self.task = Task::Lend { dir };
                self.member()?
                    .children
                    .experts
                    .cast(ExpertShardMessage::Lend { step: 0 })
                    .map_err(gone("the expert shard"))
            }
            RankCommand::Abort { reason } => {
                self.task = Task::Over;
                let abort = PipelineMessage::Abort { reason };
                let heard = self.member.as_ref().map(|member| member.children.pipeline.cast(abort));
                if !matches!(heard, Some(Ok(()))) {
                    // Nothing runs: there is no pipeline yet, or none any more.
                    (self.tell)(RankEvent::Aborted { rank: self.id });
                }
                Ok(())
            }
            RankCommand::Shutdown => Ok(()),
        }
    }

    fn begin_step(&mut self, step: u64) -> Result<(), RankError> {
        let rank = self.id;
        self.begin(info_span!(target: SPAN, parent: &self.life, "step", rank, step));
        let member = self.member()?;
        member.assignment.endpoint.activity().begin_step(step);
        member.assignment.probe.at(ProbePoint::Actor { rank, step, name: "rank" });
        member.began = Instant::now();
        member.sent_before = member.assignment.endpoint.sent_bytes();
        let recipe = &member.assignment.recipe;
        let shape = train_shape(recipe, recipe.batch_size_at(member.position.tokens));
        let part = Part::Train { cursor: member.position.cursor };
        self.gather(Phase::Train, step, part, shape)
    }

    fn validate(&mut self) -> Result<(), RankError> {
        self.begin(info_span!(target: SPAN, parent: &self.life, "validate", rank = self.id));
        let member = self.member()?;
        let available = member.assignment.datasets.validation.num_sequences();
        match validation_shape(&member.assignment.recipe, available) {
            Some(shape) => self.gather(Phase::Validate, 0, Part::Validation, shape),
            None => {
                (self.tell)(RankEvent::Validated { rank: self.id, loss: 0.0, tokens: 0 });
                Ok(())
            }
        }
    }

    /// Asks for what a program needs.
    fn gather(&mut self, phase: Phase, step: u64, part: Part, shape: BatchShape) -> Result<(), RankError> {
        let member = self.member()?;
        let (job, generation) = (member.assignment.job, member.assignment.generation);
        let children = &member.children;
        children.loader.cast(LoaderMessage::Next { step, part, shape }).map_err(gone("the loader"))?;
        children.experts.cast(ExpertShardMessage::Lend { step }).map_err(gone("the expert shard"))?;
        let id = StepId { job, generation, phase, step };
        let at_work = member.assignment.endpoint.work();
        let _load = (info_span!(target: SPAN, parent: &self.doing, "load"), at_work);
        self.task = Task::Gather { id, shape, batch: None, experts: None, _load };
        Ok(())
    }

    fn batch_loaded(&mut self, loaded: Batch) -> Result<(), RankError> {
        if let Task::Gather { batch, .. } = &mut self.task {
            *batch = Some(loaded);
        }
        self.run_if_gathered()
    }

    fn experts_lent(&mut self, lent: Params) -> Result<(), RankError> {
        match &mut self.task {
            Task::Lend { dir } => {
                let dir = std::mem::take(dir);
                self.task = Task::Export;
                let rank = self.id;
                let member = self.member()?;
                let params = Box::new(member.take_params(lent)?);
                let world = member.assignment.recipe.topology().world();
                let config = member.assignment.recipe.model_config.clone();
                let export =
                    CheckpointerMessage::Export { dir, rank, world, config: Box::new(config), params };
                member.children.checkpointer.cast(export).map_err(gone("the checkpointer"))
            }
            Task::Gather { experts, .. } => {
                *experts = Some(lent);
                self.run_if_gathered()
            }
            _ => Ok(()),
        }
    }

    /// Starts the program once batch and experts are there.
    fn run_if_gathered(&mut self) -> Result<(), RankError> {
        let Task::Gather { id, shape, batch, experts, .. } = &mut self.task else { return Ok(()) };
        let (id, shape) = (*id, *shape);
        let (Some(_), Some(_)) = (&batch, &experts) else { return Ok(()) };
        let (Some(batch), Some(experts)) = (batch.take(), experts.take()) else { return Ok(()) };
        let denominators = (batch.denominator, batch.mtp_denominator);
        self.task = Task::Run { shape, denominators, bubble_s: 0.0, peak_live_chunks: 0 };
        let (rank, span) = (self.id, self.doing.clone());
        let member = self.member()?;
        let recipe = member.assignment.recipe.clone();
        let mode = if id.phase == Phase::Train { Mode::Train } else { Mode::ForwardOnly };
        let wrong = |message| RankError::Content { path: "plan".into(), message };
        let planned = member.plans.get(shape.micro_batches, mode).map_err(wrong)?;
        let scales = LossScales {
            denominator: batch.denominator,
            mtp_denominator: batch.mtp_denominator,
            mtp_weight: recipe.mtp_weight_at(member.position.tokens),
            balance: recipe.balance.sequence_alpha / shape.global_batch as f64,
        };
        let order = PipelineOrder {
            id,
            program: planned.programs[recipe.topology().coordinates(rank).pipeline].clone(),
            plan: planned.plan.clone(),
            batches: batch.micro_batches,
            scales,
            params: member.take_params(experts)?,
            span,
        };
        member
            .children
            .pipeline
            .cast(PipelineMessage::BeginStep(Box::new(order)))
            .map_err(gone("the pipeline"))
    }

    fn plan_done(&mut self, done: PlanDone) -> Result<(), RankError> {
        let PlanDone { id, params, totals, bubble, .. } = done;
        let Task::Run { shape, bubble_s, peak_live_chunks, .. } = &mut self.task else { return Ok(()) };
        *bubble_s = bubble.as_secs_f64();
        *peak_live_chunks = totals.peak_live_chunks;
        let shape = *shape;
        let (rank, stop, span) = (self.id, self.stop, self.doing.clone());
        let member = self.member()?;
        if id.phase == Phase::Validate {
            let RankParams { dense, experts } = params;
            member.dense = Some(dense);
            member.give_back(experts)?;
            let tokens = (shape.global_batch * member.assignment.recipe.training.sequence_length) as u64;
            self.task = Task::Idle;
            self.doing = Span::none();
            (self.tell)(RankEvent::Validated { rank, loss: totals.loss, tokens });
            return Ok(());
        }
        let recipe = &member.assignment.recipe;
        let order = UpdateOrder {
            id: StepId { phase: Phase::Update, ..id },
            learning_rate: recipe.lr_at(id.step as usize - 1, member.position.tokens),
            bias_speed: recipe.bias_speed_at(member.position.tokens),
            stop,
            save: member.save_when(id.step),
            keep: member.keeper.is_some() && !member.is_last(id.step),
            kept_by: member.kept_by(id.step),
        };
        let (params, totals) = (Box::new(params), Box::new(totals));
        let update = OptimizerMessage::Update { order, params, totals, span };
        member.children.optimizer.cast(update).map_err(gone("the optimizer"))
    }

    fn update_done(&mut self, done: UpdateDone) -> Result<(), RankError> {
        let UpdateDone { order, params, result, saved, kept } = done;
        let global = match result {
            Err(RankError::Diverged(divergence)) => return self.diverged(params, divergence),
            result => result?,
        };
        let Task::Run { shape, bubble_s, peak_live_chunks, denominators } = self.task else { return Ok(()) };
        self.task = Task::Idle;
        self.doing = Span::none();
        let id = self.id;
        let member = self.member()?;
        let RankParams { dense, experts } = params;
        member.dense = Some(dense);
        member.give_back(experts)?;
        let stop = global.stop;
        let mut report = member.report(id, &order, global, denominators.0 as u64);
        report.bubble_seconds = bubble_s;
        report.peak_live_chunks = peak_live_chunks as u32;
        let step = order.id.step;
        member.position.step = step;
        member.position.cursor += shape.global_batch as u64;
        member.position.tokens += report.tokens;
        let is_last = member.is_last(step);
        if let Some(snapshot) = kept {
            member.keep(snapshot, &report);
        }
        tracing::debug!(
            rank = id,
            step = report.step,
            loss = report.loss,
            seconds = report.seconds,
            "step done"
        );
        (self.tell)(RankEvent::StepDone { report });
        if stop {
            (self.tell)(RankEvent::Stopped { rank: id, step });
        }
        let goes_on = !is_last && !stop;
        match saved {
            Some(snapshot) => self.save(Box::new(snapshot), goes_on),
            None => self.go_on(goes_on),
        }
    }

    fn go_on(&mut self, goes_on: bool) -> Result<(), RankError> {
        let next = self.member()?.position.step + 1;
        if goes_on { self.begin_step(next) } else { Ok(()) }
    }

    /// Hands a snapshot to the checkpointer and goes on while it writes.
    fn save(&mut self, snapshot: Box<Snapshot>, goes_on: bool) -> Result<(), RankError> {
        let rank = self.id;
        let member = self.member()?;
        if member.is_saving {
            let _at_work = member.assignment.endpoint.work();
            self.task = Task::AwaitSaved { then: Then::Save { snapshot, goes_on }, _at_work };
            return Ok(());
        }
        member.is_saving = true;
        let position = member.position;
        let folder =
            member.assignment.checkpoints.as_ref().ok_or(RankError::ActorGone { actor: "the storage" })?;
        let save =
            CheckpointerMessage::Save { dir: folder.unfinished(position.step), rank, position, snapshot };
        member.children.checkpointer.cast(save).map_err(gone("the checkpointer"))?;
        self.go_on(goes_on)
    }

    fn saved(
        &mut self,
        position: Position,
        result: Result<(Watch, ShardFile), RankError>,
    ) -> Result<(), RankError> {
        let rank = self.id;
        match result {
            Ok((watch, shard)) => (self.tell)(RankEvent::ShardSaved { rank, position, watch, shard }),
            Err(error) => {
                self.fail(format!("saving step {}", position.step), &error);
                return Ok(());
            }
        }
        self.member()?.is_saving = false;
        match std::mem::replace(&mut self.task, Task::Idle) {
            Task::AwaitSaved { then: Then::Save { snapshot, goes_on }, .. } => self.save(snapshot, goes_on),
            Task::AwaitSaved { then: Then::Diverge { divergence, cursor }, .. } => {
                (self.tell)(RankEvent::Diverged { rank, divergence, cursor });
                Ok(())
            }
            task => {
                self.task = task;
                Ok(())
            }
        }
    }

    /// Takes the parameters back, unchanged, and waits for what the orchestrator makes of it.
    fn diverged(&mut self, params: RankParams, divergence: Box<Divergence>) -> Result<(), RankError> {
        let Task::Run { shape, .. } = self.task else { return Ok(()) };
        self.task = Task::Idle;
        let member = self.member()?;
        member.dense = Some(params.dense);
        member.give_back(params.experts)?;
        let cursor = member.position.cursor + shape.global_batch as u64;
        if member.is_saving {
            let _at_work = member.assignment.endpoint.work();
            self.task = Task::AwaitSaved { then: Then::Diverge { divergence, cursor }, _at_work };
        } else {
            (self.tell)(RankEvent::Diverged { rank: self.id, divergence, cursor });
        }
        Ok(())
    }

    fn exported(
        &mut self,
        params: RankParams,
        result: Result<ExportedFile, RankError>,
    ) -> Result<(), RankError> {
        let rank = self.id;
        let file = result?;
        let Task::Export = self.task else { return Ok(()) };
        self.task = Task::Idle;
        self.doing = Span::none();
        let member = self.member()?;
        member.dense = Some(params.dense);
        member.give_back(params.experts)?;
        (self.tell)(RankEvent::Exported { rank, file });
        Ok(())
    }

    /// What the rank is about, in words.
    fn doing(&self) -> String {
        match &self.task {
            Task::Idle => "waiting for a command".into(),
            Task::Gather { id, .. } => format!("gathering step {}", id.step),
            Task::Run { .. } => "running a step".into(),
            Task::AwaitSaved { .. } => "waiting for a checkpoint to be written".into(),
            Task::Lend { .. } | Task::Export => "writing the weights".into(),
            Task::Over => "ending".into(),
        }
    }

    /// Tells the first failure and ends every wait; later ones are its consequences.
    fn fail(&mut self, action: String, error: &RankError) {
        let by_command = matches!(error, RankError::Fabric(FabricError::Aborted { .. }));
        if matches!(self.task, Task::Over) || by_command {
            return;
        }
        self.task = Task::Over;
        (self.tell)(RankEvent::Failed {
            rank: self.id,
            action,
            cause: error.to_string(),
            kind: error.kind(),
        });
        if let Some(member) = &self.member {
            member.assignment.endpoint.abort(&format!("rank {} failed", self.id));
        }
    }
}

/// The rank actor.
pub struct Rank;

impl Actor for Rank {
    type Msg = RankMessage;
    type State = RankState;
    type Arguments = (usize, Tell);

    async fn pre_start(
        &self,
        _myself: ActorRef<RankMessage>,
        (id, tell): (usize, Tell),
    ) -> Result<RankState, ActorProcessingErr> {
        let (life, doing, commanded) = (Span::none(), Span::none(), TraceContext::default());
        Ok(RankState { id, tell, member: None, task: Task::Idle, stop: false, life, doing, commanded })
    }

    async fn handle(
        &self,
        myself: ActorRef<RankMessage>,
        message: RankMessage,
        state: &mut RankState,
    ) -> Result<(), ActorProcessingErr> {
        let done = match message {
            RankMessage::Assign(assignment) => {
                let id = state.id;
                let Assignment { job, generation, trace, .. } = *assignment;
                let life = info_span!(target: SPAN, parent: None, "job", job, generation, rank = id);
                state.life = trace::below(trace, life);
                let build = info_span!(target: SPAN, parent: &state.life, "build");
                // Drawing the weights of a large model takes seconds, in which an abort must be heard.
                tokio::task::spawn_blocking(move || {
                    let _build = build.entered();
                    let build = AssertUnwindSafe(|| build_rank(id, *assignment));
                    let built =
                        catch_unwind(build).unwrap_or_else(|panic| Err(RankError::from_panic(&*panic)));
                    drop(myself.cast(RankMessage::Built(Box::new(built))));
                });
                Ok(())
            }
            RankMessage::Built(built) => match *built {
                Ok(built) => {
                    let (member, reports) = join(&myself, state.id, built).await?;
                    state.member = Some(member);
                    tracing::debug!(rank = state.id, "has its model and waits for the others");
                    (state.tell)(RankEvent::Ready { rank: state.id });
                    reports.into_iter().for_each(|report| (state.tell)(RankEvent::StepDone { report }));
                    Ok(())
                }
                Err(error) => {
                    state.fail("building the model".into(), &error);
                    Ok(())
                }
            },
            RankMessage::Command(RankCommand::Shutdown, _) => {
                myself.stop_children(None);
                myself.stop(None);
                Ok(())
            }
            RankMessage::Command(command, trace) => state.command(command, trace),
            RankMessage::BatchLoaded { batch, .. } => state.batch_loaded(*batch),
            RankMessage::ExpertsLent(experts) => state.experts_lent(*experts),
            RankMessage::PlanDone(done) => state.plan_done(*done),
            RankMessage::UpdateDone(done) => state.update_done(*done),
            RankMessage::Exported { params, result } => state.exported(*params, result),
            RankMessage::Saved { position, result } => state.saved(position, *result),
            RankMessage::ChildFailed { action, error } => {
                state.fail(action, &error);
                Ok(())
            }
            RankMessage::PipelineAborted => {
                (state.tell)(RankEvent::Aborted { rank: state.id });
                Ok(())
            }
        };
        if let Err(error) = done {
            let action = state.doing();
            state.fail(action, &error);
        }
        Ok(())
    }

    /// The default would stop the rank when any child ends; here a child's end is told and the rank stays to answer.
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
        let name = state.member.as_ref().map_or("a starting actor", |member| member.children.name_of(&cell));
        let action = format!("{} in {name}", state.doing());
        state.fail(action, &RankError::Panic { message: cause });
        Ok(())
    }
}
