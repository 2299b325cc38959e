//! What can be wrong with a state folder, in words; and the wall that a panic of the database does not pass.

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
    pub fault: Fault,
}

/// What is wrong with a state folder.
#[derive(Debug, Error)]
pub enum Fault {
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
        /// What stands in the file.
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
    pub(super) fn new(file: &Path, fault: Fault) -> StoreError {
        StoreError { file: file.to_owned(), fault }
    }
}

impl From<redb::Error> for Fault {
    fn from(error: redb::Error) -> Fault {
        use redb::Error as E;
        match error {
            E::DatabaseAlreadyOpen | E::LockProtocolMismatch => Fault::InUse,
            E::PreviousIo | E::LockPoisoned(_) => Fault::Failed,
            E::Io(error) if error.kind() == io::ErrorKind::InvalidData => Fault::Damaged(error.to_string()),
            E::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Fault::Damaged("expected more bytes, got the end of the file".into())
            }
            E::Io(error) => Fault::Io(error),
            E::Corrupted(words) => Fault::Damaged(words),
            other => Fault::Damaged(other.to_string()),
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
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(StoreError::new(file, Fault::Damaged(format!("the database gave up: {words}"))))
        }
    }
}
