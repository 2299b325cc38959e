//! The pipeline actor, the DualPipe scheduler of a rank: it issues the programs of a task to the lanes, each lane's
//! operations in order and within a bound ahead of completion, and gives the model back when the task has ended.
//!
//! Completion events serve progress, abort and the timeline; what runs next is in the program, and which program is next in
//! [`super::step`]. Knows no schedule by name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::schedule::{OpId, Plan, Program};
use contraflow_runtime::stability::Divergence;
use contraflow_runtime::trace::SPAN;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::compute::Compute;
use super::in_flight::InFlight;
use super::issue::Unissued;
use super::lanes::{LaneEvent, Lanes, ReportLane};
use super::plans::Planned;
use super::probe::ProbePoint;
use super::recording::{Recorder, Recording};
use super::running::{RankContext, RunningProgram, Workload};
use super::step::{Next, ProgramKind, next};
use super::update::{Update, UpdateOrder};
use crate::checkpoint::Snapshot;
use crate::comm::address::StepId;
use crate::data::batches::TaskKind;
use crate::data::sequences::Sequences;
use crate::error::{Missing, RankError};
use crate::model::Architecture;
use crate::model::micro_batch::{LossScales, MicroBatch};
use crate::model::params::RankParams;
use crate::optimizer::totals::{GlobalTotals, Totals};
use crate::optimizer::update::OptimizerState;

/// Messages of the pipeline actor.
pub enum PipelineMessage {
    /// Run the programs of a task.
    Begin(Box<PipelineOrder>),
    /// A lane has something to say.
    Lane(LaneEvent),
    /// End every wait of the running program at once.
    Abort {
        /// What caused it.
        reason: String,
    },
}

/// A task and what it works on.
pub struct PipelineOrder {
    /// The step it belongs to.
    pub id: StepId,
    /// What is done.
    pub kind: TaskKind,
    /// The plan and its programs.
    pub planned: Arc<Planned>,
    /// The micro-batches, by number.
    pub batches: Vec<Sequences>,
    /// Divisors and factors of the losses.
    pub scales: LossScales,
    /// The parameters, handed over for the task.
    pub params: RankParams,
    /// Inputs of the update, in training.
    pub update: Option<UpdateOrder>,
    /// When the rank began the task: the zero of the timeline.
    pub began: Instant,
    /// What the task belongs to.
    pub span: tracing::Span,
}

/// What a task that has ended leaves.
pub struct TaskDone {
    /// The step it belongs to.
    pub id: StepId,
    /// The parameters.
    pub params: RankParams,
    /// The plan of its passes.
    pub plan: Arc<Plan>,
    /// Sums of this rank over the passes.
    pub totals: Totals,
    /// What it ran, and when.
    pub recording: Recording,
    /// Outcome of the update, in training.
    pub update: Option<Updated>,
    /// Whether all weights are as the update has left them; otherwise the next step gathers those of other ranks' shards.
    pub is_gathered: bool,
}

/// Outcome of an update.
pub struct Updated {
    /// What was asked for.
    pub order: UpdateOrder,
    /// What every rank knows now, or why nothing was updated.
    pub result: Result<GlobalTotals, Box<Divergence>>,
    /// The state after the update, where it is to be written to storage.
    pub saved: Option<Snapshot>,
    /// The state after the update, where it is to be replicated in memory.
    pub replicated: Option<Snapshot>,
}

/// Events of the pipeline for its owner.
pub enum PipelineEvent {
    /// A task has ended.
    Done(Box<TaskDone>),
    /// An operation could not do its part.
    Failed {
        /// What it was, or the action of the plan it belongs to.
        action: String,
        /// The cause.
        error: RankError,
    },
    /// Every wait of the running program has ended.
    Aborted,
}

/// What the actor is made with.
pub struct PipelineSetup {
    /// Takes the events.
    pub report: Arc<dyn Fn(PipelineEvent) + Send + Sync>,
    /// Position in the pipeline.
    pub pipeline: usize,
    /// The architecture of the model.
    pub arch: Arc<Architecture>,
    /// The moments, with this actor while no step runs.
    pub optimizer: OptimizerState,
    /// What the lanes need.
    pub context: RankContext,
    /// What the compute lane may use.
    pub threads: Arc<Threads>,
}

/// The task under way.
struct Current {
    running: Arc<RunningProgram>,
    part: ProgramKind,
    unissued: Unissued,
    completed: usize,
    planned: Arc<Planned>,
    span: tracing::Span,
    recorder: Recorder,
}

