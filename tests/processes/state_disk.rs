//! The disk of the orchestrator's state takes nothing for a while: the job trains on, clients are told, nothing is lost.

use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::cluster::{Cluster, Process, curve, spawn_orchestrator_after, until};

/// Until `None`, the process writes its files up to this length only: what it says, and parts of its state. **Units**: bytes.
fn limit_files(process: &Process, length: Option<u64>) {
    let pid = Pid::from_raw(process.id().try_into().unwrap());
    prlimit(pid, Resource::Fsize, Rlimit { current: length, maximum: None }).unwrap();
}

#[test]
fn a_state_that_cannot_be_written_for_a_while_costs_nothing_and_is_said() {
    let mut cluster = Cluster::start(0);
    cluster.orchestrator.kill();
    // Such a write is an error then, not the end of the process.
    cluster.orchestrator = spawn_orchestrator_after(&cluster, "trap '' XFSZ");
    for number in 0..4 {
        let worker = cluster.worker(number);
        cluster.workers.push(Some(worker));
    }
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    let endless = ["training.steps=100000", "checkpoint.every=50"];
    let job = cluster.submit(&endless, &[]);
    cluster.until_step(&job, 10);
    let told = |words: &str| {
        words.contains("the orchestrator's state cannot be written for ")
            && words.contains("File too large (os error 27)")
    };
    let withheld = |cluster: &Cluster| {
        limit_files(&cluster.orchestrator, Some(64 << 10));
        let warned = || told(cluster.status(&job)?["warning"].as_str()?).then_some(());
        until("status that names the disk", warned);
        let submission = ["submit", "tiny", "--key", "later"];
        let (code, _, errors) = cluster.run(&submission);
        assert!(code == 1 && told(&errors) && errors.contains("try again later"), "{code}: {errors}");
        let (code, _, errors) = cluster.run(&["nodes"]);
        assert!(code == 0 && errors.contains("warning: ") && told(&errors), "{code}: {errors}");
        let reached = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
        // The sleep is the fault itself.
        std::thread::sleep(Duration::from_secs(4));
        reached
    };
    let goes_on = |cluster: &Cluster, reached: u64| {
        cluster.until_step(&job, reached + 20);
        let status = cluster.status(&job).unwrap();
        assert_eq!((&status["generation"], &status["losses"]), (&1.into(), &0.into()), "{status}");
    };
    let reached = withheld(&cluster);
    limit_files(&cluster.orchestrator, None);
    let status =
        until("status without a warning", || cluster.status(&job).filter(|status| status["warning"] == ""));
    // What its ranks have done meanwhile is there at once.
    assert!(status["step"].as_u64().unwrap() > reached + 2, "they have waited at {reached}: {status}");
    goes_on(&cluster, reached);
    let said = cluster.orchestrator.stderr();
    assert_eq!(
        said.matches("events.redb cannot be written, tried again until it succeeds: ").count(),
        1,
        "{said}"
    );
    assert!(said.contains("its disk works again") && said.contains("the orchestrator goes on"), "{said}");
    // And killed in the midst of it.
    let reached = withheld(&cluster);
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&[]);
    goes_on(&cluster, reached);
    for _ in 0..2 {
        assert_eq!(cluster.run(&["submit", "tiny", "--key", "later"]).0, 0);
    }
    let (_, jobs, _) = cluster.run(&["jobs"]);
    assert_eq!(jobs.matches("job-").count(), 2, "{jobs}");
    assert_eq!(cluster.run(&["cancel", "job-2"]).0, 0);
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&endless, steps.len())));
}
