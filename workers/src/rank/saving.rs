//! What a rank has put on disk by its checkpointer: its part of a checkpoint, beside the steps, and its weights at the end.
//! And what has to wait for that: the next checkpoint, and the report that the watch has stopped a step.
//!
//! When something is saved is the recipe's business, and how the checkpointer's.

use std::path::PathBuf;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankEvent};
use contraflow_runtime::stability::{Divergence, StabilityWatch};
use contraflow_runtime::trace::SPAN;
use tracing::{Span, info_span};

use super::checkpointer::CheckpointerMessage;
use super::expert_shard::ExpertShardMessage;
use super::member::gone;
use super::{RankState, Status};
use crate::checkpoint::Snapshot;
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
    /// Hands a snapshot to the checkpointer and continues while it writes.
    pub(super) fn save(&mut self, snapshot: Box<Snapshot>, goes_on: bool) -> Result<(), RankError> {
        let rank = self.id.index();
        let joined = self.joined()?;
        if joined.is_saving {
            let _at_work = joined.assignment.endpoint.work();
            self.status = Status::AwaitSaved { then: AfterSave::Save { snapshot, goes_on }, _at_work };
            return Ok(());
        }
        joined.is_saving = true;
        let position = joined.position;
        let folder =
            joined.assignment.checkpoints.as_ref().ok_or(RankError::ActorGone { actor: "the storage" })?;
        let save =
            CheckpointerMessage::Save { dir: folder.unfinished(position.step), rank, position, snapshot };
        joined.children.checkpointer.cast(save).map_err(gone("the checkpointer"))?;
        self.go_on(goes_on)
    }

    pub(super) fn saved(
        &mut self,
        position: Position,
        result: Result<(StabilityWatch, ShardFile), RankError>,
    ) -> Result<(), RankError> {
        let rank = self.id;
        match result {
            Ok((watch, shard)) => (self.events)(RankEvent::ShardSaved { rank, position, watch, shard }),
            Err(error) => {
                self.fail(format!("saving step {}", position.step), &error);
                return Ok(());
            }
        }
        self.joined()?.is_saving = false;
        match std::mem::replace(&mut self.status, Status::Idle) {
            Status::AwaitSaved { then: AfterSave::Save { snapshot, goes_on }, .. } => {
                self.save(snapshot, goes_on)
            }
            Status::AwaitSaved { then: AfterSave::Diverge { divergence, cursor }, .. } => {
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
        let joined = self.joined()?;
        if joined.is_saving {
            let _at_work = joined.assignment.endpoint.work();
            self.status = Status::AwaitSaved { then: AfterSave::Diverge { divergence, cursor }, _at_work };
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
        let rank = self.id.index();
        let joined = self.joined()?;
        let params = Box::new(joined.take_params(experts)?);
        let world = joined.assignment.recipe.topology().world();
        let config = Box::new(joined.assignment.recipe.model_config.clone());
        let export = CheckpointerMessage::Export { dir, rank, world, config, params };
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
