//! A run does not grow: what a step takes it gives back. In a process of its own, whose memory is the run's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow::cluster::{Cluster, ClusterSpec};
use contraflow_kernels::pool;
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::metrics::{StepSummary, Subscriber};
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::loader::Datasets;
use contraflow_workers::probe::Probe;

/// Resident memory of this process. **Units**: bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kibibytes
}

/// Resident and idle bytes after each step of the default recipe's cluster, on shorter sequences.
fn train(steps: usize) -> Vec<(u64, u64)> {
    let changes =
        [&format!("training.steps={steps}"), "training.sequence_length=64", "checkpoint.save_model=false"];
    let changes = changes.map(str::to_owned);
    let recipe = Arc::new(Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap());
    let text: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let packed =
        PackedDataset::pack(&[Document { name: "noise".into(), text }], recipe.training.sequence_length);
    let datasets = Arc::new(Datasets { train: packed.clone(), validation: packed });
    let measured: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let after_step = measured.clone();
    let subscriber: Subscriber = Box::new(move |_: &StepSummary| {
        after_step.lock().unwrap().push((resident_bytes(), pool::idle_bytes() as u64));
    });
    let spec = ClusterSpec {
        recipe,
        datasets,
        export_dir: None,
        network: LocalOptions::default(),
        probe: Probe::default(),
        subscribers: vec![subscriber],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(async {
        let cluster = Cluster::start(spec).await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), cluster.wait()).await.expect("the run hangs")
    });
    assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    std::mem::take(&mut *measured.lock().unwrap())
}

#[test]
fn memory_does_not_grow_over_the_steps() {
    let measured = train(12);
    let (resident_3, idle_3) = measured[2];
    let (resident_12, idle_12) = measured[11];
    let grown = |after: u64, before: u64| after as f64 / before as f64;
    assert!(grown(resident_12, resident_3) < 1.05, "resident and idle bytes by step: {measured:?}");
    assert!(grown(idle_12, idle_3) < 1.05, "resident and idle bytes by step: {measured:?}");
}
