//! A run does not grow: what a step takes it gives back. A rank takes what the plan says, and the published run fits its GPUs. In a
//! process of its own, whose memory is the run's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow::local::{LocalCluster, LocalClusterSpec};
use contraflow_kernels::pool;
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::RankFigures;
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::engine::probe::Probe;

/// Resident memory of this process.
///
/// **Units**: bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kibibytes
}

/// Resident bytes after each step of the default recipe on short sequences, in some layout.
fn train(layout: &[&str], steps: usize) -> Vec<u64> {
    let mut changes: Vec<String> = layout.iter().map(|&change| change.to_owned()).collect();
    changes.push(format!("training.steps={steps}"));
    changes.push("training.sequence_length=32".into());
    run("tiny", &changes, resident_bytes).1
}

/// What `measure` says after each step of a built-in recipe on noise; and the recipe.
fn run(
    name: &str,
    changes: &[String],
    measure: impl Fn() -> u64 + Send + 'static,
) -> (Arc<Recipe>, Vec<u64>) {
    let changes = [changes, &["checkpoint.save_model=false".to_owned()]].concat();
    let recipe = Arc::new(Recipe::load(&RecipeSource::Builtin(name.into()), &changes).unwrap());
    let text: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let packed =
        PackedDataset::pack(&[Document { name: "noise".into(), text }], recipe.training.sequence_length);
    let datasets = Arc::new(Datasets { train: packed.clone(), validation: packed });
    let measured: Arc<Mutex<Vec<u64>>> = Arc::default();
    let after_step = measured.clone();
    let subscriber: Subscriber = Box::new(move |_: &StepRecord| after_step.lock().unwrap().push(measure()));
    let spec = LocalClusterSpec {
        recipe: recipe.clone(),
        datasets,
        generation: Generation::FIRST,
        peak_flops: None,
        resume: None,
        checkpoints: None,
        export_dir: None,
        network: LocalOptions::default(),
        overlap: true,
        probe: Probe::default(),
        subscribers: vec![subscriber],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(async {
        let cluster = LocalCluster::start(spec).await.unwrap();
        tokio::time::timeout(Duration::from_secs(300), cluster.wait()).await.expect("the run hangs")
    });
    assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    (recipe, std::mem::take(&mut *measured.lock().unwrap()))
}

/// What `contraflow plan` says of a rank, and what the tensors of one have held at most in a step: the larger over the smaller.
fn estimate_and_peak(name: &str, changes: &[&str]) -> (u64, u64) {
    let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.data=1", "parallel.schedule=1f1b"];
    let few = ["training.steps=3", "training.validation_sequences=0", "parallel.threads_per_rank=1"];
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
    for name in ["tiny", "small"] {
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

#[test]
fn memory_does_not_grow_over_the_steps() {
    let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];
    // One rank does the same in every step but for the number of rows of an expert. Ranks that share the cores are now
    // and then all at their peak at once: their high water comes later and depends on chance.
    for (layout, early, late, bound) in [(&alone[..], 3, 12, 1.01), (&[][..], 12, 30, 1.05)] {
        let measured = train(layout, late);
        let growth = measured[late - 1] as f64 / measured[early - 1] as f64;
        assert!(growth < bound, "{growth} from step {early} to {late}, resident bytes by step: {measured:?}");
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
