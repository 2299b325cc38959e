//! Validation while a run trains: what is measured, what is kept of it, when it ends a run, and that it changes nothing else.

use serde_json::Value;

use crate::workplace::{Workplace, stderr};

fn records(place: &Workplace, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Steps whose records have a validation loss, with its bits.
fn validated(place: &Workplace, run: &str) -> Vec<(u64, u64)> {
    let loss = |record: &Value| {
        Some((record["step"].as_u64().unwrap(), record.get("validation_loss")?.as_f64().unwrap().to_bits()))
    };
    records(place, run).iter().filter_map(loss).collect()
}

fn summary(place: &Workplace, run: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(place.path(run).join("summary.json")).unwrap()).unwrap()
}

#[test]
fn a_run_is_validated_while_it_trains_and_trains_as_if_it_were_not() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml", "--name", "plain"]);
    place.succeed(&["train", "recipe.toml", "--name", "seen", "--set", "validate.every=5"]);
    assert_eq!(place.curve("runs/seen"), place.curve("runs/plain"), "the same bits");
    assert_eq!(validated(&place, "runs/plain"), []);
    let seen = validated(&place, "runs/seen");
    assert_eq!(seen.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [6, 11], "before these steps");
    // What a run that ends after as many steps measures at its end is the same.
    place.succeed(&["train", "recipe.toml", "--name", "short", "--set", "training.steps=5"]);
    let at_end = summary(&place, "runs/short")["validation_loss"].as_f64().unwrap();
    let on_the_way = f64::from_bits(seen[0].1);
    assert!((at_end - on_the_way).abs() < 1e-12, "{at_end} {on_the_way}");
    assert!(summary(&place, "runs/seen")["validation_loss"].as_f64().unwrap() < on_the_way, "it learns");
}

#[test]
fn a_run_that_resumes_measures_what_the_undisturbed_one_does() {
    let place = Workplace::new();
    let every = ["--set", "validate.every=4", "--set", "checkpoint.every=2"];
    place.succeed(&[&["train", "recipe.toml", "--name", "whole"][..], &every].concat());
    place.succeed(
        &[&["train", "recipe.toml", "--name", "parts", "--set", "training.steps=8"][..], &every].concat(),
    );
    place.succeed(&["train", "--resume", "parts", "--set", "training.steps=12"]);
    assert_eq!(validated(&place, "runs/parts"), validated(&place, "runs/whole"));
    assert_eq!(place.curve("runs/parts"), place.curve("runs/whole"));
    // In another layout too, within rounding.
    let layout = ["--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b"];
    place.succeed(&[&["train", "recipe.toml", "--name", "alone"][..], &every, &layout].concat());
    let (alone, whole) = (validated(&place, "runs/alone"), validated(&place, "runs/whole"));
    assert_eq!(alone.len(), whole.len());
    for ((_, one), (_, other)) in alone.iter().zip(&whole) {
        assert!((f64::from_bits(*one) - f64::from_bits(*other)).abs() < 1e-4);
    }
}

/// A run whose weights stay as they are: no validation is lower than the first.
const STILL: [&str; 14] = [
    "train",
    "recipe.toml",
    "--set",
    "lr.peak=1e-30",
    "--set",
    "optimizer.weight_decay=0",
    "--set",
    "balance.bias_speed=0",
    "--set",
    "validate.every=2",
    "--set",
    "checkpoint.every=1",
    "--set",
    "checkpoint.keep=1",
];

#[test]
fn the_best_checkpoint_is_kept_however_many_are_newer() {
    let place = Workplace::new();
    place.succeed(&STILL);
    let kept = |run: &str| {
        let mut names: Vec<String> = std::fs::read_dir(place.path(run).join("checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(kept("runs/recipe"), ["step-00000002", "step-00000012"]);
    assert_eq!(summary(&place, "runs/recipe")["best_validation_step"], 2);
    // It can be used as any other.
    place.succeed(&["generate", "runs/recipe/checkpoints/step-00000002", "--tokens", "2"]);
    place.succeed(&[&STILL[..], &["--set", "checkpoint.keep_best=false"]].concat());
    assert_eq!(kept("runs/recipe-2"), ["step-00000012"]);
}

#[test]
fn a_run_whose_validation_does_not_improve_ends_early_and_whole() {
    let place = Workplace::new();
    let patient =
        [&STILL[..], &["--set", "validate.patience=2", "--set", "checkpoint.save_model=true"]].concat();
    let output = place.run(&patient);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", stderr(&output));
    // Lowest after 2, not lower after 4 and 6; the step that begins then is the last.
    assert_eq!(validated(&place, "runs/recipe").iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 5, 7]);
    let records = records(&place, "runs/recipe");
    assert_eq!(records.len(), 7);
    assert!(records.iter().all(|record| record["ends_early"] == (record["step"] == 7)), "{records:?}");
    assert!(words.contains("ended before step 12: the validation loss did not improve any more"), "{words}");
    assert!(words.contains(", after step 2: runs/recipe/checkpoints/step-00000002"), "{words}");
    assert_eq!(summary(&place, "runs/recipe")["ended_early"], true);
    assert!(place.path("runs/recipe/model/config.json").is_file());
    let output = place.run(&["train", "--resume"]);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        words.starts_with("nothing to do: runs/recipe has ended after step 7, "),
        "{words} {}",
        stderr(&output)
    );
    place.succeed(&["train", "--resume", "--set", "validate.patience=0"]);
    assert_eq!(place.curve("runs/recipe").len(), 12);
}

#[test]
fn a_run_without_validation_says_so_before_it_begins() {
    let place = Workplace::new();
    let too_few = ["--set", "training.micro_batch_size=4", "--set", "training.validation_sequences=3"];
    let none = ["--set", "training.validation_sequences=0"];
    let note = "no validation: training.validation_sequences is";
    for (set, why) in
        [(&too_few[..], "3, less than a round of 4 (micro_batch_size 4 x expert 1 x data 1)"), (&none, "0")]
    {
        let planned = place.run(&[&["plan", "recipe.toml"][..], set].concat());
        let planned = String::from_utf8_lossy(&planned.stdout).into_owned();
        assert!(planned.contains(&format!("note: {note} {why}\n")), "{planned}");
        let output = place.run(&[&["train", "recipe.toml"][..], set].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("warning: {note} {why}\n")), "{}", stderr(&output));
        assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("{note} {why}\n")));
    }
    let output = place.run(&[&["train", "recipe.toml", "--set", "validate.every=2"][..], &none].concat());
    assert_eq!(output.status.code(), Some(2));
    let words = "validate.every: expected 0 where training.validation_sequences is 0, got 2";
    assert!(stderr(&output).contains(words), "{}", stderr(&output));
}
