//! Keeping a batch: one write to the disk, and what the hub does while a disk that fails lets it wait.
//!
//! Until the batch is kept nothing of it leaves the hub. Workers are as with an orchestrator that stands still: what they say
//! waits. Clients are answered: questions from memory, which may be ahead of the disk by that batch; wishes with
//! `UNAVAILABLE`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use contraflow_runtime::topology::JobId;
use tokio::sync::oneshot;
use tonic::Status;

use super::{Hub, HubMessage, Mailboxes, Question, Submitted};
use crate::core::WorkerCommand;
use crate::store::{Batch, Removals};
use crate::webhook::Notice;

/// How long a write may take until the hub looks why, and the time between two looks.
const LOOK: Duration = Duration::from_millis(250);

/// A disk that has not answered for so long fails, though it does not say so: clients wait for twice as long.
const SILENCE: Duration = Duration::from_secs(5);

/// What a batch leaves to be kept, and to be done afterwards.
#[derive(Default)]
pub(super) struct CommitBatch {
    pub(super) facts: Vec<Vec<u8>>,
    /// Jobs of which nothing stays.
    pub(super) forgotten: Vec<JobId>,
    /// By job that goes back to a checkpoint, its step: later ones do not stay.
    pub(super) returned: BTreeMap<JobId, u64>,
    pub(super) steps: BTreeMap<JobId, Vec<(u64, Vec<u8>)>>,
    pub(super) lines: BTreeMap<JobId, Vec<Vec<u8>>>,
    pub(super) commands: Vec<(u64, WorkerCommand)>,
    pub(super) replies: Vec<(oneshot::Sender<Submitted>, Submitted)>,
    pub(super) changes: Vec<oneshot::Sender<Result<(), Status>>>,
    pub(super) questions: Vec<Question>,
    pub(super) notices: Vec<Notice>,
}

impl CommitBatch {
    /// What of it is for the disk, if anything is.
    fn take_kept(&mut self) -> Option<Batch> {
        if self.facts.is_empty() && self.steps.is_empty() && self.lines.is_empty() {
            return None;
        }
        Some(Batch {
            records: std::mem::take(&mut self.facts),
            steps: self.steps.iter().map(|(job, steps)| (job.bits(), steps.clone())).collect(),
            lines: self.lines.iter().map(|(job, lines)| (job.bits(), lines.clone())).collect(),
            gone: Removals {
                jobs: std::mem::take(&mut self.forgotten).into_iter().map(JobId::bits).collect(),
                steps_after: self.returned.iter().map(|(job, &to)| (job.bits(), to)).collect(),
            },
        })
    }
}

impl Hub {
    /// Returns when the batch is kept; meanwhile, if that takes long because of the disk, clients are answered.
    ///
    /// **Errors**: the state is damaged.
    pub(super) async fn keep(&mut self, batch: &mut CommitBatch, mail: &mut Mailboxes) -> Result<(), String> {
        let Some(kept) = batch.take_kept() else { return Ok(()) };
        self.snapshots.count(&kept.records);
        let (store, has_facts) = (self.store.clone(), !kept.records.is_empty());
        let began = Instant::now();
        let mut write = tokio::task::spawn_blocking(move || store.keep(&kept));
        let mut look = tokio::time::interval_at((began + LOOK).into(), LOOK);
        let written = loop {
            tokio::select! {
                biased;
                written = &mut write => break written,
                _ = look.tick() => self.look(began, batch, mail),
                Some(message) = mail.clients.recv(), if self.withheld.is_some() => self.withhold(message),
            }
        };
        if let Some(since) = self.withheld.take() {
            tracing::warn!(
                "the state is kept again, after {:.1} s; the orchestrator goes on",
                since.elapsed().as_secs_f64()
            );
        }
        let last =
            written.map_err(|panic| format!("the store: {panic}"))?.map_err(|error| error.to_string())?;
        self.snapshots.look().await;
        if has_facts && self.snapshots.is_due() {
            self.snapshots.begin(self.store.clone(), last, self.core.jobs().clone());
        }
        Ok(())
    }

    /// The batch is not kept yet. If that is because the disk fails, nobody waits for it in vain.
    fn look(&mut self, began: Instant, batch: &mut CommitBatch, mail: &Mailboxes) {
        if self.withheld.is_none() {
            if self.store.trouble().is_none() && began.elapsed() < SILENCE {
                return;
            }
            self.withheld = Some(began);
            tracing::warn!(
                "{}: the orchestrator holds until it can be kept",
                self.trouble().unwrap_or_default()
            );
        }
        // It may come to it yet.
        let waiting = self.removals.values_mut().flat_map(|(_, waiting)| waiting.drain(..));
        let replies: Vec<_> = batch.replies.drain(..).map(|(reply, _)| reply).chain(waiting).collect();
        let status =
            self.unavailable("what was asked for is done once it can be kept: look before you ask again");
        // The callers may be gone.
        replies.into_iter().for_each(|reply| drop(reply.send(Err(status.clone()))));
        batch.changes.drain(..).for_each(|reply| drop(reply.send(Err(status.clone()))));
        batch.questions.drain(..).for_each(|question| question(self));
        if mail.is_filling_up() {
            // Whoever comes again says nothing before its welcome, which waits too, and then again what counts.
            self.links.clear();
        }
    }

    /// Takes a client's message while nothing can be kept.
    fn withhold(&self, message: HubMessage) {
        let status = || self.unavailable("nothing is taken before it can be kept: try again later");
        match message {
            HubMessage::Ask(question) => question(self),
            HubMessage::Submit { reply, .. }
            | HubMessage::Retry { reply, .. }
            | HubMessage::Remove { reply, .. } => drop(reply.send(Err(status()))),
            HubMessage::Change { reply, .. } => drop(reply.send(Err(status()))),
            // Time does not pass. The others are of workers, and do not come this way.
            HubMessage::Event(_)
            | HubMessage::Linked { .. }
            | HubMessage::Unlinked { .. }
            | HubMessage::Lines { .. } => {}
        }
    }

    fn unavailable(&self, therefore: &str) -> Status {
        Status::unavailable(format!("{}; {therefore}", self.trouble().unwrap_or_default()))
    }

    /// What is wrong with the disk of the state, if anything is.
    pub fn trouble(&self) -> Option<String> {
        let silent = |since: Instant| {
            format!("has not been written for {} s: its disk does not answer", since.elapsed().as_secs())
        };
        let words = self.store.trouble().map(|trouble| trouble.to_string());
        words.or_else(|| self.withheld.map(silent)).map(|words| format!("the orchestrator's state {words}"))
    }
}
