//! What dies and comes back: the loss curve does not show it.

use std::time::{Duration, Instant};

use contraflow_workers::checkpoint::{Checkpoint, Kind};

use crate::cluster::{Cluster, ENDLESS, committed, curve, until};

/// SIGKILLs of one job: few here, more where the test runs alone and is timed.
fn kills() -> Option<usize> {
    std::env::var("CONTRAFLOW_KILLS").ok().map(|kills| kills.parse().unwrap())
}

/// Within this time a worker that is gone is noticed, and a step later the ranks have trained on.
const IN_TIME: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(5)];

#[test]
fn killed_workers_do_not_show_in_the_loss_curve() {
    let mut cluster = Cluster::start(5);
    let num_kills = kills().unwrap_or(2);
    let job = cluster.submit(&[ENDLESS], &[]);
    let mut random = 20_261_124_u64;
    let mut longest = [Duration::ZERO; 2];
    for kill in 0..num_kills {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        cluster.until_step(&job, 5 + 15 * kill as u64);
        let rank = (random >> 33) as usize % 4;
        let victim = cluster.host_of(&job, rank);
        let before = cluster.status(&job).unwrap();
        cluster.workers[victim].as_mut().unwrap().kill();
        let killed = Instant::now();
        let after = until("another generation", || {
            let status = cluster.status(&job)?;
            (status["generation"].as_u64() > before["generation"].as_u64()).then_some(status)
        });
        longest[0] = longest[0].max(killed.elapsed());
        cluster.until_step(&job, before["step"].as_u64().unwrap() + 1);
        longest[1] = longest[1].max(killed.elapsed());
        assert_eq!(after["losses"].as_u64().unwrap(), kill as u64 + 1);
        cluster.workers[victim] = Some(cluster.worker(victim));
        until("a full house", || (cluster.nodes().len() == 5).then_some(()));
    }
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
    let last = steps.last().unwrap();
    assert_eq!(last["generation"].as_u64().unwrap(), num_kills as u64 + 1);
    eprintln!("{num_kills} kills: noticed within {:?}, trained on within {:?}", longest[0], longest[1]);
    if kills().is_some() {
        assert!(longest.iter().zip(&IN_TIME).all(|(took, most)| took <= most), "{longest:?}");
    }
}

#[test]
fn an_orchestrator_killed_and_restarted_loses_no_step() {
    let mut cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS], &["--key", "once"]);
    cluster.until_step(&job, 10);
    cluster.orchestrator.kill();
    // The ranks continue meanwhile: a checkpoint waits in its unfinished folder until it is committed.
    let checkpoints = cluster.path().join(format!("storage/jobs/{job}/checkpoints"));
    until("ranks that continue alone", || {
        let names = std::fs::read_dir(&checkpoints).ok()?.map(|entry| entry.unwrap().file_name());
        names.into_iter().any(|name| name.to_string_lossy().ends_with(".part")).then_some(())
    });
    cluster.start_orchestrator(&[]);
    // The same key is the same job, after the restart too.
    assert_eq!(cluster.submit(&[ENDLESS], &["--key", "once"]), job);
    let steps = cluster.ten_more_steps(&job);
    assert!(steps.iter().all(|step| step["generation"] == 1), "it was adopted, not re-formed");
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
}

/// Rank 2 keeps the state of rank 0, and rank 0 that of rank 2: half a turn around the nodes.
const BUDDY: usize = 2;

/// Steps after which formations resumed from memory, according to the job's log.
pub fn from_memory(cluster: &Cluster, job: &str) -> Vec<u64> {
    let (_, log, _) = cluster.run(&["logs", job]);
    let after = log.lines().filter_map(|line| line.split("from memory after step ").nth(1));
    after.map(|step| step.parse().unwrap()).collect()
}

