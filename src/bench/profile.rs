//! `contraflow bench profile`: what operations take on this machine, as a profile for `contraflow plan --cluster`.
//!
//! Real ranks train each model, as many as there are cores for them, each with all of it: so durations are those of a machine at
//! work. The links come from runs of the first model in which ranks share its experts or its layers.

use std::fmt;
use std::path::{Path, PathBuf};

use contraflow_runtime::files::{UNFINISHED_SUFFIX, write_synced};
use contraflow_runtime::layout::MemoryLimit;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::RecordedStep;
use contraflow_runtime::simulator::{MeasuredCosts, MeasuredModel, Observed, measured_links, measured_model};
use serde::Serialize;

use super::{WARM_UP, seeded_datasets, train_quietly};
use crate::failure::Failure;
use crate::machine;

/// Arguments of the command.
#[derive(clap::Args, Debug)]
pub(super) struct ProfileArgs {
    /// Recipes whose models are measured, by name or file; the first one measures the links too
    #[arg(default_values = ["tiny", "small", "base"])]
    recipes: Vec<String>,
    /// Where the profile goes
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Cores of a rank
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Profile {
    to: PathBuf,
    ranks: usize,
    threads_per_rank: usize,
    peak_gflops_per_rank: f64,
    models: Vec<ModelFigures>,
    links: Vec<LinkFigures>,
}

#[derive(Debug, Serialize)]
struct ModelFigures {
    recipe: String,
    operations: usize,
    between_operations_us: f64,
    apply_gb_per_s: f64,
}

#[derive(Debug, Serialize)]
struct LinkFigures {
    link: &'static str,
    latency_us: f64,
    /// Absent where no transfer took longer for being larger.
    gb_per_s: Option<f64>,
}

/// Ranks of this machine with that many cores each.
///
/// **Errors**: code 2 if it has fewer.
fn ranks_of(threads: usize) -> Result<usize, Failure> {
    match machine::cores().checked_div(threads) {
        None | Some(0) => Err(Failure::input(format!(
            "--threads: expected 1 to the {} cores of this machine, got {threads}",
            machine::cores()
        ))),
        Some(ranks) => Ok(ranks),
    }
}

/// Positions in the pipeline, of an expert group, and of replicas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) schedule: &'static str,
    pub(super) axes: [usize; 3],
    pub(super) micro_batch_size: usize,
}

/// A recipe in a layout on this machine, for steps that are measured; nothing is written.
///
/// **Errors**: code 2, with every fault of the recipe in this layout.
pub(super) fn laid_out(
    source: &str,
    layout: Layout,
    threads: usize,
    steps: usize,
) -> Result<Recipe, Failure> {
    let Layout { schedule, axes: [pipeline, expert, data], micro_batch_size } = layout;
    let overrides = [
        format!("parallel.schedule={schedule}"),
        format!("parallel.pipeline={pipeline}"),
        format!("parallel.expert={expert}"),
        format!("parallel.data={data}"),
        format!("parallel.threads_per_rank={threads}"),
        format!("training.micro_batch_size={micro_batch_size}"),
        format!("training.steps={}", WARM_UP + steps),
        "training.validation_sequences=0".to_owned(),
        "checkpoint.save_model=false".to_owned(),
    ];
    Ok(Recipe::load(&RecipeSource::parse(source), &overrides)?)
}

/// The largest micro-batch up to that of the recipe of which a rank's share of the batch has `at_least` or more.
///
/// **Errors**: code 2 if the batch does not divide so.
pub(super) fn micro_batch_size(source: &str, replicas: usize, at_least: usize) -> Result<usize, Failure> {
    let training = Recipe::load(&RecipeSource::parse(source), &[])?.training;
    let share = training.global_batch_size / replicas;
    let largest = training.micro_batch_size.min(share / at_least);
    let fits = |size: &usize| share.is_multiple_of(*size) && share * replicas == training.global_batch_size;
    (1..=largest).rev().find(fits).ok_or_else(|| {
        Failure::input(format!(
            "{source}: training.global_batch_size: expected {at_least} micro-batches or more for each of {replicas} ranks, got {} \
             sequences",
            training.global_batch_size
        ))
    })
}

/// A run, and its last steps.
struct Recorded {
    recipe: Recipe,
    steps: Vec<RecordedStep>,
}

fn record(source: &str, layout: Layout, threads: usize) -> Result<Recorded, Failure> {
    /// As many as are kept.
    const STEPS: usize = 4;
    let recipe = laid_out(source, layout, threads, STEPS)?;
    let datasets = seeded_datasets(&recipe);
    let (_, _, timelines) = train_quietly(recipe.clone(), datasets)?;
    Ok(Recorded { recipe, steps: timelines.kept() })
}

