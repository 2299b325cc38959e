//! JobService: submitting, asking, following.

use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::faults::Faults;
use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::RankFigures;
use contraflow_runtime::topology::JobId;
use contraflow_runtime::trace;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use v1::job_service_server::JobService;

use super::Handle;
use super::hub::{Hub, HubMessage, LogRecord};
use super::steps::StepProgress;
use crate::core::Event;
use crate::core::facts::{End, JobSpec};
use crate::core::jobs::{JobRecord, Phase};
use crate::metrics::record::StepRecord;
use crate::store::{Numbered, Store, StoreError};

/// Jobs of a list that does not say how many it wants.
const PAGE: usize = 100;

/// Most jobs of one list.
const MAX_PAGE: usize = 1_000;

/// Messages of a stream that wait for its reader.
const MAX_UNREAD: usize = 64;

/// Longest name of a job, and longest idempotency key, in bytes.
const MAX_TEXT: usize = 256;

/// The service.
pub(super) struct JobsApi {
    pub(super) hub: Handle,
}

type Reply<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl JobService for JobsApi {
    type WatchStream = Answers<v1::WatchResponse>;
    type LogsStream = Answers<v1::LogsResponse>;

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Reply<v1::SubmitResponse> {
        let spec = Box::new(spec(request.into_inner()).map_err(|faults| refused(&faults))?);
        let (reply, id) = oneshot::channel();
        self.hub.send(HubMessage::Submit { spec, reply }).await?;
        let ending = |_| Status::unavailable("the orchestrator is ending");
        Ok(Response::new(v1::SubmitResponse { job: id.await.map_err(ending)?.to_string() }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Reply<v1::GetResponse> {
        let job = self.id(&request.into_inner().job).await?;
        let job = self.hub.ask(move |hub| describe(hub, job)).await?;
        Ok(Response::new(v1::GetResponse { job: Some(job) }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Reply<v1::ListResponse> {
        let v1::ListRequest { limit, before } = request.into_inner();
        let limit = if limit == 0 { PAGE } else { (limit as usize).min(MAX_PAGE) };
        let before =
            if before.is_empty() { Bound::Unbounded } else { Bound::Excluded(self.id(&before).await?) };
        let page = move |hub: &Hub| -> Vec<v1::Job> {
            let numbers = hub.core().jobs().all.range((Bound::Unbounded, before)).rev().take(limit);
            numbers.map(|(&job, _)| describe(hub, job)).collect()
        };
        Ok(Response::new(v1::ListResponse { jobs: self.hub.ask(page).await? }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        let v1::WatchRequest { job, from_step } = request.into_inner();
        let first = from_step.max(1);
        let follow = self.follow(&job).await?;
        let follow = Follow { next: first, until_end: true, first_step: Some(first), ..follow };
        let read = |store: &Store, job: JobId, next: u64| {
            store.steps(job.bits(), next)?.take(MAX_UNREAD).collect::<Result<Vec<_>, _>>()
        };
        let decode = |bytes: &[u8]| {
            let record = Some(serde_json::from_slice::<StepRecord>(bytes).ok()?);
            Some(v1::WatchResponse { record })
        };
        Ok(Response::new(stream(follow, read, decode)))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Reply<v1::CancelResponse> {
        let v1::CancelRequest { job, reason } = request.into_inner();
        let job = self.id(&job).await?;
        self.hub.send(HubMessage::Event(Event::Cancel { job, reason })).await?;
        let job = self.hub.ask(move |hub| describe(hub, job)).await?;
        Ok(Response::new(v1::CancelResponse { job: Some(job) }))
    }

    async fn logs(&self, request: Request<v1::LogsRequest>) -> Reply<Self::LogsStream> {
        let v1::LogsRequest { job, rank, follow: until_end } = request.into_inner();
        let follow = Follow { next: 0, until_end, ..self.follow(&job).await? };
        let read = |store: &Store, job: JobId, next: u64| {
            store.lines(job.bits(), next)?.take(MAX_UNREAD).collect::<Result<Vec<_>, _>>()
        };
        let decode = move |bytes: &[u8]| {
            let line = serde_json::from_slice::<LogRecord>(bytes).ok()?;
            let wanted = rank.is_none_or(|rank| line.ranks.contains(&rank));
            let LogRecord { unix_ms, level, ranks, message } = line;
            wanted.then_some(v1::LogsResponse { unix_ms, level, ranks, message })
        };
        Ok(Response::new(stream(follow, read, decode)))
    }
}

impl JobsApi {
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

/// Sends what is kept, and continues with what comes.
fn stream<T: Send + 'static>(
    mut follow: Follow,
    read: Read,
    decode: impl Fn(&[u8]) -> Option<T> + Send + 'static,
) -> Answers<T> {
    let (sender, answers) = mpsc::channel(MAX_UNREAD);
    tokio::spawn(async move {
        let mut returns = follow.progress.borrow().returns;
        loop {
            let progress = follow.look(&mut returns);
            loop {
                let (store, job, next) = (follow.store.clone(), follow.job, follow.next);
                let entries = tokio::task::spawn_blocking(move || read(&store, job, next)).await;
                let Ok(Ok(entries)) = entries else {
                    return drop(sender.send(Err(Status::internal("the state cannot be read"))).await);
                };
                let Some((last, _)) = entries.last() else { break };
                follow.next = last + 1;
                let answers: Vec<T> = entries.iter().filter_map(|(_, bytes)| decode(bytes)).collect();
                for answer in answers {
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
            // What was kept when it ended has been read since.
            if progress.has_ended || !follow.until_end || follow.progress.changed().await.is_err() {
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(answers))
}

fn refused(faults: &Faults) -> Status {
    Status::invalid_argument(faults.to_string())
}

/// Checks a request.
fn spec(request: v1::SubmitRequest) -> Result<JobSpec, Faults> {
    let v1::SubmitRequest { recipe, overrides, model_config, name, priority, idempotency_key, min_ranks } =
        request;
    let name = if name.is_empty() { "recipe".to_owned() } else { name };
    let model = if model_config.is_empty() { None } else { Some(ModelConfig::from_hf_json(&model_config)?) };
    let recipe = Recipe::submitted(&recipe, &name, &overrides, model)?;
    let world = recipe.topology().world();
    let mut faults = Faults::default();
    let figures = recipe_figures(&recipe).map_err(|words| faults.push("parallel", words)).unwrap_or_default();
    let rank_bytes = figures.iter().map(RankFigures::bytes).max().unwrap_or_default();
    for (field, text) in [("name", &name), ("idempotency_key", &idempotency_key)] {
        if text.len() > MAX_TEXT {
            faults.expected(field, format!("at most {MAX_TEXT} bytes"), text.len());
        }
    }
    if min_ranks as usize > world {
        faults.expected("min_ranks", format!("at most {world}, the ranks of the recipe"), min_ranks);
    }
    faults.into_result(JobSpec {
        name,
        priority,
        min_ranks: if min_ranks == 0 { world } else { min_ranks as usize },
        key: idempotency_key,
        recipe: Arc::new(recipe),
        rank_bytes,
        traceparent: trace::current().to_string(),
    })
}

fn describe(hub: &Hub, job: JobId) -> v1::Job {
    let core = hub.core();
    let Some(record) = core.jobs().all.get(&job) else { return v1::Job::default() };
    let steps = hub.steps(job);
    let places = record.running().map_or(&[][..], |formed| &formed.places);
    let rank = |(rank, &worker): (usize, &u64)| {
        let registration = core.member(worker).map(|member| member.registration.clone()).unwrap_or_default();
        let step = steps.and_then(|steps| steps.by_rank.get(rank)).copied().unwrap_or_default();
        v1::RankPlace { rank: rank as u64, worker: registration.name, node: registration.node, step }
    };
    v1::Job {
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
    }
}

fn state(record: &JobRecord, is_running: bool) -> v1::JobState {
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