#[test]
fn a_lost_rank_resumes_from_its_buddys_replica() {
    let mut cluster = Cluster::start(5);
    // Nothing on disk to resume from.
    let rare = ["checkpoint.every=1000000", ENDLESS];
    let job = cluster.submit(&rare, &[]);
    let mut reported = Vec::new();
    for (rank, step) in [(0, 8), (3, 25), (0, 42)] {
        cluster.until_step(&job, step);
        let victim = cluster.host_of(&job, rank);
        reported.push(cluster.status(&job).unwrap()["step"].as_u64().unwrap());
        cluster.workers[victim].as_mut().unwrap().kill();
        until("another generation", || (cluster.status(&job)?["losses"] == reported.len()).then_some(()));
        cluster.workers[victim] = Some(cluster.worker(victim));
        until("a full house", || (cluster.nodes().len() == 5).then_some(()));
    }
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&rare, steps.len())));
    let resumed = from_memory(&cluster, &job);
    assert_eq!(resumed.len(), reported.len());
    // What every rank has reported is lost only if no buddy had it yet: at most the last such step.
    assert!(
        resumed.iter().zip(&reported).all(|(resumed, reported)| resumed + 1 >= *reported),
        "{resumed:?} {reported:?}"
    );
}

#[test]
fn the_moving_average_survives_in_memory_as_the_weights_do() {
    let mut cluster = Cluster::start(5);
    let rare = ["checkpoint.every=1000000", "training.ema_decay=0.9", "training.steps=60"];
    let job = cluster.submit(&rare, &[]);
    cluster.until_step(&job, 8);
    let victim = cluster.host_of(&job, 0);
    cluster.workers[victim].as_mut().unwrap().kill();
    let last = |job: &str| {
        cluster.finish(job);
        let dir = cluster.path().join(format!("storage/jobs/{job}/checkpoints/step-00000060"));
        Checkpoint::open(&dir).unwrap_or_else(|faults| panic!("{faults}")).records
    };
    let disturbed = last(&job);
    assert_eq!(from_memory(&cluster, &job).len(), 1);
    let undisturbed = last(&cluster.submit(&rare, &[]));
    for (name, shape) in undisturbed.weights() {
        let [got, expected] = [&disturbed, &undisturbed]
            .map(|records| records.read_numbers(Kind::Average, name, shape).unwrap());
        assert!(got == expected, "{name}");
    }
}

#[test]
fn losing_a_rank_and_its_buddy_costs_the_steps_since_the_checkpoint_and_is_logged() {
    let mut cluster = Cluster::start(5);
    let changes = ["checkpoint.every=10", ENDLESS];
    let job = cluster.submit(&changes, &[]);
    // Commits come one after the other: the orchestrator knows of the previous one.
    let folder = cluster.path().join(format!("storage/jobs/{job}"));
    until("a second checkpoint", || (committed(&folder).last() >= Some(&20)).then_some(()));
    let victims = [0, BUDDY].map(|rank| cluster.host_of(&job, rank));
    victims.into_iter().for_each(|victim| cluster.workers[victim].as_mut().unwrap().kill());
    cluster.workers[victims[0]] = Some(cluster.worker(victims[0]));
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&changes, steps.len())));
    assert!(from_memory(&cluster, &job).is_empty());
    let (_, log, _) = cluster.run(&["logs", &job]);
    let error_text =
        log.lines().find(|line| line.contains("in memory: its buddy")).unwrap_or_else(|| panic!("{log}"));
    assert!(
        error_text.contains("resume from the checkpoint of step") && error_text.contains("the state of rank"),
        "{error_text}"
    );
}

#[test]
fn a_worker_lost_while_the_orchestrator_is_away_takes_no_report_with_it() {
    let mut cluster = Cluster::start(5);
    let changes = [ENDLESS, "checkpoint.every=20"];
    let job = cluster.submit(&changes, &[]);
    cluster.until_step(&job, 10);
    let victim = cluster.host_of(&job, 1);
    cluster.orchestrator.kill();
    // Reports of the ranks are lost from here on.
    let checkpoints = cluster.path().join(format!("storage/jobs/{job}/checkpoints"));
    until("ranks that continue alone", || {
        let names = std::fs::read_dir(&checkpoints).ok()?.map(|entry| entry.unwrap().file_name());
        names.into_iter().any(|name| name.to_string_lossy().starts_with("step-00000100")).then_some(())
    });
    cluster.workers[victim].as_mut().unwrap().kill();
    cluster.start_orchestrator(&[]);
    // Known to be lost, and re-formed.
    until("another generation", || (cluster.status(&job)?["generation"].as_u64()? >= 2).then_some(()));
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&changes, steps.len())));
    let resumed = from_memory(&cluster, &job);
    assert!(resumed.len() == 1 && resumed[0] >= 99, "{resumed:?}");
}

