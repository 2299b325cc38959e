//! The order of things within a step, read from top to bottom: load a batch and borrow the experts, run the plan, update,
//! report, begin the next one. A validation is the first half of it.
//!
//! Tensors only pass through: what the lanes share while a plan runs is in [`crate::engine::transit`].

use std::time::Instant;

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::fabric::Phase;
use contraflow_runtime::schedule::Mode;
use contraflow_runtime::trace::SPAN;
use tracing::{Span, info_span};

use super::expert_shard::ExpertShardMessage;
use super::loader::LoaderMessage;
use super::member::{Upcoming, gone};
use super::{RankState, Task};
use crate::comm::address::StepId;
use crate::data::batches::{Batch, BatchShape, Part};
use crate::engine::pipeline::{PipelineMessage, PipelineOrder, PlanDone};
use crate::engine::plans::{train_shape, validation_shape};
use crate::engine::probe::ProbePoint;
use crate::error::RankError;
use crate::model::micro_batch::LossScales;
use crate::model::params::{Params, RankParams};
use crate::optimizer::actor::{OptimizerMessage, UpdateDone};
use crate::optimizer::update::UpdateOrder;

impl RankState {
    pub(super) fn begin_step(&mut self, step: u64) -> Result<(), RankError> {
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

    pub(super) fn validate(&mut self) -> Result<(), RankError> {
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
        children.experts.cast(ExpertShardMessage::Lend { step }).map_err(gone("the expert shard"))?;
        let batch = if phase == Phase::Train && member.upcoming.step == step {
            member.upcoming.batch.take()
        } else {
            children.loader.cast(LoaderMessage::Load { step, part, shape }).map_err(gone("the loader"))?;
            None
        };
        let id = StepId { job, generation, phase, step };
        let _load = info_span!(target: SPAN, parent: &self.doing, "load");
        self.task = Task::Gather { id, shape, batch, experts: None, _load };
        Ok(())
    }

    /// Asks for the batch of the step after `step`, to be read while that one runs. Nobody stops between two steps without
    /// the others, so what is read too much is dropped on all ranks alike.
    fn prefetch(&mut self, step: u64, shape: BatchShape, tokens: u64) -> Result<(), RankError> {
        let member = self.member()?;
        if member.is_last(step) {
            return Ok(());
        }
        let recipe = &member.assignment.recipe;
        let next = train_shape(recipe, recipe.batch_size_at(member.position.tokens + tokens));
        let part = Part::Train { cursor: member.position.cursor + shape.global_batch as u64 };
        member.upcoming = Upcoming { step: step + 1, batch: None };
        let load = LoaderMessage::Load { step: step + 1, part, shape: next };
        member.children.loader.cast(load).map_err(gone("the loader"))
    }

    pub(super) fn batch_loaded(&mut self, step: u64, loaded: Batch) -> Result<(), RankError> {
        match &mut self.task {
            Task::Gather { id, batch, .. } if id.step == step => *batch = Some(loaded),
            _ => self.member()?.upcoming.batch = Some(loaded),
        }
        self.run_if_gathered()
    }

    pub(super) fn experts_gathered(&mut self, lent: Params) -> Result<(), RankError> {
        if let Task::Gather { experts, .. } = &mut self.task {
            *experts = Some(lent);
        }
        self.run_if_gathered()
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
        let begin = PipelineMessage::BeginStep(Box::new(order));
        member.children.pipeline.cast(begin).map_err(gone("the pipeline"))?;
        match id.phase {
            Phase::Train => self.prefetch(id.step, shape, denominators.0 as u64),
            _ => Ok(()),
        }
    }

    pub(super) fn plan_done(&mut self, done: PlanDone) -> Result<(), RankError> {
        let PlanDone { id, params, totals, bubble, .. } = done;
        let Task::Run { shape, bubble_s, peak_live_chunks, .. } = &mut self.task else { return Ok(()) };
        *bubble_s = bubble.as_secs_f64();
        *peak_live_chunks = totals.peak_live_chunks;
        let shape = *shape;
        if id.phase == Phase::Validate {
            return self.validated(params, totals.loss, shape);
        }
        let (stop, span) = (self.stop, self.doing.clone());
        let member = self.member()?;
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

    fn validated(&mut self, params: RankParams, loss: f64, shape: BatchShape) -> Result<(), RankError> {
        let rank = self.id;
        let member = self.member()?;
        member.give_back(params)?;
        let tokens = (shape.global_batch * member.assignment.recipe.training.sequence_length) as u64;
        self.task = Task::Idle;
        self.doing = Span::none();
        (self.tell)(RankEvent::Validated { rank, loss, tokens });
        Ok(())
    }

    pub(super) fn update_done(&mut self, done: UpdateDone) -> Result<(), RankError> {
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
        member.give_back(params)?;
        let stop = global.stop;
        let mut report = member.report(id, &order, global, denominators.0 as u64);
        report.bubble_seconds = bubble_s;
        report.peak_live_chunks = peak_live_chunks as u32;
        let step = order.id.step;
        member.position = Position {
            step,
            cursor: member.position.cursor + shape.global_batch as u64,
            tokens: member.position.tokens + report.tokens,
        };
        let is_last = member.is_last(step);
        if let Some(snapshot) = kept {
            member.keep(snapshot, &report);
        }
        self.report(report, stop);
        let goes_on = !is_last && !stop;
        match saved {
            Some(snapshot) => self.save(Box::new(snapshot), goes_on),
            None => self.go_on(goes_on),
        }
    }

    fn report(&self, report: StepReport, stop: bool) {
        let (job, rank, step) = (self.job(), self.id, report.step);
        tracing::debug!(job, rank, step, loss = report.loss, seconds = report.seconds, "step done");
        (self.tell)(RankEvent::StepDone { report });
        if stop {
            (self.tell)(RankEvent::Stopped { rank, step });
        }
    }

    pub(super) fn go_on(&mut self, goes_on: bool) -> Result<(), RankError> {
        let next = self.member()?.position.step + 1;
        if goes_on { self.begin_step(next) } else { Ok(()) }
    }
}
