//! The hub's end of a worker's stream. Knows no messages.

use contraflow_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

/// A stream to a worker.
pub type WorkerSender = mpsc::Sender<Result<v1::ToWorker, Status>>;

/// A worker's open stream.
pub struct WorkerLink {
    /// Counts the streams of this process.
    pub(super) number: u64,
    /// The way down.
    pub(super) down: WorkerSender,
    /// What it was opened with; none where no token is needed.
    pub(super) shown: Option<Shown>,
}

/// The token that a worker has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// The name of the worker's process.
    pub(super) worker: String,
    /// Whose the token is.
    pub(super) user: String,
    /// Until when it is good with the certificate that the worker has shown. **Units**: seconds since 1970.
    pub(super) expires: u64,
}
