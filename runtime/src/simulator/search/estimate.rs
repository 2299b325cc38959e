//! A step on a coarse clock: a chunk is one operation, its exchanges wait where a pass runs alone and are hidden in a pair, and
//! transfers are free; what the update adds is that of a simulated step of two micro-batches. A tenth of the operations of a simulation.

use std::collections::HashMap;

use crate::layout::{recipe_plan, recipe_stages};
use crate::recipe::Recipe;
use crate::schedule::{
    Action, Lane, Mode, Overlap, Pass, Plan, StageLayout, UnitCosts, Work, clock_by, lower,
};
use crate::simulator::cluster::{Cluster, Costs};
use crate::simulator::run::{operation_times, simulate_stages, with_shapes};

/// Seconds of computation, and of exchanges.
type Cost = [f64; 2];

/// What a step takes.
///
/// **Units**: seconds.
///
/// # Errors
/// As [`simulate_recipe`](super::simulate_recipe).
pub fn step_s(recipe: &Recipe, cluster: &Cluster) -> Result<f64, Vec<String>> {
    let stages = recipe_stages(recipe).map_err(|error| vec![error])?;
    let pipeline = recipe.parallel.pipeline;
    let overlap = Overlap::of(recipe.parallel.overlap);
    let plan = |micro_batches| {
        let made = recipe_plan(recipe, micro_batches, Mode::Train, overlap);
        made.map(|(plan, _)| plan).map_err(|error| vec![error])
    };
    let (costs, update_s) = match &cluster.costs {
        Costs::Actions { unit, optimizer_s } => (ActionCosts::Kinds(*unit), *optimizer_s),
        Costs::Kernels(_) | Costs::Measured(_) => {
            let short = plan(2)?;
            let costs = chunk_costs(recipe, cluster, &short, &stages)?;
            let run = simulate_stages((recipe, overlap), cluster, short, &stages)?;
            (ActionCosts::Chunks(costs), run.breakdown.mean.optimizer)
        }
    };
    let passes_s = |micro_batches| {
        let walked = clock_by(&plan(micro_batches)?, |action| costs.of(action));
        walked.map(|(_, timeline)| timeline.makespan).map_err(|deadlock| vec![deadlock.to_string()])
    };
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let (some, more) = (4 * pipeline, 8 * pipeline);
    if micro_batches <= more {
        return Ok(passes_s(micro_batches)? + update_s);
    }
    // In the middle of a long step every micro-batch takes the same.
    let (of_some, of_more) = (passes_s(some)?, passes_s(more)?);
    let each = (of_more - of_some) / (more - some) as f64;
    Ok(of_more + each * (micro_batches - more) as f64 + update_s)
}

/// Durations of actions.
enum ActionCosts {
    Kinds(UnitCosts),
    Chunks(HashMap<(usize, Pass), Cost>),
}

impl ActionCosts {
    fn of(&self, action: &Action) -> f64 {
        match self {
            ActionCosts::Kinds(unit) => unit.of(action),
            ActionCosts::Chunks(costs) => duration(action, costs),
        }
    }
}

/// By stage and pass, the mean of the two micro-batches of `short`.
///
/// # Errors
/// As [`operation_times`].
fn chunk_costs(
    recipe: &Recipe,
    cluster: &Cluster,
    short: &Plan,
    stages: &[StageLayout],
) -> Result<HashMap<(usize, Pass), Cost>, Vec<String>> {
    with_shapes(recipe, &short.placement, stages, |kernels| {
        let times = operation_times(cluster, kernels)?;
        let mut costs: HashMap<(usize, Pass), Cost> = HashMap::new();
        for (rank, program) in lower(short, Some(stages), recipe.parallel.expert).iter().enumerate() {
            for op in &program.ops {
                let Work::Component { pass, chunk, .. } = op.work else { continue };
                let seconds = times.of(rank, op) / 2.0;
                costs.entry((chunk.stage, pass)).or_default()[usize::from(op.lane == Lane::Expert)] +=
                    seconds;
            }
        }
        Ok(costs)
    })
}

fn duration(action: &Action, costs: &HashMap<(usize, Pass), Cost>) -> f64 {
    let of = |stage, pass| costs.get(&(stage, pass)).copied().unwrap_or_default();
    let backward = |stage| {
        let ([input, exchange], [weight, _]) =
            (of(stage, Pass::BackwardInput), of(stage, Pass::BackwardWeight));
        [input + weight, exchange]
    };
    let both = |one: Cost, other: Cost| [one[0] + other[0], one[1] + other[1]];
    let ([computation, exchange], is_pair) = match *action {
        Action::Forward(chunk) => (of(chunk.stage, Pass::Forward), false),
        Action::Backward(chunk) => (backward(chunk.stage), false),
        Action::BackwardInput(chunk) => (of(chunk.stage, Pass::BackwardInput), false),
        Action::BackwardWeight(chunk) => (of(chunk.stage, Pass::BackwardWeight), false),
        Action::ForwardBackward { forward, backward: behind } => {
            (both(of(forward.stage, Pass::Forward), backward(behind.stage)), true)
        }
        Action::ForwardForward { first, second } => {
            (both(of(first.stage, Pass::Forward), of(second.stage, Pass::Forward)), true)
        }
        Action::InputWeight { input, weight } => {
            let ([input, exchange], [weight, _]) =
                (of(input.stage, Pass::BackwardInput), of(weight.stage, Pass::BackwardWeight));
            ([input, f64::max(weight, exchange)], false)
        }
    };
    if is_pair { f64::max(computation, exchange) } else { computation + exchange }
}
