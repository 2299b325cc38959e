//! Predictions of the published run beside what was published of it.
//!
//! Sources: the breakdown of a step is table 4 of the ISCA 2025 paper on DeepSeek-V3; the pair of four MoE layers is train.json of
//! deepseek-ai/profile-data, by kind of kernel.

use contraflow_runtime::schedule::{Mode, ScheduleKind, UnitCosts, simulate};
use contraflow_runtime::simulator::{Cluster, Prediction, cluster_names, pair, predict};

use crate::recipe;

fn cluster(name: &str) -> Cluster {
    Cluster::load(name).unwrap()
}

fn prediction(name: &str) -> Prediction {
    predict(&recipe("deepseek-v3", &[]), &cluster(name)).unwrap().1
}

fn close(what: &str, got: f64, expected: f64, by: f64) {
    let error = got / expected - 1.0;
    assert!(error.abs() <= by, "{what}: {got} is {:+.2} % off {expected}", 100.0 * error);
}

/// Seconds of a step by component; the step.
const TABLE_4: [(&str, f64); 6] =
    [("1F", 1.13), ("bubble", 2.06), ("1B", 1.99), ("1W", 0.48), ("1F1B", 13.95), ("optimizer", 0.29)];
const STEP_S: f64 = 19.926;

/// Milliseconds of the trace by kind of kernel.
const TRACE_MS: [(&[&str], f64); 8] = [
    (&["weight fp8"], 32.8),
    (&["grouped fp8"], 22.9),
    (&["attention"], 22.0),
    (&["dense fp8"], 18.8),
    (&["cast"], 16.7),
    (&["norm"], 3.5),
    (&["swiglu"], 1.9),
    // All others, among them the gate.
    (&["copy", "dense f32", "weight f32"], 11.6),
];

/// Durations of whole actions: what the schedule alone makes of them is known from recorded operation lists.
#[test]
fn the_schedule_makes_of_the_published_durations_what_was_derived() {
    let predicted = prediction("h800-2048-table4");
    close("before the optimizer", predicted.step_s - predicted.components.optimizer, 18.36, 0.005);
    close("mean idle", predicted.components.bubble, 0.80, 0.005);
    for ((name, seconds), (of, expected)) in predicted.components.named().into_iter().zip(TABLE_4) {
        assert_eq!(name, of);
        if name != "bubble" {
            close(name, seconds, expected, 0.005);
        }
    }
}

/// The rates of the profile are those of the trace: laid on the same layers they give its milliseconds again.
#[test]
fn the_rates_are_those_of_the_trace() {
    let pair = pair(&recipe("deepseek-v3", &[]), &cluster("h800-2048"), 4).unwrap();
    for (kinds, expected) in TRACE_MS {
        let own = pair.kernels_s.iter().filter(|(known, _)| kinds.contains(&known.as_str()));
        close(kinds[0], 1e3 * own.map(|(_, seconds)| seconds).sum::<f64>(), expected, 0.01);
    }
    close("all-to-alls", 1e3 * pair.exchange_s, 31.0 + 49.5, 0.01);
}

#[test]
fn a_balanced_pair_of_four_layers_takes_what_the_trace_shows() {
    let published = recipe("deepseek-v3", &[]);
    let blind = pair(&published, &cluster("h800-2048"), 4).unwrap();
    println!("{blind:?}");
    close("span", 1e3 * blind.span_s, 129.0, 0.05);
    // Of 129.0 ms 4.2 were waits for communication.
    assert!(blind.span_s - blind.compute_s <= 0.05 * blind.span_s, "{blind:?}");
    println!("{:?}", pair(&published, &cluster("h800-2048-libraries"), 4).unwrap());
}

#[test]
fn the_step_is_predicted_without_its_breakdown() {
    let predicted = prediction("h800-2048");
    println!("{predicted}");
    close("step", predicted.step_s, STEP_S, 0.15);
    assert_eq!(predicted.published.len(), 7);
    for compared in &predicted.published {
        assert!(!compared.cause.is_empty());
        let published = TABLE_4.iter().find(|(name, _)| *name == compared.name).map_or(STEP_S, |(_, s)| *s);
        assert_eq!(compared.published_s, published, "{}", compared.name);
    }
    close("parts", predicted.components.sum(), predicted.step_s, 1e-9);
}

/// One constant, fitted to the bubble alone.
#[test]
fn fitted_to_the_bubble_the_rest_is_still_a_prediction() {
    let predicted = prediction("h800-2048-calibrated");
    println!("{predicted}");
    close("bubble", predicted.components.bubble, 2.06, 0.01);
    assert!(predicted.calibrated.len() <= 2);
    close("step", predicted.step_s, STEP_S, 0.05);
    for ((name, seconds), (_, measured)) in predicted.components.named().into_iter().zip(TABLE_4) {
        close(name, seconds, measured, 0.15);
    }
    let blind = prediction("h800-2048");
    for ((name, fitted), (_, blind)) in predicted.components.named().into_iter().zip(blind.components.named())
    {
        if name != "bubble" {
            close(name, fitted, blind, 0.02);
        }
    }
}

/// Conventions: the published step is 385 and 432 TFLOP/s of a device, 1,542 tokens/s.
#[test]
fn utilization_is_counted_as_published() {
    let predicted = prediction("h800-2048-table4");
    let at_published = |share: f64| share * predicted.step_s / STEP_S;
    close("causal", at_published(predicted.mfu_causal), 0.3894, 0.005);
    close("not causal", at_published(predicted.mfu_noncausal), 0.4373, 0.005);
    close("tokens", at_published(predicted.tokens_per_gpu_s), 1541.7, 0.001);
    close("hours", predicted.gpu_hours_per_trillion_tokens * STEP_S / predicted.step_s, 180.2e3, 0.001);
}

/// Report, table 2: (PP/2 - 1)(F&B + B - 3W), where F = I and W <= I; the largest idle over ranks.
#[test]
fn bubbles_are_those_of_the_formulas() {
    for pipeline in [2, 4, 8, 16] {
        for (i, w, fb) in [(1.0, 1.0, 3.0), (1.0, 1.0, 2.0), (1.0, 0.6, 2.2), (0.7, 0.5, 1.5)] {
            let costs = UnitCosts { f: i, b: i + w, i, w, fb };
            let (plan, _) = ScheduleKind::Dualpipe.plan(pipeline, 4 * pipeline, Mode::Train).unwrap();
            let expected = (pipeline as f64 / 2.0 - 1.0) * (fb + i + w - 3.0 * w);
            let got = simulate(&plan, costs).unwrap().max_idle;
            assert!((got - expected).abs() < 1e-9, "{pipeline} {costs:?}: {got} {expected}");
            let (plan, _) = ScheduleKind::OneFOneB.plan(pipeline, 4 * pipeline, Mode::Train).unwrap();
            let expected = (pipeline as f64 - 1.0) * (2.0 * i + w);
            let got = simulate(&plan, costs).unwrap().max_idle;
            assert!((got - expected).abs() < 1e-9, "1F1B {pipeline} {costs:?}: {got} {expected}");
        }
    }
}

#[test]
fn every_built_in_profile_simulates_the_published_run() {
    for name in cluster_names() {
        let predicted = prediction(name);
        assert!(predicted.step_s > 10.0 && predicted.step_s < 30.0, "{name}: {predicted}");
        assert_eq!(predicted.peak_memory_gib.len(), 16);
    }
}
