//! What is on record of a job does not depend on where it ran: one recipe trains in one process and in a cluster, and both
//! leave the same step records, the same evidence and the same notes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::cluster::{Cluster, JOB, until};

/// Fields that hold a time, or follow from one.
const TIMES: [&str; 5] = ["seconds", "bubble_share", "tokens_per_second", "mfu", "unix_ms"];

/// Runs [`JOB`] with changes in one process, in the folder of the cluster: exit code and stderr.
fn train(cluster: &Cluster, name: &str, changes: &[&str]) -> (i32, String) {
    let mut arguments = vec!["train", "tiny", "--name", name];
    for change in JOB.iter().chain(changes) {
        arguments.extend(["--set", change]);
    }
    let (code, _, stderr) = cluster.run(&arguments);
    (code, stderr)
}

/// The lines of metrics.jsonl that a run in one process has left.
fn metrics(cluster: &Cluster, run: &str) -> Vec<Value> {
    let path = cluster.path().join("runs").join(run).join("metrics.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A record without its times, which are positive numbers, and the names of all fields.
fn split(record: &Value) -> (Value, BTreeSet<String>) {
    let mut record = record.clone();
    let fields = record.as_object().unwrap().keys().cloned().collect();
    for name in TIMES {
        let time = record.as_object_mut().unwrap().remove(name);
        let time = time.unwrap_or_else(|| panic!("expected the field {name} in {record}"));
        let is_positive = time.as_f64().is_some_and(|time| time > 0.0 || name == "bubble_share");
        assert!(is_positive, "{name}: expected a positive number, got {time}");
    }
    (record, fields)
}

fn assert_same_records(in_cluster: &[Value], in_process: &[Value]) {
    assert_eq!(in_cluster.len(), in_process.len());
    for (here, there) in in_cluster.iter().zip(in_process) {
        assert_eq!(split(here), split(there));
    }
}

/// The outcome of a failed job, as its status shows it.
fn failed(cluster: &Cluster, job: &str) -> String {
    until("the end of the job", || {
        let status = cluster.status(job)?;
        assert_ne!(status["state"], "done", "{status}");
        (status["state"] == "failed").then(|| status["outcome"].as_str().unwrap().to_owned())
    })
}

fn log(cluster: &Cluster, job: &str) -> String {
    let (code, log, stderr) = cluster.run(&["logs", job]);
    assert_eq!(code, 0, "{stderr}");
    log
}

#[test]
fn one_recipe_gives_the_same_step_records_in_one_process_and_in_a_cluster() {
    let cluster = Cluster::start(4);
    // Gate biases that move further than any score: experts starve, and the second step already warns.
    let changes = ["training.steps=8", "balance.bias_speed=100", "watch.collapse_steps=1"];
    let (code, stderr) = train(&cluster, "alone", &changes);
    assert_eq!(code, 0, "{stderr}");
    let alone = metrics(&cluster, "alone");
    let job = cluster.submit(&changes, &[]);
    let steps = cluster.finish(&job);
    assert_same_records(&steps, &alone);
    let warnings: Vec<&str> = steps
        .iter()
        .flat_map(|step| step["warnings"].as_array().unwrap())
        .filter_map(Value::as_str)
        .collect();
    assert!(warnings.iter().any(|warning| warning.contains("its gate collapses")), "{warnings:?}");
    assert!(steps[0]["gradient_norms"]["layers"].as_array().unwrap().len() > 1, "{}", steps[0]);
    assert!(!steps[0]["max_vio"].as_object().unwrap().is_empty(), "{}", steps[0]);
}

#[test]
fn validations_and_an_early_end_are_the_same_in_one_process_and_in_a_cluster() {
    let cluster = Cluster::start(4);
    // The weights stay as they are, so that no validation is lower than the first.
    let still = ["lr.peak=1e-30", "lr.floor=0", "optimizer.weight_decay=0", "balance.bias_speed=0"];
    let changes = [&still[..], &["training.steps=12", "validate.every=2", "validate.patience=2"]].concat();
    let (code, stderr) = train(&cluster, "alone", &changes);
    assert_eq!(code, 0, "{stderr}");
    let alone = metrics(&cluster, "alone");
    let job = cluster.submit(&changes, &[]);
    let steps = cluster.finish(&job);
    assert_same_records(&steps, &alone);
    let validated = |step: &&Value| step["validation_loss"].as_f64().is_some();
    let validated: Vec<u64> =
        steps.iter().filter(validated).map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!((validated, steps.len()), (vec![3, 5, 7], 7));
    assert_eq!(steps[6]["ends_early"], true);
    let status = cluster.status(&job).unwrap();
    assert!(status["validation_loss"].as_f64().is_some(), "{status}");
}

#[test]
fn evidence_of_a_step_that_is_not_finite_is_left_in_the_jobs_folder() {
    let cluster = Cluster::start(4);
    let changes = ["lr.peak=1e30", "lr.warmup_steps=0", "watch.on_nan=skip", "watch.max_skips=2"];
    let (code, stderr) = train(&cluster, "alone", &changes);
    assert_eq!(code, 1, "{stderr}");
    let job = cluster.submit(&changes, &[]);
    let outcome = failed(&cluster, &job);
    let read = |path: &str| -> Value {
        let path = cluster.path().join(path);
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap()
    };
    let evidence = read(&format!("storage/jobs/{job}/evidence.json"));
    assert_eq!(evidence, read("runs/alone/evidence.json"));
    let first = &evidence["ranks"][0];
    assert!(evidence["step"].as_u64().is_some() && first["rank"].as_u64().is_some(), "{evidence}");
    let name = first["first_gradient"]["name"].as_str().or(first["weight"]["name"].as_str()).unwrap();
    assert!(outcome.contains(name) && outcome.contains("evidence.json"), "{outcome}");
    // The batches that were skipped on the way there are on record, though not all of their numbers are finite.
    let (_, out, _) = cluster.run(&["watch", &job, "--format", "json"]);
    let steps: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_same_records(&steps, &metrics(&cluster, "alone"));
    assert_eq!(steps.iter().filter(|step| step["skipped"] == true).count(), 2);
    assert!(steps.iter().any(|step| step["skipped"] == true && step["grad_norm"].is_null()), "{steps:?}");
}

/// What a run says of each return: the step that it goes back to, and the sequences that it leaves out.
fn returns(stderr: &str) -> Vec<(u64, u64)> {
    let parse_line = |line: &str| {
        let (_, rest) = line.split_once("; rolling back to step ")?;
        let (step, rest) = rest.split_once(", skipping ")?;
        Some((step.parse().unwrap(), rest.strip_suffix(" sequences")?.parse().unwrap()))
    };
    stderr.lines().filter_map(parse_line).collect()
}

#[test]
fn a_rollback_logs_the_skipped_sequences_and_records_the_repeated_steps() {
    let cluster = Cluster::start(4);
    let changes = [
        "training.steps=40",
        "lr.peak=5e-2",
        "lr.warmup_steps=0",
        "watch.on_spike=rollback",
        "watch.spike_window=4",
        "watch.spike_factor=5",
        "watch.max_skips=100",
    ];
    let (code, stderr) = train(&cluster, "alone", &changes);
    assert_eq!(code, 0, "{stderr}");
    assert!(!returns(&stderr).is_empty(), "no step has a spike: {stderr}");
    let job = cluster.submit(&changes, &[]);
    // Who watches meanwhile sees the steps that were made again as well: the last of a number counts.
    let live = cluster.finish(&job);
    let live: BTreeMap<u64, Value> =
        live.into_iter().map(|record| (record["step"].as_u64().unwrap(), record)).collect();
    assert_same_records(&Vec::from_iter(live.into_values()), &metrics(&cluster, "alone"));
    assert_eq!(returns(&log(&cluster, &job)), returns(&stderr));
    let (_, out, _) = cluster.run(&["watch", &job, "--format", "json"]);
    let steps: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_same_records(&steps, &metrics(&cluster, "alone"));
    until_in_folder(&cluster, &job, &out);
}

/// Waits until the job's folder has its record, as `watch` tells it.
fn until_in_folder(cluster: &Cluster, job: &str, watched: &str) {
    let path = cluster.path().join("storage/jobs").join(job).join("metrics.jsonl");
    until("the record in the job's folder", || {
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        (kept == watched).then_some(())
    });
}

#[test]
fn the_record_is_in_the_jobs_folder_whoever_is_lost_meanwhile() {
    let mut cluster = Cluster::start(5);
    let job = cluster.submit(&["training.steps=120", "checkpoint.every=1000000"], &[]);
    let path = cluster.path().join("storage/jobs").join(&job).join("metrics.jsonl");
    let kept = || std::fs::read_to_string(&path).unwrap_or_default().lines().count();
    until("the first steps, while it trains", || (kept() > 3).then_some(()));
    let first = cluster.host_of(&job, 0);
    cluster.workers[first].as_mut().unwrap().kill();
    let reached = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.until_step(&job, reached + 3);
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&[]);
    assert_eq!(cluster.finish(&job).len(), 120);
    let (_, out, _) = cluster.run(&["watch", &job, "--format", "json"]);
    assert!(out.lines().any(|line| line.contains("\"generation\":2")), "{out}");
    until_in_folder(&cluster, &job, &out);
}

#[test]
fn a_fallback_plan_is_noted_in_the_jobs_log() {
    let cluster = Cluster::start(4);
    let changes = ["training.steps=2", "training.global_batch_size=4", "training.micro_batch_size=1"];
    let (code, stderr) = train(&cluster, "alone", &changes);
    assert_eq!(code, 0, "{stderr}");
    let note =
        stderr.lines().find_map(|line| line.strip_prefix("note: ")).unwrap_or_else(|| panic!("{stderr}"));
    assert!(note.contains("a plan of the kind of 1f1b runs instead"), "{note}");
    let job = cluster.submit(&changes, &[]);
    cluster.finish(&job);
    let log = log(&cluster, &job);
    assert_eq!(log.lines().filter(|line| line.contains(note)).count(), 1, "{log}");
}

#[test]
fn workers_log_of_a_job_what_its_recipe_asks_for() {
    let cluster = Cluster::start(4);
    for (level, has_info, has_debug) in
        [("error", false, false), ("info", true, false), ("debug", true, true)]
    {
        let job = cluster.submit(&["training.steps=3", &format!("log.level={level}")], &[]);
        cluster.finish(&job);
        // Lines of ranks wait a moment for their like; the job does not wait for them.
        if has_info {
            until("a line of a rank", || {
                log(&cluster, &job).contains("has run the validation sequences").then_some(())
            });
        }
        let (_, of_rank, _) = cluster.run(&["logs", &job, "--rank", "1"]);
        assert_eq!(of_rank.contains(" INFO "), has_info, "{level}: {of_rank}");
        assert_eq!(of_rank.contains("step done"), has_debug, "{level}: {of_rank}");
        let stderr: String = cluster.workers.iter().flatten().map(|worker| worker.stderr()).collect();
        let lines = stderr.lines().filter(|line| line.contains(&format!("job={job}")));
        let lines: Vec<&str> = lines.collect();
        assert_eq!(lines.iter().any(|line| line.contains("INFO")), has_info, "{level}: {lines:#?}");
        assert_eq!(lines.iter().any(|line| line.contains("DEBUG")), has_debug, "{level}: {lines:#?}");
    }
}
