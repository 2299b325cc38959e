//! From a request to a job: everything that a submission is checked for. The checks run beside the threads that serve, a few at
//! once, so that nobody waits for another one's recipe but who submits one too.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::faults::Faults;
use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::RankFigures;
use contraflow_runtime::trace;
use tokio::sync::Semaphore;
use tonic::Status;

use super::{bounds, refused};
use crate::core::facts::JobSpec;

/// How long a submission waits for its turn to be checked.
const TURN: Duration = Duration::from_secs(10);

/// Most ranks of a job: its formations are facts, which have a bound.
const MAX_RANKS: usize = 1 << 16;

/// Submissions that are checked at once: half of the cores.
static TURNS: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Semaphore::new(cores.div_ceil(2))
});

/// A job of this user as it is asked for.
///
/// **Errors**: `INVALID_ARGUMENT` with every fault; `RESOURCE_EXHAUSTED` if too many others are being checked.
pub(super) async fn check(request: v1::SubmitRequest, user: String) -> Result<Box<JobSpec>, Status> {
    bounds::submit(&request).map_err(|faults| refused(&faults))?;
    let busy = "submissions: others are being checked; submit it again in some seconds";
    let turn = tokio::time::timeout(TURN, TURNS.acquire()).await;
    let turn = turn.ok().and_then(Result::ok).ok_or_else(|| Status::resource_exhausted(busy))?;
    let traceparent = trace::current().to_string();
    let checked = tokio::task::spawn_blocking(move || {
        let spec = spec(request);
        drop(turn);
        spec
    });
    let spec =
        checked.await.map_err(|panic| Status::internal(format!("the check of the recipe: {panic}")))?;
    let spec = spec.map_err(|faults| refused(&faults))?;
    Ok(Box::new(JobSpec { user, traceparent, ..spec }))
}

fn spec(request: v1::SubmitRequest) -> Result<JobSpec, Faults> {
    let v1::SubmitRequest { recipe, overrides, model_config, name, priority, idempotency_key, min_ranks } =
        request;
    let name = if name.is_empty() { "recipe".to_owned() } else { name };
    let model = if model_config.is_empty() { None } else { Some(ModelConfig::from_hf_json(&model_config)?) };
    let recipe = Recipe::submitted(&recipe, &name, &overrides, model)?;
    bounds::recipe(&recipe)?;
    let world = recipe.topology().world();
    let mut faults = Faults::default();
    if world > MAX_RANKS {
        faults.expected("parallel", format!("at most {MAX_RANKS} ranks"), world);
        return Err(faults);
    }
    let figures = recipe_figures(&recipe).map_err(|words| faults.push("parallel", words)).unwrap_or_default();
    let rank_bytes = figures.iter().map(RankFigures::bytes).max().unwrap_or_default();
    if min_ranks as usize > world {
        faults.expected("min_ranks", format!("at most {world}, the ranks of the recipe"), min_ranks);
    }
    faults.into_result(JobSpec {
        name,
        priority,
        min_ranks: if min_ranks == 0 { world } else { min_ranks as usize },
        key: idempotency_key,
        user: String::new(),
        recipe: Arc::new(recipe),
        rank_bytes,
        traceparent: String::new(),
    })
}
