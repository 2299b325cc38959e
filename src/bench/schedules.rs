//! `contraflow bench schedules`: every schedule beside table 2 of the report, by its formulas, on the virtual clock, and in a run whose
//! actions wait as long as the formulas say they take.
//!
//! The run is a training of real ranks: their actors, lanes, frames and programs, of a model so small that its arithmetic takes next to
//! nothing; the first operation of each action sleeps. So idle time is what the order of the plan and the engine make of it, on any
//! number of cores.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use contraflow_orchestrator::metrics::Subscriber;
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{
    Lane, Mode, Plan, RecordedRank, RecordedStep, ScheduleKind, UnitCosts, check, lower, simulate,
};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::Plans;
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use contraflow_workers::engine::step::ProgramKind;
use parking_lot::Mutex;
use serde::Serialize;

use super::{QuietRun, seeded_datasets};
use crate::failure::Failure;
use crate::output::table;

/// Stages of every pipeline: the table compares methods with the same number of them.
const STAGES: usize = 4;
/// Steps of a run; the last one counts.
const STEPS: usize = 2;
/// How far a run and the simulation may be from the formula where it holds.
const TOLERANCE: f64 = 0.05;

/// Costs, and whether the formulas hold for them: F = I and W <= I.
const COSTS: [(UnitCosts, bool); 4] = [
    (UnitCosts::SUM, true),
    (UnitCosts { f: 1.0, b: 1.5, i: 1.0, w: 0.5, fb: 2.5 }, true),
    (UnitCosts { f: 1.0, b: 1.8, i: 0.8, w: 1.0, fb: 2.8 }, false),
    (UnitCosts { f: 1.0, b: 2.3, i: 1.4, w: 0.9, fb: 3.3 }, false),
];

/// The table.
#[derive(Debug, Serialize)]
pub(super) struct Schedules {
    /// How long a forward pass waits. **Units**: seconds.
    unit_s: f64,
    rows: Vec<Row>,
}

/// A schedule under some costs. Times are in forward passes.
#[derive(Debug, Serialize)]
struct Row {
    schedule: String,
    ranks: usize,
    stages: usize,
    micro_batches: usize,
    costs: UnitCosts,
    /// Whether the formula holds for these costs.
    inside: bool,
    /// Largest idle time of a rank: by the formula, on the virtual clock, and in the run.
    bubble_formula: f64,
    bubble_simulated: f64,
    bubble_run: f64,
    /// Of the two from the formula. Absent where that says 0.
    difference_simulated: Option<f64>,
    difference_run: Option<f64>,
    /// Stages' worth of parameters on a rank, of a model with as many parts as the table counts stages.
    parameters_formula: f64,
    parameters: f64,
    /// Activations that a rank holds at most, in chunks.
    activations_formula: usize,
    activations_simulated: usize,
    activations_run: usize,
}

/// **Errors**: code 1 if a run fails.
pub(super) fn run(unit_ms: u64) -> Result<Schedules, Failure> {
    let unit = Duration::from_millis(unit_ms);
    let kinds = [
        ScheduleKind::OneFOneB,
        ScheduleKind::Zb1p,
        ScheduleKind::Interleaved(2),
        ScheduleKind::Dualpipe,
        ScheduleKind::Dualpipev,
    ];
    let cases = kinds.into_iter().flat_map(|kind| COSTS.map(|costs| (kind, costs)));
    let rows = cases.map(|(kind, (costs, inside))| row(kind, costs, inside, unit));
    Ok(Schedules { unit_s: unit.as_secs_f64(), rows: rows.collect::<Result<_, _>>()? })
}

/// Report section 3.2.1, table 2, in stages `stages` and ranks; for interleaved 1F1B Narayanan et al. 2021, section 2.2.2, where the
/// costs are those of one of a rank's stages.
fn formulas(kind: ScheduleKind, ranks: usize, stages: usize, costs: UnitCosts) -> (f64, f64, usize) {
    let UnitCosts { f, b, w, fb, .. } = costs;
    let (p, half) = (ranks as f64 - 1.0, stages as f64 / 2.0 - 1.0);
    match kind {
        ScheduleKind::OneFOneB => (p * (f + b), 1.0, ranks),
        ScheduleKind::Zb1p => (p * (f + b - 2.0 * w), 1.0, ranks),
        ScheduleKind::Interleaved(per_rank) => {
            (p * (f + b), per_rank as f64, (per_rank - 1) * ranks + 2 * (ranks - 1) + 1)
        }
        ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => (half * (fb + b - 3.0 * w), 2.0, stages + 1),
    }
}

