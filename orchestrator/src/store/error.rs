//! The errors of a state folder, and the boundary that catches panics of the database.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The file, and what is wrong with it.
#[derive(Debug, Error)]
#[error("{}: {fault}", file.display())]
pub struct StoreError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong.
    #[source]
    pub fault: StoreErrorKind,
}

/// What is wrong with a state folder.
#[derive(Debug, Error)]
pub enum StoreErrorKind {
    /// Another process has it open.
    #[error("in use by another orchestrator; stop that one or choose another state folder")]
    InUse,
    /// Written by another version.
    #[error(
        "expected format {expected}, got {got}: written by another version of contraflow; choose a new state folder, \
         checkpoints in the storage stay as they are",
        expected = super::FORMAT
    )]
    Format {
        /// The format of the file.
        got: u64,
    },
    /// Not what was written.
    #[error("damaged or no event log: {0}")]
    Damaged(String),
    /// The disk.
    #[error("cannot be read or written: {0}")]
    Io(#[source] io::Error),
    /// A write failed; what is on the disk is known only after a new start.
    #[error("cannot be written any more since an earlier write failed; start the orchestrator again")]
    Failed,
    /// The call asks for what cannot be; nothing was written.
    #[error("{0}")]
    Refused(String),
}

impl StoreError {
    pub(super) fn new(file: &Path, fault: StoreErrorKind) -> StoreError {
        StoreError { file: file.to_owned(), fault }
    }
}

impl From<redb::Error> for StoreErrorKind {
    fn from(error: redb::Error) -> StoreErrorKind {
        use redb::Error as E;
        match error {
            E::DatabaseAlreadyOpen | E::LockProtocolMismatch => StoreErrorKind::InUse,
            E::PreviousIo | E::LockPoisoned(_) => StoreErrorKind::Failed,
            E::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                StoreErrorKind::Damaged(error.to_string())
            }
            E::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                StoreErrorKind::Damaged("expected more bytes, got the end of the file".into())
            }
            E::Io(error) => StoreErrorKind::Io(error),
            E::Corrupted(reason) => StoreErrorKind::Damaged(reason),
            other => StoreErrorKind::Damaged(other.to_string()),
        }
    }
}

/// Runs what asks the database. It checks its file when it opens it, yet says of itself that a file changed by others may
/// make it panic; that ends here, as damage. Its locks are poisoned then, so that every later call fails too.
pub(super) fn contain<T>(file: &Path, ask: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(StoreError::new(file, error.into())),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason =
                reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(StoreError::new(file, StoreErrorKind::Damaged(format!("the database failed: {reason}"))))
        }
    }
}
