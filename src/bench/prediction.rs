//! `contraflow bench prediction`: steps of real ranks on this machine, beside what the simulator says of them from a profile of it.

use std::fmt;

use contraflow_runtime::simulator::{Cluster, simulate_recipe};
use serde::Serialize;

use super::profile::{Layout, laid_out, micro_batch_size};
use super::{WARM_UP, seeded_datasets, train_quietly};
use crate::failure::Failure;
use crate::machine;
use crate::output::table;

/// Arguments of the command.
#[derive(clap::Args, Debug)]
pub(super) struct PredictionArgs {
    /// Recipes, by name or file; their layers are in the profile
    #[arg(default_values = ["tiny", "small", "base"])]
    recipes: Vec<String>,
    /// A profile of this machine: `contraflow bench profile --to FILE`
    #[arg(long, value_name = "FILE")]
    cluster: String,
    /// Steps of a run that are measured, after two that are not
    #[arg(long, default_value_t = 5)]
    steps: usize,
}

/// The figures.
#[derive(Debug, Serialize)]
pub(super) struct Predictions {
    rows: Vec<Row>,
    /// The largest error of a row, whatever its sign.
    worst_error: f64,
}

/// A recipe in a layout.
#[derive(Debug, Serialize)]
struct Row {
    recipe: String,
    layout: String,
    predicted_s: f64,
    /// Of the median step.
    measured_s: f64,
    /// Slowest step over fastest: what of the error may be the machine's.
    spread: f64,
    /// Predicted over measured, less 1.
    error: f64,
}

/// **Errors**: code 2 for faults of recipes or of the profile, and one with more ranks than there are cores for; code 1 if a run fails.
pub(super) fn run(args: &PredictionArgs) -> Result<Predictions, Failure> {
    let PredictionArgs { recipes, cluster, steps } = args;
    let cluster = Cluster::load(cluster).map_err(|faults| Failure::faults("cluster", &faults.list))?;
    let (ranks, cores) = (cluster.ranks, machine::cores());
    let threads = cores / ranks;
    if threads == 0 {
        let name = &cluster.name;
        return Err(Failure::input(format!(
            "{name}: ranks: expected at most {cores}, a core for each, got {ranks}"
        )));
    }
    let mut rows = Vec::new();
    for recipe in recipes {
        let replicas = micro_batch_size(recipe, ranks, 1)?;
        let piped = micro_batch_size(recipe, 1, 2 * ranks)?;
        let layouts = [
            ("1f1b", [ranks, 1, 1], piped),
            ("zb1p", [ranks, 1, 1], piped),
            ("1f1b", [1, ranks, 1], replicas),
            ("1f1b", [1, 1, ranks], replicas),
        ];
        for (schedule, axes, micro_batch_size) in layouts {
            rows.push(row(recipe, &cluster, Layout { schedule, axes, micro_batch_size }, (threads, *steps))?);
        }
    }
    let worst_error = rows.iter().map(|row| row.error.abs()).fold(0.0, f64::max);
    Ok(Predictions { rows, worst_error })
}

fn row(
    source: &str,
    cluster: &Cluster,
    layout: Layout,
    (threads, steps): (usize, usize),
) -> Result<Row, Failure> {
    let recipe = laid_out(source, layout, threads, steps)?;
    let predicted = simulate_recipe(&recipe, cluster);
    let predicted_s = predicted
        .map_err(|faults| Failure::faults(&format!("no simulation on {}", cluster.name), &faults))?
        .step_s;
    let datasets = seeded_datasets(&recipe);
    let (records, ..) = train_quietly(recipe, datasets)?;
    let mut seconds: Vec<f64> = records.iter().skip(WARM_UP).map(|record| record.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let (Some(fastest), Some(slowest)) = (seconds.first(), seconds.last()) else {
        return Err(Failure::input("--steps: expected 1 or more, got 0"));
    };
    let measured_s = seconds[seconds.len() / 2];
    let Layout { schedule, axes: [pipeline, expert, data], micro_batch_size } = layout;
    Ok(Row {
        recipe: source.to_owned(),
        layout: format!(
            "pipeline {pipeline} x expert {expert} x data {data}, {schedule}, {micro_batch_size} sequence(s)"
        ),
        predicted_s,
        measured_s,
        spread: slowest / fastest,
        error: predicted_s / measured_s - 1.0,
    })
}

impl fmt::Display for Predictions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows.iter().map(|row| {
            vec![
                row.recipe.clone(),
                row.layout.clone(),
                format!("{:.3}", row.predicted_s),
                format!("{:.3}", row.measured_s),
                format!("{:.2}", row.spread),
                format!("{:+.1} %", 100.0 * row.error),
            ]
        });
        let header = vec!["recipe", "layout", "predicted s", "measured s", "slowest/fastest", "error"];
        write!(f, "{}", table(header, 2..6, rows))?;
        writeln!(f, "largest error {:.1} %", 100.0 * self.worst_error)
    }
}
