//! Which layers stand in which pipeline stage, what that asks of a rank's memory (`memory`, for a recipe `need`), and what a
//! process has (`limit`).
//!
//! Pure arithmetic on a model's shapes, used by `contraflow plan` before anything starts and by the ranks
//! when they build their stages. Who holds which stages, and how many chunks are alive at once, the caller says.

mod limit;
mod memory;
mod need;

use std::cmp::Reverse;

use serde::Serialize;

pub use limit::{LimitedBy, MemoryLimit, resident_bytes};
pub use memory::{MemoryQuery, rank_figures};
pub use need::{checkpoint_bytes, figures_with, folder_bytes, recipe_figures};

use crate::cost;
use crate::model_config::ModelConfig;
use crate::recipe::{Recipe, StageRule, Stages};
use crate::schedule::program::StageLayout;
use crate::schedule::{Mode, Overlap, Plan, pair_up};

/// Divides the layers among `num_stages` contiguous stages of at least one layer so that the costliest stage
/// is as cheap as can be, and among those divisions the costs are as even as can be (least sum of squares);
/// what is still equal is decided for later cuts. The cost of a stage is its forward FLOPs per token, the
/// head and multi-token prediction included in the last one's.
///
/// **Errors**: no stages, or fewer layers than stages.
pub fn split_layers(
    config: &ModelConfig,
    num_stages: usize,
    sequence_length: usize,
) -> Result<Vec<StageLayout>, String> {
    let num_layers = config.num_hidden_layers;
    if num_stages == 0 || num_stages > num_layers {
        return Err(format!(
            "expected from 1 to {num_layers} stages, one layer each at least, got {num_stages}"
        ));
    }
    let costs = layer_costs(config, sequence_length);
    Ok(stages_of(config, &cut(&costs, num_stages)))
}

/// What each layer costs, forward and for a token; head and multi-token prediction are the last one's, and looking rows up in the
/// embedding costs no product. **Units**: FLOP.
fn layer_costs(config: &ModelConfig, sequence_length: usize) -> Vec<u64> {
    let layers = 0..config.num_hidden_layers;
    let mut costs: Vec<u64> =
        layers.map(|layer| cost::layer_flops(config, config.layer_kind(layer), sequence_length)).collect();
    let mtp = config.mtp_layer().map_or(0, |_| cost::mtp_flops(config, sequence_length));
    if let Some(last) = costs.last_mut() {
        *last += cost::head_flops(config) + mtp;
    }
    costs
}

/// As many layers in each stage as in any other, the first ones with one more where they do not divide: the last one has the head.
fn even(config: &ModelConfig, num_stages: usize) -> Vec<StageLayout> {
    let num_layers = config.num_hidden_layers;
    let (least, more) = (num_layers / num_stages, num_layers % num_stages);
    let cuts: Vec<usize> = (0..=num_stages).map(|stage| stage * least + stage.min(more)).collect();
    stages_of(config, &cuts)
}

/// What the stages of a recipe cost, and what other ways to spread its layers would.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageCosts {
    /// Forward pass of a token in each stage. **Units**: FLOP.
    pub flops_per_token: Vec<u64>,
    /// The costliest stage over their mean, of these stages, of balanced and of even ones.
    pub imbalance: f64,
    /// See above.
    pub imbalance_balanced: f64,
    /// See above.
    pub imbalance_even: f64,
}

/// Prices the stages of a recipe.
///
/// **Errors**: as [`recipe_stages`].
pub fn stage_costs(recipe: &Recipe) -> Result<StageCosts, String> {
    let (config, length) = (&recipe.model_config, recipe.training.sequence_length);
    let costs = layer_costs(config, length);
    let of_stages = |stages: &[StageLayout]| {
        let of = |stage: &StageLayout| costs[stage.first_layer..][..stage.layers.len()].iter().sum();
        stages.iter().map(of).collect::<Vec<u64>>()
    };
    let imbalance = |flops: &[u64]| {
        let most = flops.iter().max().copied().unwrap_or_default() as f64;
        most * flops.len() as f64 / flops.iter().sum::<u64>().max(1) as f64 - 1.0
    };
    let flops_per_token = of_stages(&recipe_stages(recipe)?);
    Ok(StageCosts {
        imbalance: imbalance(&flops_per_token),
        imbalance_balanced: imbalance(&of_stages(&split_layers(config, recipe.stages(), length)?)),
        imbalance_even: imbalance(&of_stages(&even(config, recipe.stages()))),
        flops_per_token,
    })
}

