//! What the pages of a cluster ask for and do: JSON of the services' answers, and their refusals as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_proto::v1;
use serde_json::{Value, json};
use tonic::Status;

use super::incidents::incidents;
use super::{Cluster, Viewer, phase_of};
use crate::client::{job_json, state_of};
use crate::dashboard::prometheus::{Exposition, Family, counter, gauge, label};
use crate::dashboard::shown::{Phase, planned_memory};

/// Jobs of one answer.
const PAGE: u32 = 500;

/// Lines of one answer: the latest ones.
const MAX_LINES: usize = 2_000;

/// Open jobs with samples of their own in one answer of `/metrics`: labels stay few.
const MAX_JOBS: usize = 100;

/// Families of a cluster.
pub const OF_CLUSTERS: [Family; 11] = [
    gauge("contraflow_jobs", "Jobs that are known, by state."),
    gauge("contraflow_workers", "Members of the cluster, by whether they take ranks."),
    gauge("contraflow_slots", "Ranks that members can host."),
    gauge("contraflow_used_slots", "Ranks that members host."),
    gauge("contraflow_worker_silence_seconds", "Time since a member's last heartbeat."),
    gauge("contraflow_job_step", "Latest step of an open job of which all ranks have reported."),
    gauge("contraflow_job_steps", "Steps of an open job's recipe."),
    gauge("contraflow_job_loss_nats", "Mean cross-entropy a token of an open job's latest step."),
    counter("contraflow_job_losses_total", "Times an open job has lost a rank."),
    gauge("contraflow_job_slow_ranks", "Ranks of an open job that hold the others up."),
    counter("contraflow_orchestrator_starts_total", "Starts of the orchestrator on its state."),
];

type Answer = Result<Value, Status>;

/// As the command line prints it, with what pages ask of any run.
fn of_job(job: &v1::Job) -> Value {
    let mut value = job_json(job);
    (value["id"], value["phase"]) = (job.job.as_str().into(), json!(phase_of(job.state())));
    value
}

async fn all_jobs(cluster: &Cluster, viewer: &Viewer) -> Result<v1::ListResponse, Status> {
    let request = v1::ListRequest { limit: PAGE, before: String::new() };
    Ok(cluster.jobs(viewer).list(request).await?.into_inner())
}

/// The jobs, the newest first.
///
/// **Errors**: the service's refusal; so of all below.
pub async fn jobs(cluster: &Cluster, viewer: &Viewer) -> Answer {
    let listed = all_jobs(cluster, viewer).await?;
    Ok(json!({"jobs": listed.jobs.iter().map(of_job).collect::<Vec<_>>(), "more": listed.more}))
}

/// One job.
pub async fn job(cluster: &Cluster, viewer: &Viewer, id: &str) -> Answer {
    Ok(of_job(&cluster.job(viewer, id).await?))
}

/// The jobs as runs: what the frame of a page wants to know.
pub async fn about(cluster: &Cluster, viewer: &Viewer) -> Answer {
    let listed = all_jobs(cluster, viewer).await?;
    let run = |job: &v1::Job| {
        json!({"id": job.job, "name": if job.name.is_empty() { &job.job } else { &job.name }, "phase": phase_of(job.state()),
            "step": job.step, "steps": job.steps, "loss": job.loss, "validation_loss": job.validation_loss})
    };
    let runs: Vec<Value> = listed.jobs.iter().map(run).collect();
    Ok(json!({"version": env!("CARGO_PKG_VERSION"), "kind": "cluster", "runs": runs}))
}

/// The members.
pub async fn nodes(cluster: &Cluster, viewer: &Viewer) -> Answer {
    let answer = cluster.nodes(viewer).nodes(v1::NodesRequest {}).await?.into_inner();
    let worker = |worker: &v1::Worker| {
        json!({"worker": worker.worker, "node": worker.node, "block": worker.block, "slots": worker.slots, "used": worker.used,
            "draining": worker.draining, "silent_ms": worker.silent_ms, "address": worker.address,
            "memory_bytes": Some(worker.memory_bytes).filter(|bytes| *bytes > 0), "unreachable": worker.unreachable})
    };
    Ok(
        json!({"workers": answer.workers.iter().map(worker).collect::<Vec<_>>(), "incarnation": answer.incarnation,
        "warning": answer.warning}),
    )
}

