//! An orchestrator as small as it can be: keeps jobs by key as the real one does, and runs none. A test moves them.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use contraflow_operator::link::{Connect, Place};
use contraflow_operator::trouble::Trouble;
use contraflow_proto::v1;
use futures_util::Stream;
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use v1::JobState;
use v1::cluster_service_server::{ClusterService, ClusterServiceServer};
use v1::job_service_server::{JobService, JobServiceServer};

use crate::stage::{Change, Fuse};

struct Known {
    request: v1::SubmitRequest,
    job: v1::Job,
}

#[derive(Default)]
struct World {
    jobs: Vec<Known>,
    calls: BTreeMap<&'static str, usize>,
    is_away: bool,
    workers: Vec<v1::Worker>,
}

/// The orchestrator; its clones are the same.
#[derive(Clone)]
pub struct Orchestrator {
    world: Arc<Mutex<World>>,
    change: Change,
    fuse: Arc<Mutex<Fuse>>,
    places: Arc<Mutex<Vec<String>>>,
}

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Orchestrator {
    pub fn new(change: Change) -> Self {
        Orchestrator { world: Arc::default(), change, fuse: Arc::default(), places: Arc::default() }
    }

    /// A way to it, whose calls burn down `fuse`.
    pub fn connect(&self, fuse: Fuse) -> Connect {
        *self.fuse.lock().unwrap() = fuse;
        let server = self.clone();
        Arc::new(move |place: &Place| {
            server.places.lock().unwrap().push(place.address.clone());
            Ok::<Channel, Trouble>(server.channel())
        })
    }

    fn channel(&self) -> Channel {
        let (sender, receiver) = mpsc::unbounded_channel::<DuplexStream>();
        let incoming = UnboundedReceiverStream::new(receiver).map(Ok::<_, std::io::Error>);
        let services = Server::builder()
            .add_service(JobServiceServer::new(self.clone()))
            .add_service(ClusterServiceServer::new(self.clone()));
        tokio::spawn(services.serve_with_incoming(incoming));
        let world = self.world.clone();
        Endpoint::from_static("http://orchestrator:7070").connect_with_connector_lazy(tower::service_fn(
            move |_| {
                let is_away = {
                    let mut world = world.lock().unwrap();
                    *world.calls.entry("connect").or_default() += 1;
                    world.is_away
                };
                let (ours, theirs) = tokio::io::duplex(1 << 16);
                let refused = is_away || sender.send(theirs).is_err();
                async move {
                    if refused {
                        Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
                    } else {
                        Ok(TokioIo::new(ours))
                    }
                }
            },
        ))
    }

    pub fn set_away(&self, is_away: bool) {
        self.world.lock().unwrap().is_away = is_away;
        self.change.tell();
    }

    /// It starts anew, with an empty state.
    pub fn forget_all(&self) {
        self.world.lock().unwrap().jobs.clear();
    }

    /// Where operators have looked for it.
    pub fn places(&self) -> Vec<String> {
        self.places.lock().unwrap().clone()
    }

    pub fn set_workers(&self, workers: Vec<v1::Worker>) {
        self.world.lock().unwrap().workers = workers;
    }

    pub fn calls(&self, method: &str) -> usize {
        self.world.lock().unwrap().calls.get(method).copied().unwrap_or(0)
    }

    pub fn all_calls(&self) -> usize {
        let world = self.world.lock().unwrap();
        world.calls.iter().filter(|(method, _)| **method != "connect").map(|(_, count)| count).sum()
    }

    pub fn jobs(&self) -> Vec<v1::Job> {
        self.world.lock().unwrap().jobs.iter().map(|known| known.job.clone()).collect()
    }

    pub fn requests(&self) -> Vec<v1::SubmitRequest> {
        self.world.lock().unwrap().jobs.iter().map(|known| known.request.clone()).collect()
    }

    /// What happens to a job.
    pub fn move_job(&self, job: &str, change: impl FnOnce(&mut v1::Job)) {
        let mut world = self.world.lock().unwrap();
        change(&mut world.jobs.iter_mut().find(|known| known.job.job == job).unwrap().job);
    }

    /// Somebody else's job.
    pub fn submit_by_hand(&self, name: &str) {
        let request = v1::SubmitRequest {
            name: name.into(),
            idempotency_key: name.into(),
            ..v1::SubmitRequest::default()
        };
        self.world.lock().unwrap().submit(request).unwrap();
    }

    async fn call<T>(
        &self,
        method: &'static str,
        change: impl FnOnce(&mut World) -> Result<T, Status>,
    ) -> Answer<T> {
        let fuse = self.fuse.lock().unwrap().clone();
        fuse.before().await;
        let answer = {
            let mut world = self.world.lock().unwrap();
            *world.calls.entry(method).or_default() += 1;
            if world.is_away { Err(Status::unavailable("it is ending")) } else { change(&mut world) }
        };
        self.change.tell();
        fuse.after().await;
        answer.map(Response::new)
    }
}

