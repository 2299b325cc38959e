//! Storage that is slow, and storage that fails for a while: nobody is ended for it, and the curve is the undisturbed one.

use crate::cluster::{Cluster, committed, curve, until};

fn is_about_storage(cluster: &Cluster, job: &str) -> Option<()> {
    let status = cluster.status(job)?;
    assert_ne!(status["state"], "failed", "{status}");
    status["waiting_for"].as_str()?.starts_with("the storage: ").then_some(())
}

#[test]
fn a_last_checkpoint_that_takes_long_is_waited_for_and_status_says_so() {
    let mut cluster = Cluster::start(0);
    let slow = [("FAILPOINTS", "checkpoint.shard-written=sleep(20000)".to_owned())];
    for number in 0..4 {
        cluster.workers.push(Some(cluster.worker_with(number, &slow)));
    }
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    let job = cluster.submit(&["training.steps=10", "checkpoint.every=0"], &[]);
    until("status that names the storage", || is_about_storage(&cluster, &job));
    assert_eq!(cluster.finish(&job).len(), 10);
    assert_eq!(cluster.status(&job).unwrap()["generation"], 1);
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_tried_again_while_the_training_continues() {
    let cluster = Cluster::start(4);
    let endless = ["training.steps=100000", "checkpoint.every=10"];
    let job = cluster.submit(&endless, &[]);
    cluster.until_step(&job, 15);
    let folder = cluster.path().join("storage/jobs").join(&job);
    let (checkpoints, aside) = (folder.join("checkpoints"), folder.join("aside"));
    // A file where the folder was: whatever is written below it fails.
    std::fs::rename(&checkpoints, &aside).unwrap();
    std::fs::write(&checkpoints, "in the way").unwrap();
    until("status that names the storage", || is_about_storage(&cluster, &job));
    let reached = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.until_step(&job, reached + 20);
    std::fs::remove_file(&checkpoints).unwrap();
    std::fs::rename(&aside, &checkpoints).unwrap();
    let newest = || committed(&folder).last().copied();
    let before = newest();
    until("a checkpoint after the fault", || (newest() > before).then_some(()));
    assert_eq!(cluster.status(&job).unwrap()["generation"], 1);
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&endless, steps.len())));
}
