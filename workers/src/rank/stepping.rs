//! The order of things around a task, read from top to bottom: load a batch and borrow the experts, run the programs, report,
//! begin the next step.
//!
//! Tensors only pass through: what a task does is in its programs, which [`crate::engine`] runs.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::layout::resident_bytes;
use contraflow_runtime::stability::Divergence;
use contraflow_runtime::topology::Rank;
use contraflow_runtime::trace::SPAN;
use tracing::{Span, info_span};

use super::expert_shard::ExpertShardMessage;
use super::loader::LoaderMessage;
use super::member::{Upcoming, gone};
use super::{RankState, Status};
use crate::comm::address::StepId;
use crate::data::batches::{Batch, BatchShape, Task, TaskKind, batch_evidence};
use crate::engine::pipeline::{PipelineMessage, PipelineOrder, TaskDone, Updated};
use crate::engine::plans::{train_shape, validation_shape};
use crate::engine::probe::ProbePoint;
use crate::engine::timelines::RankStep;
use crate::error::RankError;
use crate::model::params::Params;

/// The step of the validation after the last one: no step has this number.
const AT_END: u64 = 0;

/// Milliseconds since 1970, by this machine's clock.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl RankState {
    /// Begins a step: with a validation of the weights that the step begins with, if one is due.
    pub(super) fn begin_step(&mut self, step: u64) -> Result<(), RankError> {
        match self.joined()?.validation_before(step) {
            Some(shape) => self.validate_before(step, shape),
            None => self.train(step),
        }
    }

    fn validate_before(&mut self, step: u64, shape: BatchShape) -> Result<(), RankError> {
        let rank = self.id.index();
        self.begin(info_span!(target: SPAN, parent: &self.life, "validate", rank, step));
        let joined = self.joined()?;
        joined.weights_are_whole()?;
        joined.assignment.endpoint.activity().begin_step(step);
        self.gather(step, Task { kind: TaskKind::Evaluate, shape, start: 0 })
    }

    fn train(&mut self, step: u64) -> Result<(), RankError> {
        let rank = self.id.index();
        self.begin(info_span!(target: SPAN, parent: &self.life, "step", rank, step));
        let joined = self.joined()?;
        joined.assignment.endpoint.activity().begin_step(step);
        joined.assignment.probe.at(ProbePoint::Actor { rank, step, name: "rank" });
        joined.sent_before = joined.assignment.endpoint.sent_bytes();
        joined.link_before = joined.assignment.endpoint.link_time();
        let recipe = &joined.assignment.recipe;
        let shape = train_shape(recipe, recipe.batch_size_at(joined.position.tokens));
        let start = joined.position.cursor;
        self.gather(step, Task { kind: TaskKind::Train, shape, start })
    }

    pub(super) fn validate(&mut self) -> Result<(), RankError> {
        self.begin(info_span!(target: SPAN, parent: &self.life, "validate", rank = self.id.number()));
        let joined = self.joined()?;
        joined.weights_are_whole()?;
        let available = joined.assignment.datasets.validation.num_sequences();
        match validation_shape(&joined.assignment.recipe, available) {
            Some(shape) => self.gather(AT_END, Task { kind: TaskKind::Evaluate, shape, start: 0 }),
            None => {
                (self.events)(RankEvent::Validated { rank: self.id, loss: 0.0, tokens: 0 });
                Ok(())
            }
        }
    }

    /// Asks for what a task needs.
    fn gather(&mut self, step: u64, task: Task) -> Result<(), RankError> {
        let joined = self.joined()?;
        joined.began = Instant::now();
        let formation = joined.assignment.formation;
        let children = &joined.children;
        children.experts.cast(ExpertShardMessage::Lend { step }).map_err(gone("the expert shard"))?;
        let batch = if task.kind == TaskKind::Train && joined.upcoming.step == step {
            joined.upcoming.batch.take()
        } else {
            children.loader.cast(LoaderMessage::Load { step, task }).map_err(gone("the loader"))?;
            None
        };
        let id = StepId { formation, phase: task.kind.phase(), step };
        let _load = info_span!(target: SPAN, parent: &self.doing, "load");
        self.status = Status::Gather { id, task, batch, experts: None, _load };
        Ok(())
    }

    /// Asks for the batch of the step after `step`, to be read while that one runs. No rank stops between two steps without
    /// the others, so what is read too much is dropped on all ranks alike.
    fn prefetch(&mut self, step: u64, shape: BatchShape, tokens: u64) -> Result<(), RankError> {
        let joined = self.joined()?;
        if joined.is_last(step) {
            return Ok(());
        }
        let recipe = &joined.assignment.recipe;
        let next = train_shape(recipe, recipe.batch_size_at(joined.position.tokens + tokens));
        let start = joined.position.cursor + shape.global_batch as u64;
        joined.upcoming = Upcoming { step: step + 1, batch: None };
        let task = Task { kind: TaskKind::Train, shape: next, start };
        let load = LoaderMessage::Load { step: step + 1, task };
        joined.children.loader.cast(load).map_err(gone("the loader"))
    }

    pub(super) fn batch_loaded(
        &mut self,
        step: u64,
        kind: TaskKind,
        loaded: Box<Batch>,
    ) -> Result<(), RankError> {
        match &mut self.status {
            Status::Gather { id, task, batch, .. } if id.step == step && task.kind == kind => {
                *batch = Some(loaded);
            }
            _ => self.joined()?.upcoming.batch = Some(loaded),
        }
        self.run_if_gathered()
    }

    pub(super) fn experts_gathered(&mut self, lent: Box<Params>) -> Result<(), RankError> {
        if let Status::Gather { experts, .. } = &mut self.status {
            *experts = Some(lent);
        }
        self.run_if_gathered()
    }

    /// Starts the task once batch and experts are there.
    fn run_if_gathered(&mut self) -> Result<(), RankError> {
        let Status::Gather { id, task, batch, experts, .. } = &mut self.status else { return Ok(()) };
        let (id, task) = (*id, *task);
        let (Some(_), Some(_)) = (&batch, &experts) else { return Ok(()) };
        let (Some(batch), Some(experts)) = (batch.take(), experts.take()) else { return Ok(()) };
        let tokens = batch.denominator as u64;
        self.status = Status::Run { task, tokens };
        let (span, stop) = (self.doing.clone(), self.stop.clone());
        let joined = self.joined()?;
        let wrong = |message| RankError::Content { path: "plan".into(), message };
        let planned = joined.plans.get(task.shape.micro_batches, task.kind).map_err(wrong)?;
        let update = task.kind.has_backward().then(|| joined.update_order(id.step, stop));
        let order = PipelineOrder {
            id,
            kind: task.kind,
            planned,
            scales: joined.scales(task, &batch),
            batches: batch.micro_batches,
            params: joined.take_params(*experts)?,
            update,
            began: joined.began,
            span,
        };
        let begin = PipelineMessage::Begin(Box::new(order));
        joined.children.pipeline.cast(begin).map_err(gone("the pipeline"))?;
        match task.kind {
            TaskKind::Train => self.prefetch(id.step, task.shape, tokens),
            TaskKind::Evaluate => Ok(()),
        }
    }

    pub(super) fn task_done(&mut self, done: TaskDone) -> Result<(), RankError> {
        let TaskDone { id, params, plan, totals, recording, update, is_gathered } = done;
        let Status::Run { task, tokens } = self.status else { return Ok(()) };
        self.status = Status::Idle;
        self.doing = Span::none();
        let rank = self.id.index();
        let joined = self.joined()?;
        joined.give_back(params)?;
        joined.is_gathered = is_gathered;
        let (seconds, step) = (joined.began.elapsed().as_secs_f64(), id.step);
        let recorded = ProbePoint::Recorded { rank, step, recording: &recording, seconds };
        joined.assignment.probe.at(recorded);
        let Some(Updated { order, result, saved, replicated }) = update else {
            return self.evaluated(step, totals.loss, task.shape);
        };
        let bubble_seconds = recording.idle.passes;
        let pipeline = joined.assignment.recipe.topology().coordinates(rank).pipeline;
        joined.assignment.timelines.keep(RankStep { rank, pipeline, step, plan, recording });
        let cursor = joined.position.cursor + task.shape.global_batch as u64;
        let global = match result {
            Ok(global) => global,
            Err(divergence) => {
                let divergence = self.with_batch(divergence, task)?;
                return self.diverged(divergence, cursor);
            }
        };
        let (stop, ends_early, in_memory) = (global.stop, global.ends_early, global.in_memory);
        let report = StepReport {
            tokens,
            learning_rate: order.rates.learning_rate,
            seconds,
            bubble_seconds,
            peak_live_chunks: totals.peak_live_chunks as u32,
            unix_ms: unix_ms(),
            memory_bytes: resident_bytes().unwrap_or(0),
            ..joined.report((rank, id), global)
        };
        let tokens = joined.position.tokens + tokens;
        joined.position = Position { step, cursor, tokens };
        let goes_on = !joined.is_last(step) && !stop && !ends_early;
        joined.forget_earlier(step);
        if let Some(snapshot) = replicated {
            joined.keep(snapshot, &report, in_memory);
        }
        // What is kept in memory says so itself once the buddy has it.
        self.report(report, stop && !ends_early && !in_memory);
        match saved {
            Some(snapshot) => self.save(Box::new(snapshot), goes_on),
            None => self.go_on(goes_on),
        }
    }

    /// The same divergence, with the sequences of the batch in its evidence: those that rank 0 has written are enough.
    fn with_batch(
        &mut self,
        mut divergence: Box<Divergence>,
        task: Task,
    ) -> Result<Box<Divergence>, RankError> {
        let is_first = self.id == Rank::ZERO;
        let assignment = &self.joined()?.assignment;
        if let Some(evidence) = divergence.evidence.as_mut().filter(|_| is_first) {
            evidence.sequences = batch_evidence(&assignment.datasets, assignment.recipe.training.seed, task);
        }
        Ok(divergence)
    }

    /// A validation at the end is reported, one before a step goes into its totals.
    fn evaluated(&mut self, step: u64, loss: f64, shape: BatchShape) -> Result<(), RankError> {
        let rank = self.id;
        if step != AT_END {
            self.joined()?.validated = Some((step, loss));
            return self.train(step);
        }
        let length = self.joined()?.assignment.recipe.training.sequence_length;
        let tokens = (shape.global_batch * length) as u64;
        (self.events)(RankEvent::Validated { rank, loss, tokens });
        Ok(())
    }

    fn report(&self, report: StepReport, stop: bool) {
        let (job, rank, step) = (self.job(), self.id, report.step);
        tracing::debug!(
            job,
            rank = rank.number(),
            step,
            loss = report.loss,
            seconds = report.seconds,
            "step done"
        );
        (self.events)(RankEvent::StepDone { report });
        if stop {
            (self.events)(RankEvent::Stopped { rank, step, in_memory: false });
        }
    }

    pub(super) fn go_on(&mut self, goes_on: bool) -> Result<(), RankError> {
        let next = self.joined()?.position.step + 1;
        if goes_on { self.begin_step(next) } else { Ok(()) }
    }
}
