//! A run resumed from a checkpoint: the same bits in the same layout, the same samples and all but the same losses in
//! any other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use contraflow_runtime::checkpoint::{CheckpointFolder, Manifest};
use contraflow_runtime::recipe::Recipe;
use contraflow_workers::checkpoint::provenance::{companions, manifest};
use contraflow_workers::checkpoint::{Checkpoint, Kind};
use contraflow_workers::data::Tokenizer;

use crate::lab::{FOUR_RANKS, Finished, Lab, Layout, ONE_RANK, Setup, layout};

/// Steps before the checkpoint that runs resume from.
pub const BEFORE: u64 = 3;

/// Keeps checkpoints in a run's folder.
pub fn commits(run: &Path, recipe: &Recipe) -> Commits {
    // A run makes its folder before it trains.
    std::fs::create_dir_all(run).unwrap();
    let manifest = manifest(recipe, "").unwrap();
    Commits {
        folder: CheckpointFolder::of_run(run),
        keep: 3,
        manifest,
        companions: companions(recipe, &Tokenizer::Bytes),
    }
}

/// Runs a layout to `steps`, from a checkpoint if one is given, keeping checkpoints in `run`.
fn run(lab: &Lab, at: (&Path, Layout), from: Option<&Path>, steps: u64) -> Finished {
    run_with(lab, at, from, steps, &[])
}

/// The same with changes to the recipe.
pub fn run_with(
    lab: &Lab,
    (run, layout): (&Path, Layout),
    from: Option<&Path>,
    steps: u64,
    changes: &[&str],
) -> Finished {
    let (steps, every) = (format!("training.steps={steps}"), format!("checkpoint.every={BEFORE}"));
    let setup = lab.setup(layout, &[&[steps.as_str(), every.as_str()], changes].concat());
    let checkpoints = Some(commits(run, &setup.recipe));
    let resume = from.map(|dir| Arc::new(Checkpoint::open(dir).unwrap_or_else(|faults| panic!("{faults}"))));
    lab.run(Setup { resume, checkpoints, ..setup })
}

/// The folder of a step's checkpoint.
pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    CheckpointFolder::of_run(run).committed(step)
}

/// Every number of a step.
fn bits(record: &StepRecord) -> [u64; 5] {
    [record.loss, record.mtp_loss.unwrap(), record.balance_loss, record.grad_norm, mean_max_vio(record)]
        .map(f64::to_bits)
}

