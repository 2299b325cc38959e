//! `contraflow plan`: what a run would do, proved and printed before anything starts.
//!
//! Three sources: a recipe, a bare schedule by name, a file in the text form. Plans, checks and figures are made in
//! `runtime`; the programs of a recipe are those its ranks would issue. `simulated` is its step on a cluster,
//! `search` compares others with it. Knows no actor and no data.

pub mod pictures;
mod search;
mod simulated;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::builder::RangedU64ValueParser;
use contraflow_runtime::cost::{self, OpCost, Shapes};
use contraflow_runtime::layout::{MemoryQuery, StageCosts, rank_figures, stage_costs};
use contraflow_runtime::recipe::{
    Accumulation, GradientScales, MemorySection, NumberFormat, PrecisionSection, Recipe, RecipeSource,
    parse_plan,
};
use contraflow_runtime::schedule::{Mode, Plan, PlanFault, PlanReport, ScheduleKind, StepCost, lower};
use contraflow_runtime::simulator::Prediction;
use contraflow_runtime::topology::{Coordinates, Topology};
use contraflow_workers::data::batches::{BatchShape, TaskKind};
use contraflow_workers::engine::plans::{Planned, Plans, train_shape, validation_shape};
use serde::Serialize;

use self::pictures::Pictures;
use self::simulated::Step;
use crate::failure::Failure;
use crate::import::config_note;
use crate::output::{Format, count, line_style, print};

/// Arguments of the command.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// A built-in recipe or a TOML file
    #[arg(default_value = "tiny", conflicts_with_all = ["schedule", "file"])]
    pub recipe: String,
    /// Override a key of the recipe; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", conflicts_with_all = ["schedule", "file"])]
    pub overrides: Vec<String>,
    /// Plan a bare schedule instead: dualpipe, dualpipev, 1f1b, zb1p, interleaved (two stages on a rank) or interleaved-N
    #[arg(long, requires_all = ["pipeline", "micro_batches"], conflicts_with = "file")]
    pub schedule: Option<ScheduleKind>,
    /// Pipeline ranks of the bare schedule
    #[arg(long, requires = "schedule", value_parser = RangedU64ValueParser::<usize>::new().range(..=4096))]
    pub pipeline: Option<usize>,
    /// Micro-batches of the bare schedule, both directions together
    #[arg(long, requires = "schedule", value_parser = RangedU64ValueParser::<usize>::new().range(..=65536))]
    pub micro_batches: Option<usize>,
    /// Check and print a plan written in the text form, or as a table (.csv), instead
    #[arg(long, value_name = "PLAN.txt")]
    pub file: Option<PathBuf>,
    /// Simulate the recipe's step on a cluster: a built-in profile or a TOML file
    #[arg(long, value_name = "PROFILE", conflicts_with_all = ["schedule", "file"])]
    pub cluster: Option<String>,
    /// Search the layouts that pay on the cluster instead, and say why the others do not
    #[arg(long, requires = "cluster", conflicts_with_all = ["svg", "trace"])]
    pub search: bool,
    /// Pictures of the step.
    #[command(flatten)]
    pub pictures: Pictures,
    /// Output format; in JSON every message is listed, in text they are counted by pair of ranks
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Makes, checks and prints a plan.
///
/// **Errors**: every fault of the recipe, of the file or of the plan.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    if let (true, Some(cluster)) = (args.search, &args.cluster) {
        return search::run(args, cluster);
    }
    let (overview, plan) = match (&args.file, args.schedule) {
        (Some(path), _) => of_file(path)?,
        (None, Some(kind)) => {
            of_schedule(kind, args.pipeline.unwrap_or_default(), args.micro_batches.unwrap_or_default())?
        }
        (None, None) => {
            let recipe = Recipe::load(&RecipeSource::parse(&args.recipe), &args.overrides)?;
            let (mut overview, plan) = of_recipe(&recipe)?;
            let simulated = args.cluster.as_ref().map(|cluster| simulated::on_cluster(&recipe, cluster));
            let (run, prediction) = simulated.transpose()?.unzip();
            overview.prediction = prediction;
            let step = run.map_or_else(|| Step::of_plan(plan), |run| Ok(Step::simulated(run)))?;
            return show(args, &overview, &step);
        }
    };
    show(args, &overview, &Step::of_plan(plan)?)
}

