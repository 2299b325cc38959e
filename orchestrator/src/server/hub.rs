//! The hub: owns core and store, takes messages in batches, and does nothing before what must be kept is kept.
//!
//! One batch is one write to the disk, however many facts it holds: that is what makes a thousand submissions a second
//! cheap. Streams to workers are bounded; a worker that does not read is cut off.

mod keeping;
mod messages;
mod telling;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use contraflow_proto::v1;
use contraflow_runtime::control::text::tidy;
use contraflow_runtime::random::from_system;
use contraflow_runtime::topology::JobId;
use tokio::sync::oneshot;
use tonic::Status;

use self::keeping::CommitBatch;
pub use self::messages::{HubMessage, LogRecord, Question, Submitted};
pub(super) use self::messages::{Mailboxes, Senders};

use super::Settings;
use super::admission::Admission;
use super::encode::{encode, span_of};
use super::log_dedup::LogDedup;
use super::outdated::outdated_by;
use super::snapshot::Snapshots;
use super::steps::Steps;
use super::submission;
use super::worker_link::WorkerLink;
use crate::core::facts::{Fact, JobSpec};
use crate::core::{Core, Effect, Event, Severity, WorkerCommand};
use crate::metrics::pace::Change;
use crate::metrics::record::StepRecord;
use crate::store::{Replay, Store, StoreError};
use crate::webhook::{Happened, Notices};

/// The longest line of a job's log. **Units**: bytes.
const MAX_LINE: usize = 64 << 10;

/// The hub.
pub struct Hub {
    core: Core,
    store: Arc<Store>,
    /// From which the secrets of formations follow.
    key: [u8; 32],
    /// What the folder of a job may hold, if there is a limit. **Units**: bytes.
    job_quota: Option<u64>,
    pub(super) links: BTreeMap<u64, WorkerLink>,
    steps: BTreeMap<JobId, Steps>,
    /// By job, the worker that is to remove its files, and who waits for that.
    removals: BTreeMap<JobId, (u64, Vec<oneshot::Sender<Submitted>>)>,
    /// Lines of ranks that wait for their like.
    log_dedup: LogDedup,
    /// Why it has to end: it must not act on what it does not know.
    outdated: Option<String>,
    /// Since when a batch waits for a disk that fails: until it is kept, nothing is taken that would change something.
    withheld: Option<Instant>,
    admission: Admission,
    snapshots: Snapshots,
    notices: Notices,
}

/// The time that the core sees: that of the wall when the process began, and from then on of a monotonic clock, for
/// leases hang on it.
///
/// **Units**: milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    static BEGAN: OnceLock<(u64, Instant)> = OnceLock::new();
    let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis);
    let (wall, clock) = BEGAN.get_or_init(|| (since_1970(), Instant::now()));
    wall + millis(clock.elapsed())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Identifies the state for workers that may know another one: the key was drawn with it and stays here.
fn state_of(key: &[u8; 32]) -> u64 {
    let hash = blake3::Hasher::new_keyed(key).update(b"contraflow: which state").finalize();
    let mut state = [0; 8];
    state.copy_from_slice(&hash.as_bytes()[..8]);
    // Nothing stands for none.
    u64::from_le_bytes(state).max(1)
}

impl Hub {
    /// Resumes from the stored state.
    ///
    /// **Errors**: a record that this version cannot read.
    pub fn new(store: Store, replay: Replay, key: [u8; 32], settings: &Settings) -> Result<Self, String> {
        let (jobs, snapshots) = Snapshots::replay(&replay)?;
        let admission = Admission::of(&jobs);
        let nonce = u32::from_le_bytes(from_system().map_err(|error| error.to_string())?);
        let core =
            Core::new(jobs, replay.incarnation, now_ms(), settings.times).retaining(settings.retained_jobs);
        let core = core.identified(state_of(&key), nonce);
        let store = Arc::new(store);
        let mut hub = Hub {
            core,
            store,
            key,
            job_quota: settings.job_quota,
            links: BTreeMap::new(),
            steps: BTreeMap::new(),
            removals: BTreeMap::new(),
            log_dedup: LogDedup::default(),
            outdated: None,
            withheld: None,
            admission,
            snapshots,
            notices: Notices::default(),
        };
        let all: Vec<JobId> = hub.core.jobs().all.keys().copied().collect();
        for job in all {
            hub.restore_steps(job)?;
        }
        Ok(hub)
    }

