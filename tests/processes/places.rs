//! Places that are not what a job expects: data that is no file, or is elsewhere than it seems.

use std::path::Path;

use rustix::fs::{CWD, Mode, mkfifoat};

use crate::cluster::{Cluster, ENDLESS, Process, spawn_after, spawn_with, until};

/// A cluster with one worker, of four slots, that reads data in the folder `data`.
pub fn with_data() -> (Cluster, Process) {
    let cluster = Cluster::start(0);
    let data = cluster.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("text.txt"), include_str!("cluster.rs")).unwrap();
    let worker = data_worker(cluster.path(), &cluster.address);
    until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    (cluster, worker)
}

fn data_worker(dir: &Path, address: &str) -> Process {
    let arguments = [
        "worker",
        "--join",
        address,
        "--storage",
        "storage",
        "--data-root",
        "data",
        "--slots",
        "4",
        "--labels",
        "node=here",
    ];
    // What is free goes back to the system at once: what is resident is what the process needs, not what it keeps in hand.
    spawn_with(dir, "worker", &arguments, &vec![("MIMALLOC_PURGE_DELAY", "0".to_owned())])
}

/// How a job has ended, and in which words.
pub fn outcome(cluster: &Cluster, job: &str) -> (String, String) {
    until("the end of the job", || {
        let status = cluster.status(job)?;
        let text = |key: &str| status[key].as_str().unwrap().to_owned();
        ["done", "failed"].contains(&text("state").as_str()).then(|| (text("state"), text("outcome")))
    })
}

#[test]
fn data_that_is_no_file_fails_its_job_in_words_and_holds_no_slot() {
    let (cluster, _worker) = with_data();
    let data = cluster.path().join("data");
    std::fs::create_dir(data.join("folder")).unwrap();
    for pipe in ["pipe", "rows.jsonl", "tokenizer.json", "folder/pipe"] {
        mkfifoat(CWD, data.join(pipe), Mode::RUSR | Mode::WUSR).unwrap();
    }
    std::os::unix::fs::symlink("pipe", data.join("link")).unwrap();
    for (change, named) in [
        ("data.paths=[\"pipe\"]", "data/pipe: expected a file or a folder, got a named pipe"),
        ("data.paths=[\"link\"]", "data/link: expected a file or a folder, got a named pipe"),
        ("data.paths=[\"rows.jsonl\"]", "data/rows.jsonl: expected a file or a folder, got a named pipe"),
        ("data.paths=[\"folder\"]", "data/folder/pipe: expected a file or a folder, got a named pipe"),
        (
            "tokenizer.path=\"tokenizer.json\"",
            "data/tokenizer.json: expected a tokenizer.json, got a named pipe",
        ),
    ] {
        let (state, words) = outcome(&cluster, &cluster.submit(&[change], &[]));
        assert_eq!(state, "failed", "{change}: {words}");
        assert!(words.contains(named), "{change}: {words}");
    }
    let last = cluster.submit(&["training.steps=2", "data.paths=[\"text.txt\"]"], &[]);
    assert_eq!(outcome(&cluster, &last).0, "done");
}

#[test]
fn links_lead_nowhere_outside_of_the_data_root() {
    use std::os::unix::fs::symlink;
    let (cluster, _worker) = with_data();
    let (data, outside) = (cluster.path().join("data"), cluster.path().join("outside"));
    std::fs::create_dir_all(data.join("folder/more")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::copy(data.join("text.txt"), outside.join("secret.txt")).unwrap();
    std::fs::copy(data.join("text.txt"), data.join("folder/more/own.txt")).unwrap();
    symlink(outside.join("secret.txt"), data.join("file")).unwrap();
    symlink("../outside", data.join("away")).unwrap();
    symlink("../../outside/secret.txt", data.join("folder/found")).unwrap();
    symlink("folder/more", data.join("near")).unwrap();
    for path in ["file", "away", "away/secret.txt", "folder"] {
        let (state, words) = outcome(&cluster, &cluster.submit(&[&format!("data.paths=[{path:?}]")], &[]));
        assert_eq!(state, "failed", "{path}: {words}");
        assert!(words.contains("got a link that leads out of ") && words.contains(path), "{path}: {words}");
    }
    let (state, words) = outcome(&cluster, &cluster.submit(&["tokenizer.path=\"file\""], &[]));
    assert!(state == "failed" && words.contains("got a link that leads out of "), "{words}");
    let own = cluster.submit(&["training.steps=2", "data.paths=[\"near\"]"], &[]);
    assert_eq!(outcome(&cluster, &own).0, "done", "links within the root are followed");
}

#[test]
fn a_storage_that_goes_away_is_named_with_its_mark_and_not_made_anew() {
    let (cluster, _worker) = with_data();
    let (storage, away) = (cluster.path().join("storage"), cluster.path().join("away"));
    let job = cluster.submit(&[ENDLESS, "checkpoint.every=1000000"], &[]);
    cluster.until_step(&job, 1);
    let mark = std::fs::read_to_string(storage.join(".contraflow-storage")).unwrap();
    // As if it were unmounted: an empty folder is left in its place.
    std::fs::rename(&storage, &away).unwrap();
    std::fs::create_dir(&storage).unwrap();
    assert_eq!(cluster.run(&["drain", "here"]).0, 0, "a drained job saves its step");
    let words =
        format!("the storage is gone: expected the mark {mark} in .contraflow-storage, got no such file");
    until("the words of the storage", || cluster.run(&["logs", &job]).1.contains(&words).then_some(()));
    assert_eq!(std::fs::read_dir(&storage).unwrap().count(), 0, "nothing is made on the bare mount point");
}

/// Permission bits of everything below a folder, by path.
fn modes(folder: &Path) -> Vec<(String, u32)> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        found.push((path.display().to_string(), metadata.permissions().mode() & 0o777));
        if metadata.is_dir() {
            found.extend(modes(&path));
        }
    }
    found
}

