//! What is refused: with a clear message and the right exit code, and nothing is disturbed.

use crate::cluster::{Cluster, spawn};

#[test]
fn impossible_input_is_refused_with_a_message() {
    let cluster = Cluster::start(1);
    for (arguments, code, words) in [
        (&["status", "job-7"][..], 2, "expected the id of a job, got \"job-7\""),
        (&["watch", "nonsense"], 2, "expected the id of a job"),
        (&["drain", "nowhere"], 2, "expected that of a member, got \"nowhere\""),
        (&["submit", "tiny", "--set", "training.stpes=3"], 2, "training.stpes"),
        (&["submit", "tiny", "--set", "data.paths=[\"../secrets\"]"], 2, "below the workers' data root"),
        (&["submit", "tiny", "--set", "data.paths=[\"/etc/passwd\"]"], 2, "below the workers' data root"),
        (
            &["submit", "tiny", "--set", "data.paths=[\"s3://bucket/text\"]"],
            2,
            "below the workers' data root",
        ),
        (
            // An address of nobody, on a network: whom this worker would announce loopback to.
            &["worker", "--join", "192.0.2.1:7070", "--storage", "elsewhere"],
            2,
            "--listen 127.0.0.1:0: expected an address of this host that other workers can reach",
        ),
        (&["submit", "tiny", "--min-ranks", "99"], 2, "min_ranks: expected at most"),
        (&["jobs", "--orchestrator", "127.0.0.1:1"], 1, "expected an orchestrator"),
    ] {
        let (got, out, stderr) = cluster.run(arguments);
        assert_eq!((got, out.as_str()), (code, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
    }
    assert!(!cluster.path().join("elsewhere").exists(), "a refused worker makes nothing");
    let (_, jobs, _) = cluster.run(&["jobs", "--format", "json"]);
    assert_eq!(jobs.trim(), r#"{"jobs":[]}"#);
}

#[test]
fn a_second_orchestrator_on_one_state_is_refused() {
    let cluster = Cluster::start(0);
    let (code, _, stderr) = cluster.run(&["orchestrator", "--state", "state", "--listen", "127.0.0.1:0"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("state"), "{stderr}");
}

#[test]
fn a_worker_with_another_storage_is_refused() {
    let cluster = Cluster::start(1);
    let arguments = ["worker", "--join", &cluster.address, "--storage", "elsewhere"];
    let mut worker = spawn(cluster.path(), "foreign", &arguments);
    assert_eq!(worker.wait(), Some(2));
    assert!(worker.stderr().contains("expected the cluster's shared storage"), "{}", worker.stderr());
    assert_eq!(cluster.nodes().len(), 1);
}
