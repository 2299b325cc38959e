//! The exact output of commands: help, lists, plans and refusals. The cases stand in `tests/cmd`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/deadline.rs"]
mod deadline;

use std::process::Command;

use contraflow_runtime::recipe::builtin;

#[test]
fn the_output_of_commands_is_as_recorded() {
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
        // Behind every size that the batch grows to.
        let last = plan["checked"].as_array().unwrap().last().unwrap();
        assert_eq!(last["purpose"], "validation", "{name}");
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

/// Small, so that its figures say little; that both ways come to the same bits is said by any run.
#[test]
fn the_update_is_measured_with_and_without_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let output = deadline::output(
        Command::new(env!("CARGO_BIN_EXE_contraflow"))
            .args(["bench", "update", "--rounds", "1", "--steps", "1", "--format", "json"])
            .current_dir(folder.path()),
    );
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["measured_steps"], 1);
    for (world, axes) in [("two_processes", [2, 1]), ("four_processes", [2, 2])] {
        let of_world = &report[world];
        assert_eq!(["pipeline", "expert"].map(|axis| &of_world["axes"][axis]), axes, "{report}");
        let equal = ["losses_and_norms_equal", "weights_equal"].map(|what| &of_world[what]);
        assert_eq!(equal, [true, true], "{report}");
    }
    for way in ["with_overlap", "without_overlap"] {
        let figure = |name: &str| report["two_processes"][way][name].as_f64().unwrap();
        for (exposed, step) in
            [("exposed_communication_ms", "step_ms"), ("walk_exposed_communication_ms", "walk_step_ms")]
        {
            let (exposed, step) = (figure(exposed), figure(step));
            assert!(0.0 < exposed && exposed < step, "{way}: {report}");
        }
    }
    assert_eq!(folder.path().join("runs").read_dir().unwrap().count(), 0, "something was left behind");
}

/// How much is exposed is for idle machines to say; that the figures fit each other is said by any.
#[test]
fn overlap_is_measured_beside_its_prediction() {
    let output = deadline::output(Command::new(env!("CARGO_BIN_EXE_contraflow")).args([
        "bench",
        "overlap",
        "--ratios",
        "1",
        "--sequences",
        "1",
        "--steps",
        "1",
        "--format",
        "json",
    ]));
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let [row] = report["rows"].as_array().unwrap().as_slice() else {
        panic!("expected one row, got {report}")
    };
    let figure = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report}"));
    assert_eq!(figure("ratio"), 1.0);
    assert!(figure("compute_s") < figure("overlap_s"), "{report}");
    let shares = [figure("exposed_share"), figure("exposed_in_pairs")];
    assert!(shares.into_iter().all(|share| (0.0..1.0).contains(&share)), "{report}");
    // Nothing beside the exchanges: on the clock their links come on top of the computations.
    assert!(figure("predicted_no_overlap_s") > figure("predicted_s"), "{report}");
    let is_void = figure("no_overlap_exposed") < 0.8 || figure("stretched") > 1.25;
    assert_eq!(row["void"], is_void, "{report}");
}