/// Runs with micro-batches as large as they get, and of one sequence.
fn record_sizes(source: &str, layout: Layout, threads: usize) -> Result<Vec<Recorded>, Failure> {
    let mut sizes = vec![layout.micro_batch_size, 1];
    sizes.dedup();
    sizes
        .into_iter()
        .map(|micro_batch_size| record(source, Layout { micro_batch_size, ..layout }, threads))
        .collect()
}

fn observed(runs: &[Recorded]) -> Vec<Observed<'_>> {
    runs.iter().map(|run| Observed { recipe: &run.recipe, steps: &run.steps }).collect()
}

/// Measures, and writes the profile.
///
/// **Errors**: code 2 for a recipe that is faulty or does not fit the ranks, or a file that cannot be written; code 1 if a run fails.
pub(super) fn run(args: &ProfileArgs) -> Result<Profile, Failure> {
    let ProfileArgs { recipes, to, threads, .. } = args;
    let ranks = ranks_of(*threads)?;
    // Before minutes are spent.
    write(to, "")?;
    let mut models = Vec::new();
    let mut link_runs = Vec::new();
    for source in recipes {
        let micro_batch_size = micro_batch_size(source, ranks, 1)?;
        let alone = Layout { schedule: "1f1b", axes: [1, 1, ranks], micro_batch_size };
        let runs = record_sizes(source, alone, *threads)?;
        let model = measured_model(source, &observed(&runs)).map_err(Failure::run)?;
        if models.is_empty() && ranks > 1 {
            link_runs.extend(runs);
            for axes in [[1, ranks, 1], [ranks, 1, 1]] {
                link_runs.extend(record_sizes(source, Layout { axes, ..alone }, *threads)?);
            }
        }
        models.push(model);
    }
    let first = models.first().ok_or_else(|| Failure::input("expected a recipe, got none"))?;
    let [send, exchange, collective] = measured_links(first, &observed(&link_runs)).map_err(Failure::run)?;
    let costs = MeasuredCosts { send, exchange, collective, models };
    let peak = machine::peak(*threads);
    let memory = MemoryLimit::of_process()
        .ok_or_else(|| Failure::run("the system does not say how much memory it has"))?;
    let head = format!(
        "# Measured by `contraflow bench profile`, with {threads} core(s) to a rank.\nranks = {ranks}\nranks_per_node = {ranks}\n\
         memory_bytes = {}\npeak_flops = {peak:?}\n\n",
        memory.bytes / ranks as u64
    );
    write(to, &(head + &costs.to_toml()))?;
    let figures = |model: &MeasuredModel| ModelFigures {
        recipe: model.name.clone(),
        operations: model.operations.len(),
        between_operations_us: 1e6 * model.operation_s,
        apply_gb_per_s: model.update.apply / 1e9,
    };
    let links = [("send", send), ("exchange", exchange), ("collective", collective)];
    Ok(Profile {
        to: to.clone(),
        ranks,
        threads_per_rank: *threads,
        peak_gflops_per_rank: peak / 1e9,
        models: costs.models.iter().map(figures).collect(),
        links: links
            .into_iter()
            .map(|(link, measured)| LinkFigures {
                link,
                latency_us: 1e6 * measured.latency_s,
                gb_per_s: (measured.bytes_per_s < f64::MAX).then_some(measured.bytes_per_s / 1e9),
            })
            .collect(),
    })
}

/// Puts a whole file in place; with nothing to write, only looks whether that can be done.
fn write(to: &Path, text: &str) -> Result<(), Failure> {
    let mut part = to.as_os_str().to_owned();
    part.push(UNFINISHED_SUFFIX);
    let written = write_synced(Path::new(&part), text.as_bytes());
    let placed = written.and_then(|()| {
        if text.is_empty() { std::fs::remove_file(&part) } else { std::fs::rename(&part, to) }
    });
    placed.map_err(|error| Failure::input(format!("{}: {error}", to.display())))
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Profile { to, ranks, threads_per_rank, peak_gflops_per_rank, models, links } = self;
        writeln!(f, "{ranks} rank(s) of {threads_per_rank} core(s), {peak_gflops_per_rank:.0} GFLOP/s each")?;
        for ModelFigures { recipe, operations, between_operations_us, apply_gb_per_s } in models {
            writeln!(
                f,
                "{recipe}: {operations} kinds of operations, {between_operations_us:.0} us between two, AdamW {apply_gb_per_s:.1} GB/s"
            )?;
        }
        for LinkFigures { link, latency_us, gb_per_s } in links {
            let speed =
                gb_per_s.map_or("no slower for more bytes".to_owned(), |speed| format!("{speed:.1} GB/s"));
            writeln!(f, "{link}: {latency_us:.0} us, {speed}")?;
        }
        writeln!(
            f,
            "written to {}; a step there: contraflow plan RECIPE --cluster {}",
            to.display(),
            to.display()
        )
    }
}
