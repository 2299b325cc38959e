//! Jobs that end the workers they are on, and ranks that fit nowhere.

use crate::cluster::{Cluster, spawn_in_memory, until};

/// A job of one rank.
const ALONE: [&str; 3] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];

#[test]
fn a_job_that_ends_its_workers_before_its_first_step_ends_itself() {
    let mut cluster = Cluster::start(0);
    let dies = [("FAILPOINTS", "compute.operation=return".to_owned())];
    for number in 0..7 {
        cluster.workers.push(Some(cluster.worker_with(number, &dies)));
    }
    until("all workers", || (cluster.nodes().len() == 7).then_some(()));
    let job = cluster.submit(&ALONE, &[]);
    let status = until("its end", || cluster.status(&job).filter(|status| status["state"] == "failed"));
    let outcome = status["outcome"].as_str().unwrap();
    assert!(
        outcome.starts_with("formed 6 times in a row without completing a step: generation 1: rank 0 lost"),
        "{outcome}"
    );
    // Each on another node than those before.
    let nodes: std::collections::BTreeSet<&str> =
        outcome.split(" on node ").skip(1).map(|rest| rest.split(' ').next().unwrap()).collect();
    assert_eq!(nodes.len(), 6, "{outcome}");
    assert_eq!(status["generation"], 6);
}

#[test]
fn a_rank_that_fits_into_no_worker_is_not_placed_and_status_says_why() {
    let mut cluster = Cluster::start(0);
    for number in 0..2 {
        let worker = spawn_in_memory(&cluster, number, 2_200_000);
        cluster.workers.push(Some(worker));
    }
    until("all workers", || (cluster.nodes().len() == 2).then_some(()));
    assert!(cluster.nodes().iter().all(|node| node["memory_bytes"] == 2_200_000_u64 * 1024));
    let (code, out, stderr) =
        cluster.run(&["submit", "base", "--set", "training.steps=2", "--format", "json"]);
    assert_eq!(code, 0, "{stderr}");
    let job = serde_json::from_str::<serde_json::Value>(&out).unwrap()["job"].as_str().unwrap().to_owned();
    let waits = until("what it waits for in status", || {
        let status = cluster.status(&job)?;
        Some(status["waiting_for"].as_str()?.to_owned()).filter(|waits| !waits.is_empty())
    });
    let words = "needs 1 rank, room for 0, 2 with too little memory: a rank needs at least 2.5 GiB, worker ";
    assert!(waits.starts_with(words) && waits.ends_with("has 2.1 GiB (RLIMIT_AS)"), "{waits}");
    // What is forced is placed all the same.
    let forced = ["submit", "base", "--set", "training.steps=2", "--force", "--format", "json"];
    let (code, out, stderr) = cluster.run(&forced);
    assert_eq!(code, 0, "{stderr}");
    let forced: serde_json::Value = serde_json::from_str(&out).unwrap();
    let forced = forced["job"].as_str().unwrap();
    until("a formation of the forced job", || {
        (cluster.status(forced)?["generation"].as_u64()? > 0).then_some(())
    });
    assert_eq!(cluster.run(&["cancel", forced]).0, 0);
    // What fits is placed.
    let small = cluster.submit(&ALONE, &[]);
    assert_eq!(cluster.finish(&small).len(), 60);
}
