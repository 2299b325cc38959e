//! What the hub is sent, and on which way. Knows no state.

use contraflow_runtime::topology::JobId;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::Hub;
use crate::core::Event;
use crate::core::facts::JobSpec;
use crate::server::worker_link::WorkerLink;

/// Messages that wait on each of the two ways, at most.
const MAX_WAITING: usize = 16_384;

/// Messages that are taken at once.
const BATCH: usize = 1_024;

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
    /// A job that has ended is to be removed with its files; answered once that is durable.
    Remove {
        /// Which one.
        job: JobId,
        /// Where the outcome goes.
        reply: oneshot::Sender<Submitted>,
    },
    /// Something else that changes decisions; answered once that is durable.
    Change {
        /// For the core.
        event: Box<Event>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), Status>>,
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

impl HubMessage {
    /// Whether it is of a worker, and may wait as long as the disk lets all of them wait.
    fn is_of_worker(&self) -> bool {
        match self {
            HubMessage::Event(event) => !matches!(event, Event::Tick),
            HubMessage::Linked { .. } | HubMessage::Unlinked { .. } | HubMessage::Lines { .. } => true,
            _ => false,
        }
    }
}

/// What has come for the hub, on two ways: clients are answered also while workers have to wait.
pub(in crate::server) struct Mailboxes {
    pub(super) clients: mpsc::Receiver<HubMessage>,
    pub(super) workers: mpsc::Receiver<HubMessage>,
}

/// Their other ends.
#[derive(Clone)]
pub(in crate::server) struct Senders {
    clients: mpsc::Sender<HubMessage>,
    workers: mpsc::Sender<HubMessage>,
}

impl Mailboxes {
    /// Empty ones.
    pub(in crate::server) fn open() -> (Senders, Mailboxes) {
        let ((clients, of_clients), (workers, of_workers)) =
            (mpsc::channel(MAX_WAITING), mpsc::channel(MAX_WAITING));
        (Senders { clients, workers }, Mailboxes { clients: of_clients, workers: of_workers })
    }

    /// Waits until something has come, and takes it, up to a batch; false if all senders are gone.
    pub(super) async fn next(&mut self, taken: &mut Vec<HubMessage>) -> bool {
        let first = tokio::select! {
            message = self.clients.recv() => message,
            message = self.workers.recv() => message,
        };
        let Some(first) = first else { return false };
        taken.push(first);
        for way in [&mut self.clients, &mut self.workers] {
            while taken.len() < BATCH
                && let Ok(message) = way.try_recv()
            {
                taken.push(message);
            }
        }
        true
    }

    /// Whether more is waiting of workers than they send in any usual pause.
    pub(super) fn is_filling_up(&self) -> bool {
        self.workers.len() >= MAX_WAITING / 2
    }
}

impl Senders {
    /// Hands a message over, as soon as there is room; false if the hub has ended.
    pub(in crate::server) async fn send(&self, message: HubMessage) -> bool {
        let way = if message.is_of_worker() { &self.workers } else { &self.clients };
        way.send(message).await.is_ok()
    }
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
