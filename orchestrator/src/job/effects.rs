//! What a job is made with, what it wants done, and how it ends. Knows no state.

use std::path::PathBuf;

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::stability::{Divergence, StabilityWatch};
use contraflow_runtime::topology::Rank;

/// What a job is made with.
#[derive(Clone, Debug)]
pub struct JobSetup {
    /// Number of ranks.
    pub world: usize,
    /// Optimizer updates that were made before, by an earlier run of the job.
    pub steps_before: u64,
    /// Optimizer updates to make, those before included.
    pub steps: u64,
    /// Whether the ranks keep checkpoints: after the last step at least.
    pub keeps_checkpoints: bool,
    /// Where the weights go at the end, if anywhere; the folder exists.
    pub export_dir: Option<PathBuf>,
}

/// What is to be done about an event.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEffect {
    /// Send a command to a rank.
    Command {
        /// The recipient.
        rank: Rank,
        /// What it has to do.
        command: RankCommand,
    },
    /// Pass a report on.
    Record(StepReport),
    /// Every rank's part of a checkpoint is on disk: commit it, then call [`Job::committed`](super::Job::committed).
    CommitCheckpoint {
        /// Position of the run.
        position: Position,
        /// State of the stability watch.
        watch: StabilityWatch,
        /// By rank.
        shards: Vec<ShardFile>,
    },
    /// All weights are on disk: put the index beside them, give the folder its name, then call [`Job::weights_published`](super::Job::weights_published).
    PublishWeights {
        /// The folder.
        dir: PathBuf,
        /// By rank.
        files: Vec<ExportedFile>,
    },
    /// The job has ended.
    End(Outcome),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything was done.
    Done {
        /// Mean validation loss in nats per token, and over how many tokens; `None` if there were no validation sequences.
        validation: Option<(f64, u64)>,
    },
    /// The run was stopped between two steps.
    Stopped {
        /// The last step that was made.
        step: u64,
        /// Whether its state is in memory, not in the storage.
        in_memory: bool,
    },
    /// The watch has ended the training, on all ranks before an update.
    Diverged {
        /// Which step, and why.
        divergence: Box<Divergence>,
        /// Sequences used, the batch of that step included.
        cursor: u64,
    },
    /// A rank could not continue.
    Failed {
        /// Rank, action, cause.
        message: String,
        /// Who has to act.
        kind: ErrorKind,
    },
}