    fn restore_steps(&mut self, job: JobId) -> Result<(), String> {
        let record = &self.core.jobs().all[&job];
        let commands = |error: StoreError| error.to_string();
        let last =
            self.store.steps(job.bits(), 0).map_err(commands)?.next_back().transpose().map_err(commands)?;
        let loss = last.as_ref().and_then(|(_, bytes)| serde_json::from_slice::<StepRecord>(bytes).ok());
        let loss = loss.map(|record| record.loss);
        let lines =
            self.store.lines(job.bits(), 0).map_err(commands)?.next_back().transpose().map_err(commands)?;
        let lines = lines.map_or(0, |(number, _)| number);
        let mut steps = Steps::new(last.map_or(0, |(step, _)| step), loss, lines, record.has_ended());
        // Reports of ranks of a broken formation may still arrive.
        if let Some(formed) = &record.formed {
            steps.formed(&record.spec, formed);
        }
        self.steps.insert(job, steps);
        Ok(())
    }

    /// The same, and tells what happens to jobs.
    pub fn telling(mut self, notices: Notices) -> Self {
        self.notices = notices;
        self
    }

    /// The decisions.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// What is kept.
    pub fn store(&self) -> Arc<Store> {
        self.store.clone()
    }

    /// The steps of a job.
    pub fn steps(&self, job: JobId) -> Option<&Steps> {
        self.steps.get(&job)
    }

    /// Runs until all senders are gone.
    ///
    /// **Errors**: the state is damaged, or is an older copy of what a worker has seen.
    pub async fn run(mut self, mut mail: Mailboxes) -> Result<(), String> {
        let mut waiting = Vec::new();
        while mail.next(&mut waiting).await {
            let mut batch = CommitBatch::default();
            for message in waiting.drain(..) {
                self.take(message, &mut batch);
                if let Some(why) = self.outdated.take() {
                    return Err(why);
                }
            }
            for (job, line) in self.log_dedup.due(now_ms()) {
                self.log(job, vec![line], &mut batch);
            }
            self.keep(&mut batch, &mut mail).await?;
            self.apply_effects(batch);
        }
        Ok(())
    }

    fn take(&mut self, message: HubMessage, batch: &mut CommitBatch) {
        match message {
            HubMessage::Event(Event::Attached(attachment)) => {
                let last_step = |job| self.steps.get(&job).map(|steps| steps.last);
                self.outdated = outdated_by(&self.core, last_step, &attachment);
                if self.outdated.is_none() {
                    self.step(Event::Attached(attachment), batch);
                }
            }
            HubMessage::Event(Event::Removed { worker, job, result }) => {
                self.removed((worker, job), result, batch);
            }
            HubMessage::Event(event) => self.step(event, batch),
            HubMessage::Change { event, reply } => {
                self.step(*event, batch);
                batch.changes.push(reply);
            }
            HubMessage::Linked { worker, link } => {
                // What was decided for the stream before does not come ahead of the welcome on this one, which repeats it.
                batch.commands.retain(|(to, _)| *to != worker);
                self.links.insert(worker, link);
            }
            HubMessage::Unlinked { worker, link, expelled } => {
                // The hub may have let go of it before; one that came later counts.
                if self.links.get(&worker).is_none_or(|current| current.number == link) {
                    self.links.remove(&worker);
                    let event = match expelled {
                        Some(why) => Event::Expelled { worker, why },
                        None => Event::Detached { worker },
                    };
                    self.step(event, batch);
                }
            }
            HubMessage::Submit { spec, reply } => {
                let outcome = self.submit(spec, batch);
                batch.replies.push((reply, outcome));
            }
            HubMessage::Retry { job, reply } => {
                let outcome = self.retry(job, batch);
                batch.replies.push((reply, outcome));
            }
            HubMessage::Remove { job, reply } => match self.core.may_be_removed(job) {
                Ok(worker) => {
                    let (asked, waiting) = self.removals.entry(job).or_default();
                    *asked = worker;
                    waiting.push(reply);
                    self.step(Event::Remove { job }, batch);
                }
                Err(why) => batch.replies.push((reply, Err(Status::failed_precondition(why)))),
            },
            HubMessage::Lines { worker, job, lines } => {
                let Some(steps) = self.steps.get(&job) else { return };
                let own =
                    lines.into_iter().filter(|line| line.ranks.iter().all(|&rank| steps.hosts(worker, rank)));
                own.for_each(|line| self.log_dedup.take(job, line, now_ms()));
            }
            HubMessage::Ask(question) => batch.questions.push(question),
        }
    }

    /// **Errors**: `ALREADY_EXISTS`, another job has its key; `RESOURCE_EXHAUSTED`, too many jobs are open.
    fn submit(&mut self, spec: Box<JobSpec>, batch: &mut CommitBatch) -> Submitted {
        if let Some(&job) = self.core.jobs().by_key.get(&spec.key) {
            return submission::same_job(job, &self.core.jobs().all[&job].spec, &spec);
        }
        self.admission.admit(&spec).map_err(Status::resource_exhausted)?;
        self.step(Event::Submit(spec), batch);
        Ok(self.core.jobs().newest)
    }

