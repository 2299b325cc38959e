//! Carries what is decided about `TrainingJob` objects: asks their orchestrator, and writes their status and events.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use contraflow_proto::v1;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::finalizer::{self, Event, finalizer};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use crate::cluster::TrainingCluster;
use crate::context::{Context, Fault, MANAGER, is_code};
use crate::decide::{
    self, DELETED, Farewell, SUBMITTING, SUSPENDED, farewell, is_over, left_to_live, may_have_job, next_look,
    waited,
};
use crate::job::{TrainingJob, TrainingJobStatus};
use crate::link::{Link, Place};
use crate::request::{fingerprint, name, recipe, submission};
use crate::status::{Look, Notice, Seen, notices, parting, status, submitting};
use crate::trouble::{REACHABLE, SCALED, SUBMITTED, Trouble};
use crate::watching::Faults;

/// Keeps an object until its job is cancelled.
pub const FINALIZER: &str = "contraflow.dev/cancel";

/// Objects that are looked at, at once.
const AT_ONCE: u16 = 32;

/// How long a look may take, all of it.
const LIMIT: Duration = Duration::from_secs(120);

/// Calls that a look makes at most to bring a job to where it is wanted.
const STEPS: usize = 4;

/// Looks after every object of a namespace until `end`.
pub async fn run(
    context: Arc<Context>,
    namespace: &str,
    end: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let jobs: Api<TrainingJob> = Api::namespaced(context.client.clone(), namespace);
    let faults = Faults::default();
    let (reader, writer) = reflector::store();
    let changed = watcher(jobs, watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .predicate_filter(what_counts, Default::default());
    Controller::for_stream(changed, reader)
        .with_config(Config::default().concurrency(AT_ONCE))
        .graceful_shutdown_on(end)
        .run(reconcile, again, context)
        .for_each(|looked| {
            looked.as_ref().err().inspect(|error| faults.tell(error));
            std::future::ready(())
        })
        .await;
}

/// A change of the status is our own, and no reason to look again.
fn what_counts(job: &TrainingJob) -> Option<u64> {
    let meta = job.meta();
    let mut hasher = DefaultHasher::new();
    (meta.generation, meta.deletion_timestamp.is_some(), &meta.finalizers).hash(&mut hasher);
    Some(hasher.finish())
}

fn again(job: Arc<TrainingJob>, fault: &Fault, context: Arc<Context>) -> Action {
    match fault {
        Fault::Again(after) => Action::requeue(*after),
        fault => {
            tracing::warn!("{}: {fault}", job.name_any());
            Action::requeue(context.pace.waiting)
        }
    }
}

/// One look at an object.
///
/// **Errors**: of the API server; those of an orchestrator are shown in the object.
pub async fn reconcile(job: Arc<TrainingJob>, context: Arc<Context>) -> Result<Action, Fault> {
    let jobs: Api<TrainingJob> =
        Api::namespaced(context.client.clone(), &job.namespace().unwrap_or_default());
    let looked = finalizer(&jobs, FINALIZER, job, |event| async {
        match event {
            Event::Apply(job) => carry(&jobs, &job, &context).await,
            Event::Cleanup(job) => part(&jobs, &job, &context).await,
        }
    });
    match tokio::time::timeout(LIMIT, looked).await {
        Err(_) => Err(Fault::Slow(LIMIT)),
        Ok(Err(finalizer::Error::ApplyFailed(Fault::Gone))) => Ok(Action::await_change()),
        Ok(Err(finalizer::Error::ApplyFailed(fault) | finalizer::Error::CleanupFailed(fault))) => Err(fault),
        Ok(Err(finalizer::Error::AddFinalizer(error) | finalizer::Error::RemoveFinalizer(error)))
            if is_code(&error, 404) =>
        {
            Ok(Action::await_change())
        }
        Ok(Err(error)) => Err(Fault::Finalizer(error.to_string())),
        Ok(Ok(action)) => Ok(action),
    }
}

async fn carry(jobs: &Api<TrainingJob>, job: &TrainingJob, context: &Context) -> Result<Action, Fault> {
    let before = job.status.clone().unwrap_or_default();
    let request = request(job, context).await?;
    let mut done = before.clone();
    let (seen, scale) = match open(job, context).await? {
        Err(trouble) => (Seen::Trouble(trouble), None),
        Ok(link) => pursue(jobs, job, &link, &request, &mut done).await?,
    };
    let wanted = request.ok().map(|request| fingerprint(&request));
    let look = Look { generation: job.meta().generation, seen, wanted, scale, now: context.now() };
    let after = status(&done, &look);
    if after != before {
        show(jobs, job, &after).await?;
        context.tell(job, notices(&before, &after)).await;
    }
    // Only what is known now counts: a job that nobody answers for may have been retried.
    let left = left_to_live(&job.spec, &after, look.now).filter(|_| is_over(&look.seen));
    if left.is_some_and(|left| left.is_zero()) {
        let own = Preconditions { uid: job.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(own), ..DeleteParams::default() };
        jobs.delete(&job.name_any(), &parameters).await.map(drop).or_else(gone)?;
        return Ok(Action::await_change());
    }
    Ok(Action::requeue(next_look(&job.spec, &after, &context.pace, look.now)))
}

/// Brings the job to where it is wanted. What has been done is noted in `done`.
async fn pursue(
    jobs: &Api<TrainingJob>,
    job: &TrainingJob,
    link: &Link,
    request: &Result<v1::SubmitRequest, Trouble>,
    done: &mut TrainingJobStatus,
) -> Result<(Seen, Option<Trouble>), Fault> {
    let mut seen = match find(job, link, done).await {
        Ok(None) if done.job.is_some() => return Ok((Seen::Forgotten, None)),
        Ok(found) => found,
        Err(trouble) => return Ok((Seen::Trouble(trouble), None)),
    };
    for _ in 0..STEPS {
        let id = seen.as_ref().map(|job| job.job.clone()).unwrap_or_default();
        let outcome = match decide::action(&job.spec, job.meta().generation, done, seen.as_ref()) {
            decide::Action::Rest => break,
            decide::Action::Submit => match request {
                Ok(request) => submit(jobs, job, link, request, done).await?,
                Err(trouble) => Err(trouble.clone()),
            },
            decide::Action::Suspend => link.cancel(&id, SUSPENDED).await,
            decide::Action::Resume => link.retry(&id).await,
            decide::Action::Scale(ranks) => {
                let scaled = link.scale(&id, ranks).await;
                if let Ok(Some(job)) = &scaled {
                    done.scaled_to = i32::try_from(ranks).unwrap_or(i32::MAX);
                    done.max_ranks = i32::try_from(job.max_ranks).unwrap_or(i32::MAX);
                }
                scaled
            }
        };
        match (outcome, seen) {
            // The job goes on as it is.
            (Err(trouble), Some(job)) if trouble.condition == SCALED => {
                return Ok((Seen::Job(Box::new(job)), Some(trouble)));
            }
            (Err(trouble), _) => return Ok((Seen::Trouble(trouble), None)),
            (Ok(job), _) => seen = job,
        }
        if let Some(job) = &seen {
            done.job = Some(job.job.clone());
        }
    }
    Ok((seen.map_or(Seen::Held, |job| Seen::Job(Box::new(job))), None))
}

/// Submits the job, or finds that it has been; what it is then.
async fn submit(
    jobs: &Api<TrainingJob>,
    job: &TrainingJob,
    link: &Link,
    request: &v1::SubmitRequest,
    done: &mut TrainingJobStatus,
) -> Result<Result<Option<v1::Job>, Trouble>, Fault> {
    let own = fingerprint(request);
    // Written first: an object without it has no job, and may go without its orchestrator. What is written tells whether the object is
    // still wanted, too.
    if done.state != SUBMITTING {
        *done = submitting(done, &own);
    }
    let shown = show(jobs, job, done).await?;
    if shown.is_none_or(|shown| shown.meta().deletion_timestamp.is_some()) {
        return Err(Fault::Gone);
    }
    let found = match link.submit(request.clone()).await {
        Ok(Some(id)) => {
            done.fingerprint = own;
            link.get(&id).await
        }
        Ok(None) => link.find(&request.name).await,
        Err(trouble) => Err(trouble),
    };
    let lost = || Trouble {
        condition: SUBMITTED,
        reason: "Refused",
        words: format!("the key {} is that of another job", request.idempotency_key),
    };
    Ok(found.and_then(|job| job.map(Some).ok_or_else(lost)))
}

/// The job of an object; none if the orchestrator has none.
async fn find(job: &TrainingJob, link: &Link, known: &TrainingJobStatus) -> Result<Option<v1::Job>, Trouble> {
    let name = name(job);
    if let Some(id) = &known.job
        && let Some(found) = link.get(id).await?
        && found.name == name
    {
        return Ok(Some(found));
    }
    // Another state may have given the id to somebody else's, and this one another id.
    if may_have_job(known) { link.find(&name).await } else { Ok(None) }
}

/// What is submitted of an object.
async fn request(job: &TrainingJob, context: &Context) -> Result<Result<v1::SubmitRequest, Trouble>, Fault> {
    let map = match &job.spec.recipe.config_map {
        None => None,
        Some(map) => {
            let maps: Api<ConfigMap> =
                Api::namespaced(context.client.clone(), &job.namespace().unwrap_or_default());
            maps.get_opt(&map.name).await?
        }
    };
    let data = map.map(|map| map.data.unwrap_or_default());
    Ok(recipe(&job.spec.recipe, data.as_ref()).map(|recipe| submission(job, &recipe)))
}

/// The connection to the orchestrator of an object.
async fn open(job: &TrainingJob, context: &Context) -> Result<Result<Link, Trouble>, Fault> {
    let place = place(job, context).await?;
    Ok(place.and_then(|place| context.links.to(&place)))
}

async fn place(job: &TrainingJob, context: &Context) -> Result<Result<Place, Trouble>, Fault> {
    let namespace = job.namespace().unwrap_or_default();
    if let Some(own) = &job.spec.orchestrator {
        return context.place(&namespace, own.address.clone(), own.secret.as_deref()).await;
    }
    if let Some(name) = &job.spec.cluster {
        let clusters: Api<TrainingCluster> = Api::namespaced(context.client.clone(), &namespace);
        let Some(cluster) = clusters.get_opt(name).await? else {
            return Ok(Err(Trouble::way("NoCluster", format!("there is no TrainingCluster {name}"))));
        };
        let address = crate::objects::orchestrator_address(&cluster);
        return context.place(&namespace, address, Some(&cluster.spec.tls.client_secret)).await;
    }
    match &context.home {
        Some(home) => context.place(&namespace, home.address.clone(), home.secret.as_deref()).await,
        None => Ok(Err(Trouble::way(
            "NoOrchestrator",
            "expected cluster or orchestrator, got neither, and the operator was installed without one"
                .into(),
        ))),
    }
}

/// An object that is deleted takes its job with it.
async fn part(jobs: &Api<TrainingJob>, job: &TrainingJob, context: &Context) -> Result<Action, Fault> {
    let known = job.status.clone().unwrap_or_default();
    if !may_have_job(&known) {
        return Ok(Action::await_change());
    }
    let generation = job.meta().generation;
    let waited = waited(&known, generation, context.started, context.now());
    let link = open(job, context).await?;
    let found = match &link {
        Ok(link) => find(job, link, &known).await,
        Err(trouble) => Err(trouble.clone()),
    };
    let mut next = farewell(&known, found.as_ref().map(Option::as_ref), waited, &context.pace);
    let mut words = found.err();
    if let (Farewell::Cancel(id), Ok(link)) = (&next, &link) {
        next = match link.cancel(id, DELETED).await {
            Ok(_) => Farewell::Go,
            Err(trouble) => {
                let next = farewell(&known, Err(&trouble), waited, &context.pace);
                words = Some(trouble);
                next
            }
        };
    }
    match next {
        Farewell::Go | Farewell::Cancel(_) => {}
        Farewell::Abandon(words) => {
            context.tell(job, vec![Notice { is_warning: true, reason: "Abandoned", words }]).await;
        }
        Farewell::Wait(after) => {
            let trouble = words.unwrap_or_else(|| Trouble::way("Unreachable", String::new()));
            let trouble = Trouble { condition: REACHABLE, ..trouble };
            let look = Look {
                generation,
                seen: Seen::Trouble(trouble),
                wanted: None,
                scale: None,
                now: context.now(),
            };
            let after_look = status(&parting(&known, generation), &look);
            if after_look != known {
                show(jobs, job, &after_look).await?;
                context.tell(job, notices(&known, &after_look)).await;
            }
            return Err(Fault::Again(after));
        }
    }
    Ok(Action::await_change())
}

/// Writes the status; the object as it is then, none where it is gone.
async fn show(
    jobs: &Api<TrainingJob>,
    job: &TrainingJob,
    status: &TrainingJobStatus,
) -> Result<Option<TrainingJob>, Fault> {
    let object = json!({
        "apiVersion": TrainingJob::api_version(&()),
        "kind": TrainingJob::kind(&()),
        "metadata": {"name": job.name_any(), "uid": job.uid()},
        "status": status,
    });
    let parameters = PatchParams::apply(MANAGER).force();
    match jobs.patch_status(&job.name_any(), &parameters, &Patch::Apply(object)).await {
        Ok(shown) => Ok(Some(shown)),
        Err(error) => gone(error).map(|()| None),
    }
}

/// An object that is gone meanwhile, or has made way for another of its name, needs nothing.
fn gone(error: kube::Error) -> Result<(), Fault> {
    if is_code(&error, 404) || is_code(&error, 409) { Ok(()) } else { Err(error.into()) }
}
