//! Disk: jobs that are removed with their files, what is left unfinished, and room that runs out.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cluster::{Cluster, ENDLESS, Process, committed, until};

/// A job of one rank.
const ALONE: [&str; 3] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];

fn with<'a>(changes: &[&'a str]) -> Vec<&'a str> {
    [&ALONE[..], changes].concat()
}

fn size(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn a_removed_job_is_gone_with_its_folder_and_one_that_is_needed_stays() {
    let mut cluster = Cluster::start(1);
    let jobs = cluster.path().join("storage/jobs");
    let done = cluster.submit(&with(&["training.steps=5"]), &[]);
    cluster.finish(&done);
    let running = cluster.submit(&with(&[ENDLESS]), &[]);
    cluster.until_step(&running, 5);
    let init = format!("model.init=\"storage/jobs/{done}/model\"");
    let reader = cluster.submit(&with(&[&init]), &[]);
    let rm = |jobs: &[&str]| {
        let (code, out, stderr) = cluster.run(&[&["jobs", "rm"], jobs].concat());
        (code, format!("{out}{stderr}"))
    };
    for (job, words) in [
        (
            &running,
            format!("expected one that has ended, got {running}; contraflow cancel {running} ends it"),
        ),
        (&done, format!("{reader}, which has not ended, reads from the folder of {done}")),
        (&"job-99".to_owned(), "expected the id of a job, got \"job-99\"".into()),
    ] {
        let (code, said) = rm(&[job]);
        assert!(code == 2 && said.contains(&words), "{code}: {said}");
    }
    assert!(jobs.join(&done).join("checkpoints").exists() && jobs.join(&running).exists());
    assert_eq!(cluster.run(&["cancel", &reader]).0, 0);
    // All that can be removed are, and the others named.
    let (code, said) = rm(&[&running, &done, &reader]);
    let removed = [&done, &reader].map(|job| said.contains(&format!("{job}: removed")));
    assert!(code == 2 && removed == [true; 2] && said.contains(&format!("got {running};")), "{said}");
    assert!(!jobs.join(&done).exists() && cluster.status(&done).is_none());
    until("an end of the removal", || {
        let names = jobs.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        (names.collect::<Vec<_>>() == [running.clone()]).then_some(())
    });
    let reached = cluster.status(&running).unwrap()["step"].as_u64().unwrap();
    cluster.until_step(&running, reached + 5);
    assert_eq!(cluster.status(&running).unwrap()["generation"], 1);
    let log = std::fs::read_to_string(cluster.path().join("state/audit.jsonl")).unwrap();
    assert!(log.contains(&format!("\"call\":\"remove\",\"target\":\"{done}\",\"result\":\"ok\"")), "{log}");
    // Workers alone have the storage.
    assert_eq!(cluster.run(&["cancel", &running]).0, 0);
    cluster.workers[0].as_mut().unwrap().kill();
    until("an empty cluster", || cluster.nodes().is_empty().then_some(()));
    let (code, _, stderr) = cluster.run(&["jobs", "rm", &running]);
    assert!(code == 2 && stderr.contains("expected a worker that can remove them, got none"), "{stderr}");
    assert!(cluster.status(&running).is_some());
}

#[test]
fn unfinished_checkpoints_go_with_the_next_commit_and_with_the_end_of_the_job() {
    let cluster = Cluster::start(1);
    let job = cluster.submit(&with(&[ENDLESS, "checkpoint.every=10"]), &[]);
    cluster.until_step(&job, 12);
    let folder = cluster.path().join("storage/jobs").join(&job);
    let leave = |step: u64| {
        let part = folder.join(format!("checkpoints/step-{step:08}.g1.part"));
        std::fs::create_dir(&part).unwrap();
        std::fs::write(part.join("rank-00000.safetensors"), "half").unwrap();
        part
    };
    let (past, future) = (leave(3), leave(90_000));
    let newest = committed(&folder).last().copied();
    until("two more commits", || {
        (committed(&folder).last().copied() > newest.map(|step| step + 10)).then_some(())
    });
    until("the end of what is past", || (!past.exists()).then_some(()));
    assert!(future.exists(), "it may be written still");
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    until("the end of what is not finished", || {
        let names = folder.join("checkpoints").read_dir().unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        (!names.collect::<Vec<_>>().iter().any(|name| name.ends_with(".part"))).then_some(())
    });
    assert!(!committed(&folder).is_empty(), "what was committed stays");
}

/// Whether a thread of a process writes a checkpoint.
fn writes_a_checkpoint(process: &Process) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    // One may end meanwhile.
    let name =
        |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.flatten().any(|task| name(task).trim() == "checkpoint")
}

#[test]
fn a_part_that_is_written_when_its_job_has_ended_does_not_stay() {
    let mut cluster = Cluster::start(0);
    // The second part is slow, and begins only then.
    let slow = [("FAILPOINTS", "checkpoint.write-begins=1*off->sleep(5000)".to_owned())];
    cluster.workers.push(Some(cluster.worker_with(0, &slow)));
    until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    let job = cluster.submit(&with(&[ENDLESS, "checkpoint.every=10"]), &[]);
    let worker = cluster.workers[0].as_ref().unwrap();
    let folder = cluster.path().join("storage/jobs").join(&job);
    until("the first checkpoint", || (committed(&folder) == [10]).then_some(()));
    until("the second part", || writes_a_checkpoint(worker).then_some(()));
    cluster.until_step(&job, 20);
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    until("the end of the writing", || (!writes_a_checkpoint(worker)).then_some(()));
    let left = folder.join("checkpoints").read_dir().unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.contains(".part")), "{left:?}");
    assert_eq!(committed(&folder), [10], "what was committed stays");
}