    /// **Errors**: `FAILED_PRECONDITION`, it has not ended, or is done; `RESOURCE_EXHAUSTED`, too many jobs are open.
    fn retry(&mut self, job: JobId, batch: &mut CommitBatch) -> Submitted {
        let record = self.core.jobs().all.get(&job);
        let record = record.ok_or_else(|| Status::not_found(format!("job: {job} is no longer retained")))?;
        submission::may_be_retried(job, &record.phase)?;
        if self.removals.get(&job).is_some_and(|(_, waiting)| waiting.iter().any(|reply| !reply.is_closed()))
        {
            return Err(Status::failed_precondition(format!("job: the files of {job} are being removed")));
        }
        self.admission.admit(&record.spec).map_err(Status::resource_exhausted)?;
        self.step(Event::Retry { job }, batch);
        Ok(job)
    }

    /// A worker has removed the folder of a job, or could not; counts if it was asked to.
    fn removed(&mut self, (worker, job): (u64, JobId), result: Result<(), String>, batch: &mut CommitBatch) {
        if self.removals.get(&job).is_none_or(|(asked, _)| *asked != worker) {
            return;
        }
        let failed = |why| Status::unavailable(format!("the files of {job}: {why}"));
        let answer = result.clone().map(|()| job).map_err(failed);
        let (_, waiting) = self.removals.remove(&job).unwrap_or_default();
        batch.replies.extend(waiting.into_iter().map(|reply| (reply, answer.clone())));
        self.step(Event::Removed { worker, job, result }, batch);
    }

    fn step(&mut self, event: Event, batch: &mut CommitBatch) {
        for effect in self.core.step(event, now_ms()) {
            match effect {
                Effect::Persist(fact) => {
                    self.apply_fact(&fact, batch);
                    // A fact is numbers, texts and lists.
                    batch.facts.push(serde_json::to_vec(&fact).unwrap_or_default());
                }
                Effect::Send { worker, command } => batch.commands.push((worker, command)),
                Effect::Record { job, report } => {
                    let record = self.steps.get_mut(&job).and_then(|steps| steps.record(*report));
                    if let Some(record) = record {
                        if !record.warnings.is_empty() {
                            self.notify(job, Happened::Warning, &record.warnings.join("; "), batch);
                        }
                        // A record is numbers and texts.
                        let bytes = serde_json::to_vec(&record).unwrap_or_default();
                        batch.steps.entry(job).or_default().push((record.step, bytes));
                        self.log_pace(job, batch);
                    }
                }
                Effect::Log { job, severity, line } => self.log_line(job, severity, line, batch),
            }
        }
    }

    fn apply_fact(&mut self, fact: &Fact, batch: &mut CommitBatch) {
        self.notify_of(fact, batch);
        match fact {
            Fact::Submitted { job, spec, .. } => {
                self.admission.opened(*job, spec);
                self.steps.insert(*job, Steps::new(0, None, 0, false));
            }
            Fact::Ended { job, .. } => self.admission.ended(*job),
            Fact::Retried { job, .. } => {
                if let Some(record) = self.core.jobs().all.get(job) {
                    self.admission.opened(*job, &record.spec);
                }
            }
            Fact::Formed { job, formed, .. } => {
                let record = self.core.jobs().all.get(job);
                if let (Some(steps), Some(record)) = (self.steps.get_mut(job), record) {
                    steps.formed(&record.spec, formed);
                }
            }
            Fact::RolledBack { job, .. } => {
                let to = self.core.jobs().all.get(job).map_or(0, |record| record.last_checkpoint);
                if let Some(steps) = self.steps.get_mut(job) {
                    steps.rolled_back(to);
                }
                if let Some(steps) = batch.steps.get_mut(job) {
                    steps.retain(|(step, _)| *step <= to);
                }
                batch.returned.insert(*job, to);
            }
            Fact::Forgotten { job } => {
                // Its watchers have everything, and get nothing more.
                self.steps.remove(job);
                batch.steps.remove(job);
                batch.lines.remove(job);
                batch.returned.remove(job);
                batch.forgotten.push(*job);
            }
            _ => {}
        }
    }

    /// Names ranks that hold the others up, and those that do not any more.
    fn log_pace(&mut self, job: JobId, batch: &mut CommitBatch) {
        let changes = self.steps.get_mut(&job).map(Steps::judge).unwrap_or_default();
        for (worker, Change { rank, time, typical }) in changes {
            let place =
                self.core.member(worker).map(|member| member.registration.clone()).unwrap_or_default();
            let of = format!("rank {rank} on worker {}, node {}", place.name, place.node);
            let times = format!("works {:.2} s of a step, others like it {typical:.2} s", time.busy);
            let (severity, words) = match time.is_slow {
                true => (Severity::Warn, "is slow and holds the others up"),
                false => (Severity::Info, "holds the others up no more"),
            };
            let line = format!("{of}, {words}: it {times}");
            self.log_line(job, severity, line, batch);
        }
    }

