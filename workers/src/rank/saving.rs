//! What a rank has put on disk by its checkpointer: its part of a checkpoint, beside the steps, and its weights at the end.
//! And what has to wait for that: the next checkpoint, and the report that the watch has stopped a step.
//!
//! When something is saved is the recipe's business, and how the checkpointer's.

use std::path::PathBuf;
use std::time::Duration;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankEvent};
use contraflow_runtime::fabric::Phase;
use contraflow_runtime::stability::{Divergence, StabilityWatch};
use contraflow_runtime::trace::SPAN;
use tracing::{Span, info_span};

use super::checkpointer::CheckpointerMessage;
use super::expert_shard::ExpertShardMessage;
use super::member::gone;
use super::{RankMessage, RankState, Status};
use crate::checkpoint::Snapshot;
use crate::checkpoint::saves::PATIENCE;
use crate::comm::address::StepId;
use crate::error::RankError;
use crate::model::params::{Params, RankParams};

/// What a rank does once a checkpoint is written.
pub(super) enum AfterSave {
    /// Save the next one, and continue with the run or not.
    Save { snapshot: Box<Snapshot>, goes_on: bool },
    /// Report that the watch has stopped the step: the receiver may rely on the checkpoint.
    Diverge { divergence: Box<Divergence>, cursor: u64 },
}

impl RankState {
    /// Hands a snapshot to the checkpointer and continues while it writes. The step waits for the one before, but not for long
    /// unless it is the last.
    pub(super) fn save(&mut self, snapshot: Box<Snapshot>, goes_on: bool) -> Result<(), RankError> {
        let rank = self.id.index();
        let joined = self.joined()?;
        let position = joined.position;
        if joined.saves.is_under_way() {
            self.status = Status::AwaitSaved { then: AfterSave::Save { snapshot, goes_on } };
            if goes_on {
                self.myself.send_after(PATIENCE, move || RankMessage::SkipSave { step: position.step });
            }
            return Ok(());
        }
        joined.saves.begin();
        let folder =
            joined.assignment.checkpoints.as_ref().ok_or(RankError::ActorGone { actor: "the storage" })?;
        let folder = folder.clone();
        let storage = joined.assignment.endpoint.use_storage();
        let retry = if goes_on { Duration::ZERO } else { joined.assignment.save_timeout };
        let save = CheckpointerMessage::Save { folder, rank, position, snapshot, storage, retry };
        joined.children.checkpointer.cast(save).map_err(gone("the checkpointer"))?;
        self.go_on(goes_on)
    }

    pub(super) fn saved(
        &mut self,
        position: Position,
        result: Result<(StabilityWatch, ShardFile), RankError>,
    ) -> Result<(), RankError> {
        let rank = self.id;
        let is_last = self.joined()?.position.step == position.step && matches!(self.status, Status::Idle);
        match result {
            Ok((watch, shard)) => {
                self.joined()?.saves.succeed();
                (self.events)(RankEvent::ShardSaved { rank, position, watch, shard });
            }
            // The training does not depend on one checkpoint, but on the last one.
            Err(RankError::Storage { message }) if !is_last => {
                let wait = self.joined()?.saves.fail();
                let cause = format!("{message}; tried again in {} s", wait.as_secs());
                self.save_failed(position.step, cause);
            }
            Err(error) => {
                self.fail(format!("saving step {}", position.step), &error);
                return Ok(());
            }
        }
        self.after_save()?;
        self.stop_if_kept()
    }

    /// The state after the last step is in memory: the ranks may stop once nothing is being written any more.
    pub(super) fn kept(&mut self, step: u64) -> Result<(), RankError> {
        self.joined()?.kept = Some(step);
        self.stop_if_kept()
    }

    fn stop_if_kept(&mut self) -> Result<(), RankError> {
        let (rank, is_idle) = (self.id, matches!(self.status, Status::Idle));
        let joined = self.joined()?;
        if is_idle
            && !joined.saves.is_under_way()
            && let Some(step) = joined.kept.take()
        {
            (self.events)(RankEvent::Stopped { rank, step, in_memory: true });
        }
        Ok(())
    }

