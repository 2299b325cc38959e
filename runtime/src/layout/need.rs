//! What the ranks of a recipe need in memory at the least: what they hold between two steps and in one with the whole batch.
//!
//! Data, frames, copies of the state and the process itself come on top.

use super::{MemoryQuery, rank_figures, recipe_plan, recipe_stages};
use crate::cost;
use crate::recipe::{NumberFormat, Recipe};
use crate::schedule::{Mode, Overlap, RankFigures, lower_with};

/// By pipeline rank; all ranks at one pipeline coordinate need the same.
///
/// # Errors
/// The layers cannot be spread over the stages; the schedule has no plan for the batch.
pub fn recipe_figures(recipe: &Recipe) -> Result<Vec<RankFigures>, String> {
    figures_with(recipe, recipe.micro_batches(recipe.training.global_batch_size))
}

/// The same where passes are looked at for so many micro-batches: their activations take no more for more of them, once there are
/// four for each of the pipeline's ranks.
///
/// # Errors
/// As [`recipe_figures`].
pub fn figures_with(recipe: &Recipe, looked_at: usize) -> Result<Vec<RankFigures>, String> {
    let (training, parallel) = (&recipe.training, &recipe.parallel);
    let stages = recipe_stages(recipe)?;
    let overlap = Overlap::of(parallel.overlap);
    let (plan, _) = recipe_plan(recipe, looked_at, Mode::Train, overlap)?;
    Ok(rank_figures(&MemoryQuery {
        config: &recipe.model_config,
        topology: recipe.topology(),
        expert_nodes: recipe.expert_nodes(),
        stages: &stages,
        placement: &plan.placement,
        micro_batch_tokens: training.micro_batch_size * training.sequence_length,
        micro_batches: recipe.micro_batches(training.global_batch_size),
        programs: &lower_with(&plan, Some(&stages), parallel.expert, overlap),
        precision: &recipe.precision,
        memory: &recipe.memory,
        has_average: recipe.training.ema_decay > 0.0,
    }))
}

/// What a checkpoint takes in the storage, but for what is small: weights in f32, both moments, and an average. **Units**: bytes.
pub fn checkpoint_bytes(recipe: &Recipe) -> u64 {
    let parameters = cost::parameters(&recipe.model_config);
    let of_moment = if recipe.precision.moments == NumberFormat::Bf16 { 2 } else { 4 };
    let of_average = if recipe.training.ema_decay > 0.0 { 4 } else { 0 };
    (4 + 2 * of_moment + of_average) * (parameters.total + parameters.mtp)
}

/// What a job's folder needs: the two checkpoints that it may be sent back to, the newest, the next two, of which one may be written
/// while the other is committed, and as much again for everything else. **Units**: bytes.
pub fn folder_bytes(recipe: &Recipe) -> u64 {
    6 * checkpoint_bytes(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::RecipeSource;

    fn bytes(changes: &[&str]) -> Vec<u64> {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap();
        recipe_figures(&recipe).unwrap().iter().map(RankFigures::bytes).collect()
    }

    #[test]
    fn more_micro_batches_than_four_a_rank_need_no_more() {
        for schedule in crate::schedule::ScheduleKind::ALL {
            for pipeline in [2, 4] {
                let changes = [
                    format!("parallel.schedule={schedule}"),
                    format!("parallel.pipeline={pipeline}"),
                    "parallel.expert=1".into(),
                    "parallel.data=1".into(),
                    // A layer for each of two stages a rank.
                    "model.num_hidden_layers=8".into(),
                ];
                let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap();
                let enough = figures_with(&recipe, 4 * pipeline).unwrap();
                assert_eq!(enough, figures_with(&recipe, 10 * pipeline).unwrap(), "{schedule}, {pipeline}");
            }
        }
    }

    #[test]
    fn every_pipeline_rank_has_its_figures_and_more_tokens_need_more() {
        let [one, other] = bytes(&["parallel.pipeline=2"])[..] else { panic!("expected two ranks") };
        assert_eq!(one, other, "under DualPipe mirrors hold the same stages");
        let longer = bytes(&["parallel.pipeline=2", "training.sequence_length=512"]);
        assert!(longer[0] > one);
        // The weights of the ranks together, in the layout that shares nothing: 16 bytes a parameter, and some activations.
        let alone = bytes(&["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"]);
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        let parameters = crate::cost::parameters(&recipe.model_config);
        let parameters = parameters.total + parameters.mtp;
        assert!(alone[0] > 16 * parameters && alone[0] < 32 * parameters, "{alone:?} {parameters}");
    }
}
