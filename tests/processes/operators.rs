//! What operators do and see: nodes out of use and back, lists in pages, files that are nobody else's.

use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cluster::{Cluster, ENDLESS, curve, until};

/// A job of one rank.
const ALONE: [&str; 3] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];

#[test]
fn a_job_that_waits_for_drained_nodes_says_so_and_starts_when_that_is_undone() {
    let mut cluster = Cluster::start(1);
    assert_eq!(cluster.run(&["drain", "n0"]).0, 0);
    let job = cluster.submit(&ALONE, &[]);
    let waiting_for =
        |cluster: &Cluster| cluster.status(&job).unwrap()["waiting_for"].as_str().unwrap().to_owned();
    let words = "; drained: n0, to be undone by contraflow drain --undo NODE";
    assert!(waiting_for(&cluster).ends_with(words), "{}", waiting_for(&cluster));
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&[]);
    until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    assert!(waiting_for(&cluster).ends_with(words), "{}", waiting_for(&cluster));
    let (code, out, _) = cluster.run(&["drain", "--undo", "n0"]);
    assert_eq!((code, out.as_str()), (0, "n0: 1 worker to take ranks again\n"));
    assert_eq!(cluster.finish(&job).len(), 60);
    let (code, _, stderr) = cluster.run(&["drain", "--undo", "n0"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("node: expected one that is drained, got \"n0\""), "{stderr}");
}

