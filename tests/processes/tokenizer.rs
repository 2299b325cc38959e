//! A job with a tokenizer of its own: what it leaves in the storage is read with that tokenizer.

use std::path::{Path, PathBuf};

use crate::cluster::{Cluster, Environment, spawn_with, until};
use crate::server::Server;

/// What the job of these tests reads below the data root.
const FILES: [&str; 2] = ["wordpiece.json", "text.jsonl"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf")
}

#[test]
fn a_job_takes_its_tokenizer_and_its_end_of_a_document_along() {
    let cluster = Cluster::start(0);
    let data = cluster.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for file in FILES {
        std::fs::copy(fixtures().join(file), data.join(file)).unwrap();
    }
    trains_below(&cluster, "data", &Environment::new());
}

#[test]
fn a_job_reads_below_a_data_root_in_an_object_store() {
    let (cluster, server) = (Cluster::start(0), Server::start());
    for file in FILES {
        server.put(&format!("data/{file}"), std::fs::read(fixtures().join(file)).unwrap());
    }
    let environment = server.environment(&cluster.path().join("cache"));
    trains_below(&cluster, "s3://bucket/data", &environment.into_iter().collect());
    assert!(server.requests().contains(&"GET bucket/data/text.jsonl".to_owned()), "{:?}", server.requests());
}

/// Trains on [`FILES`] below a data root, and reads what the job leaves.
fn trains_below(cluster: &Cluster, root: &str, environment: &Environment) {
    let model =
        crate::cluster::MODEL.replace("\"vocab_size\": 260", "\"vocab_size\": 701, \"eos_token_id\": 256");
    std::fs::write(cluster.path().join("model.json"), model).unwrap();
    let worker = ["worker", "--join", &cluster.address, "--storage", "storage", "--data-root", root];
    let _worker = spawn_with(cluster.path(), "worker", &worker, environment);
    until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    let one_rank = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b", "training.steps=4"];
    let changes =
        ["data.paths=[\"text.jsonl\"]", "tokenizer.path=wordpiece.json", "checkpoint.save_model=true"];
    let reported = [
        "tokenizer.end_of_document=\"[SEP]\"",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
    ];
    let job = cluster.submit(&[&one_rank[..], &changes, &reported].concat(), &[]);
    cluster.finish(&job);
    let job = format!("storage/jobs/{job}");
    for model in [format!("{job}/model"), format!("{job}/checkpoints/step-00000004")] {
        let read = |file: &str| -> serde_json::Value {
            let text = std::fs::read(cluster.path().join(&model).join(file)).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        assert_eq!(read("config.json")["eos_token_id"], 3, "{model}");
        assert_eq!(read("tokenizer_config.json")["eos_token"], "[SEP]", "{model}");
        let (code, out, reported) =
            cluster.run(&["generate", &model, "--prompt", "the ranks", "--tokens", "3"]);
        assert!(code == 0 && out.starts_with("the ranks"), "{model}: {out}{reported}");
    }
}
