//! Inputs and outputs of the core: events, effects, and commands to workers. Plain values; the decisions are the core's.

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::{Pinned, Position, ShardFile};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use super::facts::{Fact, JobSpec};
use super::members::Registration;
use crate::recovery::ReplicaShard;

/// What a worker says when its stream opens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attachment {
    /// Who it is.
    pub registration: Registration,
    /// Formations it hosts ranks of.
    pub hosted: Vec<Hosted>,
    /// Formations it has left and of whose state it keeps something.
    pub left: Vec<Left>,
    /// The state of the orchestrator whose member it was last; 0: none so far.
    pub state: u64,
    /// The highest incarnation of that state it has seen.
    pub incarnation: u64,
    /// The most facts of that state it has seen.
    pub facts: u64,
    /// The id of its storage.
    pub storage_id: String,
}

/// Something has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A job is submitted.
    Submit(Box<JobSpec>),
    /// A job is cancelled.
    Cancel {
        /// One that is over stays as it is.
        job: JobId,
        /// Shown in the log.
        reason: String,
    },
    /// A job that has failed or was cancelled is taken up again.
    Retry {
        /// Any other one stays as it is.
        job: JobId,
    },
    /// A job is to have so many ranks.
    Scale {
        /// One that is over stays as it is.
        job: JobId,
        /// At most this many, however few others need; 0: as it was submitted.
        ranks: usize,
    },
    /// A node is drained.
    Drain {
        /// Its label.
        node: String,
    },
    /// A drained node takes ranks again.
    Undrain {
        /// Its label.
        node: String,
    },
    /// A worker's stream is open.
    Attached(Box<Attachment>),
    /// A worker has left a formation.
    Left {
        /// Id of the worker.
        worker: u64,
        /// What it has left, and what it keeps.
        left: Left,
    },
    /// A worker asks to leave.
    LeaveRequested {
        /// Id of the worker.
        worker: u64,
    },
    /// A worker's stream has ended.
    Detached {
        /// Id of the worker.
        worker: u64,
    },
    /// A worker may not be a member any more: its token or its certificate was taken back.
    Expelled {
        /// Id of the worker.
        worker: u64,
        /// Shown in the log.
        why: String,
    },
    /// A worker is alive.
    Beat {
        /// Id of the worker.
        worker: u64,
        /// How far its ranks are.
        progress: Vec<Progress>,
    },
    /// An event of a rank.
    Rank {
        /// Who hosts it.
        worker: u64,
        /// Address of the rank.
        from: RankAddress,
        /// What the rank reports.
        event: Box<RankEvent>,
    },
    /// A job that has ended is to be removed with its files.
    Remove {
        /// Which one.
        job: JobId,
    },
    /// A worker has removed a job's folder, or could not.
    Removed {
        /// Id of the worker.
        worker: u64,
        /// Whose folder it was.
        job: JobId,
        /// The error, if it failed.
        result: Result<(), String>,
    },
    /// What room the storage has after a commit.
    Space {
        /// Id of the worker.
        worker: u64,
        /// In whose folder.
        formation: FormationId,
        /// What room there is.
        space: Space,
    },
    /// What the flight recorders of a formation tell.
    FlightRead {
        /// Id of the worker that has read them.
        worker: u64,
        /// Whose ranks they are of.
        formation: FormationId,
        /// For people; empty if nothing can be said.
        says: String,
    },
    /// Result of a commit or a publication.
    Committed {
        /// Who did it.
        worker: u64,
        /// In which formation.
        formation: FormationId,
        /// Of the checkpoint; `None`: the exported weights.
        position: Option<Position>,
        /// The error, if it failed.
        result: Result<(), String>,
    },
    /// Time has passed.
    Tick,
}

impl Event {
    /// Whether a worker was heard.
    pub(super) fn is_from_worker(&self) -> bool {
        match self {
            Event::Attached(_)
            | Event::Left { .. }
            | Event::LeaveRequested { .. }
            | Event::Beat { .. }
            | Event::Rank { .. }
            | Event::Committed { .. }
            | Event::Removed { .. }
            | Event::FlightRead { .. }
            | Event::Space { .. } => true,
            Event::Submit(_)
            | Event::Cancel { .. }
            | Event::Retry { .. }
            | Event::Scale { .. }
            | Event::Remove { .. }
            | Event::Drain { .. }
            | Event::Undrain { .. }
            | Event::Detached { .. }
            | Event::Expelled { .. }
            | Event::Tick => false,
        }
    }
}

