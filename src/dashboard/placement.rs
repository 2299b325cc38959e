//! Where the experts of a run would stand for even load, and what that would gain: the view behind the second half of the experts' page.
//!
//! By the mean over the sampled steps of a history, as the load heat map shows them, so that one uneven batch moves nothing. Pure;
//! knows nothing of who moves experts: nobody does while a run trains.

use std::collections::BTreeMap;

use contraflow_runtime::eplb::{Advice, Proposal, Slots, advise};
use contraflow_runtime::recipe::Recipe;
use serde_json::{Value, json};

use super::history::History;
use super::shown::Shown;

/// Copies that are proposed, a rank.
const SPARE: usize = 1;

/// What was seen of a run.
#[derive(Default)]
struct Seen {
    /// Steps of which the tokens of single experts are known, ascending.
    steps: Vec<u64>,
    /// Tokens per expert of all of them together, by layer.
    sums: BTreeMap<u32, Vec<u64>>,
}

impl Seen {
    fn of(history: &History) -> Self {
        let mut seen = Seen::default();
        for sample in history.samples().iter().filter(|sample| !sample.loads.is_empty()) {
            seen.steps.push(sample.step);
            for (layer, counts) in &sample.loads {
                let sums = seen.sums.entry(*layer).or_insert_with(|| vec![0; counts.len()]);
                sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum = sum.saturating_add(*count));
            }
        }
        seen
    }

    /// Layer by layer. **Units**: tokens of a step.
    fn means(&self) -> Vec<Vec<f32>> {
        let of_step = |sum: &u64| (*sum as f64 / self.steps.len() as f64) as f32;
        self.sums.values().map(|sums| sums.iter().map(of_step).collect()).collect()
    }
}

/// The proposal for each layer of a run, or why there is none.
pub fn of_run(shown: &Shown) -> Value {
    let seen = shown.read(|state| Seen::of(&state.history));
    let steps = json!({"count": seen.steps.len(), "first": seen.steps.first(), "last": seen.steps.last()});
    match proposed(shown.facts.recipe.as_deref(), &seen) {
        Ok((on, advice)) => {
            let layer = |(layer, advice): (&u32, &Advice)| {
                let Advice { now, moved, copied } = advice;
                json!({"layer": layer, "now": now.imbalance, "moved": proposal(moved), "copied": proposal(copied)})
            };
            json!({
                "steps": steps, "ranks": on.num_ranks, "nodes": on.num_nodes, "groups": on.num_groups,
                "policy": on.policy().to_string(), "copies_per_rank": SPARE,
                "layers": seen.sums.keys().zip(&advice).map(layer).collect::<Vec<_>>(),
            })
        }
        Err(why) => json!({"steps": steps, "layers": [], "why": why}),
    }
}

/// On the ranks and nodes of the recipe.
///
/// **Errors**: what is not known, or does not fit.
fn proposed(recipe: Option<&Recipe>, seen: &Seen) -> Result<(Slots, Vec<Advice>), String> {
    let Some(num_experts) = seen.sums.values().next().map(Vec::len) else {
        return Err("of no step the tokens of single experts are known".into());
    };
    let recipe = recipe.ok_or("the recipe is not known, and so not on how many ranks its experts are")?;
    let num_ranks = recipe.parallel.expert;
    if num_ranks == 1 {
        return Err("one rank has all experts (parallel.expert = 1), whatever their load".into());
    }
    let on = Slots {
        num_slots: num_experts + SPARE * num_ranks,
        num_groups: recipe.model_config.n_group,
        num_nodes: recipe.expert_nodes(),
        num_ranks,
    };
    let advice = advise(&seen.means(), &on).map_err(|faults| faults.to_string())?;
    Ok((on, advice))
}

