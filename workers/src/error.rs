//! What can go wrong on a rank, sorted by who has to act.

use std::panic::{AssertUnwindSafe, catch_unwind};

use contraflow_runtime::checkpoint::{CheckpointError, FolderError};
use contraflow_runtime::fabric::FabricError;
pub use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::files::Refused;
use contraflow_runtime::files::objects::{ObjectError, ObjectFault};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::Rank;

use crate::data::from_recipe::TextFaults;

/// An operation found nothing where the one before it should have put something: the program's order is broken.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// Something of a chunk.
    #[error("missing {what} of chunk {chunk} layer {layer}: the program runs it too early")]
    OfChunk {
        /// Name of the value.
        what: &'static str,
        /// Its chunk.
        chunk: Chunk,
        /// Its layer.
        layer: usize,
    },
    /// Something of the update.
    #[error("missing {what} of bucket {bucket}: the program runs it too early")]
    OfBucket {
        /// Name of the value.
        what: &'static str,
        /// Its bucket.
        bucket: usize,
    },
    /// The program has an update, and no optimizer came with it.
    #[error("missing {what} of the step: the program runs it too early")]
    OfStep {
        /// Name of the value.
        what: &'static str,
    },
}

/// An error on a rank.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// The data plane.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// The program ran an operation before its input was there.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A panic in an operation or an actor.
    #[error("panicked: {message}")]
    Panic {
        /// The panic's own message.
        message: String,
    },
    /// An operation waited for another lane of its rank until the deadline.
    #[error("waited {waited_s} s for {work}, which never ended")]
    Late {
        /// What was waited for.
        work: String,
        /// **Units**: seconds.
        waited_s: u64,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Path of the file.
        path: String,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}")]
    Content {
        /// Path of the file.
        path: String,
        /// What was expected and what came.
        message: String,
    },
    /// The checkpoint to resume from does not hold what was written.
    #[error("the checkpoint in {dir} is damaged: {message}")]
    Damaged {
        /// Its folder.
        dir: String,
        /// Every fault, with its file.
        message: String,
    },
    /// The shared storage is gone, or does not take what is to be written.
    #[error("{message}")]
    Storage {
        /// The path, what was expected and what came.
        message: String,
    },
    /// What this process is asked to do only another one can.
    #[error("{message}")]
    Node {
        /// What was expected of it and what it has.
        message: String,
    },
    /// A directory of weights does not hold its model.
    #[error("{}", faults.join("\n  "))]
    Model {
        /// Every fault, with its file.
        faults: Vec<String>,
    },
    /// A child actor is gone.
    #[error("{actor} is gone")]
    ActorGone {
        /// Name of the actor.
        actor: &'static str,
    },
}

impl From<CheckpointError> for RankError {
    fn from(error: CheckpointError) -> Self {
        match error.kind {
            ErrorKind::Storage => RankError::Storage { message: error.to_string() },
            ErrorKind::Node => RankError::Node { message: error.to_string() },
            _ => RankError::Content { path: error.path, message: error.message },
        }
    }
}

impl From<ObjectError> for RankError {
    fn from(error: ObjectError) -> Self {
        match error.kind {
            ObjectFault::Failed => RankError::Node { message: error.to_string() },
            _ => RankError::Content { path: error.location, message: error.message },
        }
    }
}

impl From<FolderError> for RankError {
    fn from(error: FolderError) -> Self {
        CheckpointError::from(error).into()
    }
}

impl From<TextFaults> for RankError {
    fn from(faults: TextFaults) -> Self {
        match faults.is_of_node {
            true => RankError::Node { message: faults.to_string() },
            false => RankError::Content { path: faults.key.into(), message: faults.faults.join("; ") },
        }
    }
}

impl RankError {
    /// The rank that was not reached, if that is the error.
    pub fn peer(&self) -> Option<Rank> {
        match self {
            RankError::Fabric(FabricError::Lost { rank, .. }) => Some(Rank::at(*rank)),
            _ => None,
        }
    }

    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        match self {
            RankError::Fabric(error) => kind_of(error),
            // What a path names is the user's, whatever node looks it up.
            RankError::File { source, .. } if Refused::of(source).is_some() => ErrorKind::Config,
            RankError::File { .. } | RankError::Node { .. } => ErrorKind::Node,
            RankError::Storage { .. } => ErrorKind::Storage,
            RankError::Content { .. } | RankError::Model { .. } => ErrorKind::Config,
            RankError::Damaged { .. } => ErrorKind::Damaged,
            RankError::Late { .. } => ErrorKind::Lost,
            RankError::Missing(_) | RankError::Panic { .. } | RankError::ActorGone { .. } => ErrorKind::Bug,
        }
    }

    /// Runs `work`; a panic in it is an error like any other.
    ///
    /// **Errors**: those of `work`, and its panic.
    pub fn catch<T>(work: impl FnOnce() -> Result<T, RankError>) -> Result<T, RankError> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(RankError::from_panic(&*panic)))
    }

    /// An error of the file system, with the path it is about.
    pub fn file(path: &std::path::Path) -> impl Fn(std::io::Error) -> RankError + use<> {
        let path = path.display().to_string();
        move |source| RankError::File { path: path.clone(), source }
    }

    /// An error of writing to the storage: of the shared one if it is one of the file system.
    pub fn in_storage(self) -> Self {
        match self {
            RankError::File { .. } | RankError::Node { .. } => {
                RankError::Storage { message: self.to_string() }
            }
            other => other,
        }
    }

    fn from_panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        RankError::Panic { message: text.unwrap_or_else(|| "no message".into()) }
    }
}

/// A frame that is not what its tag promises comes again in the next formation: only what a lost peer explains is worth one.
fn kind_of(error: &FabricError) -> ErrorKind {
    match error {
        FabricError::Timeout { .. }
        | FabricError::Aborted { .. }
        | FabricError::Lost { .. }
        | FabricError::Formation { .. } => ErrorKind::Lost,
        FabricError::Duplicate { .. } | FabricError::NoSuchRank { .. } | FabricError::Content { .. } => {
            ErrorKind::Bug
        }
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::fabric::{FrameKind, Phase};
    use contraflow_runtime::schedule::Chunk;

    use super::*;
    use crate::comm::address::StepId;

    #[test]
    fn only_what_a_lost_peer_explains_is_worth_another_formation() {
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
        let (expected, got) = ("rows".into(), "ids".into());
        let bugs = [
            FabricError::Content { tag, expected, got },
            FabricError::Duplicate { tag },
            FabricError::NoSuchRank { to: 7 },
        ];
        assert!(bugs.into_iter().all(|error| RankError::from(error).kind() == ErrorKind::Bug));
        let lost = [
            FabricError::Timeout { tag, waited_s: 1.0 },
            FabricError::Aborted { reason: "why".into() },
            FabricError::Lost { rank: 1, reason: "why".into() },
        ];
        assert!(lost.into_iter().all(|error| RankError::from(error).kind() == ErrorKind::Lost));
    }

    #[test]
    fn a_disk_that_fails_is_its_nodes_fault_and_a_damaged_file_is_not() {
        let source = std::io::ErrorKind::StorageFull.into();
        let disk = RankError::File { path: "checkpoints".into(), source };
        let damaged = RankError::Content { path: "manifest.json".into(), message: "damaged".into() };
        assert_eq!([disk.kind(), damaged.kind()], [ErrorKind::Node, ErrorKind::Config]);
    }
}