/// What room a storage has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What may still be written. **Units**: bytes.
    pub free: u64,
    /// What a checkpoint takes. **Units**: bytes.
    pub checkpoint: u64,
}

/// A formation of which a worker hosts ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosted {
    /// May be one that this state knows nothing of.
    pub formation: FormationId,
    /// Those that are here.
    pub ranks: Vec<Rank>,
    /// How many ranks the formation has.
    pub world: usize,
    /// Steps of the recipe; 0: not known.
    pub steps: u64,
    /// The last step whose reports it knows to be durable.
    pub durable: u64,
}

/// A formation that a worker has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The latest of its job that was there.
    pub formation: FormationId,
    /// Of the state of its ranks, what the worker keeps in memory.
    pub replicas: Vec<ReplicaShard>,
}

/// How far a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Address of the rank.
    pub rank: RankAddress,
    /// The running step.
    pub step: u64,
    /// Finished operations of it and waits for other ranks.
    pub operations: u64,
    /// Whether something is under way that needs no other rank.
    pub is_at_work: bool,
    /// Whether it reads from storage or writes to it.
    pub uses_storage: bool,
}

/// Something is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Keep a fact, durably, before anything that follows.
    Persist(Fact),
    /// Send a command to a worker.
    Send {
        /// Id of the recipient.
        worker: u64,
        /// What it has to do.
        command: WorkerCommand,
    },
    /// Put a rank's report with those of the other ranks.
    Record {
        /// Whose step it is.
        job: JobId,
        /// The report.
        report: Box<StepReport>,
    },
    /// Write a line into a job's log.
    Log {
        /// Whose log it is.
        job: JobId,
        /// Whether somebody should look at it.
        severity: Severity,
        /// Text of the line.
        line: String,
    },
}

/// How bad it is what a line of a log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// All is as it should be.
    Info,
    /// Something was lost or has failed, and the job goes on.
    Warn,
    /// A job has failed.
    Error,
}

impl Severity {
    /// As it stands in a log.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "INFO",
            Severity::Warn => "WARN",
            Severity::Error => "ERROR",
        }
    }
}

/// A command to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum WorkerCommand {
    /// It is a member.
    Welcome,
    /// Leave the cluster.
    Reject {
        /// Shown in the log.
        why: String,
    },
    /// Its lease has expired: its stream ends, and it may attach again.
    Disconnect,
    /// Host these ranks of a job's running formation.
    Assign {
        /// The running one.
        formation: FormationId,
        /// Those of it that belong to this worker.
        ranks: Vec<Rank>,
    },
    /// To a rank.
    Rank {
        /// Address of the rank.
        to: RankAddress,
        /// What it has to do.
        command: RankCommand,
    },
    /// Leave a formation, and all earlier ones of the job.
    Release {
        /// Earlier ones of its job end with it.
        formation: FormationId,
        /// Shown in the log.
        reason: String,
        /// Whether the worker keeps its replicas of the ranks' state in memory and reports them.
        keep: bool,
    },
    /// Commit a checkpoint.
    CommitCheckpoint {
        /// Whose ranks wrote it, or which was left before it was written down.
        formation: FormationId,
        /// Position of the run.
        position: Position,
        /// State of the stability watch.
        watch: StabilityWatch,
        /// By rank.
        shards: Vec<ShardFile>,
        /// The checkpoints that are known to stand: they stay.
        pinned: Pinned,
    },
    /// Bring what is kept in memory of a job's state to the ranks of its running formation, which has none there.
    Bring {
        /// The running one.
        formation: FormationId,
        /// By what the worker goes among the ranks: a number after theirs.
        place: Rank,
    },
    /// Say what the flight recorders of a formation that was lost tell.
    ReadFlight {
        /// Whose ranks they are of.
        formation: FormationId,
        /// Those that are known to have been lost.
        lost: Vec<Rank>,
    },
    /// Remove files of a job that has ended.
    Discard {
        /// Which job.
        job: JobId,
        /// Its latest formation: what a later one has written stays.
        last: Generation,
        /// The whole folder; otherwise only what was not finished in it.
        everything: bool,
    },
    /// Put exported weights in place.
    PublishWeights {
        /// Whose ranks wrote them.
        formation: FormationId,
        /// By rank.
        files: Vec<ExportedFile>,
    },
}
