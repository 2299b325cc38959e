//! Ctrl-C, once and twice, a full disk, and changes between a run and its continuation.

use std::io::{BufRead, BufReader};
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};

use crate::deadline;
use crate::workplace::{Workplace, stderr, wait_for};

fn interrupt(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn rest(mut lines: BufReader<std::process::ChildStderr>) -> String {
    let mut text = String::new();
    std::io::Read::read_to_string(&mut lines, &mut text).unwrap();
    text
}

/// Long enough not to end by itself in a test.
const LONG: [&str; 6] =
    ["train", "recipe.toml", "--set", "training.steps=1000000", "--set", "checkpoint.every=0"];

#[test]
fn an_interrupted_run_saves_its_step_and_resumes_with_the_same_bits() {
    let place = Workplace::new();
    let signals =
        [(Signal::INT, "runs/recipe"), (Signal::TERM, "runs/recipe-2"), (Signal::HUP, "runs/recipe-3")];
    // Whoever runs this test may have started it to outlive a terminal, and so the runs.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let hangs_up = u64::from_str_radix(ignored, 16).unwrap() & 1 == 0;
    for (signal, run) in signals.into_iter().filter(|(signal, _)| *signal != Signal::HUP || hangs_up) {
        let mut child = place.start(&LONG, "");
        let lines = wait_for(&mut child, "step 1/");
        interrupt(&child, signal);
        let stderr = rest(lines);
        assert_eq!(child.wait().unwrap().code(), Some(130), "{stderr}");
        let kept = place.curve(run);
        let step = kept.last().unwrap().0;
        let resume_hint = format!("step {step} is saved, resume with: contraflow train --resume {run}");
        assert!(stderr.contains(&resume_hint), "{stderr}");
        assert!(place.checkpoint(run, step).join("manifest.json").is_file());
        let steps = format!("training.steps={}", step + 5);
        place.succeed(&["train", "--resume", "--set", &steps]);
        let whole = format!("whole-{step}-{run}").replace('/', "-");
        let train =
            ["train", "recipe.toml", "--name", &whole, "--set", &steps, "--set", "checkpoint.every=0"];
        place.succeed(&train);
        assert_eq!(place.curve(run), place.curve(&format!("runs/{whole}")));
        std::fs::remove_dir_all(place.path("runs").join(whole)).unwrap();
    }
}

#[test]
fn a_second_interruption_ends_at_once_and_leaves_the_last_commit() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let before = place.files("runs/recipe/checkpoints");
    let resume = ["train", "--resume", "--set", "training.steps=1000000", "--set", "checkpoint.every=0"];
    // The commit never comes to its end: the first interruption waits for it.
    let mut child = place.start(&resume, "checkpoint.shards-saved=pause");
    let lines = wait_for(&mut child, "step 13/");
    interrupt(&child, Signal::INT);
    let mut lines = lines;
    let mut line = String::new();
    while !line.contains("interrupted: finishing and saving the step") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0);
    }
    interrupt(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let after = place.files("runs/recipe/checkpoints");
    assert!(before.iter().all(|(path, bytes)| after.get(path) == Some(bytes)), "the commits are untouched");
    place.succeed(&["train", "--resume", "--set", "training.steps=14"]);
}

#[test]
fn a_full_disk_ends_the_run_with_the_file_and_leaves_the_last_commit() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let before = place.files("runs/recipe/checkpoints");
    let largest = before.values().map(Vec::len).max().unwrap();
    // Blocks of 512 bytes: room for all but a shard.
    let limit = largest / 2 / 512;
    let script = format!("ulimit -f {limit}; exec \"$0\" train --resume --set training.steps=16");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_contraflow")]).current_dir(place.path(""));
    let output = deadline::output(&mut command);
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("saving step 16") && stderr.contains("rank-0000"), "{stderr}");
    assert!(stderr.contains("File too large"), "{stderr}");
    assert!(
        stderr.contains("step 12 is saved, resume with: contraflow train --resume runs/recipe"),
        "{stderr}"
    );
    assert_eq!(place.files("runs/recipe/checkpoints"), before);
    place.succeed(&["train", "--resume", "--set", "training.steps=16"]);
    place.succeed(&["train", "recipe.toml", "--set", "training.steps=16", "--name", "whole"]);
    assert_eq!(place.curve("runs/recipe"), place.curve("runs/whole"));
}

#[test]
fn a_run_resumes_in_another_layout_and_from_an_earlier_checkpoint_in_a_new_run() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let whole = place.curve("runs/recipe");
    let earlier = place.checkpoint("runs/recipe", 8);
    let branch = ["train", "--resume", earlier.to_str().unwrap()];
    let output = place.run(&[&branch[..], &["--set", "lr.peak=2e-2"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("note: lr.peak was 0.01, is 0.02 from now on"), "{}", stderr(&output));
    assert_eq!(place.curve("runs/recipe"), whole, "the old run is as it was");
    let branched = place.curve("runs/recipe-2");
    assert_eq!(branched[..9], whole[..9], "the first new step is made of the old weights");
    assert_ne!(branched[9..], whole[9..]);
    let layout =
        ["--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b", "--set", "parallel.expert=2"];
    place.succeed(
        &[&["train", "--resume", "runs/recipe", "--set", "training.steps=14"][..], &layout].concat(),
    );
    assert_eq!(place.curve("runs/recipe")[..12], whole[..]);
    assert_eq!(place.curve("runs/recipe").len(), 14);
}

#[test]
fn an_interrupted_run_can_be_measured_and_handed_on_from_its_checkpoint() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml", "--set", "checkpoint.save_model=true"]);
    place.succeed(&["export", "runs/recipe", "--to", "finished"]);
    std::fs::remove_dir_all(place.path("runs/recipe/model")).unwrap();
    place.succeed(&["export", "runs/recipe", "--to", "kept"]);
    assert_eq!(
        place.files("finished").into_values().collect::<Vec<_>>(),
        place.files("kept").into_values().collect::<Vec<_>>()
    );
    place.succeed(&["generate", "runs/recipe", "--tokens", "4"]);
    place.succeed(&["train", "recipe.toml", "--init", "runs/recipe", "--set", "training.steps=1"]);
}
