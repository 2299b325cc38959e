//! A recipe's training step on the virtual clock of a cluster.
//!
//! The programs are made as the ranks make them: the plan lowered, the update laid around it, its gathering in front as in any step
//! but the first. Where a cluster knows nothing but durations of whole actions, the plan itself walks.

use super::breakdown::{Breakdown, breakdown, of_actions};
use super::cluster::{Cluster, Costs};
use super::duration::Durations;
use super::kernels::KernelShapes;
use super::measured_durations::MeasuredDurations;
use super::times::OperationTimes;
use crate::cost::Shapes;
use crate::layout::{recipe_plan, recipe_stages};
use crate::recipe::Recipe;
use crate::schedule::{
    Mode, Overlap, Plan, Program, Sharding, StageLayout, StepPrograms, Timeline, UnitCosts, Work, buckets,
    clock, lower_with, walk,
};

/// A simulated step.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The plan of the step.
    pub plan: Plan,
    /// What each pipeline rank ran; chunks as a whole where the cluster knows whole actions only.
    pub programs: Vec<Program>,
    /// When. **Units**: seconds.
    pub timeline: Timeline,
    /// Where the time went.
    pub breakdown: Breakdown,
    /// **Units**: seconds.
    pub step_s: f64,
}

/// The step with the whole batch.
///
/// # Errors
/// Every reason why it cannot be simulated: a layout that the model or the cluster has no place for, rates that the profile lacks, a
/// plan that deadlocks.
pub fn simulate_recipe(recipe: &Recipe, cluster: &Cluster) -> Result<Run, Vec<String>> {
    simulate_with(recipe, cluster, Overlap::of(recipe.parallel.overlap))
}

/// [`simulate_recipe`], where `overlap` says what runs beside what.
///
/// # Errors
/// As [`simulate_recipe`].
pub fn simulate_with(recipe: &Recipe, cluster: &Cluster, overlap: Overlap) -> Result<Run, Vec<String>> {
    let world = recipe.topology().world();
    if world > cluster.ranks {
        return Err(vec![format!(
            "parallel: expected at most the {} ranks of {}, got {world}",
            cluster.ranks, cluster.name
        )]);
    }
    let stages = recipe_stages(recipe).map_err(|error| vec![error])?;
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let (plan, _) = recipe_plan(recipe, micro_batches, Mode::Train, overlap).map_err(|error| vec![error])?;
    match &cluster.costs {
        Costs::Actions { unit, optimizer_s } => {
            // One pass after the other.
            let apart = UnitCosts { fb: unit.f + unit.b, ..*unit };
            let unit = if overlap == Overlap::Off { &apart } else { unit };
            let walked = clock(&plan, *unit).map_err(|deadlock| vec![deadlock.to_string()])?;
            let (programs, timeline) = walked;
            let breakdown = of_actions(&plan, *unit, &timeline, *optimizer_s);
            let step_s = timeline.makespan + optimizer_s;
            Ok(Run { plan, programs, timeline, breakdown, step_s })
        }
        Costs::Kernels(_) | Costs::Measured(_) => simulate_stages((recipe, overlap), cluster, plan, &stages),
    }
}

/// The step of a plan with these stages.
pub(super) fn simulate_stages(
    (recipe, overlap): (&Recipe, Overlap),
    cluster: &Cluster,
    plan: Plan,
    stages: &[StageLayout],
) -> Result<Run, Vec<String>> {
    let passes = lower_with(&plan, Some(stages), recipe.parallel.expert, overlap);
    with_shapes(recipe, &plan.placement.clone(), stages, |kernels| {
        let sharding = Sharding {
            buckets: kernels.shapes.buckets.to_vec(),
            replicated: false,
            overlap: overlap != Overlap::Off,
        };
        let programs = StepPrograms::new(&passes, &sharding).whole();
        simulate_shapes(plan, programs, cluster, kernels)
    })
}

/// What the durations of a recipe's operations follow from, where `placement[rank]` lists the stages of a rank.
pub(super) fn with_shapes<R>(
    recipe: &Recipe,
    placement: &[Vec<usize>],
    stages: &[StageLayout],
    then: impl FnOnce(KernelShapes) -> R,
) -> R {
    let topology = recipe.topology();
    let shapes = Shapes {
        config: &recipe.model_config,
        topology,
        expert_nodes: recipe.expert_nodes(),
        stages,
        buckets: &buckets(placement, stages, &topology),
        micro_batch_tokens: recipe.training.micro_batch_size * recipe.training.sequence_length,
        sequence_length: recipe.training.sequence_length,
        precision: &recipe.precision,
        mode: Mode::Train,
    };
    then(KernelShapes { shapes: &shapes, memory: &recipe.memory })
}

/// The durations on a cluster: from the rates of kernels, or as they were measured.
///
/// # Errors
/// A profile that knows whole actions only, or has not measured such layers.
pub fn operation_times<'a>(
    cluster: &'a Cluster,
    kernels: KernelShapes<'a>,
) -> Result<Box<dyn OperationTimes + 'a>, Vec<String>> {
    match &cluster.costs {
        Costs::Kernels(rates) => Ok(Box::new(Durations::new(cluster, rates, kernels))),
        Costs::Measured(costs) => Ok(Box::new(MeasuredDurations::new(&cluster.name, costs, kernels)?)),
        Costs::Actions { .. } => {
            Err(vec![format!("{}: expected costs of operations, got durations of actions", cluster.name)])
        }
    }
}

/// Any programs of a plan, under the durations that follow from shapes.
///
/// # Errors
/// As [`simulate_recipe`].
pub fn simulate_shapes(
    plan: Plan,
    programs: Vec<Program>,
    cluster: &Cluster,
    kernels: KernelShapes,
) -> Result<Run, Vec<String>> {
    let times = operation_times(cluster, kernels)?;
    let works: Vec<&Work> =
        programs.iter().flat_map(|program| program.ops.iter().map(|op| &op.work)).collect();
    let missing = times.missing(&works);
    if !missing.is_empty() {
        return Err(missing.into_iter().map(|what| format!("{}: {what}, got none", cluster.name)).collect());
    }
    let timeline =
        walk(&programs, |rank, op| times.of(rank, op)).map_err(|deadlock| vec![deadlock.to_string()])?;
    let breakdown = breakdown(&plan, &programs, &timeline);
    let step_s = timeline.makespan;
    Ok(Run { plan, programs, timeline, breakdown, step_s })
}