fn row(kind: ScheduleKind, costs: UnitCosts, inside: bool, unit: Duration) -> Result<Row, Failure> {
    // DualPipeV has its stages on half as many ranks; an interleaved schedule has more of them.
    let ranks = if kind == ScheduleKind::Dualpipev { STAGES / 2 } else { STAGES };
    let micro_batches = 2 * kind.min_micro_batches(ranks).max(ranks);
    let failed = |error: String| Failure::run(error);
    let (plan, _) =
        kind.plan(ranks, micro_batches, Mode::Train).map_err(|error| failed(error.to_string()))?;
    let report = check(&plan, &lower(&plan, None, 1));
    let report = report.map_err(|faults| Failure::faults("the plan is not sound", &faults))?;
    let simulated = simulate(&plan, costs).map_err(|deadlock| failed(deadlock.to_string()))?;
    let (bubble_formula, parameters_formula, activations_formula) = formulas(kind, ranks, plan.stages, costs);
    let (step, activations_run) = waiting_run(kind, &plan, costs, unit)?;
    let bubble_run = largest_idle(&step) / unit.as_secs_f64();
    let difference = |got: f64| (bubble_formula > 0.0).then(|| got / bubble_formula - 1.0);
    let most = |counts: &[usize]| counts.iter().copied().max().unwrap_or_default();
    Ok(Row {
        schedule: kind.to_string(),
        ranks,
        stages: plan.stages,
        micro_batches,
        costs,
        inside,
        bubble_formula,
        bubble_simulated: simulated.max_idle,
        bubble_run,
        difference_simulated: difference(simulated.max_idle),
        difference_run: difference(bubble_run),
        parameters_formula,
        parameters: plan.placement.iter().map(Vec::len).max().unwrap_or_default() as f64,
        activations_formula,
        activations_simulated: most(&report.peak_activations_until_weight),
        activations_run,
    })
}

/// Trains with actions that wait; returns the last step, and how many activations a rank has held at most.
fn waiting_run(
    kind: ScheduleKind,
    plan: &Plan,
    costs: UnitCosts,
    unit: Duration,
) -> Result<(RecordedStep, usize), Failure> {
    let (schedule, per_rank) = match kind {
        ScheduleKind::Interleaved(per_rank) => ("interleaved".to_owned(), per_rank),
        kind => (kind.to_string(), 2),
    };
    let overrides = [
        format!("parallel.schedule={schedule}"),
        format!("parallel.virtual_stages={per_rank}"),
        format!("parallel.pipeline={}", plan.ranks()),
        "parallel.expert=1".to_owned(),
        format!("model.num_hidden_layers={}", plan.stages),
        format!("model.first_k_dense_replace={}", plan.stages),
        "model.num_nextn_predict_layers=0".to_owned(),
        "model.hidden_size=32".to_owned(),
        "mtp.weight=0".to_owned(),
        "training.sequence_length=8".to_owned(),
        "training.micro_batch_size=1".to_owned(),
        format!("training.global_batch_size={}", plan.micro_batches),
        format!("training.steps={STEPS}"),
        "training.validation_sequences=0".to_owned(),
        "checkpoint.save_model=false".to_owned(),
    ];
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".to_owned()), &overrides)?;
    let mut plans = Plans::new(&recipe).map_err(Failure::run)?;
    let planned = plans.get(plan.micro_batches, TaskKind::Train).map_err(Failure::run)?;
    // The first operation of each action, by pipeline rank and what it does: those of the plan run once a step.
    let mut waits = HashMap::new();
    for rank in 0..plan.ranks() {
        let program = planned.program(rank, ProgramKind::Passes);
        let mut begun = None;
        for op in program.ops.iter().filter(|op| op.lane == Lane::Compute && op.action.is_some()) {
            if begun != op.action {
                begun = op.action;
                let action = op.action.map(|action| costs.of(&plan.actions[rank][action]));
                waits.insert((rank, op.work), unit.mul_f64(action.unwrap_or_default()));
            }
        }
    }
    let probe = Probe::new(move |point| {
        if let ProbePoint::Op { rank, op, .. } = point
            && let Some(&wait) = waits.get(&(rank, op.work))
        {
            std::thread::sleep(wait);
        }
    });
    let peak = Arc::new(Mutex::new(0));
    let noted = peak.clone();
    let subscriber: Subscriber = Box::new(move |record| *noted.lock() = record.peak_live_chunks as usize);
    let datasets = seeded_datasets(&recipe);
    let run = QuietRun { recipe, datasets, checkpoints: None, export_dir: None, subscriber };
    let (_, timelines) = run.run_with(probe, Recorders::default())?;
    let step = timelines.latest().ok_or_else(|| Failure::run("no step was recorded"))?;
    let peak = *peak.lock();
    Ok((step, peak))
}

