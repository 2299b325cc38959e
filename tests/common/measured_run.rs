//! A run in this process, and what a test measures of the process after each of its steps. Knows nothing of what is measured.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow::local::{LocalCluster, LocalClusterSpec};
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::engine::probe::Probe;

/// What `measure` says after each step of a built-in recipe on noise; and the recipe.
pub fn run(
    name: &str,
    changes: &[String],
    measure: impl Fn() -> u64 + Send + 'static,
) -> (Arc<Recipe>, Vec<u64>) {
    let changes = [changes, &["checkpoint.save_model=false".to_owned()]].concat();
    let recipe = Arc::new(Recipe::load(&RecipeSource::Builtin(name.into()), &changes).unwrap());
    let text: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let packed =
        PackedDataset::pack(&[Document { name: "noise".into(), text }], recipe.training.sequence_length);
    let datasets = Arc::new(Datasets { train: packed.clone(), validation: packed });
    let measured: Arc<Mutex<Vec<u64>>> = Arc::default();
    let after_step = measured.clone();
    let subscriber: Subscriber = Box::new(move |_: &StepRecord| after_step.lock().unwrap().push(measure()));
    let spec = LocalClusterSpec {
        recipe: recipe.clone(),
        datasets,
        generation: Generation::FIRST,
        peak_flops: None,
        resume: None,
        checkpoints: None,
        export_dir: None,
        network: LocalOptions::default(),
        flight: Recorders::default(),
        probe: Probe::default(),
        subscribers: vec![subscriber],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(async {
        let cluster = LocalCluster::start(spec).await.unwrap();
        tokio::time::timeout(Duration::from_secs(300), cluster.wait()).await.expect("the run hangs")
    });
    assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    (recipe, std::mem::take(&mut *measured.lock().unwrap()))
}
