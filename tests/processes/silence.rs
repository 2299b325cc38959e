//! How long workers may be silent is the operator's to say.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::cluster::{Cluster, ENDLESS, spawn, until};

#[test]
fn a_worker_that_stands_still_for_less_than_the_lease_is_not_lost() {
    let mut cluster = Cluster::start(5);
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&["--beat-ms", "300", "--lease-ms", "12000"]);
    until("all workers", || (cluster.nodes().len() == 5).then_some(()));
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 3);
    let host = cluster.host_of(&job, 1);
    let stopped = Instant::now();
    cluster.workers[host].as_ref().unwrap().signal(Signal::STOP);
    // More than twice the default.
    until("a while to pass", || (stopped.elapsed() > Duration::from_secs(4)).then_some(()));
    let status = cluster.status(&job).unwrap();
    assert_eq!((&status["generation"], &status["losses"]), (&1.into(), &0.into()), "{status}");
    cluster.workers[host].as_ref().unwrap().signal(Signal::CONT);
    let reached = status["step"].as_u64().unwrap();
    cluster.until_step(&job, reached + 3);
    assert_eq!(cluster.status(&job).unwrap()["generation"], 1);
    // One that stands still for longer is.
    let stopped = Instant::now();
    cluster.workers[host].as_ref().unwrap().signal(Signal::STOP);
    until("the second generation", || (cluster.status(&job)?["generation"] == 2).then_some(()));
    assert!(stopped.elapsed() > Duration::from_secs(11), "{:?}", stopped.elapsed());
    let log = cluster.run(&["logs", &job]).1;
    assert!(log.contains("is silent"), "{log}");
}

/// **Units**: ms since 1970.
fn wall() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

#[test]
fn an_orchestrator_that_stood_still_shows_the_time_of_the_wall() {
    let cluster = Cluster::start(2);
    let stopped = Instant::now();
    cluster.orchestrator.signal(Signal::STOP);
    // Longer than a lease, and than what a loaded machine may take for the rest.
    until("a while to pass", || (stopped.elapsed() > Duration::from_secs(8)).then_some(()));
    cluster.orchestrator.signal(Signal::CONT);
    // Not for ever as long as it stood still.
    until("workers that are heard", || {
        let silent = |node: &serde_json::Value| node["silent_ms"].as_u64().unwrap();
        let nodes = cluster.nodes();
        (nodes.len() == 2 && nodes.iter().all(|node| silent(node) < 5_000)).then_some(())
    });
    let before = wall();
    let job = cluster.submit(&["training.steps=2"], &[]);
    let submitted = cluster.status(&job).unwrap()["submitted_unix_ms"].as_u64().unwrap();
    // Its clock is read at most a tick before, and rounded.
    assert!((before - 200..=wall()).contains(&submitted), "{before} {submitted}");
}

#[test]
fn times_that_contradict_each_other_are_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    for (options, words) in [
        (["--beat-ms", "50"], "--beat-ms: expected 100 to 5000, got 50"),
        (["--lease-ms", "1000"], "--lease-ms: expected 1500 (three beats) to 30000, got 1000"),
    ] {
        let mut arguments = vec!["orchestrator", "--state", "state", "--listen", "127.0.0.1:0"];
        arguments.extend(options);
        let mut refused = spawn(dir.path(), "refused", &arguments);
        assert_eq!(refused.wait(), Some(2));
        assert!(refused.stderr().contains(words), "{}", refused.stderr());
        assert!(!dir.path().join("state").exists());
    }
}