fn show(args: &PlanArgs, overview: &Overview, step: &Step) -> Result<(), Failure> {
    step.draw(&args.pictures)?;
    match args.format {
        Format::Text => print(&format!("{overview}\n{}", step.gantt(line_style()))),
        Format::Json => {
            let json =
                serde_json::to_string_pretty(overview).map_err(|error| Failure::run(error.to_string()))?;
            print(&format!("{json}\n"))
        }
    }
}

/// All that is printed.
#[derive(Serialize)]
struct Overview {
    /// What the recipe asks for; a bare schedule has none.
    layout: Option<Layout>,
    #[serde(flatten)]
    report: PlanReport,
    /// The step on a cluster, where one was named.
    #[serde(flatten)]
    prediction: Option<Prediction>,
    /// What its stages cost, and what others would; a bare schedule has none.
    stage_costs: Option<StageCosts>,
    /// Every plan that was proved.
    checked: Vec<Checked>,
    /// What the user should know of the recipe, in sentences.
    notes: Vec<String>,
}

/// What a recipe asks for.
#[derive(Serialize)]
struct Layout {
    model: String,
    #[serde(flatten)]
    topology: Topology,
    world: usize,
    /// How tokens get to their experts, where the recipe says which ranks share a node.
    all_to_all: Option<String>,
    /// Parameters of the whole model, multi-token prediction included.
    parameters: u64,
    /// Those that work on one token, multi-token prediction left out.
    active_parameters: u64,
    /// Forward and backward, matrix products only.
    training_flops_per_token: u64,
    /// Which kind of tensor is in which format.
    precision: PrecisionSection,
    /// What is computed again.
    memory: MemorySection,
}

/// Which kind of tensor is in which format, in words.
fn formats(precision: &PrecisionSection, memory: &MemorySection) -> String {
    let name = |format: NumberFormat| serde_name(&format);
    let linear = name(precision.linear);
    let masters =
        if precision.linear == NumberFormat::F32 { "" } else { " with f32 masters of the own shard" };
    let kinds = [
        ("weights of linear layers and inputs of their products", format!("{linear}{masters}")),
        ("embedding, head, residual stream, attention", name(precision.activations)),
        ("norms, gates, gradients of weights", "f32".to_owned()),
        ("moments", name(precision.moments)),
        ("rows to the experts", name(precision.dispatch)),
        ("sums from the experts", name(precision.combine)),
        ("kept of attention's output", name(precision.attention_output)),
        ("kept of SwiGLU's input", name(precision.swiglu_input)),
    ];
    let kinds = kinds.map(|(kind, format)| format!("{kind} {format}")).join("; ");
    let again: Vec<String> = memory.recompute.iter().map(serde_name).collect();
    let again = if again.is_empty() { "nothing".to_owned() } else { again.join(", ") };
    let studies = [
        (precision.gradient_scales == GradientScales::Block, "gradients in fp8 have a scale per block"),
        (
            precision.accumulate == Accumulation::TensorCore,
            "products of fp8 are added up in 14 bits, not promoted",
        ),
    ];
    let studies = studies.iter().filter(|(is_on, _)| *is_on).map(|(_, what)| format!("\nstudy: {what}"));
    let studies: String = studies.collect();
    format!("formats: {kinds}{studies}\ncomputed again in the backward pass: {again}")
}

