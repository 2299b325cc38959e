//! The metrics of runs, by family: one source for all who want them, in whatever form. Pure; docs/metrics.md has the same names.

use std::sync::Arc;

use super::history::{History, figure};
use super::shown::{Shown, State};
use crate::otlp::families::{Family, Labels, Metrics, counter, gauge, label};

/// Of a run, with the label `run`; those with `layer` have one sample a mixture layer.
pub static OF_RUNS: [Family; 26] = [
    gauge("contraflow_run_info", "Always 1; layout, schedule and model are labels."),
    gauge("contraflow_run_training", "Whether the run makes steps: 1 or 0."),
    gauge("contraflow_run_step", "Latest optimizer update, from 1."),
    gauge("contraflow_run_steps", "Optimizer updates that the recipe asks for."),
    gauge("contraflow_run_formation", "Count of the formations of the run's ranks, from 1."),
    gauge("contraflow_run_last_step_timestamp_seconds", "When the latest step ended, in seconds since 1970."),
    counter("contraflow_run_tokens_total", "Tokens trained on."),
    counter("contraflow_run_training_seconds_total", "Time of all steps, of the slowest rank of each."),
    gauge("contraflow_run_step_duration_seconds", "Time of the latest step, of its slowest rank."),
    gauge("contraflow_run_tokens_per_second", "Tokens of the latest step a second."),
    gauge(
        "contraflow_run_mfu_ratio",
        "Model FLOP utilization of the latest step; absent where no peak was measured.",
    ),
    gauge("contraflow_run_bubble_ratio", "Share of the latest step in which compute lanes were blocked."),
    gauge("contraflow_run_loss_nats", "Mean cross-entropy a token of the latest step."),
    gauge(
        "contraflow_run_mtp_loss_nats",
        "Mean cross-entropy a token of multi-token prediction; absent without it.",
    ),
    gauge("contraflow_run_balance_loss", "Sequence-wise balance loss times its factor, over the layers."),
    gauge("contraflow_run_validation_loss_nats", "Latest mean validation loss a token."),
    gauge("contraflow_run_learning_rate", "Learning rate of the latest update."),
    gauge("contraflow_run_gradient_norm", "Global L2 norm of the gradient before clipping."),
    gauge("contraflow_run_sent_bytes", "Bytes that all ranks sent in the latest step."),
    gauge(
        "contraflow_run_live_chunks",
        "Largest number of chunks with live activations in the latest step, over the ranks.",
    ),
    gauge(
        "contraflow_run_expert_violation_ratio",
        "MaxVio of a layer: (largest load - mean) / mean over its experts.",
    ),
    gauge("contraflow_run_idle_experts", "Experts of a layer without a token in the latest step."),
    gauge("contraflow_run_resident_memory_bytes", "Memory of the process that hosts all ranks."),
    gauge("contraflow_run_planned_memory_bytes", "What the plan says that all ranks need."),
    counter("contraflow_run_skipped_batches_total", "Batches that the stability watch has skipped."),
    counter("contraflow_run_rollbacks_total", "Returns to a checkpoint."),
];

/// Of the program.
pub static BUILD: Family = gauge("contraflow_build_info", "Always 1; the version is a label.");

/// Of the server itself.
pub static VIEWERS: Family = gauge("contraflow_dashboard_viewers", "Pages that follow a run live.");

/// Most runs of one answer: labels stay few.
const MAX_RUNS: usize = 50;

/// Adds the version of this program.
pub fn of_build(out: &mut Metrics) {
    out.family(&BUILD, [(label("version", env!("CARGO_PKG_VERSION")), 1.0)]);
}

/// Adds the families of runs.
pub fn of_runs(out: &mut Metrics, runs: &[Arc<Shown>]) {
    let runs = &runs[..runs.len().min(MAX_RUNS)];
    for family in &OF_RUNS {
        out.family(
            family,
            runs.iter().flat_map(|shown| shown.read(|state| of_run(family.name, shown, state))),
        );
    }
}

fn of_run(name: &str, shown: &Shown, state: &State) -> Vec<(Labels, f64)> {
    let facts = &shown.facts;
    let run = label("run", &facts.id);
    let history = &state.history;
    let last = history.points().last();
    let of_last = |key: &str| {
        let place = figure(key);
        last.zip(place).map_or(f64::NAN, |(last, place)| f64::from(last.values[place]))
    };
    let layers = |value: fn(&(u32, Vec<u64>)) -> f64| {
        let of_layer = |load: &(u32, Vec<u64>)| {
            ([run.clone(), label("layer", &load.0.to_string())].concat(), value(load))
        };
        history.latest().loads.iter().map(of_layer).collect::<Vec<_>>()
    };
    let value = match name {
        "contraflow_run_info" => {
            let recipe = facts.recipe.as_ref();
            let labels = [
                run.clone(),
                label("model", recipe.map_or("", |recipe| recipe.model.config.as_str())),
                label(
                    "schedule",
                    &recipe.map_or(String::new(), |recipe| recipe.parallel.schedule.to_string()),
                ),
                label("ranks", &recipe.map_or(String::new(), |recipe| recipe.topology().world().to_string())),
            ];
            return vec![(labels.concat(), 1.0)];
        }
        "contraflow_run_expert_violation_ratio" => {
            return layers(|load| contraflow_orchestrator::metrics::record::max_vio(&load.1));
        }
        "contraflow_run_idle_experts" => {
            return layers(|load| load.1.iter().filter(|count| **count == 0).count() as f64);
        }
        "contraflow_run_training" => f64::from(u8::from(state.phase == super::shown::Phase::Training)),
        "contraflow_run_step" => last.map_or(0.0, |last| last.step as f64),
        "contraflow_run_steps" => facts.steps.map_or(f64::NAN, |steps| steps as f64),
        "contraflow_run_formation" => f64::from(history.generation()),
        "contraflow_run_last_step_timestamp_seconds" => {
            last.map_or(f64::NAN, |last| last.unix_ms as f64 / 1e3)
        }
        "contraflow_run_tokens_total" => last.map_or(0.0, |last| last.tokens as f64),
        "contraflow_run_training_seconds_total" => last.map_or(0.0, |last| last.seconds),
        "contraflow_run_step_duration_seconds" => of_last("seconds"),
        "contraflow_run_tokens_per_second" => of_last("tokens_per_second"),
        "contraflow_run_mfu_ratio" => of_last("mfu"),
        "contraflow_run_bubble_ratio" => of_last("bubble_share"),
        "contraflow_run_loss_nats" => of_last("loss"),
        "contraflow_run_mtp_loss_nats" => of_last("mtp_loss"),
        "contraflow_run_balance_loss" => of_last("balance_loss"),
        "contraflow_run_validation_loss_nats" => latest(history, "validation_loss"),
        "contraflow_run_learning_rate" => of_last("learning_rate"),
        "contraflow_run_gradient_norm" => of_last("grad_norm"),
        "contraflow_run_sent_bytes" => of_last("sent_bytes"),
        "contraflow_run_live_chunks" => of_last("peak_live_chunks"),
        "contraflow_run_resident_memory_bytes" => of_last("memory_bytes"),
        "contraflow_run_planned_memory_bytes" => {
            facts.planned_memory().map_or(f64::NAN, |bytes| bytes as f64)
        }
        "contraflow_run_skipped_batches_total" => history.counts().0 as f64,
        "contraflow_run_rollbacks_total" => history.counts().1 as f64,
        _ => f64::NAN,
    };
    vec![(run, value)]
}

fn latest(history: &History, key: &str) -> f64 {
    history.last(key).map_or(f64::NAN, |(_, value)| value)
}
