//! What a rank has put on disk by its checkpointer: its part of a checkpoint, beside the steps, and its weights at the end.
//! And what has to wait for that: the next checkpoint, and the word that the watch has stopped a step.
//!
//! When something is saved is the recipe's business, and how the checkpointer's.

use std::path::PathBuf;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankEvent};
use contraflow_runtime::trace::SPAN;
use contraflow_runtime::watch::{Divergence, Watch};
use tracing::{Span, info_span};

use super::checkpointer::CheckpointerMessage;
use super::expert_shard::ExpertShardMessage;
use super::member::gone;
use super::{RankState, Status};
use crate::checkpoint::Snapshot;
use crate::error::RankError;
use crate::model::params::{Params, RankParams};

/// What a rank does once a checkpoint is written.
pub(super) enum Then {
    /// Save the next one, and go on with the run or not.
    Save { snapshot: Box<Snapshot>, goes_on: bool },
    /// Tell that the watch has stopped the step: whoever hears it may count on the checkpoint.
    Diverge { divergence: Box<Divergence>, cursor: u64 },
}

impl RankState {
    /// Hands a snapshot to the checkpointer and goes on while it writes.
    pub(super) fn save(&mut self, snapshot: Box<Snapshot>, goes_on: bool) -> Result<(), RankError> {
        let rank = self.id.index();
        let member = self.member()?;
        if member.is_saving {
            let _at_work = member.assignment.endpoint.work();
            self.status = Status::AwaitSaved { then: Then::Save { snapshot, goes_on }, _at_work };
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

    pub(super) fn saved(
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
        match std::mem::replace(&mut self.status, Status::Idle) {
            Status::AwaitSaved { then: Then::Save { snapshot, goes_on }, .. } => self.save(snapshot, goes_on),
            Status::AwaitSaved { then: Then::Diverge { divergence, cursor }, .. } => {
                (self.tell)(RankEvent::Diverged { rank, divergence, cursor });
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
        let member = self.member()?;
        if member.is_saving {
            let _at_work = member.assignment.endpoint.work();
            self.status = Status::AwaitSaved { then: Then::Diverge { divergence, cursor }, _at_work };
        } else {
            (self.tell)(RankEvent::Diverged { rank, divergence, cursor });
        }
        Ok(())
    }

    /// Borrows the experts first.
    pub(super) fn begin_export(&mut self, dir: PathBuf) -> Result<(), RankError> {
        self.begin(info_span!(target: SPAN, parent: &self.life, "export", rank = self.id.number()));
        self.member()?.weights_are_whole()?;
        self.status = Status::Lend { dir };
        let experts = &self.member()?.children.experts;
        experts.cast(ExpertShardMessage::Lend { step: 0 }).map_err(gone("the expert shard"))
    }

    pub(super) fn export(&mut self, dir: PathBuf, experts: Params) -> Result<(), RankError> {
        self.status = Status::Export;
        let rank = self.id.index();
        let member = self.member()?;
        let params = Box::new(member.take_params(experts)?);
        let world = member.assignment.recipe.topology().world();
        let config = Box::new(member.assignment.recipe.model_config.clone());
        let export = CheckpointerMessage::Export { dir, rank, world, config, params };
        member.children.checkpointer.cast(export).map_err(gone("the checkpointer"))
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
        let member = self.member()?;
        member.give_back(params)?;
        (self.tell)(RankEvent::Exported { rank, file });
        Ok(())
    }
}
