//! JobService: submitting, asking, following.

use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use contraflow_proto::{Message as _, v1};
use contraflow_runtime::control::text::tidy;
use contraflow_runtime::topology::JobId;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use v1::job_service_server::JobService;

use super::auth::Session;
use super::hub::{Hub, HubMessage, LogRecord};
use super::steps::StepProgress;
use super::submission::Resumed;
use super::{Handle, bounds, refused, submission};
use crate::core::Event;
use crate::core::facts::End;
use crate::core::jobs::{JobRecord, Phase};
use crate::metrics::goodput::{Account, SlotTime};
use crate::metrics::pace::RankTime;
use crate::metrics::record::StepRecord;
use crate::store::{Numbered, Store, StoreError};

/// Jobs of a list that does not say how many it wants.
const PAGE: usize = 100;

/// Most jobs of one list.
const MAX_PAGE: usize = 1_000;

/// Messages of a stream that wait for its reader: there may be thousands of streams, and readers that do not read.
const MAX_UNREAD: usize = 4;

/// Entries that are read at once for a stream.
const READ_AT_ONCE: usize = 16;

/// What an answer with a list may hold before the rest is left to the next page. **Units**: bytes.
const MAX_ANSWER: usize = 1 << 20;

/// How long the last message of a stream waits for its reader.
const LEAVE: Duration = Duration::from_secs(5);

/// How long a worker may take to put a job's folder out of the way: less than a client waits.
const REMOVAL: Duration = Duration::from_secs(8);

/// The longest text of an answer. **Units**: bytes.
const MAX_SHOWN: usize = 64 << 10;

/// Reads of the state that are under way at once.
static READERS: Semaphore = Semaphore::const_new(8);

/// The service.
pub(super) struct JobsApi {
    pub(super) hub: Handle,
    /// What the folder of a job may hold, if there is a limit. **Units**: bytes.
    pub(super) job_quota: Option<u64>,
}

