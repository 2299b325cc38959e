//! From a request to a job: everything that a submission is checked for. The checks run beside the threads that serve, a few at
//! once, so that nobody waits for another one's recipe but who submits one too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::faults::Faults;
use contraflow_runtime::files::objects::Sources;
use contraflow_runtime::layout::{checkpoint_bytes, folder_bytes, recipe_figures};
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::{Recipe, continuation};
use contraflow_runtime::schedule::{RankFigures, size};
use contraflow_runtime::topology::JobId;
use contraflow_runtime::trace;
use tokio::sync::Semaphore;
use tonic::Status;

use super::{bounds, refused};
use crate::core::MAX_RANKS;
use crate::core::facts::{End, JobSpec, Origin};
use crate::core::jobs::{JobRecord, Phase};
use crate::rollback::Checkpoint;

/// How long a submission waits for its turn to be checked.
const TURN: Duration = Duration::from_secs(10);

/// Submissions that are checked at once: half of the cores.
static TURNS: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Semaphore::new(cores.div_ceil(2))
});

/// The job whose newest checkpoint a new one begins with.
pub(super) struct Resumed {
    /// What it trained, and how.
    spec: JobSpec,
    origin: Origin,
}

impl Resumed {
    /// **Errors**: `FAILED_PRECONDITION`; the job has not ended, or has no checkpoint.
    pub(super) fn of(job: JobId, record: &JobRecord) -> Result<Self, Status> {
        let refused = |got: &str| {
            let words =
                format!("resume: expected a job that has ended and has a checkpoint, got {job}, {got}");
            Err(Status::failed_precondition(words))
        };
        match record.checkpoint() {
            _ if !record.has_ended() => refused("one that has not ended"),
            None => refused("one without a checkpoint"),
            Some(checkpoint) => {
                let origin =
                    Origin { job: Some(job), folder: String::new(), checkpoint, cursor: record.cursor };
                Ok(Resumed { spec: record.spec.clone(), origin })
            }
        }
    }
}

/// A job of this user as it is asked for.
///
/// **Errors**: `INVALID_ARGUMENT` with every fault; `RESOURCE_EXHAUSTED` if too many others are being checked.
pub(super) async fn check(
    request: v1::SubmitRequest,
    resumed: Option<Resumed>,
    user: String,
    quota: Option<u64>,
) -> Result<Box<JobSpec>, Status> {
    let busy = "submissions: others are being checked; submit it again in some seconds";
    let turn = tokio::time::timeout(TURN, TURNS.acquire()).await;
    let turn = turn.ok().and_then(Result::ok).ok_or_else(|| Status::resource_exhausted(busy))?;
    let traceparent = trace::current().to_string();
    let checked = tokio::task::spawn_blocking(move || {
        let spec = spec(request, resumed, quota);
        drop(turn);
        spec
    });
    let spec =
        checked.await.map_err(|panic| Status::internal(format!("the check of the recipe: {panic}")))?;
    let spec = spec.map_err(|faults| refused(&faults))?;
    Ok(Box::new(JobSpec { user, traceparent, ..spec }))
}

/// What of object stores a job names, against what each of the workers reads that are there; they look again. Where there are none
/// nothing is known.
///
/// **Errors**: `INVALID_ARGUMENT`; none of them reads all of it, with what the one says that reads most.
pub(super) fn check_sources(spec: &JobSpec, workers: &[Sources]) -> Result<(), Status> {
    let refusals = workers.iter().map(|sources| spec.recipe.check_sources(sources).err());
    let least =
        refusals.min_by_key(|refusal| refusal.as_ref().map_or(0, |faults| faults.list.len() + faults.more));
    least.flatten().map_or(Ok(()), |faults| Err(refused(&faults)))
}

/// The job of a key that is submitted again.
///
/// **Errors**: `ALREADY_EXISTS`; it is another job, and what differs.
pub(super) fn same_job(job: JobId, known: &JobSpec, again: &JobSpec) -> Result<JobId, Status> {
    match difference(known, again) {
        None => Ok(job),
        Some(field) => Err(Status::already_exists(format!(
            "idempotency_key: {:?} is that of {job}, which has another {field}; submit this one under another key",
            again.key
        ))),
    }
}

/// **Errors**: `FAILED_PRECONDITION`; the job has neither failed nor was it cancelled.
pub(super) fn may_be_retried(job: JobId, phase: &Phase) -> Result<(), Status> {
    let state = match phase {
        Phase::Ended(End::Failed | End::Cancelled) => return Ok(()),
        Phase::Ended(End::Done) => "one that is done",
        _ => "one that has not ended",
    };
    let words = format!("job: expected one that has failed or was cancelled, got {job}, {state}");
    Err(Status::failed_precondition(words))
}

/// The first field in which two jobs differ. Whose token submitted them, and under which span, makes no difference.
fn difference(one: &JobSpec, other: &JobSpec) -> Option<String> {
    let of_job = [
        ("name", one.name != other.name),
        ("priority", one.priority != other.priority),
        ("min_ranks", one.min_ranks != other.min_ranks),
        ("max_ranks", one.max_ranks != other.max_ranks),
        ("resume", one.origin != other.origin),
        ("model.config", one.recipe.model_config != other.recipe.model_config),
    ];
    let of_job = of_job.into_iter().find(|(_, differs)| *differs).map(|(field, _)| field.to_owned());
    of_job.or_else(|| {
        let (one, other) = (one.recipe.resolved_toml(), other.recipe.resolved_toml());
        let (one, other) = (keys(&one), keys(&other));
        let changed = one.iter().find(|(key, value)| other.get(*key) != Some(value));
        let added = || other.iter().find(|(key, _)| !one.contains_key(*key));
        changed.or_else(added).map(|(key, _)| key.clone())
    })
}

