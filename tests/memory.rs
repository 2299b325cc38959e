//! A run does not grow: what a step takes it gives back. In a process of its own, whose memory is the run's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow::local::{LocalCluster, LocalClusterSpec};
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::engine::probe::Probe;

/// Resident memory of this process.
///
/// **Units**: bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kibibytes
}

/// Resident bytes after each step of the default recipe on short sequences, in some layout.
fn train(layout: &[&str], steps: usize) -> Vec<u64> {
    let mut changes: Vec<String> = layout.iter().map(|&change| change.to_owned()).collect();
    changes.push(format!("training.steps={steps}"));
    changes.extend(["training.sequence_length=32", "checkpoint.save_model=false"].map(str::to_owned));
    let recipe = Arc::new(Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap());
    let text: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let packed =
        PackedDataset::pack(&[Document { name: "noise".into(), text }], recipe.training.sequence_length);
    let datasets = Arc::new(Datasets { train: packed.clone(), validation: packed });
    let measured: Arc<Mutex<Vec<u64>>> = Arc::default();
    let after_step = measured.clone();
    let subscriber: Subscriber =
        Box::new(move |_: &StepRecord| after_step.lock().unwrap().push(resident_bytes()));
    let spec = LocalClusterSpec {
        recipe,
        datasets,
        generation: Generation::FIRST,
        peak_flops: None,
        resume: None,
        checkpoints: None,
        export_dir: None,
        network: LocalOptions::default(),
        overlap: true,
        probe: Probe::default(),
        subscribers: vec![subscriber],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(async {
        let cluster = LocalCluster::start(spec).await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), cluster.wait()).await.expect("the run hangs")
    });
    assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    std::mem::take(&mut *measured.lock().unwrap())
}

#[test]
fn memory_does_not_grow_over_the_steps() {
    let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];
    // One rank does the same in every step but for the number of rows of an expert. Ranks that share the cores are now
    // and then all at their peak at once: their high water comes later and depends on chance.
    for (layout, early, late, bound) in [(&alone[..], 3, 12, 1.01), (&[][..], 12, 30, 1.05)] {
        let measured = train(layout, late);
        let growth = measured[late - 1] as f64 / measured[early - 1] as f64;
        assert!(growth < bound, "{growth} from step {early} to {late}, resident bytes by step: {measured:?}");
    }
}