/// The stages of a recipe: as `parallel.stages` says, or as [`split_layers`] makes them.
///
/// **Errors**: those of [`split_layers`]. What `parallel.stages` says was checked with the recipe.
pub fn recipe_stages(recipe: &Recipe) -> Result<Vec<StageLayout>, String> {
    let (config, counts) = (&recipe.model_config, recipe.parallel.stages.layers());
    if recipe.parallel.stages == Stages::Rule(StageRule::Even) {
        return Ok(even(config, recipe.stages()));
    }
    if counts.is_empty() {
        return split_layers(config, recipe.stages(), recipe.training.sequence_length);
    }
    let ends = counts.iter().scan(0, |end, count| {
        *end += count;
        Some(*end)
    });
    Ok(stages_of(config, &std::iter::once(0).chain(ends).collect::<Vec<_>>()))
}

/// The plan of a task as the ranks run it, and why it is not that of the schedule: where exchanges are to be hidden, with neighbours
/// beside each other. An own plan says itself what runs beside what.
///
/// # Errors
/// As [`Recipe::plan`] and [`recipe_stages`].
pub fn recipe_plan(
    recipe: &Recipe,
    micro_batches: usize,
    mode: Mode,
    overlap: Overlap,
) -> Result<(Plan, Option<String>), String> {
    let (plan, why) = recipe.plan(micro_batches, mode)?;
    if overlap == Overlap::Off || recipe.parallel.expert == 1 || recipe.own_plan.is_some() {
        return Ok((plan, why));
    }
    Ok((pair_up(plan, &recipe_stages(recipe)?), why))
}

/// The stages between cuts, the first layer and the end of the last one among them. Embedding, head and multi-token prediction are
/// at the ends.
fn stages_of(config: &ModelConfig, cuts: &[usize]) -> Vec<StageLayout> {
    let stages = cuts.windows(2).enumerate().map(|(stage, range)| {
        let is_last = stage + 2 == cuts.len();
        StageLayout {
            first_layer: range[0],
            layers: (range[0]..range[1]).map(|layer| config.layer_kind(layer)).collect(),
            embedding: stage == 0,
            head: is_last,
            tied: is_last && config.tie_word_embeddings,
            mtp_layer: config.mtp_layer().filter(|_| is_last),
        }
    });
    stages.collect()
}

/// The best cut of `costs` into `parts` runs: the index where each part begins, and the end.
fn cut(costs: &[u64], parts: usize) -> Vec<usize> {
    let limit = least_maximum(costs, parts);
    let sums = prefix_sums(costs);
    // best[p][end]: for the first `end` items in `p` parts, none above the limit, the least sum of squared
    // costs and where the last part begins.
    let mut best = vec![vec![None; costs.len() + 1]; parts + 1];
    best[0][0] = Some((0, 0));
    for part in 1..=parts {
        for end in 1..=costs.len() {
            let options = (0..end).filter_map(|start| {
                let (before, _) = best[part - 1][start]?;
                let last = sums[end] - sums[start];
                (last <= limit).then(|| (before + u128::from(last).pow(2), start))
            });
            best[part][end] = options.min_by_key(|&(squares, start)| (squares, Reverse(start)));
        }
    }
    let mut cuts = vec![costs.len()];
    for part in (1..=parts).rev() {
        let end = cuts[cuts.len() - 1];
        cuts.push(best[part][end].expect("the limit was found with as many parts").1);
    }
    cuts.reverse();
    cuts
}

/// The cost of the costliest run in the best cut of `costs` into `parts` runs.
fn least_maximum(costs: &[u64], parts: usize) -> u64 {
    let sums = prefix_sums(costs);
    let mut best = sums.clone();
    for part in 1..parts {
        // From the end, so that every entry still read belongs to one part fewer.
        for end in (part + 1..=costs.len()).rev() {
            let options = (part..end).map(|start| best[start].max(sums[end] - sums[start]));
            best[end] = options.min().expect("a part has an item");
        }
    }
    best[costs.len()]
}

