//! SIGKILL, at every named place of a commit and at seeded moments.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::workplace::{Workplace, stderr};

const SIGKILL: i32 = 9;

/// Every failpoint on the way of a commit.
const FAILPOINTS: [&str; 12] = [
    "checkpoint.write-begins",
    "checkpoint.folder-made",
    "checkpoint.shard-begins",
    "checkpoint.shard-half-written",
    "checkpoint.shard-written",
    "checkpoint.shard-synced",
    "checkpoint.shards-saved",
    "checkpoint.manifest-begins",
    "checkpoint.manifest-synced",
    "checkpoint.renamed",
    "checkpoint.committed",
    "checkpoint.dropped",
];

/// The failpoints that the sources name: the list above must hold all of them.
fn failpoints_in_the_sources() -> Vec<String> {
    let mut names = Vec::new();
    for file in [
        "runtime/src/checkpoint/folder.rs",
        "workers/src/checkpoint/shard.rs",
        "workers/src/rank/checkpointer.rs",
    ] {
        let text = std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let calls = text.split("failpoint(\"").skip(1);
        names.extend(calls.map(|rest| rest.split('"').next().unwrap().to_owned()));
    }
    names
}

#[test]
fn a_run_killed_at_any_point_of_a_commit_resumes_with_the_same_bits() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml", "--name", "whole"]);
    let whole = place.curve("runs/whole");
    assert_eq!(whole.len(), 12);
    let mut named = failpoints_in_the_sources();
    named.sort();
    let mut known = FAILPOINTS;
    known.sort_unstable();
    assert_eq!(named, known);
    for name in FAILPOINTS {
        // Two commits stand and are kept; the third is the one that dies, and the first to drop one.
        let run = name.replace('.', "-");
        place.succeed(&["train", "recipe.toml", "--name", &run, "--set", "training.steps=8"]);
        let run = format!("runs/{run}");
        let resume = ["train", "--resume", &run, "--set", "training.steps=12"];
        let output = place.start(&resume, &format!("{name}=return")).wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(SIGKILL), "{name}: {}", stderr(&output));
        assert!(place.checkpoint(&run, 8).is_dir(), "{name}: what was committed stands");
        place.succeed(&resume);
        assert_eq!(place.curve(&run), whole, "{name}");
        let left = std::fs::read_dir(place.path(&run).join("checkpoints")).unwrap();
        assert_eq!(left.count(), 2, "{name}: two committed ones, and nothing unfinished");
    }
}

/// Kills of one run, each at another moment of its start, its steps or its commits.
const KILLS: u64 = 50;

#[test]
fn a_run_killed_at_fifty_seeded_moments_resumes_with_the_same_bits() {
    let place = Workplace::new();
    let steps = "training.steps=400";
    let each = "checkpoint.every=3";
    place.succeed(&[
        "train",
        "recipe.toml",
        "--name",
        "whole",
        "--set",
        steps,
        "--set",
        "checkpoint.every=0",
    ]);
    let train = ["train", "recipe.toml", "--name", "killed", "--set", steps, "--set", each];
    let resume = ["train", "--resume", "runs/killed", "--set", steps];
    let mut random = 20_261_124_u64;
    let (mut num_killed, mut num_resumed) = (0, 0);
    let committed = || {
        std::fs::read_dir(place.path("runs/killed/checkpoints"))
            .is_ok_and(|entries| entries.into_iter().any(|entry| entry.unwrap().path().extension().is_none()))
    };
    for kill in 0..KILLS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let begun = committed();
        num_resumed += u64::from(begun);
        let lines = || {
            std::fs::read_to_string(place.path("runs/killed/metrics.jsonl"))
                .unwrap_or_default()
                .lines()
                .count()
        };
        let before = lines();
        let mut child = place.start(if begun { &resume } else { &train }, "");
        // From its first step on, so that every kill hits a running run, before or after a commit; a finished run is not killed.
        let steps = 1 + (random >> 24) as usize % 6;
        // A busy machine lets checkpoints wait: every other kill waits for the first of them.
        let is_early = || lines() < before + steps || (kill % 2 == 1 && !committed());
        let begins = std::time::Instant::now();
        while is_early() && child.try_wait().unwrap().is_none() {
            assert!(begins.elapsed() < Duration::from_secs(60), "no {steps} steps within a minute");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros((random >> 33) % 60_000));
        drop(child.kill());
        let output = child.wait_with_output().unwrap();
        num_killed += u64::from(output.status.signal() == Some(SIGKILL));
        assert!(output.status.success() || output.status.signal() == Some(SIGKILL), "{}", stderr(&output));
        // Killed before its first commit a run has nothing to resume from: it starts from scratch.
        if !committed() {
            std::fs::remove_dir_all(place.path("runs/killed")).unwrap();
        }
    }
    assert!(num_killed >= KILLS * 9 / 10, "the run was over after {num_killed} kills");
    assert!(num_resumed >= KILLS / 2, "{num_resumed} of {KILLS} kills hit a run that had a checkpoint");
    place.succeed(&resume);
    assert_eq!(place.curve("runs/killed"), place.curve("runs/whole"));
}
