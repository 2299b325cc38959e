//! The watch sends a run back to its newest checkpoint, past the sequences that led to the spike.

use std::collections::BTreeMap;

use crate::workplace::{Workplace, stderr};

#[test]
fn a_spike_takes_the_run_back_to_its_checkpoint_and_past_the_batch() {
    let place = Workplace::new();
    // Under this learning rate there are losses clearly above the median of four, but not all of them are.
    let output = place.run(&[
        "train",
        "recipe.toml",
        "--set",
        "training.steps=60",
        "--set",
        "lr.peak=5e-2",
        "--set",
        "watch.on_spike=rollback",
        "--set",
        "watch.spike_window=4",
        "--set",
        "watch.spike_factor=5",
        "--set",
        "watch.max_skips=100",
    ]);
    let stderr = stderr(&output);
    assert!(output.status.success(), "{stderr}");
    let returns: Vec<(u64, u64)> = stderr
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once("; rolling back to step ")?;
            let (step, rest) = rest.split_once(", skipping ")?;
            let sequences = rest.strip_suffix(" sequences")?;
            Some((step.parse().unwrap(), sequences.parse().unwrap()))
        })
        .collect();
    assert!(!returns.is_empty(), "{stderr}");
    for (step, sequences) in &returns {
        assert!(step % 4 == 0 && *sequences > 0 && sequences % 8 == 0, "{returns:?}");
    }
    let steps: Vec<u64> = place.curve("runs/recipe").iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=60).collect::<Vec<_>>(), "every step is reported once");
    let manifest =
        std::fs::read_to_string(place.checkpoint("runs/recipe", 60).join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    // What the last return to a step says is skipped, beside the steps that count.
    let skipped: u64 = returns.iter().copied().collect::<BTreeMap<_, _>>().values().sum();
    assert_eq!(manifest["position"]["cursor"].as_u64().unwrap(), 60 * 8 + skipped);
}

#[test]
fn a_run_that_diverges_before_its_first_checkpoint_says_that_there_is_none() {
    let place = Workplace::new();
    let output =
        place.run(&["train", "recipe.toml", "--set", "lr.peak=1e30", "--set", "watch.on_nan=rollback"]);
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("there is no checkpoint to roll back to"), "{stderr}");
    assert!(place.path("runs/recipe/evidence.json").is_file());
}
