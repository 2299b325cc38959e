//! A rank takes what the plan says, and the published run fits its GPUs. Only one of these tests trains: what tensors hold is
//! counted for the whole process.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/measured_run.rs"]
mod measured_run;

use contraflow_kernels::pool;
use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::RankFigures;
use measured_run::run;

/// What `contraflow plan` says of a rank, and what the tensors of one have held at most in a step: the larger over the smaller.
fn estimate_and_peak(name: &str, changes: &[&str]) -> (u64, u64) {
    let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.data=1", "parallel.schedule=1f1b"];
    let few = ["training.steps=2", "training.validation_sequences=0", "parallel.threads_per_rank=1"];
    let changes =
        [&alone[..], &few, changes].concat().iter().map(|&change| change.to_owned()).collect::<Vec<_>>();
    let (recipe, measured) = run(name, &changes, || {
        let peak = pool::peak_bytes() as u64;
        pool::forget_peak();
        peak
    });
    let [rank] = &recipe_figures(&recipe).unwrap()[..] else { panic!("expected one rank") };
    println!("{name} {changes:?}: {measured:?} of {rank:?}");
    (rank.device_bytes, measured[1])
}

/// By how much the plan may be wrong.
const MARGIN: f64 = 0.1;

#[test]
fn a_rank_takes_what_the_plan_says() {
    let mut names = vec!["tiny", "small"];
    match std::env::var_os("CONTRAFLOW_BASE") {
        Some(_) => names.push("base"),
        None => println!("base: skipped without CONTRAFLOW_BASE=1"),
    }
    for name in names {
        for precision in ["f32", "bf16", "fp8"].map(|recipe| format!("precision.recipe={recipe}")) {
            for recompute in ["[]", r#"["norms", "mla-up-projections", "swiglu"]"#] {
                let recompute = format!("memory.recompute={recompute}");
                let (estimate, peak) = estimate_and_peak(name, &[&precision, &recompute]);
                let ratio = estimate as f64 / peak as f64;
                println!("{name}, {precision}, {recompute}: {estimate} planned, {peak} measured, {ratio:.3}");
                assert!((ratio - 1.0).abs() <= MARGIN, "{name}, {precision}, {recompute}: {ratio}");
            }
        }
    }
}

/// Of the GPUs that the published run was made on.
///
/// **Units**: bytes.
const GPU: u64 = 80_000_000_000;

fn published_recipe(changes: &[&str]) -> Recipe {
    let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
    Recipe::load(&RecipeSource::Builtin("deepseek-v3".into()), &changes).unwrap()
}

/// What is changed of the published recipe to see what it saves.
const CHOICES: [&str; 9] = [
    "precision.recipe=f32",
    "precision.recipe=bf16",
    "precision.moments=f32",
    "precision.attention_output=bf16",
    "precision.swiglu_input=bf16",
    "memory.recompute=[]",
    "memory.recompute=[\"mla-up-projections\", \"swiglu\"]",
    "memory.recompute=[\"norms\", \"swiglu\"]",
    "memory.recompute=[\"norms\", \"mla-up-projections\"]",
];

fn published(changes: &[&str]) -> Vec<RankFigures> {
    recipe_figures(&published_recipe(changes)).unwrap()
}

fn largest(ranks: &[RankFigures]) -> u64 {
    ranks.iter().map(|rank| rank.device_bytes).max().unwrap()
}

/// **Units**: 10^9 bytes.
fn gb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

#[test]
fn the_published_run_fits_the_gpus_that_it_was_made_on() {
    let ranks = published(&[]);
    assert_eq!(ranks.len(), 16);
    for rank in ranks {
        assert!(rank.device_bytes <= GPU, "{rank:?}");
    }
}

#[test]
fn the_documented_figures_are_those_of_the_plan() {
    let ranks = published(&[]);
    let of_rank = |rank: &RankFigures| {
        let RankFigures {
            weight_bytes,
            gradient_bytes,
            optimizer_bytes,
            activation_bytes,
            working_bytes,
            ..
        } = *rank;
        let bytes = [
            weight_bytes,
            gradient_bytes,
            optimizer_bytes,
            activation_bytes,
            working_bytes,
            rank.device_bytes,
        ];
        format!("| {} | {} | {} |", rank.rank, rank.layers, bytes.map(gb).join(" | "))
    };
    // The largest rank is so for the gradients that wait at the end of a step, the second for what is kept in its middle.
    let both = |ranks: &[RankFigures]| [largest(ranks), ranks[1].device_bytes];
    let of_choice = |choice: &&str| {
        let all = both(&published(&[*choice])).into_iter().zip(both(&ranks));
        let columns: Vec<String> =
            all.map(|(bytes, now)| format!("{} | {}", gb(bytes), gb(bytes - now))).collect();
        format!("| `{choice}` | {} |", columns.join(" | "))
    };
    let as_it_is = format!("| none | {} | | {} | |", gb(largest(&ranks)), gb(ranks[1].device_bytes));
    let rows = ranks[..8].iter().map(of_rank).chain([as_it_is]).chain(CHOICES.iter().map(of_choice));
    let rows: Vec<String> = rows.collect();
    let documented = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/memory.md")).unwrap();
    let missing: Vec<&String> = rows.iter().filter(|row| !documented.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "docs/memory.md lacks these of its rows:\n{}", rows.join("\n"));
}