#[test]
fn a_terminating_worker_has_its_ranks_moved_and_is_no_loss() {
    let mut cluster = Cluster::start(5);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 6);
    let leaver = cluster.host_of(&job, 2);
    let leaver = cluster.workers[leaver].as_mut().unwrap();
    leaver.signal(rustix::process::Signal::TERM);
    assert_eq!(leaver.wait(), Some(0), "{}", leaver.stderr());
    until("another generation", || (cluster.status(&job)?["generation"].as_u64()? >= 2).then_some(()));
    // Before it is cancelled, which ranks may see as a lost peer.
    let (_, log, _) = cluster.run(&["logs", &job]);
    assert!(log.contains("is leaving; step ") && !log.contains("lost"), "{log}");
    // The last lines of its rank are there like those of all others, once they have been folded.
    let saved = log.split("is leaving; step ").nth(1).unwrap().split(' ').next().unwrap();
    let words = format!("its part of the checkpoint of step {saved} is on disk");
    until("the last lines of all ranks", || {
        let (_, log, _) = cluster.run(&["logs", &job]);
        let of_it = log.lines().filter(|line| line.ends_with(&words));
        (of_it.map(num_ranks).sum::<usize>() == 4).then_some(())
    });
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
    assert_eq!(steps.last().unwrap()["generation"], 2);
}

#[test]
fn a_second_signal_ends_a_worker_whose_orchestrator_does_not_answer() {
    let mut cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 2);
    cluster.orchestrator.signal(rustix::process::Signal::STOP);
    let leaver = cluster.workers[0].as_mut().unwrap();
    leaver.signal(rustix::process::Signal::TERM);
    until("what it waits for in status", || {
        leaver.stderr().contains("leaving: waiting up to 25s").then_some(())
    });
    let reported = Instant::now();
    leaver.signal(rustix::process::Signal::TERM);
    assert_eq!(leaver.wait(), Some(0), "{}", leaver.stderr());
    assert!(reported.elapsed() < Duration::from_secs(20), "{:?}", reported.elapsed());
}

/// Ranks that a line of a log is of: "rank 2" or "x3 ranks".
fn num_ranks(line: &str) -> usize {
    let folded = line.split(" x").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    folded.unwrap_or(1)
}

#[test]
fn a_frozen_worker_is_reported_and_its_late_messages_are_dropped() {
    let cluster = Cluster::start(5);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 6);
    let victim = cluster.host_of(&job, 2);
    let frozen = cluster.workers[victim].as_ref().unwrap();
    frozen.signal(rustix::process::Signal::STOP);
    until("another generation", || (cluster.status(&job)?["generation"].as_u64()? >= 2).then_some(()));
    let (_, log, _) = cluster.run(&["logs", &job]);
    assert!(log.contains("rank 2 lost") && log.contains(&format!("node n{victim} is silent")), "{log}");
    // Folded or not: a rank that was late by more than the lines wait for each other has one of its own.
    let ready = log.lines().filter(|line| line.contains("model built, waiting for other ranks"));
    assert!(ready.map(num_ranks).sum::<usize>() >= 4, "{log}");
    let (_, of_rank, _) = cluster.run(&["logs", &job, "--rank", "1"]);
    assert!(of_rank.contains("the checkpoint of step 4") && !of_rank.contains("rank 2 lost"), "{of_rank}");
    cluster.until_step(&job, 20);
    frozen.signal(rustix::process::Signal::CONT);
    until("the worker's return", || (cluster.nodes().len() == 5).then_some(()));
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
}