/// The actor's state.
pub struct PipelineState {
    report: Arc<dyn Fn(PipelineEvent) + Send + Sync>,
    pipeline: usize,
    arch: Arc<Architecture>,
    /// With the update while a step runs.
    optimizer: Option<OptimizerState>,
    /// What the step before has updated and the next one gathers, by bucket.
    updated: BTreeMap<usize, (u64, Vec<Tensor>)>,
    context: RankContext,
    lanes: Lanes,
    current: Option<Current>,
}

impl PipelineState {
    fn new(setup: PipelineSetup, report_lane: ReportLane) -> Self {
        let PipelineSetup { report, pipeline, arch, optimizer, context, threads } = setup;
        let lanes = Lanes::new(threads, report_lane);
        let (optimizer, updated) = (Some(optimizer), BTreeMap::new());
        PipelineState { report, pipeline, arch, optimizer, updated, context, lanes, current: None }
    }

    fn begin(&mut self, order: PipelineOrder) -> Result<(), RankError> {
        let PipelineOrder { id, kind, planned, batches, scales, params, update, began, span } = order;
        let rank = self.context.endpoint.rank();
        self.context.probe.at(ProbePoint::Actor { rank, step: id.step, name: "pipeline" });
        let batches =
            batches.into_iter().map(|sequences| MicroBatch::new(&self.arch, sequences, &scales)).collect();
        let compute = Compute::new(self.arch.clone(), self.context.stages.clone(), params, kind);
        let update = match update {
            Some(order) => {
                let optimizer = self.optimizer.take();
                Some(Update::new(order, optimizer.ok_or(Missing::OfStep { what: "the optimizer" })?))
            }
            None => None,
        };
        let in_flight = InFlight::default();
        let part = if self.updated.is_empty() { ProgramKind::Passes } else { ProgramKind::Gathering };
        for (bucket, updated) in std::mem::take(&mut self.updated) {
            in_flight.bucket(bucket, |in_flight| in_flight.updated = Some(updated));
        }
        let workload = Workload { batches, in_flight, compute, update };
        let recorder = Recorder::new(began);
        let program = planned.program(self.pipeline, part);
        let running = self.running(part, id, program, workload, &span);
        let unissued = Unissued::default();
        self.start(Current { running, part, unissued, completed: 0, planned, span, recorder });
        Ok(())
    }

    /// A program about to run, under a span of its own.
    fn running(
        &self,
        part: ProgramKind,
        id: StepId,
        program: Arc<Program>,
        workload: Workload,
        span: &tracing::Span,
    ) -> Arc<RunningProgram> {
        let (rank, step) = (self.context.endpoint.rank(), id.step);
        let span = match part {
            ProgramKind::Passes | ProgramKind::Gathering => {
                tracing::info_span!(target: SPAN, parent: span, "program", rank, step)
            }
            ProgramKind::Evidence | ProgramKind::Update | ProgramKind::Skip => {
                tracing::info_span!(target: SPAN, parent: span, "update", rank, step)
            }
            ProgramKind::Gather => tracing::info_span!(target: SPAN, parent: span, "gather", rank, step),
        };
        Arc::new(RunningProgram::new(&self.context, (id, program), workload, span))
    }

    /// Begins the running program.
    fn start(&mut self, mut current: Current) {
        let (unissued, at_once) = Unissued::begin(&current.running.program);
        (current.unissued, current.completed) = (unissued, 0);
        current.recorder.begin(current.running.program.clone());
        at_once.into_iter().for_each(|op| self.lanes.issue(&current.running, op));
        self.current = Some(current);
    }

    /// Takes note of a completed operation; returns what is left once it was the last of the task.
    fn completed(
        &mut self,
        id: StepId,
        op: OpId,
        (began, ended): (Instant, Instant),
    ) -> Result<Option<TaskDone>, RankError> {
        let Some(current) = self.current.as_mut().filter(|current| current.running.id == id) else {
            return Ok(None);
        };
        current.recorder.note(op, began, ended);
        current.completed += 1;
        if current.completed < current.running.program.ops.len() {
            let lane = current.running.program.ops[op].lane;
            if let Some(op) = current.unissued.next(lane) {
                self.lanes.issue(&current.running, op);
            }
            return Ok(None);
        }
        self.advance()
    }

