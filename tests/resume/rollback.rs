//! The watch sends a run back to its newest checkpoint, past the sequences that led to the spike.

use std::collections::BTreeMap;
use std::io::Read;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::workplace::{Workplace, stderr};

/// Under this learning rate there are losses clearly above the median of four, but not all of them are.
const SPIKES: [&str; 14] = [
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
];

/// To which step each roll-back went, and how many sequences it skipped.
fn returns(stderr: &str) -> Vec<(u64, u64)> {
    let numbers = |line: &str| {
        let (_, rest) = line.split_once("; rolling back to step ")?;
        let (step, rest) = rest.split_once(", skipping ")?;
        let sequences = rest.strip_suffix(" sequences")?;
        Some((step.parse().unwrap(), sequences.parse().unwrap()))
    };
    stderr.lines().filter_map(numbers).collect()
}

#[test]
fn a_spike_takes_the_run_back_to_its_checkpoint_and_past_the_batch() {
    let place = Workplace::new();
    let output = place.run(&SPIKES);
    let stderr = stderr(&output);
    assert!(output.status.success(), "{stderr}");
    let returns = returns(&stderr);
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

#[test]
fn a_roll_back_goes_past_a_checkpoint_that_is_damaged_to_the_one_before() {
    let undisturbed = Workplace::new();
    let before = stderr(&undisturbed.run(&SPIKES));
    // The first to a later step than all before it, which leaves time to damage that checkpoint, and has another one before.
    let all = returns(&before);
    let is_right = |(index, (to, skipped)): &(usize, (u64, u64))| {
        *to >= 8 && *skipped >= 16 && all[..*index].iter().all(|(earlier, _)| earlier < to)
    };
    let (index, (to, skipped)) = all.iter().copied().enumerate().find(is_right).unwrap();
    let place = Workplace::new();
    let mut child = place.start(&SPIKES, "");
    let damaged = place.checkpoint("runs/recipe", to);
    let began = Instant::now();
    while !damaged.join("manifest.json").is_file() {
        assert!(began.elapsed() < Duration::from_secs(120), "no checkpoint of step {to}");
        std::thread::sleep(Duration::from_micros(200));
    }
    // Nothing happens meanwhile.
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    let shard = damaged.join("rank-00001.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(child.wait().unwrap().success(), "{stderr}");
    let warning =
        format!("warning: the checkpoint of step {to} is damaged, the one before it is looked for:");
    assert!(stderr.contains(&warning) && stderr.contains("rank-00001.safetensors"), "{stderr}");
    let (goes_to, skips) = returns(&stderr)[index];
    assert!(goes_to == to - 4 && skips >= skipped + 4 * 8, "{stderr}");
    assert!(place.path(&format!("runs/recipe/checkpoints/damaged-step-{to:08}")).is_dir());
    // Up to there the curve is the same; from there on other sequences make other losses.
    let curves = [&place, &undisturbed].map(|place| place.curve("runs/recipe"));
    assert_eq!(curves[0].iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=60).collect::<Vec<_>>());
    let same = curves[0].iter().zip(&curves[1]).take_while(|(one, other)| one == other).count() as u64;
    assert_eq!(same, to - 4, "{stderr}");
    let manifest =
        std::fs::read_to_string(place.checkpoint("runs/recipe", 60).join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let skipped: u64 = returns(&stderr).into_iter().collect::<BTreeMap<_, _>>().values().sum();
    assert_eq!(manifest["position"]["cursor"].as_u64().unwrap(), 60 * 8 + skipped);
}
