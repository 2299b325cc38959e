//! A search finds what simulating everything finds, and says of the rest why it is not there.

use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::simulator::{Candidate, Cluster, Verdict, search, simulate_recipe};

const SOURCE: &str = "tiny";

fn cluster(memory: &str) -> Cluster {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/clusters/h800-2048.toml"))
            .unwrap()
            .replace("ranks = 2048", "ranks = 4")
            .replace("ranks_per_node = 8", "ranks_per_node = 2")
            .replace("memory_bytes = 80_000_000_000", memory);
    Cluster::from_toml("four", &text).unwrap()
}

fn seconds(recipe: &Recipe, cluster: &Cluster) -> f64 {
    simulate_recipe(recipe, cluster).unwrap().step_s
}

/// Of everything that fits, simulated one after the other.
fn front_by_force(candidates: &[Candidate], cluster: &Cluster) -> Vec<usize> {
    let base = Recipe::load(&RecipeSource::Builtin(SOURCE.into()), &[]).unwrap();
    let fitting = candidates.iter().enumerate().filter(|(_, one)| one.estimated_s.is_some());
    let all: Vec<(usize, [f64; 3])> = fitting
        .map(|(index, one)| {
            let recipe =
                Recipe::load(&RecipeSource::Builtin(SOURCE.into()), &one.choice.overrides(&base)).unwrap();
            let figures = [seconds(&recipe, cluster), one.memory_bytes.unwrap() as f64, one.ranks as f64];
            (index, figures)
        })
        .collect();
    let beats = |one: &[f64; 3], other: &[f64; 3]| one.iter().zip(other).all(|(a, b)| a <= b) && one != other;
    let mut front: Vec<&(usize, [f64; 3])> =
        all.iter().filter(|(_, own)| !all.iter().any(|(_, other)| beats(other, own))).collect();
    front.sort_by(|a, b| a.1[0].total_cmp(&b.1[0]));
    front.into_iter().map(|(index, _)| *index).collect()
}

#[test]
fn the_front_is_that_of_simulating_everything() {
    let cluster = cluster("memory_bytes = 80_000_000_000");
    let found = search(&RecipeSource::Builtin(SOURCE.into()), &[], &cluster).unwrap();
    let fitting = found.candidates.iter().filter(|one| one.estimated_s.is_some()).count();
    assert!(found.simulated < fitting, "{} of {fitting}", found.simulated);
    assert_eq!(found.front, front_by_force(&found.candidates, &cluster));
    for (index, one) in found.candidates.iter().enumerate() {
        match &one.verdict {
            Verdict::Front => assert!(found.front.contains(&index), "{one:?}"),
            Verdict::Dominated { by } => assert!(found.front.contains(by), "{one:?}"),
            Verdict::TooLarge => panic!("{one:?}"),
            Verdict::Refused { why } => assert!(!why.is_empty(), "{one:?}"),
        }
    }
}

#[test]
fn what_does_not_fit_is_not_on_the_front_and_has_its_size() {
    let limit = 40 << 20;
    let cluster = cluster(&format!("memory_bytes = {limit}"));
    let found = search(&RecipeSource::Builtin(SOURCE.into()), &[], &cluster).unwrap();
    let too_large = |one: &&Candidate| one.verdict == Verdict::TooLarge;
    let (large, other): (Vec<_>, Vec<_>) = found.candidates.iter().partition(too_large);
    assert!(!large.is_empty() && !found.front.is_empty());
    assert!(large.iter().all(|one| one.memory_bytes.unwrap() > limit && one.estimated_s.is_none()));
    assert!(other.iter().all(|one| one.memory_bytes.is_none_or(|bytes| bytes <= limit)));
}