/// What a value is called in recipes.
fn serde_name(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// A plan that is sound.
#[derive(Serialize)]
struct Checked {
    /// `training`, `validation` or `forward only`.
    purpose: &'static str,
    /// Sequences of the global batch; a bare schedule has none. A batch ramp has several.
    sequences: Option<usize>,
    micro_batches: usize,
    schedule: String,
    /// Operations of the programs, all pipeline ranks together.
    operations: usize,
    /// Why it is not the schedule that was asked for.
    note: Option<String>,
}

fn unsound(what: &str, faults: &[PlanFault]) -> Failure {
    Failure::faults(&format!("{what} is not sound"), faults)
}

fn of_file(path: &Path) -> Result<(Overview, Plan), Failure> {
    let name = path.display().to_string();
    let plan = parse_plan(path).map_err(|faults| Failure::faults(&name, &faults))?;
    Ok((bare(&name, &plan, None)?, plan))
}

fn of_schedule(
    kind: ScheduleKind,
    pipeline: usize,
    micro_batches: usize,
) -> Result<(Overview, Plan), Failure> {
    let made = kind.plan(pipeline, micro_batches, Mode::Train);
    let (plan, note) = made.map_err(|error| Failure::input(error.to_string()))?;
    Ok((bare("the plan", &plan, note)?, plan))
}

/// A plan without a model: a chunk is one operation.
fn bare(name: &str, plan: &Plan, note: Option<String>) -> Result<Overview, Failure> {
    let report = PlanReport::new(plan, note).map_err(|faults| unsound(name, &faults))?;
    let purpose = if plan.is_forward_only() { "forward only" } else { "training" };
    let checked = Checked {
        purpose,
        sequences: None,
        micro_batches: plan.micro_batches,
        schedule: plan.schedule.clone(),
        operations: lower(plan, None, 1).iter().map(|program| program.ops.len()).sum(),
        note: report.note.clone(),
    };
    Ok(Overview {
        layout: None,
        report,
        prediction: None,
        stage_costs: None,
        checked: vec![checked],
        notes: Vec::new(),
    })
}

fn of_recipe(recipe: &Recipe) -> Result<(Overview, Plan), Failure> {
    let mut plans = Plans::new(recipe).map_err(Failure::input)?;
    let mut checked = Vec::new();
    let shapes: Vec<BatchShape> = recipe.batch_sizes().map(|size| train_shape(recipe, size)).collect();
    for shape in &shapes {
        checked.push(Checked::of(prove(&mut plans, shape, TaskKind::Train)?.as_ref(), shape));
    }
    // As many sequences as the recipe asks for: a small corpus may have fewer.
    if let Some(shape) = validation_shape(recipe, usize::MAX) {
        checked.push(Checked::of(prove(&mut plans, &shape, TaskKind::Evaluate)?.as_ref(), &shape));
    }
    // A batch never shrinks: the last one is the largest.
    let largest = shapes.last().ok_or_else(|| Failure::input("training.steps: expected 1 or more, got 0"))?;
    let planned = prove(&mut plans, largest, TaskKind::Train)?;
    let mut report = PlanReport::new(&planned.plan, planned.fallback.clone())
        .map_err(|faults| unsound("the plan", &faults))?;
    report.per_rank = Some(rank_figures(&MemoryQuery {
        config: &recipe.model_config,
        topology: recipe.topology(),
        expert_nodes: recipe.expert_nodes(),
        stages: &plans.layouts,
        placement: &planned.plan.placement,
        micro_batch_tokens: recipe.training.micro_batch_size * recipe.training.sequence_length,
        micro_batches: planned.plan.micro_batches,
        programs: &plans.passes(&planned.plan),
        precision: &recipe.precision,
        memory: &recipe.memory,
        has_average: recipe.training.ema_decay > 0.0,
    }));
    report.per_step = Some(step_costs(recipe, &plans, &planned));
    let of_config = config_note(Path::new(&recipe.model.config));
    let notes = of_config.into_iter().chain(recipe.no_validation(usize::MAX)).collect();
    let overview = Overview {
        layout: Some(Layout::of(recipe)),
        report,
        prediction: None,
        stage_costs: Some(stage_costs(recipe).map_err(Failure::input)?),
        checked,
        notes,
    };
    Ok((overview, Plan::clone(&planned.plan)))
}

/// What a training step costs the first rank of each pipeline coordinate; the others there differ by the rounding of shards.
fn step_costs(recipe: &Recipe, plans: &Plans, planned: &Planned) -> Vec<StepCost> {
    let topology = recipe.topology();
    let shapes = Shapes {
        config: &recipe.model_config,
        topology,
        expert_nodes: recipe.expert_nodes(),
        stages: &plans.layouts,
        buckets: &plans.sharding.buckets,
        micro_batch_tokens: recipe.training.micro_batch_size * recipe.training.sequence_length,
        sequence_length: recipe.training.sequence_length,
        precision: &recipe.precision,
        mode: Mode::Train,
    };
    let mut costs = vec![OpCost::default(); topology.pipeline];
    for (pipeline, op) in planned.ops() {
        let rank = topology.rank(Coordinates { pipeline, data: 0, expert: 0 });
        costs[pipeline] = costs[pipeline] + cost::of(&op.work, rank, &shapes);
    }
    let of_rank = |(rank, OpCost { flops, sent_bytes })| StepCost { rank, flops, sent_bytes };
    costs.into_iter().enumerate().map(of_rank).collect()
}

/// The plan and the programs that the ranks would run, checked.
fn prove(plans: &mut Plans, shape: &BatchShape, kind: TaskKind) -> Result<Arc<Planned>, Failure> {
    plans.get(shape.micro_batches, kind).map_err(Failure::input)
}

impl Checked {
    fn of(planned: &Planned, shape: &BatchShape) -> Self {
        Checked {
            purpose: if planned.plan.is_forward_only() { "validation" } else { "training" },
            sequences: Some(shape.global_batch),
            micro_batches: shape.micro_batches,
            schedule: planned.plan.schedule.clone(),
            operations: planned.ops().count(),
            note: planned.fallback.clone(),
        }
    }
}

fn all_to_all(recipe: &Recipe) -> Option<String> {
    let expert = recipe.topology().expert;
    if expert == 1 || recipe.parallel.expert_ranks_per_node == 0 {
        return None;
    }
    let text = match recipe.two_hops() {
        Ok(nodes) => {
            format!("two hops, across {nodes} nodes and inside, among {} expert ranks each", expert / nodes)
        }
        Err(reason) => format!("one hop, as {reason}"),
    };
    Some(text)
}

impl Layout {
    fn of(recipe: &Recipe) -> Self {
        let parameters = cost::parameters(&recipe.model_config);
        let length = recipe.training.sequence_length;
        Layout {
            model: recipe.model.config.clone(),
            topology: recipe.topology(),
            world: recipe.topology().world(),
            all_to_all: all_to_all(recipe),
            parameters: parameters.total + parameters.mtp,
            active_parameters: parameters.active,
            training_flops_per_token: cost::training_flops_per_token(&recipe.model_config, length),
            precision: recipe.precision.clone(),
            memory: recipe.memory.clone(),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Topology { pipeline, expert, data } = self.topology;
        let ranks = count(self.world, "rank");
        writeln!(f, "layout: pipeline {pipeline} x expert {expert} x data {data} = {ranks}")?;
        self.all_to_all.iter().try_for_each(|hops| writeln!(f, "all-to-all: {hops}"))?;
        writeln!(
            f,
            "model {}: {} parameters, {} of them at work on a token; {} FLOP a token in training",
            self.model,
            abbreviated(self.parameters),
            abbreviated(self.active_parameters),
            abbreviated(self.training_flops_per_token),
        )?;
        writeln!(f, "{}", formats(&self.precision, &self.memory))
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Checked { purpose, micro_batches, schedule, operations, .. } = self;
        write!(f, "  {purpose}")?;
        if let Some(sequences) = self.sequences {
            write!(f, " on {}", count(sequences, "sequence"))?;
        }
        let micro_batches = count(micro_batches, "micro-batch");
        write!(f, ": {micro_batches}, {schedule}, {}", count(operations, "operation"))?;
        self.note.as_ref().map_or(Ok(()), |note| write!(f, "\n    note: {note}"))
    }
}

/// Why the stages are as they are.
fn write_stage_costs(f: &mut fmt::Formatter<'_>, costs: &StageCosts) -> fmt::Result {
    let StageCosts { flops_per_token, imbalance, imbalance_balanced, imbalance_even } = costs;
    let flops = flops_per_token.iter().map(|&flops| abbreviated(flops)).collect::<Vec<_>>().join(", ");
    let percent = |over: &f64| format!("{:.1}%", 100.0 * over);
    writeln!(
        f,
        "\nstages: {flops} FLOP a token in the forward pass, dense layers, head and multi-token prediction in it; the costliest is \
         {} over their mean, balanced stages {}, even ones {}",
        percent(imbalance),
        percent(imbalance_balanced),
        percent(imbalance_even)
    )
}

impl fmt::Display for Overview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layout) = &self.layout {
            writeln!(f, "{layout}")?;
        }
        write!(f, "{}", self.report)?;
        if let Some(costs) = &self.stage_costs {
            write_stage_costs(f, costs)?;
        }
        if let Some(prediction) = &self.prediction {
            write!(f, "\n{prediction}")?;
        }
        writeln!(
            f,
            "\nchecked: every chunk runs once a pass, every send has its receive, no deadlock without buffers"
        )?;
        self.checked.iter().try_for_each(|checked| writeln!(f, "{checked}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

/// Three or more digits and the unit: `22.70 million`.
fn abbreviated(count: u64) -> String {
    let count = count as f64;
    match count {
        1e12.. => format!("{:.2} trillion", count / 1e12),
        1e9.. => format!("{:.2} billion", count / 1e9),
        1e6.. => format!("{:.2} million", count / 1e6),
        _ => format!("{count}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ranks of the pipeline, 16 sequences in 4 micro-batches.
    const LAYOUT: [&str; 7] = [
        "parallel.pipeline=2",
        "parallel.expert=2",
        "parallel.data=1",
        "parallel.schedule=dualpipe",
        "training.global_batch_size=16",
        "training.micro_batch_size=2",
        "training.validation_sequences=64",
    ];

    /// Half of the full batch at first, too little for dualpipe.
    const RAMP: [&str; 2] = ["training.ramp_start_batch_size=8", "training.ramp_tokens=100_000"];

    fn proved(overrides: &[&str]) -> Vec<(&'static str, Option<usize>, usize, String, bool)> {
        let overrides: Vec<String> =
            LAYOUT.iter().chain(overrides).map(|entry| (*entry).to_string()).collect();
        let recipe = Recipe::load(&RecipeSource::Builtin("small".into()), &overrides).unwrap();
        let checked = of_recipe(&recipe).unwrap().0.checked;
        let words = |checked: Checked| {
            let Checked { purpose, sequences, micro_batches, schedule, note, .. } = checked;
            (purpose, sequences, micro_batches, schedule, note.is_some())
        };
        checked.into_iter().map(words).collect()
    }

    #[test]
    fn every_batch_of_the_ramp_is_proved_and_the_fallback_is_named() {
        let small = ("training", Some(8), 2, "two-way".to_string(), true);
        let full = ("training", Some(16), 4, "dualpipe".to_string(), false);
        let validation = ("validation", Some(64), 16, "dualpipe".to_string(), false);
        assert_eq!(proved(&RAMP), [small.clone(), full.clone(), validation.clone()]);
        assert_eq!(proved(&[RAMP[0], RAMP[1], "training.steps=3"]), [small, validation.clone()]);
        assert_eq!(proved(&[]), [full, validation]);
    }

    #[test]
    fn counts_read_well() {
        let cases = [(999_999, "999999"), (22_700_000, "22.70 million"), (671_026_419_200, "671.03 billion")];
        for (count, words) in cases {
            assert_eq!(abbreviated(count), words);
        }
    }
}