impl World {
    fn submit(&mut self, request: v1::SubmitRequest) -> Result<String, Status> {
        if request.recipe.contains("broken") {
            return Err(Status::invalid_argument("training.steps: expected a number, got broken"));
        }
        if let Some(known) =
            self.jobs.iter().find(|known| known.request.idempotency_key == request.idempotency_key)
        {
            let is_same = known.request == request;
            let words = format!("idempotency_key: that of {}, which has another recipe", known.job.job);
            return if is_same { Ok(known.job.job.clone()) } else { Err(Status::already_exists(words)) };
        }
        let id = format!("job-{}", self.jobs.len() + 1);
        let job = v1::Job {
            job: id.clone(),
            name: request.name.clone(),
            state: JobState::Queued.into(),
            steps: 720,
            min_ranks: request.min_ranks.max(1),
            max_ranks: 4,
            submitted_unix_ms: 1_000,
            waiting_for: "needs 4 ranks, 0 healthy".into(),
            ..v1::Job::default()
        };
        self.jobs.push(Known { request, job });
        Ok(id)
    }

    fn job(&mut self, id: &str) -> Result<&mut v1::Job, Status> {
        let job = self.jobs.iter_mut().map(|known| &mut known.job).find(|job| job.job == id);
        job.ok_or_else(|| Status::not_found(format!("job: expected the id of a job, got {id:?}")))
    }
}

fn has_ended(job: &v1::Job) -> bool {
    matches!(job.state(), JobState::Done | JobState::Failed | JobState::Cancelled)
}

#[tonic::async_trait]
impl JobService for Orchestrator {
    type WatchStream = Answers<v1::WatchResponse>;
    type LogsStream = Answers<v1::LogsResponse>;

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Answer<v1::SubmitResponse> {
        self.call("submit", |world| Ok(v1::SubmitResponse { job: world.submit(request.into_inner())? })).await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<v1::GetResponse> {
        self.call("get", |world| {
            let job = Some(world.job(&request.get_ref().job)?.clone());
            Ok(v1::GetResponse { job, ..v1::GetResponse::default() })
        })
        .await
    }

    /// Pages of two, however many are asked for.
    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        self.call("list", |world| {
            let before = &request.get_ref().before;
            let newest = world.jobs.iter().rev().map(|known| &known.job);
            let mut rest = newest
                .skip_while(|job| !before.is_empty() && job.job != *before)
                .skip(usize::from(!before.is_empty()));
            let jobs: Vec<v1::Job> = rest.by_ref().take(2).cloned().collect();
            Ok(v1::ListResponse { jobs, more: rest.next().is_some() })
        })
        .await
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        Err(Status::unimplemented("watch"))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Answer<v1::CancelResponse> {
        self.call("cancel", |world| {
            let v1::CancelRequest { job, reason } = request.get_ref();
            let job = world.job(job)?;
            if !has_ended(job) {
                job.state = JobState::Cancelled.into();
                job.outcome.clone_from(reason);
                job.ended_unix_ms = 2_000;
                job.ranks.clear();
            }
            Ok(v1::CancelResponse { job: Some(job.clone()) })
        })
        .await
    }

    async fn retry(&self, request: Request<v1::RetryRequest>) -> Answer<v1::RetryResponse> {
        self.call("retry", |world| {
            let job = world.job(&request.get_ref().job)?;
            if !matches!(job.state(), JobState::Failed | JobState::Cancelled) {
                return Err(Status::failed_precondition(
                    "job: expected one that has failed or was cancelled",
                ));
            }
            job.state = JobState::Queued.into();
            job.outcome.clear();
            job.ended_unix_ms = 0;
            Ok(v1::RetryResponse { job: Some(job.clone()) })
        })
        .await
    }

    async fn scale(&self, request: Request<v1::ScaleRequest>) -> Answer<v1::ScaleResponse> {
        self.call("scale", |world| {
            let v1::ScaleRequest { job, ranks } = request.get_ref();
            let ranks = *ranks;
            let job = world.job(job)?;
            if has_ended(job) || ranks == 1 {
                return Err(Status::failed_precondition(
                    "ranks: expected as many as a layout of the recipe has, got 1: none has so few",
                ));
            }
            // Layouts have even numbers of ranks.
            (job.is_scaled, job.max_ranks) = (ranks > 0, if ranks == 0 { 4 } else { ranks / 2 * 2 });
            Ok(v1::ScaleResponse { job: Some(job.clone()) })
        })
        .await
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        Err(Status::unimplemented("remove"))
    }

    async fn logs(&self, _: Request<v1::LogsRequest>) -> Answer<Self::LogsStream> {
        Err(Status::unimplemented("logs"))
    }
}

#[tonic::async_trait]
impl ClusterService for Orchestrator {
    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Answer<v1::NodesResponse> {
        self.call("nodes", |world| {
            Ok(v1::NodesResponse { workers: world.workers.clone(), ..v1::NodesResponse::default() })
        })
        .await
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        Err(Status::unimplemented("drain"))
    }
}
