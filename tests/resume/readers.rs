//! Whoever reads a run's output may go away, and the terminal may be lost: neither costs the run.

use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::deadline;
use crate::workplace::{Workplace, wait_for};

#[test]
fn a_run_ends_well_though_nobody_reads_what_it_says() {
    let place = Workplace::new();
    for readers in ["stderr", "both"] {
        let mut command = place.command(&[
            "train",
            "recipe.toml",
            "--name",
            readers,
            "--set",
            "checkpoint.save_model=true",
            "--set",
            "log.level=debug",
        ]);
        let mut child = deadline::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        drop(child.stderr.take());
        if readers == "both" {
            drop(child.stdout.take());
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{readers}");
        let run = place.path("runs").join(readers);
        for file in ["summary.json", "model/config.json", "checkpoints/step-00000012/manifest.json"] {
            assert!(run.join(file).is_file(), "{readers}: {file}");
        }
        assert_eq!(place.curve(&format!("runs/{readers}")).len(), 12);
    }
}

#[test]
fn a_run_that_was_started_to_outlive_its_terminal_does() {
    let place = Workplace::new();
    let script = "trap '' HUP; exec \"$0\" train recipe.toml --set training.steps=200";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_contraflow")]).current_dir(place.path(""));
    let mut child = deadline::spawn(command.stdout(Stdio::null()).stderr(Stdio::piped()));
    let _rest = wait_for(&mut child, "step 1/");
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(place.curve("runs/recipe").len(), 200);
}

#[test]
fn what_goes_into_a_file_has_no_colours() {
    let place = Workplace::new();
    let mut command = place.command(&["train", "recipe.toml", "--set", "log.level=debug"]);
    let output = deadline::output(command.env_remove("NO_COLOR"));
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("step done") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_measurement_says_how_long_it_is_and_takes_as_many_sequences_as_are_wanted() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml", "--set", "checkpoint.save_model=true"]);
    let measure = |more: &[&str]| {
        let output = place.run(&[&["eval", "--data", "text.txt", "--format", "json"][..], more].concat());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (String::from_utf8_lossy(&output.stderr).into_owned(), report)
    };
    let (said, all) = measure(&[]);
    let sequences = all["sequences"].as_u64().unwrap();
    assert!(sequences > 5 && said == format!("measuring {sequences} sequences\n"), "{said}");
    let (said, some) = measure(&["--sequences", "5"]);
    assert_eq!((said.as_str(), &some["sequences"]), ("measuring 5 sequences\n", &5.into()));
    // Evenly spread over a text that repeats itself, a few say nearly the same as all.
    let difference = some["loss"].as_f64().unwrap() - all["loss"].as_f64().unwrap();
    assert!(difference.abs() < 0.3, "{all} {some}");
}
