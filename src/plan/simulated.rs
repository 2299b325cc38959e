//! `contraflow plan --cluster`: the step on a cluster, and what is drawn of a plan. The simulator is in `runtime`.

use std::time::Instant;

use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Plan, UnitCosts, clock};
use contraflow_runtime::simulator::{Cluster, Prediction, Run, predict, rows};

use super::PlanArgs;
use crate::failure::Failure;

/// The step of a recipe on a cluster by name or file.
///
/// **Errors**: every fault of the profile; every reason why the recipe cannot be simulated there.
pub fn on_cluster(recipe: &Recipe, cluster: &str) -> Result<(Run, Prediction), Failure> {
    let begun = Instant::now();
    let cluster = Cluster::load(cluster).map_err(|faults| Failure::faults("cluster", &faults.list))?;
    let simulated = predict(recipe, &cluster);
    let (run, mut prediction) = simulated
        .map_err(|faults| Failure::faults(&format!("no simulation on {}", cluster.name), &faults))?;
    prediction.seconds = begun.elapsed().as_secs_f64();
    Ok((run, prediction))
}

/// Writes the pictures that were asked for: of a simulation, or else of the plan where a forward pass and each part of a backward
/// pass take one unit.
///
/// **Errors**: a plan that deadlocks; a file that cannot be written.
pub fn pictures(args: &PlanArgs, plan: &Plan, run: Option<&Run>) -> Result<(), Failure> {
    if args.pictures.is_none() {
        return Ok(());
    }
    match run {
        Some(run) => args.pictures.draw(plan, &rows("rank", &run.programs, &run.timeline), ("s", 1e6)),
        None => {
            let walked = clock(plan, UnitCosts::SUM);
            let (programs, timeline) = walked.map_err(|deadlock| Failure::input(deadlock.to_string()))?;
            args.pictures.draw(plan, &rows("rank", &programs, &timeline), ("F", 1e3))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use contraflow_runtime::recipe::RecipeSource;
    use contraflow_workers::data::batches::TaskKind;
    use contraflow_workers::engine::plans::Plans;

    use super::*;

    #[test]
    fn what_is_simulated_is_what_the_ranks_run() {
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        let (run, prediction) = on_cluster(&recipe, "h800-2048").unwrap();
        assert!(prediction.seconds > 0.0);
        let mut plans = Plans::new(&recipe).unwrap();
        let batch = recipe.micro_batches(recipe.training.global_batch_size);
        let planned = plans.get(batch, TaskKind::Train).unwrap();
        let mut counts: BTreeMap<(usize, String), i64> = BTreeMap::new();
        planned.ops().for_each(|(rank, op)| *counts.entry((rank, op.work.to_string())).or_default() += 1);
        let simulated = run.programs.iter().enumerate();
        let simulated = simulated.flat_map(|(rank, program)| program.ops.iter().map(move |op| (rank, op)));
        simulated.for_each(|(rank, op)| *counts.entry((rank, op.work.to_string())).or_default() -= 1);
        counts.retain(|_, count| *count != 0);
        assert!(counts.is_empty(), "{counts:?}");
        assert_eq!(run.plan, *planned.plan);
    }
}