#[test]
fn a_stalled_rank_in_a_live_process_is_found_and_moved() {
    let mut cluster = Cluster::start(3);
    // Some steps, and then its compute lane is held for ever.
    let hangs = [("FAILPOINTS", "compute.operation=400*off->pause".to_owned())];
    cluster.workers.push(Some(cluster.worker_with(3, &hangs)));
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    let job = cluster.submit(&["checkpoint.every=1000"], &[]);
    let generation = |cluster: &Cluster| cluster.status(&job)?["generation"].as_u64();
    until("a formation", || generation(&cluster).filter(|generation| *generation == 1));
    let rank = (0..4).find(|&rank| cluster.host_of(&job, rank) == 3).unwrap();
    let waits = until("what it waits for in status", || {
        let waits = cluster.status(&job)?["waiting_for"].as_str()?.to_owned();
        waits.contains("has made no progress").then_some(waits)
    });
    assert!(waits.starts_with(&format!("rank {rank} ")), "{waits}");
    // As a process supervisor would do it.
    cluster.workers.push(Some(cluster.worker(4)));
    let hung = cluster.workers[3].as_mut().unwrap();
    assert_eq!(hung.wait(), Some(2), "{}", hung.stderr());
    assert!(hung.stderr().contains("start it again"), "{}", hung.stderr());
    let curve_of_hung = curve(&cluster.finish(&job));
    let whole = cluster.submit(&["checkpoint.every=1000"], &[]);
    assert_eq!(curve_of_hung, curve(&cluster.finish(&whole)));
    // One rank is found, once; on a loaded machine a worker may be silent for a lease besides. Whatever ends a formation, the next
    // one resumes from memory.
    let (_, log, _) = cluster.run(&["logs", &job]);
    let lines = |words: &str| log.lines().filter(|line| line.contains(words)).count();
    assert_eq!(lines(" must exit"), 1, "{log}");
    assert_eq!(from_memory(&cluster, &job).len(), 1 + lines(" is silent for "), "{log}");
}

/// Steps over which a difference of rounding has not grown beyond 1e-3.
const COMPARED: usize = 60;

#[test]
fn without_a_spare_the_job_continues_with_fewer_ranks() {
    let mut cluster = Cluster::start(4);
    // Nothing on disk to resume from.
    let axes = ["parallel.pipeline=2", "parallel.expert=1", "parallel.data=2"];
    let changes = [&axes[..], &["checkpoint.every=1000000", ENDLESS]].concat();
    let whole = cluster.undisturbed(&changes, COMPARED);
    let job = cluster.submit(&changes, &["--min-ranks", "2"]);
    cluster.until_step(&job, 6);
    let reported = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.workers[3].as_mut().unwrap().kill();
    let waits = until("what it waits for in status", || {
        let waits = cluster.status(&job)?["waiting_for"].as_str()?.to_owned();
        waits.starts_with("needs").then_some(waits)
    });
    assert!(waits.contains("needs 4 ranks, 3 healthy"), "{waits}");
    until("another generation", || (cluster.status(&job)?["generation"].as_u64()? >= 2).then_some(()));
    let steps = cluster.ten_more_steps(&job);
    for (step, whole) in steps.iter().zip(&whole) {
        let (got, expected) = (step["loss"].as_f64().unwrap(), whole["loss"].as_f64().unwrap());
        // Other layouts round differently, and the difference grows with the steps; see tests/cluster/resume.rs.
        assert!((got - expected).abs() <= 1e-3 * expected, "{step} {whole}");
    }
    assert_eq!(steps.last().unwrap()["generation"], 2);
    let resumed = from_memory(&cluster, &job);
    assert!(resumed.len() == 1 && resumed[0] + 1 >= reported, "{resumed:?} {reported}");
}

#[test]
fn two_jobs_run_side_by_side_and_a_third_waits() {
    let cluster = Cluster::start(4);
    let two = ["parallel.pipeline=2", "parallel.expert=1", ENDLESS];
    let (a, b) = (cluster.submit(&two, &[]), cluster.submit(&two, &[]));
    let c = cluster.submit(&two, &[]);
    let waits = cluster.status(&c).unwrap();
    assert_eq!(waits["state"], "queued");
    assert_eq!(waits["waiting_for"], "needs 2 ranks, 0 free");
    let [a, b, c] = [a, b, c].map(|job| curve(&cluster.first_steps(&job, 60)));
    assert_eq!(a, b);
    assert_eq!(a, c);
}

#[test]
fn a_preempted_job_resumes_with_the_same_bits() {
    let cluster = Cluster::start(4);
    let low = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&low, 6);
    let high = cluster.submit(&["training.steps=9"], &["--priority", "1"]);
    assert_eq!(cluster.finish(&high).len(), 9);
    let steps = cluster.ten_more_steps(&low);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
    assert_eq!(steps.last().unwrap()["generation"], 2);
}