fn proposal(proposal: &Proposal) -> Value {
    json!({"imbalance": proposal.imbalance, "ranks": proposal.placement.ranks})
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use contraflow_orchestrator::metrics::record::StepRecord;
    use contraflow_proto::LayerLoad;
    use contraflow_runtime::recipe::RecipeSource;

    use super::super::shown::{Facts, Phase};
    use super::*;

    fn shown(settings: &[&str]) -> Arc<Shown> {
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &settings).unwrap();
        Shown::new(Facts { recipe: Some(Arc::new(recipe)), ..Facts::default() }, Phase::Training)
    }

    fn put(shown: &Shown, step: u64, loads: &[(u32, &[u64])]) {
        let loads: Vec<LayerLoad> =
            loads.iter().map(|&(layer, counts)| LayerLoad { layer, counts: counts.to_vec() }).collect();
        shown.change(|state| state.history.put_loads(step, &loads));
    }

    #[test]
    fn the_proposal_is_for_the_mean_of_the_sampled_steps_on_the_ranks_of_the_recipe() {
        let shown = shown(&[]);
        // Neither step alone has this mean: 6, 5, 4, 3, 3, 2, 1, 0, of which ranks have 18 and 6 now, and could have 12 each.
        put(&shown, 4, &[(1, &[12, 0, 8, 0, 6, 0, 2, 0]), (3, &[2; 8])]);
        put(&shown, 9, &[(1, &[0, 10, 0, 6, 0, 4, 0, 0]), (3, &[2; 8])]);
        // A line of metrics has no loads, and its step does not count.
        shown.step(&StepRecord { step: 10, ..StepRecord::default() });
        let view = of_run(&shown);
        assert_eq!(view["steps"], json!({"count": 2, "first": 4, "last": 9}));
        assert_eq!((&view["ranks"], &view["nodes"], &view["groups"]), (&json!(2), &json!(1), &json!(4)));
        let [first, second] = &view["layers"].as_array().unwrap()[..] else { panic!("{view}") };
        assert_eq!((&first["layer"], &second["layer"]), (&json!(1), &json!(3)));
        assert_eq!(first["now"], 1.5);
        assert_eq!(first["moved"], json!({"imbalance": 1.0, "ranks": [[0, 3, 4, 7], [1, 2, 5, 6]]}));
        assert_eq!(first["copied"], first["moved"], "nothing is more even than even");
        assert_eq!((&second["now"], &second["moved"]["imbalance"]), (&json!(1.0), &json!(1.0)));
    }

    #[test]
    fn a_copy_a_rank_divides_what_no_move_can() {
        let shown = shown(&[]);
        put(&shown, 1, &[(2, &[80, 10, 10, 10, 10, 10, 10, 10])]);
        let layer = &of_run(&shown)["layers"][0];
        let imbalance = |key: &str| layer[key]["imbalance"].as_f64().unwrap();
        // 110 of 150 tokens on the rank of expert 0, wherever it is; two copies more make thirds of its 80, of which
        // one rank has two, and 30 of the others.
        assert!((layer["now"].as_f64().unwrap() - 110.0 / 75.0).abs() < 1e-6, "{layer}");
        assert!((imbalance("moved") - 110.0 / 75.0).abs() < 1e-6, "{layer}");
        assert!((imbalance("copied") - (160.0 / 3.0 + 30.0) / 75.0).abs() < 1e-6, "{layer}");
        let copied = layer["copied"]["ranks"].as_array().unwrap();
        assert!(copied.iter().all(|rank| rank.as_array().unwrap().len() == 5), "{layer}");
    }

    #[test]
    fn groups_stay_in_the_nodes_of_two_hops() {
        let shown = shown(&[
            "parallel.pipeline=1",
            "parallel.schedule=1f1b",
            "parallel.expert=4",
            "parallel.expert_ranks_per_node=2",
        ]);
        put(&shown, 1, &[(1, &[9, 8, 7, 6, 5, 4, 3, 2])]);
        let view = of_run(&shown);
        assert_eq!((&view["nodes"], &view["policy"]), (&json!(2), &json!("hierarchical")));
        // Groups of two: the first (17 tokens) and the last (5) stand against the two between them (13 and 9).
        let ranks: Vec<Vec<u64>> =
            serde_json::from_value(view["layers"][0]["moved"]["ranks"].clone()).unwrap();
        let mut nodes: Vec<Vec<u64>> = ranks.chunks(2).map(<[_]>::concat).collect();
        nodes.iter_mut().for_each(|node| node.sort_unstable());
        assert_eq!(nodes, [[0, 1, 6, 7], [2, 3, 4, 5]]);
    }

    #[test]
    fn where_there_is_no_proposal_it_says_why() {
        let why = |shown: &Shown| {
            let view = of_run(shown);
            assert_eq!(view["layers"], json!([]));
            view["why"].as_str().unwrap().to_owned()
        };
        assert_eq!(why(&shown(&[])), "of no step the tokens of single experts are known");
        let alone = shown(&["parallel.expert=1"]);
        put(&alone, 1, &[(1, &[1; 8])]);
        assert_eq!(why(&alone), "one rank has all experts (parallel.expert = 1), whatever their load");
        let unknown = Shown::new(Facts::default(), Phase::Done);
        put(&unknown, 1, &[(1, &[1; 8])]);
        assert_eq!(why(&unknown), "the recipe is not known, and so not on how many ranks its experts are");
        // What a folder says need not be true.
        let other = shown(&[]);
        put(&other, 1, &[(1, &[1; 7]), (2, &[1; 8])]);
        assert_eq!(
            why(&other),
            "loads.1: expected 7 experts, as in the first layer, got 8\n\
             num_slots: expected a multiple of num_ranks (2), got 9"
        );
    }
}
