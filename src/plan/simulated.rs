//! `contraflow plan --cluster`: the step on a cluster, and what is drawn of a plan. The simulator is in `runtime`.

use std::time::Instant;

use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Plan, Program, Timeline, UnitCosts, clock};
use contraflow_runtime::simulator::{Cluster, Prediction, Row, Run, gantt, predict, rows};

use super::pictures::Pictures;
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

/// A step on a virtual clock, to be drawn.
pub struct Step {
    plan: Plan,
    programs: Vec<Program>,
    timeline: Timeline,
    /// Name of the unit of the time.
    unit: &'static str,
    /// What it is drawn as in traces.
    microseconds: f64,
}

impl Step {
    /// As it was simulated.
    pub fn simulated(run: Run) -> Step {
        let Run { plan, programs, timeline, .. } = run;
        Step { plan, programs, timeline, unit: "s", microseconds: 1e6 }
    }

    /// Of a plan where a forward pass and each part of a backward pass take one unit.
    ///
    /// **Errors**: a plan that deadlocks.
    pub fn of_plan(plan: Plan) -> Result<Step, Failure> {
        let walked = clock(&plan, UnitCosts::SUM);
        let (programs, timeline) = walked.map_err(|deadlock| Failure::input(deadlock.to_string()))?;
        Ok(Step { plan, programs, timeline, unit: "F", microseconds: 1e3 })
    }

    /// Writes the pictures that were asked for.
    ///
    /// **Errors**: a file that cannot be written.
    pub fn draw(&self, pictures: &Pictures) -> Result<(), Failure> {
        pictures.draw(&self.plan, &self.rows(), (self.unit, self.microseconds))
    }

    /// The same as lines of text, so wide and coloured or not.
    pub fn gantt(&self, (width, is_coloured): (usize, bool)) -> String {
        gantt(&self.plan, &self.rows(), self.unit, width, is_coloured)
    }

    fn rows(&self) -> Vec<Row<'_>> {
        rows("rank", &self.programs, &self.timeline)
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
