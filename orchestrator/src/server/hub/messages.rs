//! What the hub is sent. Knows no state.

use contraflow_runtime::topology::JobId;
use tokio::sync::oneshot;
use tonic::Status;

use super::Hub;
use crate::core::Event;
use crate::core::facts::JobSpec;
use crate::server::worker_link::WorkerLink;

/// The id of a job that is in line, or why it is not taken.
pub type Submitted = Result<JobId, Status>;

/// A query; it sends its own answer.
pub type Question = Box<dyn FnOnce(&Hub) + Send>;

/// Messages of the hub.
pub enum HubMessage {
    /// For the core.
    Event(Event),
    /// A worker's stream is open; its registration follows.
    Linked {
        /// Id of the worker.
        worker: u64,
        /// The stream.
        link: WorkerLink,
    },
    /// A worker's stream has ended.
    Unlinked {
        /// Id of the worker.
        worker: u64,
        /// Which of its streams.
        link: u64,
        /// Why it may not come back, if that is so.
        expelled: Option<String>,
    },
    /// A job for the queue; answered with its id once that is durable.
    Submit {
        /// The job.
        spec: Box<JobSpec>,
        /// Where the outcome goes.
        reply: oneshot::Sender<Submitted>,
    },
    /// A job is to be taken up again; answered once that is durable.
    Retry {
        /// One that has failed or was cancelled.
        job: JobId,
        /// Where the outcome goes.
        reply: oneshot::Sender<Submitted>,
    },
    /// Lines of a job's ranks.
    Lines {
        /// Who sends them: of ranks that it does not host they are dropped.
        worker: u64,
        /// Of one that may be forgotten by now.
        job: JobId,
        /// The lines.
        lines: Vec<LogRecord>,
    },
    /// Runs a query.
    Ask(Question),
}

/// A log line as it is kept.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct LogRecord {
    /// **Units**: milliseconds since 1970.
    pub unix_ms: u64,
    /// INFO, WARN and so on.
    pub level: String,
    /// Ranks that said it; none: the orchestrator.
    pub ranks: Vec<u32>,
    /// Text of the line.
    pub message: String,
}
