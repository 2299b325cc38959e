//! What the commands say, word for word: help, lists, plans and refusals. The cases stand in `tests/cmd`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/deadline.rs"]
mod deadline;

use std::process::Command;

use contraflow_runtime::recipe::builtin;

#[test]
fn commands_say_what_they_should() {
    trycmd::TestCases::new().timeout(deadline::DEADLINE).case("tests/cmd/*.trycmd");
}

#[test]
fn every_built_in_recipe_has_a_sound_plan() {
    for name in builtin::recipe_names() {
        let output = deadline::output(
            Command::new(env!("CARGO_BIN_EXE_contraflow")).args(["plan", name, "--format", "json"]),
        );
        assert!(output.status.success(), "{name}: {output:?}");
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let ranks = plan["ranks"].as_array().unwrap().len();
        assert_eq!(plan["layout"]["pipeline"], ranks, "{name}");
        assert_eq!(plan["per_rank"].as_array().unwrap().len(), ranks, "{name}");
        assert_eq!(plan["checked"][0]["purpose"], "training", "{name}");
        assert_eq!(plan["checked"][1]["purpose"], "validation", "{name}");
    }
}

#[test]
fn a_refused_run_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let refused: [&[&str]; 4] = [
        &["train", "--set", "parallel.expert=3"],
        &["train", "--set", "parallel.pipeline=3"],
        &["train", "--data", "missing.txt"],
        &["train", "missing.toml"],
    ];
    for arguments in refused {
        let output = deadline::output(
            Command::new(env!("CARGO_BIN_EXE_contraflow")).args(arguments).current_dir(folder.path()),
        );
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && output.stderr.starts_with(b"error: "), "{arguments:?}");
        assert_eq!(folder.path().read_dir().unwrap().count(), 0, "{arguments:?}");
    }
}

#[test]
fn a_reader_that_has_read_enough_is_no_failure() {
    let mut child = deadline::spawn(
        Command::new(env!("CARGO_BIN_EXE_contraflow"))
            .args(["plan", "--schedule", "dualpipe", "--pipeline", "32", "--micro-batches", "512"])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped()),
    );
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
