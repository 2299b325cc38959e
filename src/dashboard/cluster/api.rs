//! What the pages of a cluster ask for and do: JSON of the services' answers, and their refusals as they are.

use contraflow_proto::v1;
use serde_json::{Value, json};
use tonic::Status;

use super::incidents::incidents;
use super::{Cluster, Viewer, phase_of};
use crate::client::{goodput, job_json};
use crate::dashboard::shown::{planned_memory, planned_ranks};

/// Jobs of one answer.
pub const PAGE: u32 = 500;

/// Lines of one answer: the latest ones.
const MAX_LINES: usize = 2_000;

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
        "warning": answer.warning, "goodput": goodput::json(answer.goodput.as_ref())}),
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
    let memory_bytes =
        tokio::task::spawn_blocking(move || planned_memory(&sized, &planned_ranks(&sized))).await;
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

/// Whether a viewer may look at jobs and members, of which metrics are made.
///
/// **Errors**: the viewer may not.
pub async fn let_in(cluster: &Cluster, viewer: &Viewer) -> Result<(), Status> {
    drop(cluster.jobs(viewer).list(v1::ListRequest { limit: 1, before: String::new() }).await?);
    drop(cluster.nodes(viewer).nodes(v1::NodesRequest {}).await?);
    Ok(())
}