async fn lines(
    cluster: &Cluster,
    viewer: &Viewer,
    id: &str,
    rank: Option<u32>,
) -> Result<Vec<v1::LogsResponse>, Status> {
    let request = v1::LogsRequest { job: id.to_owned(), rank, follow: false, from_line: 0 };
    let mut answers = cluster.jobs(viewer).logs(request).await?.into_inner();
    let mut lines = std::collections::VecDeque::new();
    while let Some(line) = answers.message().await? {
        if lines.len() == MAX_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
    Ok(lines.into())
}

/// The latest lines of a job's log; those that several ranks wrote are one.
pub async fn log(cluster: &Cluster, viewer: &Viewer, id: &str, rank: Option<u32>) -> Answer {
    let lines = lines(cluster, viewer, id, rank).await?;
    let line = |line: &v1::LogsResponse| json!({"number": line.number, "unix_ms": line.unix_ms, "level": line.level, "ranks": line.ranks, "message": line.message});
    Ok(json!({"lines": lines.iter().map(line).collect::<Vec<_>>(), "most": MAX_LINES}))
}

/// The failures of a job as stories.
pub async fn incidents_of(cluster: &Cluster, viewer: &Viewer, id: &str) -> Answer {
    Ok(json!({"incidents": incidents(&lines(cluster, viewer, id, None).await?)}))
}

fn text(body: &Value, key: &str) -> String {
    body[key].as_str().unwrap_or_default().to_owned()
}

fn overrides(body: &Value) -> Vec<String> {
    let texts = body["overrides"].as_array().into_iter().flatten();
    texts.filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

/// What a recipe would need, without submitting it. All of its faults, if it has some.
pub async fn check(cluster: &Cluster, viewer: &Viewer, body: &Value) -> Answer {
    // Whoever may look may ask.
    all_jobs(cluster, viewer).await?;
    let recipe = cluster.front().check(asked(body)).await?;
    let (micro_batches, parallel) =
        (recipe.micro_batches(recipe.training.global_batch_size), &recipe.parallel);
    let note = parallel.schedule.fallback(parallel.pipeline, micro_batches);
    let sized = recipe.clone();
    let memory_bytes = tokio::task::spawn_blocking(move || planned_memory(&sized)).await;
    let parameters = contraflow_runtime::cost::parameters(&recipe.model_config);
    Ok(json!({
        "world": recipe.topology().world(), "pipeline": recipe.parallel.pipeline, "expert": recipe.parallel.expert,
        "data": recipe.parallel.data, "schedule": parallel.schedule, "note": note, "micro_batches": micro_batches,
        "steps": recipe.training.steps, "tokens_per_step": recipe.training.global_batch_size * recipe.training.sequence_length,
        "parameters": parameters.total + parameters.mtp, "memory_bytes": memory_bytes.ok().flatten(),
    }))
}

/// What a page asks for a job with.
fn asked(body: &Value) -> v1::SubmitRequest {
    v1::SubmitRequest {
        recipe: text(body, "recipe"),
        overrides: overrides(body),
        model_config: text(body, "model_config"),
        name: text(body, "name"),
        priority: body["priority"].as_i64().and_then(|priority| i32::try_from(priority).ok()).unwrap_or(0),
        idempotency_key: text(body, "idempotency_key"),
        min_ranks: number(body, "min_ranks"),
        max_ranks: number(body, "max_ranks"),
        resume: None,
        force: false,
    }
}

/// A count of a request; 0 if it is not given.
fn number(body: &Value, key: &str) -> u32 {
    body[key].as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or(0)
}

/// Puts a job into the queue.
pub async fn submit(cluster: &Cluster, viewer: &Viewer, body: &Value) -> Answer {
    Ok(json!({"job": cluster.jobs(viewer).submit(asked(body)).await?.into_inner().job}))
}

/// Cancels a job.
pub async fn cancel(cluster: &Cluster, viewer: &Viewer, id: &str, body: &Value) -> Answer {
    let request = v1::CancelRequest { job: id.to_owned(), reason: text(body, "reason") };
    let answer = cluster.jobs(viewer).cancel(request).await?.into_inner();
    Ok(answer.job.as_ref().map_or(Value::Null, of_job))
}

/// Takes a job up again.
pub async fn retry(cluster: &Cluster, viewer: &Viewer, id: &str) -> Answer {
    let answer = cluster.jobs(viewer).retry(v1::RetryRequest { job: id.to_owned() }).await?.into_inner();
    Ok(answer.job.as_ref().map_or(Value::Null, of_job))
}

/// Says how many ranks a job is to have at most.
pub async fn scale(cluster: &Cluster, viewer: &Viewer, id: &str, body: &Value) -> Answer {
    let request = v1::ScaleRequest { job: id.to_owned(), ranks: number(body, "ranks") };
    let answer = cluster.jobs(viewer).scale(request).await?.into_inner();
    Ok(answer.job.as_ref().map_or(Value::Null, of_job))
}

/// Takes a node out of use, or back into it.
pub async fn drain(cluster: &Cluster, viewer: &Viewer, node: &str, body: &Value) -> Answer {
    let request = v1::DrainRequest { node: node.to_owned(), undo: body["undo"].as_bool().unwrap_or(false) };
    let answer = cluster.nodes(viewer).drain(request).await?.into_inner();
    Ok(json!({"workers": answer.workers, "ranks": answer.ranks}))
}

/// Adds the families of a cluster.
///
/// **Errors**: the viewer may not look.
pub async fn metrics(cluster: &Arc<Cluster>, viewer: &Viewer, out: &mut Exposition) -> Result<(), Status> {
    let jobs = all_jobs(cluster, viewer).await?.jobs;
    let members = cluster.nodes(viewer).nodes(v1::NodesRequest {}).await?.into_inner();
    let mut by_state: BTreeMap<String, f64> = BTreeMap::new();
    jobs.iter().for_each(|job| *by_state.entry(state_of(job)).or_default() += 1.0);
    let is_open =
        |job: &&v1::Job| !matches!(phase_of(job.state()), Phase::Done | Phase::Failed | Phase::Stopped);
    let open: Vec<&v1::Job> = jobs.iter().filter(is_open).take(MAX_JOBS).collect();
    let of_jobs = |value: fn(&v1::Job) -> f64| {
        open.iter().map(|job| (label("job", &job.job), value(job))).collect::<Vec<_>>()
    };
    let all = |value: f64| vec![(String::new(), value)];
    let workers = &members.workers;
    for family in &OF_CLUSTERS {
        let samples = match family.name {
            "contraflow_jobs" => {
                by_state.iter().map(|(state, count)| (label("state", state), *count)).collect()
            }
            "contraflow_workers" => {
                let draining = workers.iter().filter(|worker| worker.draining).count();
                vec![
                    (label("state", "draining"), draining as f64),
                    (label("state", "taking"), (workers.len() - draining) as f64),
                ]
            }
            "contraflow_slots" => all(workers.iter().map(|worker| worker.slots).sum::<u64>() as f64),
            "contraflow_used_slots" => all(workers.iter().map(|worker| worker.used).sum::<u64>() as f64),
            "contraflow_worker_silence_seconds" => {
                let of =
                    |worker: &v1::Worker| (label("worker", &worker.worker), worker.silent_ms as f64 / 1e3);
                workers.iter().map(of).collect()
            }
            "contraflow_job_step" => of_jobs(|job| job.step as f64),
            "contraflow_job_steps" => of_jobs(|job| job.steps as f64),
            "contraflow_job_loss_nats" => of_jobs(|job| job.loss.unwrap_or(f64::NAN)),
            "contraflow_job_losses_total" => of_jobs(|job| f64::from(job.losses)),
            "contraflow_job_slow_ranks" => {
                of_jobs(|job| job.ranks.iter().filter(|rank| rank.slow).count() as f64)
            }
            _ => all(members.incarnation as f64),
        };
        out.family(family, samples.into_iter());
    }
    Ok(())
}