/// A file system of its own, of so many bytes.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this process may not mount.
    fn at(at: PathBuf, bytes: u64) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let data = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount("small", &at, "tmpfs", MountFlags::empty(), data.as_c_str()).ok()?;
        Some(SmallDisk(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

/// What all files below a folder take.
fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // What goes meanwhile takes nothing.
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        found => found.map_or(0, |found| found.len()),
    };
    entries.map(bytes).sum()
}

#[test]
fn a_job_stays_within_its_quota_and_one_that_cannot_is_refused() {
    let mut cluster = Cluster::start(1);
    let job = cluster.submit(&with(&["training.steps=4"]), &[]);
    cluster.finish(&job);
    let jobs = cluster.path().join("storage/jobs");
    let checkpoint = size(&jobs.join(&job).join("checkpoints/step-00000004"));
    let restart = |cluster: &mut Cluster, quota: u64| {
        cluster.orchestrator.kill();
        cluster.start_orchestrator(&["--job-quota", &quota.to_string()]);
        until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    };
    restart(&mut cluster, 3 * checkpoint);
    let mut submit = vec!["submit", "tiny", "--set", "model.config=model.json"];
    let changes =
        with(&["training.steps=60", "training.sequence_length=32", "training.validation_sequences=0"]);
    changes.iter().for_each(|change| submit.extend(["--set", change]));
    let (code, _, stderr) = cluster.run(&submit);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("checkpoint: expected a job whose folder needs ") && stderr.contains("--job-quota"),
        "{stderr}"
    );
    // Twenty checkpoints are asked for, and there is room for seven.
    let quota = 7 * checkpoint;
    restart(&mut cluster, quota);
    let job = cluster.submit(&with(&["checkpoint.keep=20", "checkpoint.every=2"]), &[]);
    let mut most = 0;
    until("the end of the job", || {
        most = most.max(bytes_below(&jobs.join(&job)));
        let status = cluster.status(&job)?;
        assert_ne!(status["state"], "failed", "{status}");
        (status["state"] == "done").then_some(())
    });
    assert!(most <= quota && most > 3 * checkpoint, "{most} of {quota}");
    let left = committed(&jobs.join(&job));
    assert!(left.contains(&60) && (2..=6).contains(&left.len()), "{left:?}");
}

#[test]
fn little_room_is_warned_of_before_the_first_checkpoint() {
    let mut cluster = Cluster::start(0);
    // A checkpoint of it takes some 300 KB.
    let Some(_disk) = SmallDisk::at(cluster.path().join("storage"), 384 << 10) else {
        return eprintln!("skipped: this process may not mount");
    };
    cluster.workers.push(Some(cluster.worker(0)));
    let job = cluster.submit(&with(&[ENDLESS, "checkpoint.every=1000000"]), &[]);
    let warning = until("a warning", || {
        Some(cluster.status(&job)?["warning"].as_str()?.to_owned()).filter(|warning| !warning.is_empty())
    });
    assert!(warning.starts_with("the storage has room for "), "{warning}");
    assert!(committed(&cluster.path().join("storage/jobs").join(&job)).is_empty());
}

#[test]
fn little_room_is_warned_of_before_a_write_fails() {
    let cluster = Cluster::start(1);
    let job = cluster.submit(&with(&["training.steps=4"]), &[]);
    cluster.finish(&job);
    let checkpoint = cluster.path().join("storage/jobs").join(&job).join("checkpoints/step-00000004");
    let checkpoint = size(&checkpoint);
    assert_eq!(cluster.status(&job).unwrap()["warning"], "");
    drop(cluster);
    let mut cluster = Cluster::start(0);
    // Room for less than five: up to three stay, and the next one is written beside them.
    let Some(_disk) = SmallDisk::at(cluster.path().join("storage"), checkpoint * 47 / 10) else {
        return eprintln!("skipped: this process may not mount");
    };
    cluster.workers.push(Some(cluster.worker(0)));
    let job = cluster.submit(&with(&[ENDLESS, "checkpoint.keep=2"]), &[]);
    let warning = until("a warning", || {
        let status = cluster.status(&job)?;
        assert_ne!(status["state"], "failed", "{status}");
        Some(status["warning"].as_str()?.to_owned()).filter(|warning| !warning.is_empty())
    });
    assert!(
        warning.starts_with("the storage has room for ") && warning.contains(", and a checkpoint takes ")
    );
    assert!(cluster.run(&["status", &job]).1.contains("warning: the storage has room for "));
    until("more checkpoints", || {
        (committed(&cluster.path().join("storage/jobs").join(&job)).last()? > &16).then_some(())
    });
    let log = cluster.run(&["logs", &job]).1;
    let line = log.lines().find(|line| line.contains("the storage has room for ")).unwrap();
    assert!(line.contains("WARN"), "{line}");
    assert!(!log.contains("No space left"), "{log}");
}
