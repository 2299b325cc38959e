//! What a checkpoint is on disk, without its tensors: the manifest, and the folder in which checkpoints are committed.
//!
//! A run keeps them in `checkpoints/step-XXXXXXXX`, each with one safetensors shard per rank and `manifest.json`. Ranks write
//! their shards into `step-XXXXXXXX.part`; the job adds the manifest and gives the folder its name in one rename. What
//! has the name is whole. Knows bytes and checksums; what is inside a shard is the workers'.

pub mod folder;
pub mod job_folder;
pub mod manifest;
pub mod remote;
pub mod storage;
#[cfg(test)]
mod tests;

pub use folder::{CheckpointFolder, Companions, Pinned, is_unfinished};
pub use job_folder::{FolderError, JobFolder, Owner};
pub use manifest::{Layout, MANIFEST_FILE, MadeBy, Manifest, Position, ShardFile};
pub use remote::RemoteFolder;
pub use storage::Storage;

use crate::faults::ErrorKind;
use crate::files::Refused;

/// A checkpoint that cannot be used, or not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct CheckpointError {
    /// Which file or folder.
    pub path: String,
    /// What was expected and what came.
    pub message: String,
    /// Who has to act: [`ErrorKind::Config`] where it is not what it should be, [`ErrorKind::Node`] where the system cannot
    /// read it here, [`ErrorKind::Storage`] where it cannot be written.
    pub kind: ErrorKind,
}

impl CheckpointError {
    /// A message about a path.
    pub fn new(path: &std::path::Path, message: impl std::fmt::Display) -> Self {
        CheckpointError {
            path: path.display().to_string(),
            message: message.to_string(),
            kind: ErrorKind::Config,
        }
    }

    /// What the system says about a path. One that is not there, too short or no regular file is not what it should be; all
    /// else is the node's.
    pub fn of_system(path: &std::path::Path, error: std::io::Error) -> Self {
        use std::io::ErrorKind::{NotFound, UnexpectedEof};
        let is_content = matches!(error.kind(), NotFound | UnexpectedEof) || Refused::of(&error).is_some();
        let kind = if is_content { ErrorKind::Config } else { ErrorKind::Node };
        CheckpointError { kind, ..CheckpointError::new(path, error) }
    }

    /// What the system says about a path that is to be written.
    pub fn of_storage(path: &std::path::Path, error: std::io::Error) -> Self {
        CheckpointError { kind: ErrorKind::Storage, ..CheckpointError::new(path, error) }
    }
}

impl From<FolderError> for CheckpointError {
    fn from(error: FolderError) -> Self {
        let kind = error.kind();
        let (path, message) = match error {
            FolderError::File { path, source } => (path, source.to_string()),
            FolderError::Gone { path, message } | FolderError::Foreign { path, message } => (path, message),
        };
        CheckpointError { path: path.display().to_string(), message, kind }
    }
}