/// Files of a checkpoint, without the manifest: it also holds the number of steps that the recipe asks for.
pub fn shards(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let shards = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    shards
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

#[test]
fn half_a_run_and_the_rest_are_the_whole_run_bit_for_bit() {
    let lab = Lab::new();
    let layouts = [
        ONE_RANK,
        FOUR_RANKS,
        layout("dualpipev", (2, 1, 2)),
        layout("1f1b", (4, 1, 1)),
        layout("1f1b", (2, 2, 2)),
    ];
    for (number, at) in layouts.into_iter().enumerate() {
        assert_rest_is_as_undisturbed(&lab, at, &number.to_string(), &[]);
    }
}

/// A run that goes on from a checkpoint halfway ends as one that went through.
pub fn assert_rest_is_as_undisturbed(lab: &Lab, at: Layout, name: &str, changes: &[&str]) {
    let run = |dir: &Path, from: Option<&Path>, steps: u64| run_with(lab, (dir, at), from, steps, changes);
    let (whole, half) = (lab.path().join(format!("whole-{name}")), lab.path().join(format!("half-{name}")));
    let expected = run(&whole, None, 2 * BEFORE);
    assert_eq!(expected.losses().len() as u64, 2 * BEFORE);
    let first = run(&half, None, BEFORE);
    let rest = run(&half, Some(&checkpoint(&half, BEFORE)), 2 * BEFORE);
    let steps: Vec<u64> = rest.records.iter().map(|record| record.step).collect();
    assert_eq!(steps, (BEFORE + 1..=2 * BEFORE).collect::<Vec<_>>());
    let both = first.records.iter().chain(&rest.records).map(bits);
    assert!(both.eq(expected.records.iter().map(bits)), "{at:?}");
    let last = |run: &Path| checkpoint(run, 2 * BEFORE);
    assert!(
        shards(&last(&whole)) == shards(&last(&half)),
        "{at:?}: weights, moments, biases or counts differ"
    );
    let position = |run: &Path| Manifest::read(&last(run)).unwrap().position;
    assert_eq!(position(&whole), position(&half));
}

/// Steps that a changed layout is followed for.
const AFTER: u64 = 21;

/// Losses of a continued run against those of the undisturbed one: the first within rounding, the others within what
/// rounding grows to.
fn assert_agrees(expected: &[f64], got: &[f64], what: &str) {
    assert_eq!(expected.len(), got.len(), "{what}");
    for (index, (&expected, &got)) in expected.iter().zip(got).enumerate() {
        let tolerance = if index == 0 { 1e-5 } else { 1e-3 };
        let distance = ((got - expected) / expected).abs();
        assert!(distance <= tolerance, "{what}, step {} after the change: {got} for {expected}", index + 1);
    }
}

#[test]
fn every_layout_resumes_from_any_other() {
    let lab = Lab::new();
    let mut layouts = vec![];
    for pipeline in [1, 2, 4] {
        for expert in [1, 2] {
            for data in [1, 2] {
                for schedule in ["dualpipe", "dualpipev", "1f1b"] {
                    // DualPipe needs a mirror for every rank.
                    if schedule != "dualpipe" || pipeline > 1 {
                        layouts.push(layout(schedule, (pipeline, expert, data)));
                    }
                }
            }
        }
    }
    let steps = BEFORE + AFTER;
    let reference = lab.path().join("reference");
    let expected = run(&lab, (&reference, FOUR_RANKS), None, BEFORE).losses();
    let from = checkpoint(&reference, BEFORE);
    let onward = run(&lab, (&lab.path().join("onward"), FOUR_RANKS), Some(&from), steps).losses();
    for at in layouts {
        let name = format!("{}-{}-{}-{}", at.schedule, at.pipeline, at.expert, at.data);
        let there = run(&lab, (&lab.path().join(&name), at), Some(&from), steps);
        assert_agrees(&onward, &there.losses(), &format!("into {name}"));
        // And back: the layout's own first steps, continued by the reference.
        let own = lab.path().join(format!("{name}-own"));
        let first = run(&lab, (&own, at), None, BEFORE).losses();
        assert_agrees(&expected[..1], &first[..1], &format!("{name} from the start"));
        let back = run(
            &lab,
            (&lab.path().join(format!("{name}-back")), FOUR_RANKS),
            Some(&checkpoint(&own, BEFORE)),
            steps,
        );
        assert_agrees(&onward, &back.losses(), &format!("out of {name}"));
        std::fs::remove_dir_all(own).unwrap();
    }
}

#[test]
fn a_checkpoint_holds_each_value_once_and_those_of_the_exported_model() {
    let lab = Lab::new();
    let (dir, export) = (lab.path().join("run"), lab.path().join("model"));
    std::fs::create_dir(&export).unwrap();
    let setup = lab.setup(FOUR_RANKS, &["training.steps=2"]);
    let checkpoints = Some(commits(&dir, &setup.recipe));
    let finished = lab.run(Setup { checkpoints, export_dir: Some(export.clone()), ..setup });
    assert!(matches!(finished.outcome, Outcome::Done { .. }));
    let checkpoint = Checkpoint::open(&checkpoint(&dir, 2)).unwrap_or_else(|faults| panic!("{faults}"));
    let published = contraflow_workers::hf::weights::HfWeights::open(&export).unwrap();
    let mut num_values = 0;
    for (name, shape) in checkpoint.records.weights() {
        let weight = checkpoint.records.read_numbers(Kind::Weight, name, shape).unwrap();
        assert!(weight == published.read(name, shape).unwrap(), "{name}");
        num_values += weight.len();
    }
    // The published files hold two copies for the MTP layer beside.
    let shared = 2 * 264 * 32;
    let published_values: usize =
        published.names().map(|name| published.info(name).unwrap().0.iter().product::<usize>()).sum();
    assert_eq!(num_values + shared, published_values);
    // Sixteen sequences of six tokens, each to two experts, in two steps; MTP rows too.
    let counts =
        checkpoint.records.read_counts("model.layers.3.mlp.gate.e_score_correction_bias", 8).unwrap();
    assert_eq!(counts.iter().sum::<u64>(), 2 * 16 * 6 * 2);
}