/// Of the passes alone, from the first operation of any rank to the last one. **Units**: seconds.
fn largest_idle(step: &RecordedStep) -> f64 {
    let passes = |rank: &RecordedRank| {
        let ops = rank.program.ops.iter().zip(&rank.spans);
        ops.filter(|(op, _)| op.lane == Lane::Compute && op.action.is_some())
            .map(|(_, span)| *span)
            .collect::<Vec<_>>()
    };
    let ranks: Vec<_> = step.ranks.iter().map(passes).collect();
    let begin = ranks.iter().flatten().map(|span| span.start).fold(f64::INFINITY, f64::min);
    let end = ranks.iter().flatten().map(|span| span.end).fold(0.0, f64::max);
    let busy = ranks.iter().map(|spans| spans.iter().map(|span| span.duration()).sum::<f64>());
    busy.map(|busy| end - begin - busy).fold(0.0, f64::max)
}

impl Schedules {
    /// **Errors**: code 1, where simulation or run differ from a formula that holds.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        let is_off = |row: &&Row| {
            let differs = |difference: Option<f64>| difference.is_some_and(|off| off.abs() > TOLERANCE);
            row.inside && (differs(row.difference_simulated) || differs(row.difference_run))
        };
        let off: Vec<&str> = self.rows.iter().filter(is_off).map(|row| row.schedule.as_str()).collect();
        if off.is_empty() {
            return Ok(());
        }
        Err(Failure::run(format!(
            "more than {:.0}% from the formula where it holds: {}; are cores of this machine in use?",
            100.0 * TOLERANCE,
            off.join(", ")
        )))
    }
}

impl fmt::Display for Schedules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signed = |off: Option<f64>| off.map_or("-".to_owned(), |off| format!("{:+.1}%", 100.0 * off));
        let row = |row: &Row| {
            let UnitCosts { i, w, fb, .. } = row.costs;
            vec![
                row.schedule.clone(),
                row.ranks.to_string(),
                row.micro_batches.to_string(),
                format!("I={i} W={w} F&B={fb}"),
                if row.inside { "yes" } else { "no" }.to_owned(),
                format!("{:.2}", row.bubble_formula),
                format!("{:.2} {}", row.bubble_simulated, signed(row.difference_simulated)),
                format!("{:.2} {}", row.bubble_run, signed(row.difference_run)),
                format!("{} {}", row.parameters_formula, row.parameters),
                format!("{} {} {}", row.activations_formula, row.activations_simulated, row.activations_run),
            ]
        };
        let header = [
            "schedule",
            "ranks",
            "batches",
            "costs",
            "valid",
            "formula",
            "simulated",
            "run",
            "params",
            "activations",
        ];
        writeln!(
            f,
            "{STAGES} stages, interleaved twice as many; F = 1 ({} ms in the run); bubble: largest idle time of a rank; params and activations: by formula, \
             plan and run\n",
            1e3 * self.unit_s
        )?;
        write!(f, "{}", table(header, 1..3, self.rows.iter().map(row)))
    }
}
