//! `contraflow bench update`: how much of the update's communication nothing hides, with and without overlap, between
//! processes whose frames are delayed; and what the virtual clock makes of the same durations.
//!
//! The command starts itself once for each rank. Two ranks hold the same two stages, so each reduces and gathers every bucket
//! with the other one. Runs with and without overlap alternate. Four processes on fewer cores would measure the scheduler of
//! the system; of those only the bits are compared.

mod measured;
mod rank;

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use contraflow_runtime::fabric::DelayInjection;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{Program, StepPrograms};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::Plans;
use serde::{Deserialize, Serialize};

use self::measured::{Figures, StepFigures, figures, medians};
use self::rank::Trained;
use super::WARM_UP;
use super::processes::Processes;
use crate::failure::Failure;

const RECIPE: &str = "tiny";
/// Each frame is held back for up to 2 ms.
const DELAYS: DelayInjection = DelayInjection { seed: 1, max_delay: Duration::from_millis(2) };

/// Role of a child process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ProcessRole {
    rank: usize,
    axes: Axes,
    overlap: bool,
    /// Steps that are measured.
    steps: usize,
}

/// Ranks in a DualPipe pipeline, and those that share the experts of one of its positions.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Axes {
    pipeline: usize,
    expert: usize,
}

impl ProcessRole {
    /// The first steps warm up. The last one is gathered at once with overlap too, so it is not measured.
    fn recipe(&self) -> Result<Recipe, Failure> {
        let overrides = [
            format!("parallel.pipeline={}", self.axes.pipeline),
            format!("parallel.expert={}", self.axes.expert),
            format!("parallel.overlap={}", self.overlap),
            format!("training.steps={}", WARM_UP + self.steps + 1),
        ];
        Ok(Recipe::load(&RecipeSource::Builtin(RECIPE.to_owned()), &overrides)?)
    }
}

/// What the command prints as JSON. Units are in the names.
#[derive(Debug, Serialize)]
pub(super) struct UpdateFigures {
    recipe: &'static str,
    /// Each frame is held back for a seeded time up to this.
    max_frame_delay_ms: f64,
    /// Over how many steps of each kind the medians are.
    measured_steps: usize,
    two_processes: Two,
    four_processes: Same,
}

#[derive(Debug, Serialize)]
struct Two {
    #[serde(flatten)]
    same: Same,
    with_overlap: Figures,
    without_overlap: Figures,
    /// Exposed communication with overlap over that without, as measured.
    exposed_communication_ratio: f64,
    /// The same, as the virtual clock has it.
    walk_exposed_communication_ratio: f64,
}

/// Whether runs with and without overlap agree bit for bit.
#[derive(Clone, Debug, Serialize)]
struct Same {
    axes: Axes,
    losses_and_norms_equal: bool,
    weights_equal: bool,
}

/// Measures it.
///
/// **Errors**: code 2 without rounds or steps; code 1 if a process cannot be started or a rank fails.
pub(super) fn run(rounds: usize, steps: usize) -> Result<UpdateFigures, Failure> {
    if rounds == 0 || steps == 0 {
        return Err(Failure::input("--rounds and --steps: expected at least 1"));
    }
    measure(rounds, steps).map_err(|error| Failure::run(error.to_string()))
}

/// The part of one rank in it, given as JSON.
///
/// **Errors**: code 1 if the rank fails.
pub(super) fn be(part: &str) -> Result<(), Failure> {
    let part = serde_json::from_str(part).map_err(|error| Failure::run(error.to_string()))?;
    rank::be(&part).map_err(|error| Failure::run(error.to_string()))
}

impl UpdateFigures {
    /// **Errors**: code 1 if the bits differ.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        let differs = [&self.two_processes.same, &self.four_processes]
            .into_iter()
            .find(|same| !same.losses_and_norms_equal || !same.weights_equal);
        differs.map_or(Ok(()), |same| {
            Err(Failure::run(format!("with and without overlap {:?} come to different bits", same.axes)))
        })
    }
}