#[test]
fn a_workers_files_are_closed_to_others_and_open_to_the_group_as_the_umask_says() {
    for (umask, group) in [("002", 0o060), ("022", 0o040), ("077", 0)] {
        let cluster = Cluster::start(0);
        let workers: Vec<Process> =
            (0..4).map(|number| spawn_after(&cluster, number, &format!("umask {umask}"))).collect();
        until("all workers", || (cluster.nodes().len() == workers.len()).then_some(()));
        let job = cluster.submit(&["training.steps=4", "checkpoint.save_model=true"], &[]);
        assert_eq!(outcome(&cluster, &job).0, "done");
        let modes = modes(&cluster.path().join("storage"));
        for what in
            ["model.safetensors.index.json", "rank-00003.safetensors", "manifest.json", "owner.json", "jobs"]
        {
            assert!(modes.iter().any(|(path, _)| path.ends_with(what)), "{what}: {modes:?}");
        }
        let wrong = modes.iter().filter(|(_, mode)| mode & 0o067 != group);
        let wrong: Vec<String> = wrong.map(|(path, mode)| format!("{mode:o} {path}")).collect();
        assert!(wrong.is_empty(), "umask {umask}: {wrong:#?}");
    }
}

/// Threads, open files and resident memory of a process. **Units**: the last in KiB.
pub fn resources(process: &Process) -> [u64; 3] {
    let proc = Path::new("/proc").join(process.id().to_string());
    let count = |what: &str| std::fs::read_dir(proc.join(what)).unwrap().count() as u64;
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    [count("task"), count("fd"), resident.trim().trim_end_matches(" kB").parse().unwrap()]
}

#[test]
fn a_worker_needs_no_more_after_many_jobs_than_after_a_few() {
    let (cluster, worker) = with_data();
    let run_jobs = |count: usize| {
        for number in 0..count {
            let (steps, data) = ("training.steps=2", "data.paths=[\"text.txt\"]");
            // Some fail while they form.
            let data = if number % 4 == 3 { "data.paths=[\"missing\"]" } else { data };
            outcome(&cluster, &cluster.submit(&[steps, data], &[]));
        }
        // Threads without work end after ten seconds.
        std::thread::sleep(std::time::Duration::from_secs(12));
        resources(&worker)
    };
    let [threads, files, memory] = run_jobs(12);
    // How much is resident depends on which jobs' threads have met: some MiB more or less from one time to the next, and none of it
    // with the number of jobs. What is lost with each job is seen every time, so the least growth counts: in all no more than 16 MiB
    // in 36 jobs.
    let [mut before, mut least] = [memory, u64::MAX];
    let [mut threads_after, mut files_after] = [threads, files];
    for _ in 0..3 {
        let memory;
        [threads_after, files_after, memory] = run_jobs(12);
        least = least.min(memory.saturating_sub(before));
        before = memory;
    }
    assert!(threads_after <= threads + 2, "threads: {threads}, then {threads_after}");
    assert!(files_after <= files + 2, "open files: {files}, then {files_after}");
    assert!(least <= (16 << 10) / 3, "KiB: {memory}, then {before}; at least {least} more in 12 jobs");
}