fn prefix_sums(costs: &[u64]) -> Vec<u64> {
    let mut sums = vec![0];
    sums.extend(costs.iter().scan(0, |sum, cost| {
        *sum += cost;
        Some(*sum)
    }));
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model_config::builtin;
    use crate::recipe::RecipeSource;

    /// Every cut of `costs` into `parts` runs, judged by (maximum, sum of squares).
    fn best_by_brute_force(costs: &[u64], parts: usize) -> (u64, u128) {
        if parts == 1 {
            let sum: u64 = costs.iter().sum();
            return (sum, u128::from(sum).pow(2));
        }
        let mut all = Vec::new();
        all_cuts(costs, parts, (0, 0), &mut all);
        all.into_iter().min().unwrap()
    }

    fn all_cuts(costs: &[u64], parts: usize, so_far: (u64, u128), all: &mut Vec<(u64, u128)>) {
        let with = |run: &[u64]| {
            let sum: u64 = run.iter().sum();
            (so_far.0.max(sum), so_far.1 + u128::from(sum).pow(2))
        };
        if parts == 1 {
            all.push(with(costs));
            return;
        }
        for end in 1..=costs.len() - (parts - 1) {
            all_cuts(&costs[end..], parts - 1, with(&costs[..end]), all);
        }
    }

    proptest! {
        #[test]
        fn cuts_are_the_best_there_are(costs in prop::collection::vec(1u64..20, 1..10), parts in 0usize..10) {
            let parts = 1 + parts % costs.len();
            let cuts = cut(&costs, parts);
            prop_assert_eq!(cuts.len(), parts + 1);
            prop_assert_eq!((cuts[0], cuts[parts]), (0, costs.len()));
            prop_assert!(cuts.windows(2).all(|range| range[0] < range[1]));
            let sums = cuts.windows(2).map(|range| costs[range[0]..range[1]].iter().sum::<u64>());
            let maximum = sums.clone().max().unwrap();
            let squares = sums.map(|sum| u128::from(sum).pow(2)).sum::<u128>();
            prop_assert_eq!((maximum, squares), best_by_brute_force(&costs, parts));
        }
    }

    #[test]
    fn stages_cover_the_model_in_order() {
        let config = builtin::model("deepseek-v3").unwrap();
        for num_stages in [1, 2, 16, 61] {
            let stages = split_layers(&config, num_stages, 4096).unwrap();
            assert_eq!(stages.len(), num_stages);
            let mut next = 0;
            for (index, stage) in stages.iter().enumerate() {
                assert_eq!(stage.first_layer, next);
                assert!(!stage.layers.is_empty());
                for (offset, &kind) in stage.layers.iter().enumerate() {
                    assert_eq!(kind, config.layer_kind(next + offset));
                }
                next += stage.layers.len();
                let is_last = index + 1 == num_stages;
                assert_eq!((stage.embedding, stage.head, stage.tied), (index == 0, is_last, false));
                assert_eq!(stage.mtp_layer, is_last.then_some(61));
            }
            assert_eq!(next, 61);
        }
        assert_eq!(
            split_layers(&config, 62, 4096).unwrap_err(),
            "expected from 1 to 61 stages, one layer each at least, got 62"
        );
        assert!(split_layers(&config, 0, 4096).is_err());
    }

    #[test]
    fn the_last_stage_of_a_tied_model_has_the_embedding_as_its_head() {
        let config = ModelConfig { tie_word_embeddings: true, ..builtin::model("deepseek-v3").unwrap() };
        for num_stages in [1, 2, 16] {
            let stages = split_layers(&config, num_stages, 4096).unwrap();
            assert!(stages.iter().all(|stage| stage.tied == stage.head), "{num_stages}");
        }
    }

    #[test]
    fn the_last_stage_makes_room_for_head_and_mtp() {
        let config = builtin::model("deepseek-v3").unwrap();
        let stages = split_layers(&config, 16, 4096).unwrap();
        let sizes: Vec<_> = stages.iter().map(|stage| stage.layers.len()).collect();
        assert!(sizes[15] < sizes[7], "{sizes:?}");
        assert!(sizes.iter().all(|&size| size <= 4), "{sizes:?}");
    }

    #[test]
    fn stages_are_those_of_the_recipe() {
        let sizes = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
            let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap();
            let stages = recipe_stages(&recipe).unwrap();
            assert!(stages[0].embedding && stages[1].head && !stages[1].embedding && !stages[0].head);
            stages.iter().map(|stage| (stage.first_layer, stage.layers.len())).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&["parallel.stages=[1, 3]"]), [(0, 1), (1, 3)]);
        assert_eq!(sizes(&[]), [(0, 3), (3, 1)]);
        assert_eq!(sizes(&["parallel.stages=[]"]), sizes(&["parallel.stages=balanced"]));
        assert_eq!(sizes(&["parallel.stages=even"]), [(0, 2), (2, 2)]);
        assert_eq!(sizes(&["parallel.stages=even", "model.num_hidden_layers=5"]), [(0, 3), (3, 2)]);
    }

    /// By hand: four equal layers and a last stage with the head; balanced is never costlier than even, which no list beats.
    #[test]
    fn no_other_stages_are_less_uneven_than_balanced_ones() {
        let costs = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
            let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap();
            stage_costs(&recipe).unwrap()
        };
        let balanced = costs(&[]);
        assert_eq!(balanced.imbalance, balanced.imbalance_balanced);
        let even = costs(&["parallel.stages=even"]);
        assert_eq!((even.imbalance, even.imbalance_even), (balanced.imbalance_even, balanced.imbalance_even));
        let total = |costs: &StageCosts| costs.flops_per_token.iter().sum::<u64>();
        for layers in ["[1, 3]", "[2, 2]", "[3, 1]"] {
            let listed = costs(&[&format!("parallel.stages={layers}")]);
            assert!(listed.imbalance >= balanced.imbalance, "{layers}");
            assert_eq!(total(&listed), total(&balanced));
        }
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        let trained = cost::training_flops_per_token(&recipe.model_config, recipe.training.sequence_length);
        assert_eq!(3 * total(&balanced), trained);
    }
}