fn measure(rounds: usize, steps: usize) -> Result<UpdateFigures, Box<dyn Error>> {
    let two = Axes { pipeline: 2, expert: 1 };
    let mut runs = Vec::new();
    let mut taken: [Vec<StepFigures>; 2] = Default::default();
    for _ in 0..rounds {
        for (overlap, taken) in [true, false].into_iter().zip(&mut taken) {
            let trained = train(two, overlap, steps)?;
            taken.extend(figures(&whole_programs(two, overlap)?, &trained)?);
            runs.push(trained);
        }
    }
    let [with_overlap, without_overlap] = taken.map(|steps| medians(&steps));
    let four = Axes { pipeline: 2, expert: 2 };
    let others = [train(four, true, steps)?, train(four, false, steps)?];
    Ok(UpdateFigures {
        recipe: RECIPE,
        max_frame_delay_ms: DELAYS.max_delay.as_secs_f64() * 1e3,
        measured_steps: rounds * steps,
        two_processes: Two {
            same: compare(two, &runs),
            exposed_communication_ratio: with_overlap.exposed_communication_ms
                / without_overlap.exposed_communication_ms,
            walk_exposed_communication_ratio: with_overlap.walk_exposed_communication_ms
                / without_overlap.walk_exposed_communication_ms,
            with_overlap,
            without_overlap,
        },
        four_processes: compare(four, &others),
    })
}

/// One run, by rank.
fn train(axes: Axes, overlap: bool, steps: usize) -> Result<Vec<Trained>, Box<dyn Error>> {
    let world = axes.pipeline * axes.expert;
    let parts: Vec<ProcessRole> = (0..world).map(|rank| ProcessRole { rank, axes, overlap, steps }).collect();
    let mut processes = Processes::start("update", &parts)?;
    let lines: Vec<String> = (0..world).map(|rank| processes.line(rank)).collect::<Result<_, _>>()?;
    processes.end()?;
    lines.iter().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// What each rank runs in a step between two others.
fn whole_programs(axes: Axes, overlap: bool) -> Result<Vec<Program>, Box<dyn Error>> {
    let recipe =
        ProcessRole { rank: 0, axes, overlap, steps: 1 }.recipe().map_err(|failure| failure.to_string())?;
    let mut plans = Plans::new(&recipe)?;
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let planned = plans.get(micro_batches, TaskKind::Train)?;
    Ok(StepPrograms::new(&plans.passes(&planned.plan), &plans.sharding).whole())
}

fn compare(axes: Axes, runs: &[Vec<Trained>]) -> Same {
    let losses: BTreeSet<Vec<_>> =
        runs.iter().map(|ranks| ranks.iter().map(|rank| &rank.losses_and_norms).collect()).collect();
    let weights: BTreeSet<Vec<_>> =
        runs.iter().map(|ranks| ranks.iter().map(|rank| &rank.weights).collect()).collect();
    Same { axes, losses_and_norms_equal: losses.len() == 1, weights_equal: weights.len() == 1 }
}

impl fmt::Display for UpdateFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Two { same, with_overlap, without_overlap, .. } = &self.two_processes;
        let line = |what: &str, figures: &Figures| {
            format!(
                "  {what:<16} {:>7.1} ms exposed ({:.1} by the walk) of a step of {:.1} ms ({:.1} by the walk)\n",
                figures.exposed_communication_ms,
                figures.walk_exposed_communication_ms,
                figures.step_ms,
                figures.walk_step_ms
            )
        };
        let bits = |same: &Same| {
            let equal = |equal: bool| if equal { "equal" } else { "DIFFERENT" };
            let (losses, weights) = (equal(same.losses_and_norms_equal), equal(same.weights_equal));
            format!("  with and without overlap: losses and norms {losses}, weights {weights}\n")
        };
        write!(
            f,
            "{}, frames delayed by up to {:.0} ms, medians over {} steps\ntwo processes\n{}{}{}four processes\n{}",
            self.recipe,
            self.max_frame_delay_ms,
            self.measured_steps,
            line("with overlap", with_overlap),
            line("without overlap", without_overlap),
            bits(same),
            bits(&self.four_processes),
        )
    }
}
