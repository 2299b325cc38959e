//! The dashboard as a browser and a scraper see it: over HTTP, in front of the library and of the binary.

#![allow(clippy::unwrap_used, missing_docs)]

mod browser;
mod cluster;
mod http;
mod metrics;
mod placement;
mod routes;
mod top;

use std::sync::Arc;

use contraflow::dashboard::{Dashboard, Door, DoorArgs, Facts, Shown, Subject};
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_proto::{GradientNorms, LayerLoad};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{Mode, Plan};

/// A run of the default recipe that has made so many steps.
fn shown(steps: u64) -> Arc<Shown> {
    let recipe = Arc::new(Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap());
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let (plan, _): (Plan, _) =
        recipe.parallel.schedule.plan(recipe.parallel.pipeline, micro_batches, Mode::Train).unwrap();
    let folder = std::path::Path::new("runs/tiny");
    let shown = Shown::starting(Facts::of_local(folder, recipe, plan));
    (1..=steps).for_each(|step| shown.step(&record(step)));
    shown
}

fn record(step: u64) -> StepRecord {
    StepRecord {
        step,
        generation: 1,
        tokens: 1_024,
        loss: 6.0 / step as f64,
        mtp_loss: Some(7.0 / step as f64),
        validation_loss: Some(5.5),
        mfu: Some(0.25),
        grad_norm: 1.5,
        learning_rate: 1e-3,
        seconds: 0.5,
        tokens_per_second: 2_048.0,
        bubble_share: 0.125,
        sent_bytes: 1 << 20,
        peak_live_chunks: 3,
        unix_ms: 1_700_000_000_000 + step,
        max_vio: [(1, 0.5)].into(),
        loads: vec![LayerLoad { layer: 1, counts: vec![6, 4, 2, 0] }],
        gradient_norms: Some(GradientNorms { embedding: 1.0, layers: vec![0.5; 4], head: 0.25 }),
        ..StepRecord::default()
    }
}

/// Serves runs on some port of loopback.
fn serve(runs: Vec<Arc<Shown>>, listen: &str, token: Option<&str>) -> Dashboard {
    let args = DoorArgs { listen: Some(listen.parse().unwrap()), token: token.map(str::to_owned) };
    Door::open(&args).unwrap().unwrap().serve(Subject::of_runs(runs)).unwrap()
}