    /// The program has ended: the next one of the task, or its end.
    fn advance(&mut self) -> Result<Option<TaskDone>, RankError> {
        let Some(mut current) = self.current.take() else { return Ok(None) };
        let id = current.running.id;
        let running = Arc::into_inner(current.running).expect("every lane drops a program before it reports");
        let mut workload = running.into_workload();
        let diverged = loop {
            match next(current.part, workload.update.as_mut())? {
                Next::End => break None,
                Next::Diverged(divergence) => break Some(divergence),
                Next::Run(part) => current.part = part,
            }
            let program = current.planned.program(self.pipeline, current.part);
            // A rank that holds every bucket alone has nothing to gather.
            if program.ops.is_empty() {
                continue;
            }
            if current.part == ProgramKind::Skip {
                workload.in_flight.forget_buckets();
            }
            current.running = self.running(current.part, id, program, workload, &current.span);
            self.start(current);
            return Ok(None);
        };
        let recorded = (current.planned.plan.clone(), current.recorder.finish());
        Ok(Some(self.end(id, recorded, workload, diverged)))
    }

    /// Takes the task apart.
    fn end(
        &mut self,
        id: StepId,
        (plan, recording): (Arc<Plan>, Recording),
        workload: Workload,
        diverged: Option<Box<Divergence>>,
    ) -> TaskDone {
        let Workload { in_flight, compute, update, .. } = workload;
        if diverged.is_some() {
            in_flight.forget_buckets();
        }
        self.updated = in_flight.take_updated();
        let left = compute.num_left() + in_flight.num_left();
        debug_assert!(update.is_none() || left == 0, "{left} tensors are left over after step {}", id.step);
        let Compute { mut params, totals, .. } = compute;
        params.clear_gradients();
        let update = update.map(|mut update| {
            let snapshot = update.snapshot.take();
            let saved = snapshot.clone().filter(|_| update.saves());
            let replicated = snapshot.filter(|_| update.replicates());
            let Update { order, optimizer, global, .. } = update;
            self.optimizer = Some(optimizer);
            let result = diverged.map_or_else(|| Ok(global.unwrap_or_default()), Err);
            Updated { order, result, saved, replicated }
        });
        TaskDone { id, params, plan, totals, recording, update, is_gathered: self.updated.is_empty() }
    }

    /// What an operation of the running program belongs to.
    fn describe(&self, op: OpId) -> String {
        let Some(current) = &self.current else { return "no operation".into() };
        let Some(op) = current.running.program.ops.get(op) else { return "no operation".into() };
        let actions = current.planned.plan.actions.get(self.pipeline);
        let action = op.action.and_then(|action| actions?.get(action));
        action.map_or_else(|| op.work.to_string(), |action| format!("action {action}"))
    }

    fn abort(&mut self, reason: &str) {
        match self.current.take() {
            Some(current) => current.running.abort(reason),
            None => self.context.endpoint.abort(reason),
        }
    }
}

/// The pipeline actor.
pub struct Pipeline;

impl Actor for Pipeline {
    type Msg = PipelineMessage;
    type State = PipelineState;
    type Arguments = PipelineSetup;

    async fn pre_start(
        &self,
        myself: ActorRef<PipelineMessage>,
        setup: PipelineSetup,
    ) -> Result<PipelineState, ActorProcessingErr> {
        // The pipeline may be gone.
        let report = move |event| drop(myself.cast(PipelineMessage::Lane(event)));
        Ok(PipelineState::new(setup, Arc::new(report)))
    }

    async fn handle(
        &self,
        _myself: ActorRef<PipelineMessage>,
        message: PipelineMessage,
        state: &mut PipelineState,
    ) -> Result<(), ActorProcessingErr> {
        let done = match message {
            PipelineMessage::Begin(order) => state.begin(*order).map(|()| None),
            PipelineMessage::Lane(LaneEvent::Completed { id, op, began, ended }) => {
                state.completed(id, op, (began, ended))
            }
            PipelineMessage::Lane(LaneEvent::Failed { op, error, .. }) => {
                let action = state.describe(op);
                (state.report)(PipelineEvent::Failed { action, error: *error });
                Ok(None)
            }
            PipelineMessage::Abort { reason } => {
                state.abort(&reason);
                (state.report)(PipelineEvent::Aborted);
                Ok(None)
            }
        };
        match done {
            Ok(None) => {}
            Ok(Some(done)) => (state.report)(PipelineEvent::Done(Box::new(done))),
            Err(error) => (state.report)(PipelineEvent::Failed { action: "the step".into(), error }),
        }
        Ok(())
    }
}