/// By key, section and all, the value of each line of a recipe.
fn keys(recipe: &str) -> BTreeMap<String, &str> {
    let mut section = "";
    let mut keys = BTreeMap::new();
    for line in recipe.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else if let Some((key, value)) = line.split_once(" = ") {
            keys.insert(format!("{section}.{key}"), value);
        }
    }
    keys
}

fn spec(request: v1::SubmitRequest, resumed: Option<Resumed>, quota: Option<u64>) -> Result<JobSpec, Faults> {
    let v1::SubmitRequest {
        recipe,
        overrides,
        model_config,
        mut name,
        priority,
        idempotency_key,
        min_ranks,
        max_ranks,
        resume,
        force,
    } = request;
    if name.is_empty() {
        name = resumed.as_ref().map_or_else(|| "recipe".to_owned(), |resumed| resumed.spec.name.clone());
    }
    let recipe = match &resumed {
        Some(Resumed { spec, .. }) if recipe.is_empty() => {
            let (text, model) = (spec.recipe.resolved_toml(), spec.recipe.model_config.clone());
            Recipe::resubmitted(&text, &name, &overrides, model)?
        }
        _ => {
            let model =
                if model_config.is_empty() { None } else { Some(ModelConfig::from_hf_json(&model_config)?) };
            Recipe::submitted(&recipe, &name, &overrides, model)?
        }
    };
    bounds::recipe(&recipe)?;
    let mut faults = match &resumed {
        Some(Resumed { spec, origin }) => continuation(&spec.recipe, &recipe, origin.checkpoint.step),
        None => Faults::default(),
    };
    let origin = resumed.map(|resumed| resumed.origin).or_else(|| resume.map(in_folder));
    check_origin(origin.as_ref(), &recipe, &mut faults);
    let world = recipe.topology().world();
    if world > MAX_RANKS {
        faults.expected("parallel", format!("at most {MAX_RANKS} ranks"), world);
        return Err(faults);
    }
    for (at, axes) in recipe.elastic.named().enumerate().filter(|(_, axes)| axes.world() > MAX_RANKS) {
        let path = format!("elastic.layouts[{at}]");
        faults.expected(path, format!("at most {MAX_RANKS} ranks"), axes.world());
    }
    let figures = recipe_figures(&recipe).map_err(|words| faults.push("parallel", words)).unwrap_or_default();
    let estimate = figures.iter().map(RankFigures::bytes).max().unwrap_or_default();
    check_quota(quota, &recipe, &mut faults);
    if min_ranks as usize > world {
        faults.expected("min_ranks", format!("at most {world}, the ranks of the recipe"), min_ranks);
    }
    if max_ranks != 0 && !(world..=MAX_RANKS).contains(&(max_ranks as usize)) {
        let expected = format!("from {world}, the ranks of the recipe, to {MAX_RANKS}");
        faults.expected("max_ranks", expected, max_ranks);
    }
    // Whoever names layouts wants all of them, unless it is said otherwise.
    let named = || recipe.elastic.named().map(|axes| axes.world());
    let (least, most) = (named().min().unwrap_or(world), named().max().unwrap_or(world));
    faults.into_result(JobSpec {
        name,
        priority,
        min_ranks: if min_ranks == 0 { least } else { min_ranks as usize },
        max_ranks: if max_ranks == 0 { most } else { max_ranks as usize },
        key: idempotency_key,
        user: String::new(),
        recipe: Arc::new(recipe),
        rank_bytes: if force { 0 } else { estimate },
        traceparent: String::new(),
        origin,
    })
}

fn check_quota(quota: Option<u64>, recipe: &Recipe, faults: &mut Faults) {
    let needed = folder_bytes(recipe);
    if let Some(quota) = quota.filter(|&quota| quota < needed) {
        let expected =
            format!("a job whose folder needs {} at most (the orchestrator's --job-quota)", size(quota));
        let checkpoint = size(checkpoint_bytes(recipe));
        faults.expected(
            "checkpoint",
            expected,
            format!("{}: six times {checkpoint}, what a checkpoint takes", size(needed)),
        );
    }
}

/// The checkpoint in a folder, as the client has read it. The workers look again.
fn in_folder(v1::ResumeFrom { folder, step, cursor, .. }: v1::ResumeFrom) -> Origin {
    Origin { job: None, folder, checkpoint: Checkpoint { step, cursor }, cursor: 0 }
}

fn check_origin(origin: Option<&Origin>, recipe: &Recipe, faults: &mut Faults) {
    let Some(Origin { job, folder, checkpoint, .. }) = origin else { return };
    if job.is_none() && !Path::new(folder).is_absolute() {
        faults.expected("resume", "a job, or the absolute path of a checkpoint", format!("{folder:?}"));
    }
    let (step, steps) = (checkpoint.step, recipe.training.steps as u64);
    if step == 0 {
        faults.expected("resume", "a checkpoint of a step from 1 on", step);
    } else if step >= steps {
        let expected = format!("more than {step}, the step of the checkpoint");
        faults.list.retain(|fault| fault.path != "training.steps");
        faults.expected("training.steps", expected, steps);
    }
}
