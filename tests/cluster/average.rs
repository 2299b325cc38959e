//! The moving average of the weights: that of the weights of every step to the bit, in every layout and however often a run is
//! interrupted; and a run that keeps one trains as one that does not.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::fabric::{DelayInjection, LocalOptions};
use contraflow_workers::checkpoint::{Checkpoint, Kind};

use crate::lab::{FOUR_RANKS, Lab, ONE_RANK, Setup, layout};
use crate::resume::{BEFORE, checkpoint, commits, run_with, shards};

const DECAY: &str = "training.ema_decay=0.75";
const EVERY_STEP: &str = "checkpoint.every=1";

type Values = BTreeMap<String, Vec<f32>>;

/// All weights of a checkpoint, gate biases included, or their averages.
fn read(dir: &Path, kind: Kind) -> Values {
    let checkpoint = Checkpoint::open(dir).unwrap_or_else(|faults| panic!("{faults}"));
    let records = &checkpoint.records;
    let values = |(name, shape)| (String::from(name), records.read_numbers(kind, name, shape).unwrap());
    records.weights().map(values).collect()
}

/// The average after one more step.
fn follow(average: &mut Values, weights: &Values) {
    assert!(average.keys().eq(weights.keys()) && average.keys().any(|name| name.contains("correction_bias")));
    for (average, weights) in average.values_mut().zip(weights.values()) {
        average.iter_mut().zip(weights).for_each(|(average, weight)| *average += 0.25 * (weight - *average));
    }
}

fn assert_same(found: &Values, expected: &Values, what: &str) {
    for (name, expected) in expected {
        assert!(found[name] == *expected, "{what}: {name}");
    }
}

#[test]
fn it_is_the_average_of_the_weights_of_all_steps_and_changes_no_training() {
    let lab = Lab::new();
    let steps = 2 * BEFORE;
    for recipe in ["precision.recipe=f32", "precision.recipe=bf16"] {
        let folder = |name: &str| lab.path().join(format!("{name}-{recipe}"));
        let (first, with, without, late) =
            (folder("first"), folder("with"), folder("without"), folder("late"));
        run_with(&lab, (&first, FOUR_RANKS), None, BEFORE, &[recipe]);
        let start = checkpoint(&first, BEFORE);
        assert!(
            !Checkpoint::open(&start).unwrap_or_else(|faults| panic!("{faults}")).records.has(Kind::Average)
        );
        let on = |run: &Path, changes: &[&str]| {
            run_with(&lab, (run, FOUR_RANKS), Some(&start), steps, &[&[recipe], changes].concat()).losses()
        };
        let losses = on(&with, &[DECAY, EVERY_STEP]);
        assert_eq!(losses, on(&without, &[]), "{recipe}");
        let weights_without = read(&checkpoint(&without, steps), Kind::Weight);
        assert_same(&read(&checkpoint(&with, steps), Kind::Weight), &weights_without, recipe);
        // A checkpoint without one: it begins with the weights that are there.
        let mut expected = read(&start, Kind::Weight);
        for step in BEFORE + 1..=steps {
            let dir = checkpoint(&with, step);
            follow(&mut expected, &read(&dir, Kind::Weight));
            assert_same(&read(&dir, Kind::Average), &expected, &format!("{recipe}, step {step}"));
        }
        // Whatever comes late.
        let steps_text = format!("training.steps={steps}");
        let setup = lab.setup(FOUR_RANKS, &[recipe, DECAY, EVERY_STEP, &steps_text]);
        let delay_injection = Some(DelayInjection { seed: 1, max_delay: Duration::from_millis(2) });
        let network = LocalOptions { delay_injection, ..setup.network };
        let checkpoints = Some(commits(&late, &setup.recipe));
        let resume = Some(Arc::new(Checkpoint::open(&start).unwrap_or_else(|faults| panic!("{faults}"))));
        lab.run(Setup { network, checkpoints, resume, ..setup }).losses();
        assert!(shards(&checkpoint(&late, steps)) == shards(&checkpoint(&with, steps)), "{recipe}");
    }
}

#[test]
fn it_goes_on_in_every_layout_as_if_nothing_had_happened() {
    let lab = Lab::new();
    let undisturbed = lab.path().join("undisturbed");
    let on = |name: &str, layout, from: &Path| {
        let run = lab.path().join(name);
        run_with(&lab, (&run, layout), Some(from), BEFORE, &[DECAY, EVERY_STEP]).losses();
        checkpoint(&run, BEFORE)
    };
    run_with(&lab, (&undisturbed, FOUR_RANKS), None, BEFORE, &[DECAY, EVERY_STEP]).losses();
    let (before, last) = (checkpoint(&undisturbed, BEFORE - 1), checkpoint(&undisturbed, BEFORE));
    assert!(shards(&on("same", FOUR_RANKS, &before)) == shards(&last));
    for (number, layout) in
        [ONE_RANK, layout("1f1b", (4, 1, 2)), layout("dualpipev", (2, 4, 1))].into_iter().enumerate()
    {
        let found = on(&format!("other-{number}"), layout, &before);
        let mut expected = read(&before, Kind::Average);
        follow(&mut expected, &read(&found, Kind::Weight));
        assert_same(&read(&found, Kind::Average), &expected, &format!("{layout:?}"));
    }
}

#[test]
fn a_fresh_run_begins_with_the_weights_that_it_begins_with() {
    let lab = Lab::new();
    let (source, run) = (lab.path().join("source"), lab.path().join("run"));
    run_with(&lab, (&source, FOUR_RANKS), None, 1, &[]).losses();
    let init = checkpoint(&source, 1);
    let from = format!("model.init={}", init.display());
    run_with(&lab, (&run, FOUR_RANKS), None, 1, &[DECAY, &from]).losses();
    let mut expected = read(&init, Kind::Weight);
    follow(&mut expected, &read(&checkpoint(&run, 1), Kind::Weight));
    assert_same(&read(&checkpoint(&run, 1), Kind::Average), &expected, "after one step");
}