    /// Says that a checkpoint could not be written; it is tried again.
    pub(super) fn save_failed(&mut self, step: u64, cause: String) {
        let (job, rank) = (self.job(), self.id);
        tracing::warn!(job, rank = rank.number(), step, "the checkpoint could not be written: {cause}");
        (self.events)(RankEvent::SaveFailed { rank, step, cause });
    }

    /// Continues without the checkpoint of a step that has waited too long for the one before.
    pub(super) fn skip_save(&mut self, step: u64) -> Result<(), RankError> {
        let Status::AwaitSaved { then: AfterSave::Save { goes_on: true, .. } } = self.status else {
            return Ok(());
        };
        if self.joined()?.position.step != step {
            return Ok(());
        }
        let (job, rank) = (self.job(), self.id.number());
        tracing::warn!(job, rank, step, "the checkpoint is skipped: the one before is still being written");
        self.status = Status::Idle;
        self.go_on(true)
    }

    fn after_save(&mut self) -> Result<(), RankError> {
        let rank = self.id;
        match std::mem::replace(&mut self.status, Status::Idle) {
            Status::AwaitSaved { then: AfterSave::Save { snapshot, goes_on } } => {
                self.save(snapshot, goes_on)
            }
            Status::AwaitSaved { then: AfterSave::Diverge { divergence, cursor } } => {
                (self.events)(RankEvent::Diverged { rank, divergence, cursor });
                Ok(())
            }
            status => {
                self.status = status;
                Ok(())
            }
        }
    }

    /// Nothing was updated: the rank waits for what the orchestrator makes of it.
    pub(super) fn diverged(&mut self, divergence: Box<Divergence>, cursor: u64) -> Result<(), RankError> {
        let rank = self.id;
        if self.joined()?.saves.is_under_way() {
            self.status = Status::AwaitSaved { then: AfterSave::Diverge { divergence, cursor } };
        } else {
            (self.events)(RankEvent::Diverged { rank, divergence, cursor });
        }
        Ok(())
    }

    /// Borrows the experts first.
    pub(super) fn begin_export(&mut self, dir: PathBuf) -> Result<(), RankError> {
        self.begin(info_span!(target: SPAN, parent: &self.life, "export", rank = self.id.number()));
        self.joined()?.weights_are_whole()?;
        self.status = Status::Lend { dir };
        let experts = &self.joined()?.children.experts;
        experts.cast(ExpertShardMessage::Lend { step: 0 }).map_err(gone("the expert shard"))
    }

    pub(super) fn export(&mut self, dir: PathBuf, experts: Params) -> Result<(), RankError> {
        self.status = Status::Export;
        let joined = self.joined()?;
        let params = Box::new(joined.take_params(experts)?);
        let endpoint = Box::new(joined.assignment.endpoint.clone());
        let (formation, step) = (joined.assignment.formation, joined.position.step);
        let id = StepId { formation, phase: Phase::Update, step };
        let world = joined.assignment.recipe.topology().world();
        let config = Box::new(joined.assignment.recipe.model_config.clone());
        let folder = joined.assignment.checkpoints.clone();
        let export = CheckpointerMessage::Export { dir, folder, endpoint, id, world, config, params };
        joined.children.checkpointer.cast(export).map_err(gone("the checkpointer"))
    }

    pub(super) fn exported(
        &mut self,
        params: RankParams,
        result: Result<ExportedFile, RankError>,
    ) -> Result<(), RankError> {
        let rank = self.id;
        let file = result?;
        let Status::Export = self.status else { return Ok(()) };
        self.status = Status::Idle;
        self.doing = Span::none();
        let joined = self.joined()?;
        joined.give_back(params)?;
        (self.events)(RankEvent::Exported { rank, file });
        Ok(())
    }
}
