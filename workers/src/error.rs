//! What can go wrong on a rank, sorted by who has to act.

use std::panic::{AssertUnwindSafe, catch_unwind};

use contraflow_runtime::checkpoint::CheckpointError;
use contraflow_runtime::fabric::FabricError;
pub use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::schedule::Chunk;

/// An operation found nothing where the one before it should have put something: the program's order is broken.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// Something of a chunk.
    #[error("nothing was there for {what} of chunk {chunk} layer {layer}: the program runs it too early")]
    OfChunk {
        /// The value.
        what: &'static str,
        /// Its chunk.
        chunk: Chunk,
        /// Its layer.
        layer: usize,
    },
    /// Something of the update.
    #[error("nothing was there for {what} of bucket {bucket}: the program runs it too early")]
    OfBucket {
        /// The value.
        what: &'static str,
        /// Its bucket.
        bucket: usize,
    },
    /// The program has an update, and no optimizer came with it.
    #[error("nothing was there for {what} of the step: the program runs it too early")]
    OfStep {
        /// The value.
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
        /// What was waited for, in words.
        work: String,
        /// **Units**: seconds.
        waited_s: u64,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}")]
    Content {
        /// Which one.
        path: String,
        /// What was expected and what came.
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
        /// Its name.
        actor: &'static str,
    },
}

impl From<CheckpointError> for RankError {
    fn from(CheckpointError { path, message }: CheckpointError) -> Self {
        RankError::Content { path, message }
    }
}

impl RankError {
    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        match self {
            RankError::Fabric(_) => ErrorKind::Lost,
            RankError::File { .. } | RankError::Content { .. } | RankError::Model { .. } => ErrorKind::Config,
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

    /// From what `catch_unwind` caught.
    pub fn from_panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        RankError::Panic { message: text.unwrap_or_else(|| "no message".into()) }
    }
}