    /// A line of the orchestrator's own.
    fn log_line(&mut self, job: JobId, severity: Severity, mut line: String, batch: &mut CommitBatch) {
        tidy(&mut line, MAX_LINE);
        match severity {
            Severity::Info => tracing::info!(%job, "{line}"),
            Severity::Warn => tracing::warn!(%job, "{line}"),
            Severity::Error => tracing::error!(%job, "{line}"),
        }
        let (unix_ms, level) = (now_ms(), severity.name().to_owned());
        self.log(job, vec![LogRecord { unix_ms, level, ranks: Vec::new(), message: line }], batch);
    }

    fn log(&mut self, job: JobId, lines: Vec<LogRecord>, batch: &mut CommitBatch) {
        if self.steps.contains_key(&job) {
            let lines = lines.iter().filter_map(|line| serde_json::to_vec(line).ok());
            batch.lines.entry(job).or_default().extend(lines);
        }
    }

    fn apply_effects(&mut self, mut batch: CommitBatch) {
        for (worker, command) in std::mem::take(&mut batch.commands) {
            if command == WorkerCommand::Disconnect {
                // A worker that stood still would beat on for ever on a stream without a reader.
                self.links.remove(&worker);
                continue;
            }
            let is_last = matches!(command, WorkerCommand::Reject { .. });
            let span = span_of(&self.core, &command);
            let message = span.in_scope(|| encode(&self.core, (&self.key, self.job_quota), command));
            self.send(worker, message, is_last);
        }
        for (job, steps) in &batch.steps {
            if let Some((step, _)) = steps.last() {
                self.acknowledge(*job, *step);
            }
        }
        self.wake_watchers(&batch);
        for notice in batch.notices.drain(..) {
            self.notices.send(notice);
        }
        // The caller may be gone.
        for (reply, job) in batch.replies {
            let _ = reply.send(job);
        }
        for reply in batch.changes {
            let _ = reply.send(Ok(()));
        }
        batch.questions.into_iter().for_each(|question| question(self));
    }

    /// Wakes the followers of jobs that have new durable records or have ended.
    fn wake_watchers(&self, batch: &CommitBatch) {
        let has_ended = |job: JobId| self.core.jobs().all.get(&job).is_none_or(|record| record.has_ended());
        let written = batch.steps.keys().chain(batch.lines.keys()).chain(batch.returned.keys());
        let is_new = |(job, steps): &(&JobId, &Steps)| !steps.progress.borrow().has_ended && has_ended(**job);
        let ended = self.steps.iter().filter(is_new).map(|(job, _)| job);
        let changed: BTreeSet<JobId> = written.chain(ended).copied().collect();
        for (job, steps) in changed.into_iter().filter_map(|job| Some((job, self.steps.get(&job)?))) {
            steps.progress.send_modify(|progress| {
                progress.step = steps.last;
                if let Some(&to) = batch.returned.get(&job) {
                    (progress.returns, progress.back_to) = (progress.returns + 1, to);
                }
                progress.has_ended = has_ended(job);
                progress.lines += batch.lines.get(&job).map_or(0, |lines| lines.len() as u64);
            });
        }
    }

    /// Tells the workers of a job that its step reports are durable.
    fn acknowledge(&mut self, job: JobId, step: u64) {
        let Some(formed) = self.core.jobs().all.get(&job).and_then(|record| record.running()) else { return };
        let mut workers = formed.places.clone();
        workers.sort_unstable();
        workers.dedup();
        for worker in workers {
            let durable = v1::to_worker::Message::Durable(v1::Durable { job: job.bits(), step });
            self.send(worker, Some(durable), false);
        }
    }

    /// Tells a worker something that it asks for again if it is lost.
    pub(super) fn tell(&self, worker: u64, message: v1::to_worker::Message) {
        if let Some(WorkerLink { down, .. }) = self.links.get(&worker) {
            let facts = self.core.jobs().facts;
            drop(down.try_send(Ok(v1::ToWorker { message: Some(message), facts })));
        }
    }

    fn send(&mut self, worker: u64, message: Option<v1::to_worker::Message>, is_last: bool) {
        let (Some(message), Some(WorkerLink { down, .. })) = (message, self.links.get(&worker)) else {
            return;
        };
        let facts = self.core.jobs().facts;
        let sent = down.try_send(Ok(v1::ToWorker { message: Some(message), facts }));
        if sent.is_err() || is_last {
            // It does not read, or shall not any more: the stream ends, and it may come back.
            self.links.remove(&worker);
        }
    }
}

impl Drop for Hub {
    /// Nothing that waits for the disk holds up the end of the process.
    fn drop(&mut self) {
        self.store.give_up();
    }
}
