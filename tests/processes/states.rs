//! Another state over the same storage: what the first one left there stays, and ranks that it had running are not lost.

use std::collections::BTreeMap;
use std::path::Path;

use crate::cluster::{Cluster, ENDLESS, committed, curve, until};

/// Every file below a folder, with what it holds.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.display().to_string(), std::fs::read(&path).unwrap());
        }
    }
    all
}

/// The folders of jobs, without those of these names and those that are only being made.
fn folders(cluster: &Cluster, but: &[&str]) -> Vec<String> {
    let names = std::fs::read_dir(cluster.path().join("storage/jobs")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.') && !but.contains(&name.as_str())).collect()
}

#[test]
fn a_fresh_state_neither_changes_nor_resumes_from_files_of_another_state() {
    let mut cluster = Cluster::start(5);
    let first = cluster.submit(&["training.seed=7", "checkpoint.save_model=true"], &[]);
    drop(cluster.finish(&first));
    let left = files(&cluster.path().join("storage/jobs"));
    assert!(left.keys().any(|path| path.contains("job-1/model/")), "{:?}", left.keys());

    cluster.orchestrator.kill();
    cluster.start_orchestrator_with("other-state");
    until("all workers", || (cluster.nodes().len() == 5).then_some(()));
    let changes = ["training.seed=1", "checkpoint.every=10", ENDLESS];
    let job = cluster.submit(&changes, &[]);
    assert_eq!(job, "job-1");
    until("a folder of its own", || (folders(&cluster, &["job-1"]).len() == 1).then_some(()));
    let own = cluster.path().join("storage/jobs").join(&folders(&cluster, &["job-1"])[0]);
    // A rank and the one that keeps its state: the job goes back to a checkpoint, which must be one of its own.
    until("a second checkpoint", || (committed(&own).last() >= Some(&20)).then_some(()));
    let victims = [0, 2].map(|rank| cluster.host_of(&job, rank));
    victims.into_iter().for_each(|victim| cluster.workers[victim].as_mut().unwrap().kill());
    cluster.workers[victims[0]] = Some(cluster.worker(victims[0]));
    until("another generation", || (cluster.status(&job)?["generation"].as_u64()? >= 2).then_some(()));
    let made = cluster.ten_more_steps(&job);
    assert_eq!(curve(&made), curve(&cluster.undisturbed(&changes, made.len())));
    // Lines of ranks wait a moment for their like.
    let reported = format!("the files of the job are in {}", own.canonicalize().unwrap().display());
    until("the lines of its log", || {
        let (_, log, _) = cluster.run(&["logs", &job]);
        (log.contains("resume from the checkpoint of step") && log.contains(&reported)).then_some(())
    });
    assert!(committed(&own).last() >= Some(&20), "{:?}", committed(&own));
    assert!(left.iter().all(|(path, bytes)| std::fs::read(path).ok().as_ref() == Some(bytes)));
}

#[test]
fn ranks_of_a_lost_state_save_their_step_before_their_slots_are_reused() {
    let mut cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS, "checkpoint.every=1000000"], &[]);
    cluster.until_step(&job, 10);
    let reported = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.orchestrator.kill();
    cluster.start_orchestrator_with("other-state");
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    let next = cluster.submit(&[], &[]);
    assert_eq!(cluster.finish(&next).len(), 60);
    let kept = committed(&cluster.path().join("storage/jobs/job-1"));
    assert!(kept.len() == 1 && kept[0] >= reported, "{kept:?} {reported}");
    let reported = cluster.orchestrator.stderr();
    assert!(
        reported.contains(&format!("is released: step {} is saved in its folder", kept[0])),
        "{reported}"
    );
}

#[test]
fn two_clusters_on_one_storage_keep_out_of_each_others_folders() {
    let one = Cluster::start(4);
    let other = Cluster::start_beside(&one, 4);
    let (first, second) = (one.submit(&["training.seed=3"], &[]), other.submit(&["training.seed=4"], &[]));
    assert_eq!(first, second);
    let (first, second) = (curve(&one.finish(&first)), curve(&other.finish(&second)));
    assert_ne!(first, second);
    assert_eq!(folders(&one, &[]).len(), 2);
    let again = other.submit(&["training.seed=3"], &[]);
    assert_eq!(curve(&other.finish(&again)), first);
    for folder in folders(&one, &[]) {
        assert_eq!(committed(&one.path().join("storage/jobs").join(folder)).last(), Some(&60));
    }
}

/// All files of a folder, in another one.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn an_older_copy_of_the_state_is_refused_by_what_the_workers_have_seen() {
    let mut cluster = Cluster::start(4);
    let changes = [ENDLESS, "checkpoint.every=10"];
    let job = cluster.submit(&changes, &[]);
    cluster.until_step(&job, 10);
    let kept = |name: &str| cluster.path().join(name);
    let (state, old, new) = (kept("state"), kept("old"), kept("new"));
    cluster.orchestrator.kill();
    copy(&state, &old);
    cluster.start_orchestrator(&[]);
    let reached = until("the job", || cluster.status(&job)?["step"].as_u64());
    cluster.until_step(&job, reached + 20);
    cluster.orchestrator.kill();
    std::fs::rename(&state, &new).unwrap();
    std::fs::rename(&old, &state).unwrap();
    cluster.start_orchestrator(&[]);
    assert_eq!(cluster.orchestrator.wait(), Some(1));
    let words = cluster.orchestrator.stderr();
    assert!(
        words.contains("the state is an older copy: it has ") && words.contains("newest copy"),
        "{words}"
    );
    // Nothing has come of it: with the newest copy the same formation continues.
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&new, &state).unwrap();
    cluster.start_orchestrator(&[]);
    until("the job", || (cluster.status(&job)?["state"] == "running").then_some(()));
    assert_eq!(cluster.status(&job).unwrap()["generation"], 1);
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&changes, steps.len())));
}
