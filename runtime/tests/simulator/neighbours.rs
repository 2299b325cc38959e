//! What pairs of neighbours are worth for layers of DeepSeek-V3 whose all-to-alls take as long as their computations.

use std::sync::Arc;

use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Mode, Overlap};
use contraflow_runtime::simulator::{Cluster, Run, simulate_with};

use crate::orders::cluster;
use crate::recipe;

/// The model's own layers on eight pipeline ranks, and seven of them, four with experts, on one.
const CASES: [(&str, &[&str]); 6] = [
    ("1f1b", &["parallel.pipeline=8", "parallel.data=4"]),
    ("zb1p", &["parallel.pipeline=8", "parallel.data=4"]),
    ("interleaved", &["parallel.pipeline=8", "parallel.data=4"]),
    ("dualpipe", &["parallel.pipeline=8", "parallel.data=4"]),
    ("dualpipev", &["parallel.pipeline=8", "parallel.data=4"]),
    ("1f1b", &["parallel.pipeline=1", "parallel.data=4", "model.num_hidden_layers=7"]),
];

fn case(schedule: &str, changes: &[&str]) -> Recipe {
    let schedule = format!("parallel.schedule={schedule}");
    // 64 micro-batches.
    recipe("deepseek-v3", &[changes, &[&schedule, "training.global_batch_size=16384"]].concat())
}

/// With the plan as its schedule makes it, for an own plan says itself what runs beside what.
fn unpaired(recipe: &Recipe) -> Recipe {
    let (plan, _) = recipe.plan(64, Mode::Train).unwrap();
    Recipe { own_plan: Some(Arc::new(plan)), ..recipe.clone() }
}

/// Seconds of the step, and of it what the compute lanes wait for exchanges, in the mean.
fn figures(run: &Run) -> (f64, f64) {
    let exposed = &run.breakdown.exposed;
    (run.step_s, exposed.iter().sum::<f64>() / exposed.len() as f64)
}

#[test]
fn the_documented_gains_are_those_of_the_simulator() {
    let simulated = |recipe: &Recipe, cluster: &Cluster, overlap| {
        let run = simulate_with(recipe, cluster, overlap).unwrap();
        let peak = |run: &Run| {
            let programs = contraflow_runtime::schedule::lower(&run.plan, None, 1);
            let report = contraflow_runtime::schedule::check(&run.plan, &programs).unwrap();
            report.peak_activations.into_iter().max().unwrap()
        };
        (figures(&run), peak(&run))
    };
    let mut rows = Vec::new();
    for ratio in [1.0, 0.62] {
        let cluster = cluster(ratio);
        for (schedule, changes) in CASES {
            let recipe = case(schedule, changes);
            let ((off, _), _) = simulated(&recipe, &cluster, Overlap::Off);
            let ((before, exposed_before), peak_before) =
                simulated(&unpaired(&recipe), &cluster, Overlap::DEFAULT);
            let ((after, exposed), peak) = simulated(&recipe, &cluster, Overlap::DEFAULT);
            // No choice may cost more than the clock that it was made on is wrong.
            assert!(after <= 1.002 * before, "{schedule} at {ratio}: {after}, {before} before");
            let pipeline = recipe.parallel.pipeline;
            rows.push(format!(
                "| {schedule} | {pipeline} | {ratio} | {off:.2} | {before:.2} | {exposed_before:.2} | {after:.2} | {exposed:.2} | {peak_before} -> {peak} |"
            ));
        }
    }
    let documented = include_str!("../../../docs/simulator.md");
    let missing: Vec<&String> = rows.iter().filter(|row| !documented.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "docs/simulator.md lacks these of its rows:\n{}", rows.join("\n"));
}