#[test]
fn jobs_are_listed_in_pages() {
    let cluster = Cluster::start(0);
    for _ in 0..5 {
        cluster.submit(&[], &[]);
    }
    let page = |options: &[&str]| {
        let (code, out, stderr) = cluster.run(&[&["jobs", "--format", "json"], options].concat());
        assert_eq!(code, 0, "{stderr}");
        let jobs: serde_json::Value = serde_json::from_str(&out).unwrap();
        let jobs = jobs["jobs"].as_array().unwrap().iter();
        jobs.map(|job| job["job"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(page(&["--limit", "2"]), ["job-5", "job-4"]);
    assert_eq!(page(&["--limit", "2", "--before", "job-4"]), ["job-3", "job-2"]);
    assert_eq!(page(&["--before", "job-2"]), ["job-1"]);
    let (_, _, stderr) = cluster.run(&["jobs", "--limit", "2"]);
    assert_eq!(stderr, "older ones: contraflow jobs --before job-4\n");
    assert_eq!(cluster.run(&["jobs"]).2, "");
}

/// Every file and folder below one, with its rights.
fn modes(dir: &Path) -> Vec<(String, u32)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        all.push((path.display().to_string(), path.metadata().unwrap().permissions().mode() & 0o777));
        if path.is_dir() {
            all.extend(modes(&path));
        }
    }
    all
}

#[test]
fn the_state_is_for_its_owner_alone() {
    let cluster = Cluster::start(0);
    cluster.submit(&[], &[]);
    let all = modes(&cluster.path().join("state"));
    assert!(all.iter().any(|(path, _)| path.ends_with("events.redb")), "{all:?}");
    let open: Vec<_> = all.iter().filter(|(_, mode)| mode & 0o077 != 0).collect();
    assert!(open.is_empty(), "{open:?}");
    assert_eq!(cluster.path().join("state").metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn an_orchestrator_that_does_not_answer_costs_its_clients_seconds_and_not_a_wait_for_ever() {
    let cluster = Cluster::start(0);
    cluster.orchestrator.signal(rustix::process::Signal::STOP);
    let (code, _, stderr) = cluster.run(&["jobs"]);
    assert_eq!((code, stderr.trim()), (1, "error: the orchestrator has not answered within 10 s"));
    cluster.orchestrator.signal(rustix::process::Signal::CONT);
    assert_eq!(cluster.run(&["jobs"]).0, 0);
}

#[test]
fn what_is_done_is_audited_with_who_did_it() {
    let cluster = Cluster::secured(1);
    let job = cluster.submit(&[], &[]);
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    assert_eq!(cluster.run(&["cancel", "job-99"]).0, 2);
    assert_eq!(cluster.run(&["drain", "n0"]).0, 0);
    assert_eq!(cluster.run(&["drain", "n0", "--undo"]).0, 0);
    let log = std::fs::read_to_string(cluster.path().join("state/audit.jsonl")).unwrap();
    let calls: Vec<[String; 4]> = log
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|call| ["user", "call", "target", "result"].map(|key| call[key].as_str().unwrap().to_owned()))
        .collect();
    let done = |call: &str, target: &str| ["the-admin", call, target, "ok"].map(str::to_owned);
    assert_eq!((calls[0][0].as_str(), calls[0][1].as_str()), ("the-worker", "attach"), "{log}");
    assert_eq!(calls[1..3], [done("submit", &job), done("cancel", &job)]);
    assert!(calls[3][2] == "job-99" && calls[3][3].starts_with("job: expected the id of a job"), "{log}");
    assert_eq!(calls[4..], [done("drain", "n0"), done("undrain", "n0")]);
}

#[test]
fn a_cancelled_job_is_taken_up_again_from_its_checkpoint_and_a_finished_one_is_not() {
    let cluster = Cluster::start(4);
    let whole = curve(&cluster.finish(&cluster.submit(&[], &[])));
    let job = cluster.submit(&["training.steps=60"], &[]);
    let (code, _, stderr) = cluster.run(&["retry", &job]);
    assert_eq!(code, 2);
    assert!(stderr.contains(&format!("got {job}, one that has not ended")), "{stderr}");
    cluster.until_step(&job, 20);
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    assert_eq!(cluster.run(&["retry", &job]).0, 0);
    assert_eq!(curve(&cluster.finish(&job)), whole);
    let (_, log, _) = cluster.run(&["logs", &job]);
    assert!(log.contains("taken up again, from the checkpoint of step "), "{log}");
    let (code, _, stderr) = cluster.run(&["retry", &job]);
    assert_eq!(code, 2);
    assert!(stderr.contains(&format!("got {job}, one that is done")), "{stderr}");
}

/// The job's folder in the storage.
fn job_folder(cluster: &Cluster, job: &str) -> String {
    cluster.path().join("storage/jobs").join(job).display().to_string()
}

#[test]
fn a_new_job_begins_with_the_checkpoint_of_one_that_has_ended_or_of_a_folder() {
    let cluster = Cluster::start(4);
    let whole = curve(&cluster.finish(&cluster.submit(&[], &[])));
    let first = cluster.submit(&["training.steps=60"], &[]);
    let resume = |from: &str, options: &[&str]| {
        let arguments = [&["submit", "--resume", from, "--format", "json"], options].concat();
        let (code, out, stderr) = cluster.run(&arguments);
        let id =
            || serde_json::from_str::<serde_json::Value>(&out).unwrap()["job"].as_str().unwrap().to_owned();
        if code == 0 { Ok(id()) } else { Err(stderr) }
    };
    assert!(resume(&first, &[]).unwrap_err().contains(&format!("got {first}, one that has not ended")));
    cluster.until_step(&first, 20);
    assert_eq!(cluster.run(&["cancel", &first]).0, 0);
    let rest_of = |job: &str| {
        let rest = curve(&cluster.finish(job));
        assert!(!rest.is_empty() && rest.len() < whole.len(), "{} steps", rest.len());
        assert_eq!(rest, whole[whole.len() - rest.len()..]);
        cluster.run(&["logs", job]).1
    };
    let of_job = resume(&first, &[]).unwrap();
    let log = rest_of(&of_job);
    assert!(log.contains("formed and resume from the checkpoint of step "), "{log}");
    assert!(log.contains(&format!(" of {first}\n")), "{log}");
    let folder = job_folder(&cluster, &first);
    let log = rest_of(&resume(&folder, &[]).unwrap());
    assert!(log.contains(&format!(" in {folder}/checkpoints/step-000000")), "{log}");
    // It has checkpoints of its own by now, and what it began with is not needed any more.
    std::fs::remove_dir_all(folder).unwrap();
    let longer = resume(&of_job, &["--set", "training.steps=62"]).unwrap();
    let steps: Vec<u64> = curve(&cluster.finish(&longer)).into_iter().map(|(step, ..)| step).collect();
    assert_eq!(steps, [61, 62]);
    for (options, words) in [
        (&[][..], "training.steps: expected more than 60, the step of the checkpoint, got 60"),
        (&["--set", "training.steps=61", "--set", "training.seed=5"], "training.seed: expected "),
        (
            &["--set", "training.steps=61", "--set", "model.hidden_size=64"],
            "model.config.hidden_size: expected ",
        ),
    ] {
        let stderr = resume(&of_job, options).unwrap_err();
        assert!(stderr.contains(words), "{stderr}");
    }
}

#[test]
fn a_job_begins_with_no_checkpoint_outside_of_what_the_workers_were_given() {
    let cluster = Cluster::start(4);
    let first = cluster.submit(&["training.steps=6"], &[]);
    cluster.finish(&first);
    let outside = tempfile::tempdir().unwrap();
    let moved = outside.path().join("moved");
    std::fs::rename(job_folder(&cluster, &first), &moved).unwrap();
    let from = moved.display().to_string();
    let (code, out, stderr) = cluster.run(&["submit", "--resume", &from, "--set", "training.steps=8"]);
    assert_eq!(code, 0, "{stderr}");
    let outcome = until("the end", || {
        let status = cluster.status(out.trim())?;
        (status["state"] == "failed").then(|| status["outcome"].as_str().unwrap().to_owned())
    });
    assert!(outcome.contains("resume: expected a checkpoint below "), "{outcome}");
}

#[test]
fn a_rank_that_holds_the_others_up_is_named_in_log_and_status() {
    let cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 2);
    let (worker, words) =
        (cluster.workers[3].as_ref().unwrap(), "is slow and holds the others up: it works ");
    let has_been_named = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Stopped for most of the time, but never for as long as a lease.
        scope.spawn(|| {
            while !has_been_named.load(Ordering::Relaxed) {
                worker.signal(rustix::process::Signal::STOP);
                std::thread::sleep(Duration::from_millis(300));
                worker.signal(rustix::process::Signal::CONT);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let named = std::panic::catch_unwind(AssertUnwindSafe(|| {
            // On a machine with other work another one may be slow for a while, too.
            let rank = until("the slow rank in status", || {
                let status = cluster.status(&job)?;
                status["ranks"]
                    .as_array()?
                    .iter()
                    .find(|rank| rank["slow"] == true && rank["node"] == "n3")
                    .cloned()
            });
            assert!(rank["busy_seconds"].as_f64().unwrap() > 0.1, "{rank}");
            assert!(rank["link_seconds"].as_f64().unwrap() > 0.0, "{rank}");
            until("it in words", || {
                let text = cluster.run(&["status", &job]).1;
                text.lines().any(|line| line.ends_with(" on n3  slow")).then_some(())
            });
            let log = cluster.run(&["logs", &job]).1;
            let line = log.lines().find(|line| line.contains(words) && line.contains(", node n3, ")).unwrap();
            let of_rank =
                format!("rank {} on worker {}, node n3, ", rank["rank"], rank["worker"].as_str().unwrap());
            assert!(line.contains(&of_rank) && line.contains(" WARN "), "{log}");
        }));
        has_been_named.store(true, Ordering::Relaxed);
        if let Err(panic) = named {
            std::panic::resume_unwind(panic);
        }
    });
    until("the rank that has caught up", || {
        cluster.run(&["logs", &job]).1.contains(", node n3, holds the others up no more: ").then_some(())
    });
}
