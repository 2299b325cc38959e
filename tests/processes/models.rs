//! Models that differ in what ranks keep of them: lost ranks resume from memory, and the loss curve does not show it.

use serde_json::Value;

use crate::cluster::{Cluster, ENDLESS, JOB, MODEL, curve, until};

/// The steps of a job of which two workers are killed, one after the other, while it has nothing on disk to resume from.
fn killed_twice(cluster: &mut Cluster, changes: &[&str]) -> Vec<Value> {
    let job = cluster.submit(changes, &[]);
    for (losses, rank) in [(1, 0), (2, 3)] {
        cluster.until_step(&job, 8 * losses);
        let victim = cluster.host_of(&job, rank);
        cluster.workers[victim].as_mut().unwrap().kill();
        until("another generation", || (cluster.status(&job)?["losses"] == losses).then_some(()));
        cluster.workers[victim] = Some(cluster.worker(victim));
        until("a full house", || (cluster.nodes().len() == 5).then_some(()));
    }
    let steps = cluster.ten_more_steps(&job);
    let (_, log, _) = cluster.run(&["logs", &job]);
    assert_eq!(log.matches("from memory after step ").count(), 2, "{log}");
    steps
}

/// The steps that the same recipe makes in one process.
fn in_one_process(cluster: &Cluster, changes: &[&str]) -> Vec<Value> {
    let mut arguments = vec!["train", "tiny", "--name", "alone"];
    for change in JOB.iter().chain(changes) {
        arguments.extend(["--set", change]);
    }
    let (code, _, errors) = cluster.run(&arguments);
    assert_eq!(code, 0, "{errors}");
    let text = std::fs::read_to_string(cluster.path().join("runs/alone/metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn assert_recovers(model: &Value, more: &[&str]) {
    let mut cluster = Cluster::start(5);
    std::fs::write(cluster.path().join("other.json"), model.to_string()).unwrap();
    let changes = [&["model.config=other.json", "checkpoint.every=1000000"][..], more].concat();
    let endless = [&changes[..], &[ENDLESS]].concat();
    let steps = killed_twice(&mut cluster, &endless);
    assert_eq!(steps.last().unwrap()["generation"], 3);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&endless, steps.len())));

    let short = [&changes[..], &["training.steps=10"]].concat();
    let job = cluster.submit(&short, &[]);
    assert_eq!(curve(&cluster.finish(&job)), curve(&in_one_process(&cluster, &short)));
}

fn model(changes: &[(&str, Value)]) -> Value {
    let mut model: Value = serde_json::from_str(MODEL).unwrap();
    for (key, value) in changes {
        model[key] = value.clone();
    }
    model
}

/// Gates without a bias keep counts only.
#[test]
fn a_model_without_gate_biases_recovers_from_memory() {
    let v2 = model(&[
        ("model_type", "deepseek_v2".into()),
        ("topk_method", "greedy".into()),
        ("n_group", 1.into()),
        ("norm_topk_prob", false.into()),
        ("num_nextn_predict_layers", 0.into()),
    ]);
    assert_recovers(&v2, &["mtp.weight=0", "balance.bias_speed=0", "balance.sequence_alpha=0.01"]);
}

/// Embedding and head are on different ranks, of which one is lost, then the other.
#[test]
fn a_tied_model_recovers_from_memory() {
    assert_recovers(&model(&[("tie_word_embeddings", true.into())]), &["parallel.schedule=1f1b"]);
}
