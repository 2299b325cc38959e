//! What the orchestrator and a rank say to each other, as plain values. In one process they go from mailbox to mailbox;
//! over a network they go by the worker link.
//!
//! Commands are imperative, events past tense.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod outbox;
pub mod text;
pub mod wire;

use std::path::PathBuf;

use contraflow_proto::StepReport;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Position, ShardFile};
use crate::faults::ErrorKind;
use crate::stability::{Divergence, StabilityWatch};
use crate::topology::Rank;

/// To a rank.
#[derive(Clone, Debug, PartialEq)]
pub enum RankCommand {
    /// Train from this step on, to the end of the recipe. The ranks commit the steps among themselves.
    BeginStep {
        /// Optimizer update, counted from 1.
        step: u64,
    },
    /// Finish the running step, keep the state after it, and wait. The ranks agree on the step among themselves, so that
    /// all of them stop after the same one.
    Stop {
        /// It is kept in memory, and not written to the storage.
        in_memory: bool,
    },
    /// Run the validation sequences forward.
    Validate,
    /// Write the weights this rank answers for into a folder, in the published format.
    Export {
        /// The folder; it exists.
        dir: PathBuf,
    },
    /// Give up what is under way.
    Abort {
        /// The reason, as it is reported to the job.
        reason: String,
    },
    /// End.
    Shutdown,
}

/// From a rank.
#[derive(Clone, Debug, PartialEq)]
pub enum RankEvent {
    /// The rank has its model and waits for commands.
    Ready {
        /// The reporting rank.
        rank: Rank,
    },
    /// The rank has taken its state over from memory, in another layout.
    StateMoved {
        /// The reporting rank.
        rank: Rank,
        /// How much of it moved.
        moved: MovedBytes,
    },
    /// An update has been made.
    StepDone {
        /// Who, which step, and what was measured.
        report: StepReport,
    },
    /// The ranks have agreed to stop after this step.
    Stopped {
        /// The reporting rank.
        rank: Rank,
        /// The last step.
        step: u64,
        /// The state after it is in memory, of this rank and its buddy, and need not be in the storage.
        in_memory: bool,
    },
    /// The rank's part of a checkpoint is on disk, synced, in the unfinished folder of its step.
    ShardSaved {
        /// The reporting rank.
        rank: Rank,
        /// Position of the run.
        position: Position,
        /// State of the stability watch: on every rank the same.
        watch: StabilityWatch,
        /// What was written.
        shard: ShardFile,
    },
    /// The rank's part of a checkpoint could not be written. It continues, and tries again with a later step.
    SaveFailed {
        /// The reporting rank.
        rank: Rank,
        /// Of which step.
        step: u64,
        /// The cause.
        cause: String,
    },
    /// The validation sequences have been run.
    Validated {
        /// The reporting rank.
        rank: Rank,
        /// This rank's share of the mean loss, in nats per token.
        loss: f64,
        /// Tokens over all ranks.
        tokens: u64,
    },
    /// The rank's weights are on disk.
    Exported {
        /// The reporting rank.
        rank: Rank,
        /// What it wrote.
        file: ExportedFile,
    },
    /// The rank gave up on command.
    Aborted {
        /// The reporting rank.
        rank: Rank,
    },
    /// The watch has stopped a step: no rank has updated its weights, every rank says the same and waits for a command.
    Diverged {
        /// The reporting rank.
        rank: Rank,
        /// Which step and why.
        divergence: Box<Divergence>,
        /// Sequences used, the batch of that step included.
        cursor: u64,
    },
    /// The rank cannot continue.
    Failed {
        /// The reporting rank.
        rank: Rank,
        /// What it was doing.
        action: String,
        /// The cause.
        cause: String,
        /// Who has to act.
        kind: ErrorKind,
        /// The rank that it could not reach, if that is the cause.
        peer: Option<Rank>,
    },
}

impl RankEvent {
    /// Who it is from.
    pub fn rank(&self) -> Rank {
        match self {
            RankEvent::Ready { rank }
            | RankEvent::StateMoved { rank, .. }
            | RankEvent::Stopped { rank, .. }
            | RankEvent::ShardSaved { rank, .. }
            | RankEvent::SaveFailed { rank, .. }
            | RankEvent::Validated { rank, .. }
            | RankEvent::Exported { rank, .. }
            | RankEvent::Aborted { rank }
            | RankEvent::Diverged { rank, .. }
            | RankEvent::Failed { rank, .. } => *rank,
            RankEvent::StepDone { report } => Rank::new(report.rank),
        }
    }
}

/// What has been taken over of a state in memory. **Units**: bytes of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MovedBytes {
    /// From other processes.
    pub moved: u64,
    /// What could not but come from there.
    pub least: u64,
    /// All of it.
    pub needed: u64,
}

impl MovedBytes {
    /// Both together.
    pub fn and(self, other: MovedBytes) -> MovedBytes {
        MovedBytes {
            moved: self.moved.saturating_add(other.moved),
            least: self.least.saturating_add(other.least),
            needed: self.needed.saturating_add(other.needed),
        }
    }
}

/// One file of published weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedFile {
    /// File name within the folder; empty if the rank answers for no weight.
    pub file: String,
    /// Names of the tensors inside.
    pub tensors: Vec<String>,
    /// **Units**: bytes of tensor data.
    pub bytes: u64,
}