type Reply<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl JobService for JobsApi {
    type WatchStream = Answers<v1::WatchResponse>;
    type LogsStream = Answers<v1::LogsResponse>;

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Reply<v1::SubmitResponse> {
        let session = Session::of(&request);
        let submitted = self.submitted(request.into_inner(), session.user()).await;
        let job = submitted.as_ref().map_or_else(|_| String::new(), JobId::to_string);
        session.note("submit", &job, &submitted).await;
        submitted.map(|_| Response::new(v1::SubmitResponse { job }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Reply<v1::GetResponse> {
        let request = request.into_inner();
        bounds::get(&request).map_err(|faults| refused(&faults))?;
        let job = self.id(&request.job).await?;
        let answer = move |hub: &Hub| {
            let record = hub.core().jobs().all.get(&job).filter(|_| request.with_recipe);
            let recipe = record.map(|record| record.spec.recipe.clone());
            (describe(hub, job), recipe, hub.core().state())
        };
        let (found, recipe, state) = self.hub.ask(answer).await?;
        // Not in the hub, nor on a thread that serves: it is of any size.
        let recipe = match recipe {
            Some(recipe) => tokio::task::spawn_blocking(move || recipe.resolved_toml())
                .await
                .map_err(|error| Status::internal(error.to_string()))?,
            None => String::new(),
        };
        Ok(Response::new(v1::GetResponse { job: Some(found), recipe, id: job.bits(), state }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Reply<v1::ListResponse> {
        let request = request.into_inner();
        bounds::list_of(&request).map_err(|faults| refused(&faults))?;
        let v1::ListRequest { limit, before } = request;
        let limit = if limit == 0 { PAGE } else { (limit as usize).min(MAX_PAGE) };
        let before =
            if before.is_empty() { Bound::Unbounded } else { Bound::Excluded(self.id(&before).await?) };
        Ok(Response::new(self.hub.ask(move |hub| list(hub, limit, before)).await?))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        let session = Session::of(&request);
        let request = request.into_inner();
        bounds::watch(&request).map_err(|faults| refused(&faults))?;
        let v1::WatchRequest { job, from_step } = request;
        let first = from_step.max(1);
        let follow = self.follow(&job).await?;
        let follow = Follow { next: first, until_end: true, first_step: Some(first), ..follow };
        let read = |store: &Store, job: JobId, next: u64| {
            store.steps(job.bits(), next)?.take(READ_AT_ONCE).collect::<Result<Vec<_>, _>>()
        };
        let decode = |_: u64, bytes: &[u8]| {
            let mut record = serde_json::from_slice::<StepRecord>(bytes).ok()?;
            record.warnings.iter_mut().for_each(show);
            Some(v1::WatchResponse { record: Some(record) })
        };
        Ok(Response::new(stream(follow, read, decode, session)))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Reply<v1::CancelResponse> {
        let (session, request) = (Session::of(&request), request.into_inner());
        bounds::cancel(&request).map_err(|faults| refused(&faults))?;
        let name = request.job.clone();
        let cancelled = self.cancelled(request).await;
        session.note("cancel", &name, &cancelled).await;
        cancelled.map(|job| Response::new(v1::CancelResponse { job: Some(job) }))
    }

    async fn retry(&self, request: Request<v1::RetryRequest>) -> Reply<v1::RetryResponse> {
        let (session, request) = (Session::of(&request), request.into_inner());
        bounds::retry(&request).map_err(|faults| refused(&faults))?;
        let retried = self.retried(&request.job).await;
        session.note("retry", &request.job, &retried).await;
        retried.map(|job| Response::new(v1::RetryResponse { job: Some(job) }))
    }

    async fn scale(&self, request: Request<v1::ScaleRequest>) -> Reply<v1::ScaleResponse> {
        let (session, request) = (Session::of(&request), request.into_inner());
        bounds::scale(&request).map_err(|faults| refused(&faults))?;
        let scaled = self.scaled(&request).await;
        session.note("scale", &format!("{} to {} ranks", request.job, request.ranks), &scaled).await;
        scaled.map(|job| Response::new(v1::ScaleResponse { job: Some(job) }))
    }

    async fn remove(&self, request: Request<v1::RemoveRequest>) -> Reply<v1::RemoveResponse> {
        let (session, request) = (Session::of(&request), request.into_inner());
        bounds::remove(&request).map_err(|faults| refused(&faults))?;
        let removed = self.removed(&request.job).await;
        session.note("remove", &request.job, &removed).await;
        removed.map(|_| Response::new(v1::RemoveResponse {}))
    }

    async fn logs(&self, request: Request<v1::LogsRequest>) -> Reply<Self::LogsStream> {
        let session = Session::of(&request);
        let request = request.into_inner();
        bounds::logs(&request).map_err(|faults| refused(&faults))?;
        let v1::LogsRequest { job, rank, follow: until_end, from_line } = request;
        let follow = Follow { next: from_line, until_end, ..self.follow(&job).await? };
        let read = |store: &Store, job: JobId, next: u64| {
            store.lines(job.bits(), next)?.take(READ_AT_ONCE).collect::<Result<Vec<_>, _>>()
        };
        let decode = move |number: u64, bytes: &[u8]| {
            let line = serde_json::from_slice::<LogRecord>(bytes).ok()?;
            let wanted = rank.is_none_or(|rank| line.ranks.contains(&rank));
            let LogRecord { unix_ms, level, ranks, mut message } = line;
            show(&mut message);
            wanted.then_some(v1::LogsResponse { unix_ms, level, ranks, message, number })
        };
        Ok(Response::new(stream(follow, read, decode, session)))
    }
}

impl JobsApi {
    async fn submitted(&self, request: v1::SubmitRequest, user: String) -> Result<JobId, Status> {
        bounds::submit(&request).map_err(|faults| refused(&faults))?;
        let resumed = match &request.resume {
            Some(resume) if !resume.job.is_empty() => Some(self.resumed(&resume.job).await?),
            _ => None,
        };
        let spec = submission::check(request, resumed, user, self.job_quota).await?;
        let workers = |hub: &Hub| {
            let attached = hub.core().members().filter(|member| member.is_attached);
            attached.map(|member| member.registration.sources.clone()).collect::<Vec<_>>()
        };
        submission::check_sources(&spec, &self.hub.ask(workers).await?)?;
        let (reply, id) = oneshot::channel();
        self.hub.send(HubMessage::Submit { spec, reply }).await?;
        id.await.map_err(|_| Status::unavailable("the orchestrator is ending"))?
    }

    async fn resumed(&self, name: &str) -> Result<Resumed, Status> {
        let job = self.id(name).await?;
        let resumed =
            self.hub.ask(move |hub| hub.core().jobs().all.get(&job).map(|record| Resumed::of(job, record)));
        resumed.await?.unwrap_or_else(|| Err(Status::not_found(format!("job: {name} is no longer retained"))))
    }

    async fn cancelled(
        &self,
        v1::CancelRequest { job, reason }: v1::CancelRequest,
    ) -> Result<v1::Job, Status> {
        let job = self.id(&job).await?;
        self.hub.change(Event::Cancel { job, reason }).await?;
        self.hub.ask(move |hub| describe(hub, job)).await
    }

    async fn retried(&self, name: &str) -> Result<v1::Job, Status> {
        let job = self.id(name).await?;
        let (reply, outcome) = oneshot::channel();
        self.hub.send(HubMessage::Retry { job, reply }).await?;
        outcome.await.map_err(|_| Status::unavailable("the orchestrator is ending"))??;
        self.hub.ask(move |hub| describe(hub, job)).await
    }

    async fn scaled(&self, request: &v1::ScaleRequest) -> Result<v1::Job, Status> {
        let (job, ranks) = (self.id(&request.job).await?, request.ranks as usize);
        let checked = self.hub.ask(move |hub| hub.core().check_scale(job, ranks)).await?;
        checked.map_err(Status::failed_precondition)?;
        self.hub.change(Event::Scale { job, ranks }).await?;
        self.hub.ask(move |hub| describe(hub, job)).await
    }

    async fn removed(&self, name: &str) -> Result<JobId, Status> {
        let job = self.id(name).await?;
        let (reply, outcome) = oneshot::channel();
        self.hub.send(HubMessage::Remove { job, reply }).await?;
        let answered = tokio::time::timeout(REMOVAL, outcome).await.map_err(|_| {
            let seconds = REMOVAL.as_secs();
            Status::unavailable(format!(
                "the files of {job}: no worker has answered within {seconds} s; ask again"
            ))
        })?;
        answered.map_err(|_| Status::unavailable("the orchestrator is ending"))?
    }

    /// **Errors**: `NOT_FOUND`.
    async fn id(&self, name: &str) -> Result<JobId, Status> {
        let unknown = || Status::not_found(format!("job: expected the id of a job, got {name:?}"));
        let number = JobId::parse_number(name).ok_or_else(unknown)?;
        match self.hub.ask(move |hub| hub.core().jobs().of_number(number)).await? {
            Ok(id) => Ok(id),
            Err(true) => Err(Status::not_found(format!(
                "job: {name} has ended and is no longer retained; the orchestrator's --keep-jobs sets how many ended jobs are"
            ))),
            Err(false) => Err(unknown()),
        }
    }

    async fn follow(&self, name: &str) -> Result<Follow, Status> {
        let job = self.id(name).await?;
        let found =
            self.hub.ask(move |hub| Some((hub.store(), hub.steps(job)?.progress.subscribe()))).await?;
        let (store, progress) =
            found.ok_or_else(|| Status::not_found(format!("job: {name} is no longer retained")))?;
        Ok(Follow { job, store, progress, next: 0, first_step: None, until_end: false })
    }
}

/// Reads some entries of a job from a number on.
type Read = fn(&Store, JobId, u64) -> Result<Vec<Numbered>, StoreError>;

/// Something kept that is read from `next` on.
struct Follow {
    job: JobId,
    store: Arc<Store>,
    progress: watch::Receiver<StepProgress>,
    next: u64,
    /// Of steps, the first that is wanted: where the job goes back, those after the checkpoint are sent again.
    first_step: Option<u64>,
    /// Not only what is there: everything until the job ends.
    until_end: bool,
}

impl Follow {
    /// The next entries. However many follow, few threads read.
    ///
    /// **Errors**: the state cannot be read.
    async fn read(&self, read: Read) -> Result<Vec<Numbered>, Status> {
        let failed = || Status::internal("the state cannot be read");
        let _turn = READERS.acquire().await.map_err(|_| failed())?;
        let (store, job, next) = (self.store.clone(), self.job, self.next);
        let entries = tokio::task::spawn_blocking(move || read(&store, job, next)).await;
        entries.map_err(|_| failed())?.map_err(|_| failed())
    }

    /// Takes note of how much is kept by now.
    fn look(&mut self, returns: &mut u64) -> StepProgress {
        let progress = *self.progress.borrow_and_update();
        let has_gone_back = std::mem::replace(returns, progress.returns) < progress.returns;
        if let Some(first) = self.first_step.filter(|_| has_gone_back) {
            self.next = self.next.min(progress.back_to + 1).max(first);
        }
        progress
    }
}

/// Sends what is kept, and continues with what comes, as long as the caller may hear it.
fn stream<T: Send + 'static>(
    follow: Follow,
    read: Read,
    decode: impl Fn(u64, &[u8]) -> Option<T> + Send + 'static,
    session: Session,
) -> Answers<T> {
    let (sender, answers) = mpsc::channel(MAX_UNREAD);
    tokio::spawn(async move {
        let refused = tokio::select! {
            ended = feed(follow, read, decode, &sender) => ended.err(),
            refused = session.withdrawn() => Some(refused),
        };
        if let Some(refused) = refused {
            // Who does not read does not get it.
            drop(tokio::time::timeout(LEAVE, sender.send(Err(refused))).await);
        }
    });
    Box::pin(ReceiverStream::new(answers))
}

/// Ends where the reader has everything, or is gone.
///
/// **Errors**: the state cannot be read.
async fn feed<T>(
    mut follow: Follow,
    read: Read,
    decode: impl Fn(u64, &[u8]) -> Option<T>,
    sender: &mpsc::Sender<Result<T, Status>>,
) -> Result<(), Status> {
    let mut returns = follow.progress.borrow().returns;
    loop {
        let progress = follow.look(&mut returns);
        loop {
            let entries = follow.read(read).await?;
            let Some((last, _)) = entries.last() else { break };
            follow.next = last + 1;
            let answers: Vec<T> =
                entries.iter().filter_map(|(number, bytes)| decode(*number, bytes)).collect();
            drop(entries);
            for answer in answers {
                if sender.send(Ok(answer)).await.is_err() {
                    return Ok(());
                }
            }
        }
        // What was kept when it ended has been read since.
        if progress.has_ended || !follow.until_end || follow.progress.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// At most so many jobs, the newest first.
pub(super) fn list(hub: &Hub, limit: usize, before: Bound<JobId>) -> v1::ListResponse {
    let older = hub.core().jobs().all.range((Bound::Unbounded, before)).rev();
    let jobs = page(older.clone().take(limit).map(|(&job, _)| describe(hub, job)));
    v1::ListResponse { more: older.count() > jobs.len(), jobs }
}

/// The first of these jobs, as many as one answer holds; at least one.
fn page(jobs: impl Iterator<Item = v1::Job>) -> Vec<v1::Job> {
    let mut bytes = 0;
    let mut fits = |job: &v1::Job| {
        let is_first = bytes == 0;
        bytes += job.encoded_len();
        is_first || bytes <= MAX_ANSWER
    };
    jobs.take_while(|job| fits(job)).collect()
}

/// Texts that were kept by an earlier version are as they came.
fn show(text: &mut String) {
    tidy(text, MAX_SHOWN);
}

/// A job as clients see it.
pub(super) fn describe(hub: &Hub, job: JobId) -> v1::Job {
    let core = hub.core();
    let Some(record) = core.jobs().all.get(&job) else { return v1::Job::default() };
    let steps = hub.steps(job);
    let places = record.running().map_or(&[][..], |formed| &formed.places);
    let rank = |(rank, &worker): (usize, &u64)| {
        let registration = core.member(worker).map(|member| member.registration.clone()).unwrap_or_default();
        let step = steps.and_then(|steps| steps.by_rank.get(rank)).copied().unwrap_or_default();
        let RankTime { busy, waited, link, is_slow } =
            steps.map(|steps| steps.pace.time_of(rank)).unwrap_or_default();
        v1::RankPlace {
            rank: rank as u64,
            worker: registration.name,
            node: registration.node,
            step,
            busy_seconds: busy,
            waited_seconds: waited,
            slow: is_slow,
            link_seconds: link,
            memory_bytes: steps.and_then(|steps| steps.memory.get(rank)).copied().unwrap_or_default(),
        }
    };
    let (size, account) = (core.size(job), core.account(job));
    let mut described = v1::Job {
        job: job.to_string(),
        name: record.spec.name.clone(),
        priority: record.spec.priority,
        state: state(record, core.is_running(job)).into(),
        step: steps.map_or(0, |steps| steps.last),
        steps: record.spec.steps(),
        generation: record.generation().number(),
        loss: steps.and_then(|steps| steps.loss),
        validation_loss: record.validation_loss,
        ranks: places.iter().enumerate().map(rank).collect(),
        waiting_for: core.waiting_for(job),
        outcome: if record.has_ended() { record.why.clone() } else { String::new() },
        submitted_unix_ms: record.submitted_ms,
        ended_unix_ms: record.ended_ms,
        losses: record.losses,
        warning: [hub.trouble().unwrap_or_default(), core.warning(job)]
            .into_iter()
            .filter(|warning| !warning.is_empty())
            .collect::<Vec<_>>()
            .join("; "),
        min_ranks: size.least.try_into().unwrap_or(u32::MAX),
        max_ranks: size.most.try_into().unwrap_or(u32::MAX),
        is_scaled: record.target > 0,
        eta_seconds: steps.filter(|_| core.is_training(job)).and_then(|steps| {
            Some(record.spec.steps().saturating_sub(steps.last) as f64 * steps.seconds_per_step()?)
        }),
        goodput: Some(goodput(account)),
        queued_seconds: account.queued_ms as f64 / 1e3,
        layout: record.running().map_or_else(String::new, |formed| formed.layout.clone()),
    };
    let v1::Job { name, waiting_for, outcome, layout, .. } = &mut described;
    [name, waiting_for, outcome, layout].into_iter().for_each(show);
    described
}

/// An account as it is told.
pub(super) fn goodput(account: Account) -> v1::Goodput {
    let seconds = |ms: u64| ms as f64 / 1e3;
    let SlotTime { committed, recomputed, forming, recovery } = account.spent;
    v1::Goodput {
        committed: seconds(committed),
        recomputed: seconds(recomputed),
        forming: seconds(forming),
        recovery: seconds(recovery),
        undecided: seconds(account.undecided),
        idle: seconds(account.idle),
    }
}

/// Its state; `is_running`: whether all of its ranks are ready.
pub(super) fn state(record: &JobRecord, is_running: bool) -> v1::JobState {
    match record.phase {
        Phase::Queued => v1::JobState::Queued,
        Phase::Formed if is_running => v1::JobState::Running,
        Phase::Formed if record.losses > 0 => v1::JobState::Recovering,
        Phase::Formed => v1::JobState::Forming,
        Phase::Broken => v1::JobState::Recovering,
        Phase::Ended(End::Done) => v1::JobState::Done,
        Phase::Ended(End::Failed) => v1::JobState::Failed,
        Phase::Ended(End::Cancelled) => v1::JobState::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_as_many_jobs_as_fit_and_at_least_one() {
        let job = |bytes| v1::Job { outcome: "o".repeat(bytes), ..v1::Job::default() };
        let listed = |bytes: usize| page((0..100).map(|_| job(bytes))).len();
        assert_eq!(listed(10), 100);
        assert_eq!(listed(MAX_ANSWER / 10), 9);
        assert_eq!(listed(2 * MAX_ANSWER), 1);
    }
}
