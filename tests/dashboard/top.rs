//! `contraflow top` as a script runs it: one frame of a run that trains, of a cluster, and through TLS.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use crate::browser::{PATIENCE, PROGRAM, Running};
use crate::{serve, shown};

/// One frame, without whatever the environment says.
fn top(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg("top").args(args).current_dir(dir).env("LANG", "C.UTF-8");
    let variables = [
        "LC_ALL",
        "LC_CTYPE",
        "CONTRAFLOW_DASHBOARD",
        "CONTRAFLOW_DASHBOARD_TOKEN",
        "CONTRAFLOW_TOKEN",
        "CONTRAFLOW_TLS",
    ];
    for name in variables {
        command.env_remove(name);
    }
    command.output().unwrap()
}

/// The same, that has to succeed.
fn frame(dir: &Path, args: &[&str]) -> String {
    let output = top(dir, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(dir: &Path, args: &[&str]) -> (i32, String) {
    let output = top(dir, args);
    assert!(output.stdout.is_empty());
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_run_that_trains_is_shown_with_its_name_its_step_and_its_loss() {
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "train",
        "--name",
        "seen",
        "--dashboard",
        "127.0.0.1:0",
        "--set",
        "training.steps=100000",
        "--set",
        "training.sequence_length=64",
    ];
    let run = Running::start(dir.path(), &args);
    let url = run.said("dashboard: ");
    let begun = Instant::now();
    // It has no step while its ranks are brought up.
    let text = loop {
        let text = frame(dir.path(), &["--once", "--url", &url]);
        if text.contains("nats/token") {
            break text;
        }
        assert!(begun.elapsed() < PATIENCE, "{text}");
    };
    let first = text.lines().next().unwrap();
    let words: Vec<&str> = first.split_whitespace().collect();
    let [name, phase, "step", step, ..] = words[..] else { panic!("{first}") };
    let (step, steps) = step.split_once('/').unwrap();
    assert_eq!((name, phase, steps), ("seen", "training", "100000"), "{text}");
    assert!(step.parse::<u64>().unwrap() >= 1, "{text}");
    let loss = text.lines().find(|line| line.starts_with("Loss")).unwrap();
    // Of bytes that are told apart by chance alone: ln 256.
    let value: f64 = loss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((value - 256_f64.ln()).abs() < 0.5, "{loss}");
    assert!(
        text.contains("pipeline 2 x expert 2 x data 1, dualpipe") && text.contains("recorded in step"),
        "{text}"
    );
}

#[test]
fn runs_are_listed_where_there_are_several_and_one_that_is_not_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dashboard = serve(vec![shown(3)], "127.0.0.1:0", Some("0123456789abcdef"));
    let url = dashboard.url();
    let token = ["--url", &url, "--dashboard-token", "0123456789abcdef"];
    let alone = frame(dir.path(), &token);
    assert!(
        alone.starts_with("tiny  training  step 3/720") && alone.contains("Loss  6.000 → 2.000"),
        "{alone}"
    );
    assert!(alone.contains("MaxVio 1.00, most in layer 1: 1.00"), "{alone}");
    let (code, words) = refused(dir.path(), &[&["another"][..], &token].concat());
    assert!(code == 2 && words.contains("got \"another\""), "{words}");
    let (code, words) = refused(dir.path(), &["--url", &url]);
    assert!(code == 2 && words.contains("token: expected the dashboard's"), "{words}");
    drop(dashboard);
    let (code, words) = refused(dir.path(), &token);
    assert!(code == 1 && words.contains("expected the dashboard of a run or an orchestrator"), "{words}");
}

#[test]
fn the_jobs_of_a_cluster_are_shown_through_tls_to_whoever_has_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(PROGRAM).args(args).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["certs", "init", "--dir", "certs"]);
    let issued = run(&["certs", "issue", "--dir", "certs", "--name", "ann", "--role", "submit"]);
    let token = issued.trim();
    let state = [
        "orchestrator",
        "--state",
        "state",
        "--listen",
        "127.0.0.1:0",
        "--tls",
        "certs",
        "--dashboard",
        "127.0.0.1:0",
    ];
    let orchestrator = Running::start(dir.path(), &state);
    let join = orchestrator.said("orchestrator at ");
    let url = orchestrator.said("dashboard: ");
    let access = ["--tls", "certs/ann", "--token", token];
    let listed = |args: &[&str]| frame(dir.path(), &[&["--url", &url][..], &access, args].concat());
    assert!(listed(&[]).starts_with(&format!("0 jobs  {url}\n")), "{}", listed(&[]));
    run(&[&["submit", "tiny", "--name", "night", "--orchestrator", &join][..], &access].concat());
    run(&[&["submit", "tiny", "--name", "day", "--orchestrator", &join][..], &access].concat());
    let jobs = listed(&[]);
    let rows: Vec<Vec<&str>> = jobs.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows, [["job-2", "day", "queued", "0/720"], ["job-1", "night", "queued", "0/720"]], "{jobs}");
    // By id and by name.
    for job in ["job-1", "night"] {
        let text = listed(&[job]);
        assert!(text.starts_with("night · job-1  queued  step 0/720"), "{text}");
        assert!(text.contains("waits for: needs 4 ranks"), "{text}");
        assert!(text.contains("no places yet") && text.contains("Incidents: none"), "{text}");
    }
    let (code, words) = refused(dir.path(), &["--url", &url, "--tls", "certs/ann"]);
    assert!(code == 2 && words.contains("token"), "{words}");
    let (code, words) = refused(dir.path(), &[&["job-9", "--url", &url][..], &access].concat());
    assert!(code == 2 && words.contains("job-9"), "{words}");
}
