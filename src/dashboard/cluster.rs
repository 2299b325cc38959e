//! The jobs of a cluster for pages: asked of the orchestrator's own services, with the token of whoever looks, so that its roles hold here as
//! they hold for every other client.
//!
//! A job that somebody looks at is followed into a history, which all its viewers share; those that nobody has looked at for longest are let
//! go.

pub mod api;
pub mod figures;
pub mod incidents;

use std::sync::Arc;

use contraflow_orchestrator::server::{Calls, Front, Visitor};
use contraflow_proto::v1;
use contraflow_runtime::layout::recipe_plan;
use contraflow_runtime::schedule::{Mode, Overlap};
use parking_lot::Mutex;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Status};
use v1::cluster_service_client::ClusterServiceClient;
use v1::job_service_client::JobServiceClient;

use super::shown::{Facts, Phase, Shown, planned_ranks};
use crate::access::Bearer;

/// Jobs that are followed at once.
const MAX_FOLLOWED: usize = 32;

/// Who looks at a page.
#[derive(Clone, Debug)]
pub struct Viewer {
    /// Where they are.
    pub visitor: Visitor,
    /// The token that they have shown, if any.
    pub token: Option<String>,
}

type Guarded = InterceptedService<Calls, Bearer>;

/// A cluster.
pub struct Cluster {
    front: Front,
    /// The one that was looked at last stands last.
    followed: Mutex<Vec<Arc<Shown>>>,
}

impl Cluster {
    /// Of an orchestrator in this process.
    pub fn new(front: Front) -> Self {
        Cluster { front, followed: Mutex::default() }
    }

    /// The services in this process.
    pub fn front(&self) -> &Front {
        &self.front
    }

    fn guarded(&self, viewer: &Viewer) -> Guarded {
        let token = viewer.token.as_ref();
        // What is no text of a header is no token of the cluster's either, and refused as none.
        let token = token.and_then(|token| MetadataValue::try_from(format!("Bearer {token}")).ok());
        InterceptedService::new(self.front.calls(viewer.visitor.clone()), Bearer(token))
    }

    /// The service of jobs for a viewer.
    pub fn jobs(&self, viewer: &Viewer) -> JobServiceClient<Guarded> {
        JobServiceClient::new(self.guarded(viewer))
    }

    /// The service of nodes for a viewer.
    pub fn nodes(&self, viewer: &Viewer) -> ClusterServiceClient<Guarded> {
        ClusterServiceClient::new(self.guarded(viewer))
    }

    /// A job, if the viewer may see it.
    ///
    /// **Errors**: `NOT_FOUND`, `UNAUTHENTICATED`, `PERMISSION_DENIED`.
    pub async fn job(&self, viewer: &Viewer, id: &str) -> Result<v1::Job, Status> {
        let asked = self.jobs(viewer).get(v1::GetRequest { job: id.to_owned(), with_recipe: false }).await?;
        asked.into_inner().job.ok_or_else(|| Status::not_found("job"))
    }

    /// The history of a job, if the viewer may see it.
    ///
    /// **Errors**: as [`Cluster::job`].
    pub async fn find(self: &Arc<Self>, viewer: &Viewer, id: &str) -> Result<Arc<Shown>, Status> {
        let job = self.job(viewer, id).await?;
        let known = {
            let mut followed = self.followed.lock();
            let known = followed.iter().position(|shown| shown.facts.id == job.job);
            known.map(|place| {
                let shown = followed.remove(place);
                followed.push(shown.clone());
                shown
            })
        };
        let shown = match known {
            // A job that was taken up again makes more steps than its history has.
            Some(shown) if !has_ended(&shown) || is_over(job.state()) => shown,
            _ => self.follow(viewer.clone(), &job).await,
        };
        let loads = self.front.loads(&job.job).await;
        let phase = phase_of(job.state());
        if has_changed(&shown, phase, &job) || loads.is_some() {
            shown.change(|state| {
                if let Some((step, loads)) = loads {
                    state.history.put_loads(step, &loads);
                }
                state.phase = phase;
                state.outcome = if job.outcome.is_empty() { job.waiting_for } else { job.outcome };
            });
        }
        Ok(shown)
    }

    async fn follow(self: &Arc<Self>, viewer: Viewer, job: &v1::Job) -> Arc<Shown> {
        let recipe = self.front.recipe(&job.job).await;
        let plan = recipe.as_ref().and_then(|recipe| {
            let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
            let overlap = Overlap::of(recipe.parallel.overlap);
            let plan = recipe_plan(recipe, micro_batches, Mode::Train, overlap);
            plan.ok().map(|(plan, _)| plan)
        });
        let of = recipe.clone();
        let planned_ranks = tokio::task::spawn_blocking(move || of.map(|recipe| planned_ranks(&recipe)));
        let facts = Facts {
            id: job.job.clone(),
            name: if job.name.is_empty() { job.job.clone() } else { format!("{} · {}", job.name, job.job) },
            folder: None,
            steps: Some(job.steps),
            planned_ranks: planned_ranks.await.ok().flatten().unwrap_or_default(),
            recipe,
            plan,
            is_local: false,
        };
        let shown = Shown::new(facts, Phase::Loading);
        {
            let mut followed = self.followed.lock();
            followed.retain(|other| other.facts.id != job.job);
            if followed.len() >= MAX_FOLLOWED {
                followed.remove(0);
            }
            followed.push(shown.clone());
        }
        let (cluster, id, weak) = (self.clone(), job.job.clone(), Arc::downgrade(&shown));
        tokio::spawn(async move {
            let request = v1::WatchRequest { job: id, from_step: 0 };
            let Ok(watched) = cluster.jobs(&viewer).watch(request).await else { return };
            let mut steps = watched.into_inner();
            drop(cluster);
            // Ends with the job, when the token is withdrawn, and when nobody has the history any more.
            while let Ok(Some(step)) = steps.message().await {
                let Some(shown) = weak.upgrade() else { return };
                shown.change(|state| step.record.iter().for_each(|record| state.history.push(record, None)));
            }
        });
        shown
    }
}

fn has_ended(shown: &Shown) -> bool {
    shown.read(|state| matches!(state.phase, Phase::Done | Phase::Failed | Phase::Stopped))
}

fn has_changed(shown: &Shown, phase: Phase, job: &v1::Job) -> bool {
    shown.read(|state| {
        state.phase != phase || (state.outcome != job.outcome && state.outcome != job.waiting_for)
    })
}

fn is_over(state: v1::JobState) -> bool {
    matches!(state, v1::JobState::Done | v1::JobState::Failed | v1::JobState::Cancelled)
}

/// A job's state as the phase of a run.
pub fn phase_of(state: v1::JobState) -> Phase {
    match state {
        v1::JobState::Unspecified | v1::JobState::Queued => Phase::Queued,
        v1::JobState::Forming | v1::JobState::Recovering => Phase::Starting,
        v1::JobState::Running => Phase::Training,
        v1::JobState::Done => Phase::Done,
        v1::JobState::Failed => Phase::Failed,
        v1::JobState::Cancelled => Phase::Stopped,
    }
}

/// HTTP status of a refusal, and its reasons.
pub fn refusal(status: &Status) -> (u16, Vec<String>) {
    let code = match status.code() {
        Code::Unauthenticated => 401,
        Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::InvalidArgument => 400,
        Code::FailedPrecondition | Code::AlreadyExists => 409,
        Code::ResourceExhausted => 429,
        _ => 503,
    };
    (code, status.message().lines().map(str::to_owned).collect())
}
