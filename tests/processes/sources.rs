//! Jobs whose data and weights are in an object store: read where the operator of a worker has allowed it, and nowhere else.

use crate::cluster::{Cluster, Environment, Process, curve, spawn_with, until};
use crate::places::outcome;
use crate::server::Server;

/// A cluster without workers, and a store with a text below `data/` and beside it.
fn with_store() -> (Cluster, Server) {
    let (cluster, server) = (Cluster::start(0), Server::start());
    let text = include_str!("cluster.rs");
    for key in ["data/text.txt", "data-2/text.txt", "other.txt"] {
        server.put(key, text);
    }
    server.set_faults(|_, _| None);
    let data = cluster.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("text.txt"), text).unwrap();
    (cluster, server)
}

/// A worker with room for a job, which reads below these prefixes.
fn worker(cluster: &Cluster, server: &Server, allowed: &[&str]) -> Process {
    let environment: Environment = server.environment(&cluster.path().join("cache")).into_iter().collect();
    let mut arguments = vec!["worker", "--join", &cluster.address, "--storage", "storage", "--slots", "4"];
    arguments.extend(["--data-root", "data"]);
    allowed.iter().for_each(|prefix| arguments.extend(["--allow-source", prefix]));
    let worker = spawn_with(cluster.path(), "worker", &arguments, &environment);
    until("the worker", || (cluster.nodes().len() == 1).then_some(()));
    worker
}

fn paths(path: &str) -> String {
    format!("data.paths=[{path:?}]")
}

/// What is said of a submission that is refused.
fn refused(cluster: &Cluster, change: &str) -> String {
    let (code, out, said) = cluster.run(&["submit", "tiny", "--set", change]);
    assert_eq!((code, out.as_str()), (2, ""), "{change}: {said}");
    said
}

#[test]
fn a_job_reads_of_a_store_what_its_worker_allows_and_gets_the_bits_of_local_files() {
    let (cluster, server) = with_store();
    let _worker = worker(&cluster, &server, &["s3://bucket/data", "s3://bucket/models"]);
    let steps = |data: &str| {
        let job = cluster.submit(&["training.steps=4", "checkpoint.save_model=true", &paths(data)], &[]);
        (curve(&cluster.finish(&job)), job)
    };
    let (local, job) = steps("text.txt");
    assert_eq!(steps("s3://bucket/data/text.txt").0, local);
    assert_eq!(server.requests(), ["HEAD bucket/data/text.txt", "GET bucket/data/text.txt"]);

    // Weights to begin with are another kind of source.
    let model = cluster.path().join(format!("storage/jobs/{job}/model"));
    std::fs::create_dir(cluster.path().join("data/model")).unwrap();
    for file in std::fs::read_dir(model).unwrap() {
        let (path, name) = (file.as_ref().unwrap().path(), file.unwrap().file_name().into_string().unwrap());
        server.put(&format!("models/a/{name}"), std::fs::read(&path).unwrap());
        std::fs::copy(&path, cluster.path().join("data/model").join(name)).unwrap();
    }
    let init = |from: &str| {
        let changes = ["training.steps=3", &paths("text.txt"), &format!("model.init={from:?}")];
        curve(&cluster.finish(&cluster.submit(&changes, &[])))
    };
    let begun = init("model");
    assert_eq!(init("s3://bucket/models/a"), begun);
    assert_ne!(begun[..3], local[..3]);

    // The worker lives on; what a later job reads is what is there then.
    server.put("data/text.txt", "another text, which is as long as it has to be\n".repeat(400));
    assert_ne!(steps("s3://bucket/data/text.txt").0, local);
}

#[test]
fn what_no_worker_allows_is_refused_when_it_is_submitted() {
    let (cluster, server) = with_store();
    let _worker = worker(&cluster, &server, &["s3://bucket/data"]);
    for (key, change, location) in [
        (
            "data.paths",
            "data.paths=[\"s3://bucket/data/text.txt\", \"s3://bucket/data-2/text.txt\"]",
            "s3://bucket/data-2/text.txt",
        ),
        ("data.paths", "data.paths=[\"s3://bucket-evil/data/text.txt\"]", "s3://bucket-evil/data/text.txt"),
        ("data.paths", "data.paths=[\"gs://bucket/data/text.txt\"]", "gs://bucket/data/text.txt"),
        ("data.validation", "data.validation=[\"s3://bucket/other.txt\"]", "s3://bucket/other.txt"),
        ("tokenizer.path", "tokenizer.path=\"s3://bucket/tokenizer.json\"", "s3://bucket/tokenizer.json"),
        ("model.init", "model.init=\"https://127.0.0.1/model\"", "https://127.0.0.1/model"),
    ] {
        let said = refused(&cluster, change);
        let words = format!(
            "{key}: expected a location below s3://bucket/data (worker --allow-source), got \"{location}\""
        );
        assert!(said.contains(&words), "{said}");
        assert_eq!(said.matches(": expected ").count(), 1, "what is allowed is no fault: {said}");
    }
    let around = refused(&cluster, "data.paths=[\"s3://bucket/data/../other.txt\"]");
    let words = "data.paths: s3://bucket/data/../other.txt: expected a key without empty parts, . and ..";
    assert!(around.contains(words), "{around}");
    assert_eq!(server.requests(), [""; 0], "nothing is asked of a store");
}

#[test]
fn a_worker_that_comes_later_looks_itself() {
    let (cluster, server) = with_store();
    let change = paths("s3://bucket/data/text.txt");
    // Nobody is there who could be asked.
    let job = cluster.submit(&["training.steps=2", &change], &[]);
    let mut strict = worker(&cluster, &server, &[]);
    let (state, words) = outcome(&cluster, &job);
    let fault = "data.paths: expected a path below the workers' data root, since they allow no location \
                 (worker --allow-source), got \"s3://bucket/data/text.txt\"";
    assert!(state == "failed" && words.contains(fault), "{state}: {words}");
    assert_eq!(server.requests(), [""; 0], "nothing is asked of a store");
    strict.kill();
    until("an empty house", || cluster.nodes().is_empty().then_some(()));
    let _worker = worker(&cluster, &server, &["s3://bucket"]);
    assert_eq!(cluster.run(&["retry", &job]).0, 0);
    assert_eq!(outcome(&cluster, &job).0, "done");
}

#[test]
fn a_prefix_that_is_none_is_refused_with_the_option() {
    let cluster = Cluster::start(0);
    let arguments = ["worker", "--join", &cluster.address, "--storage", "storage", "--allow-source", "data"];
    let (code, _, said) = cluster.run(&arguments);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("--allow-source: expected a prefix as s3://BUCKET/PREFIX"), "{said}");
}
