//! Rights that are taken back while they are in use: streams end, the worker is no member any more, everybody else goes on.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tonic::Code;
use tonic::codegen::tokio_stream;
use tonic::transport::Identity;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::cluster::{Cluster, ENDLESS, Process, Who, spawn, until};
use crate::security::{channel, runtime, with_token};

/// A job of one rank.
const ALONE: [&str; 4] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b", ENDLESS];

/// How long an open stream may outlive the right to it.
const GRACE: Duration = Duration::from_secs(10);

/// Takes the lines of these names out of the tokens.
fn remove_lines(certs: &Path, names: &[&str]) {
    let tokens = std::fs::read_to_string(certs.join("tokens")).unwrap();
    let is_kept = |line: &&str| !names.contains(&line.split(' ').next().unwrap());
    let kept: Vec<&str> = tokens.lines().filter(is_kept).collect();
    std::fs::write(certs.join("tokens"), kept.join("\n") + "\n").unwrap();
}

/// A client that follows a job.
fn follow(cluster: &Cluster, who: &Who, name: &str, command: &[&str]) -> Process {
    let orchestrator = ["--orchestrator", &cluster.address];
    spawn(cluster.path(), name, &[command, &orchestrator, &who.arguments()].concat())
}

fn assert_ends(mut process: Process, since: Instant, words: &str) {
    assert_eq!(process.wait(), Some(2), "{}", process.stderr());
    assert!(since.elapsed() < GRACE, "{:?}", since.elapsed());
    assert!(process.stderr().contains(words), "{}", process.stderr());
}

#[test]
fn streams_end_with_the_token_that_opened_them() {
    let mut cluster = Cluster::secured(1);
    let certs = cluster.path().join("certs");
    let [eve, ann] = ["eve", "ann"].map(|name| Who::issue(cluster.path(), "certs", name, "view"));
    let job = cluster.submit(&ALONE, &[]);
    cluster.until_step(&job, 3);
    let watch = follow(&cluster, &eve, "watch", &["watch", &job]);
    let logs = follow(&cluster, &eve, "logs", &["logs", &job, "--follow"]);
    let other = follow(&cluster, &ann, "other", &["watch", &job]);
    std::thread::sleep(Duration::from_secs(1));
    remove_lines(&certs, &["eve", "the-worker"]);
    let since = Instant::now();
    let words = "token: expected one issued by this cluster, got another";
    assert_ends(watch, since, words);
    assert_ends(logs, since, words);
    until("an empty cluster", || cluster.nodes().is_empty().then_some(()));
    assert!(since.elapsed() < GRACE, "{:?}", since.elapsed());
    let mut worker = cluster.workers[0].take().unwrap();
    assert_eq!(worker.wait(), Some(2), "{}", worker.stderr());
    assert!(worker.stderr().contains(words), "{}", worker.stderr());
    assert_eq!(cluster.status(&job).unwrap()["state"], "recovering");
    let log = cluster.run(&["logs", &job]).1;
    assert!(log.contains(&format!("is no member any more: {words}")), "{log}");
    assert!(!other.stderr().contains("token"), "{}", other.stderr());
}

#[test]
fn a_revoked_certificate_ends_its_streams_and_opens_no_connection() {
    let cluster = Cluster::secured(0);
    let [bob, ann] = ["bob", "ann"].map(|name| Who::issue(cluster.path(), "certs", name, "view"));
    let job = cluster.submit(&ALONE, &[]);
    let logs = follow(&cluster, &bob, "logs", &["logs", &job, "--follow"]);
    std::thread::sleep(Duration::from_secs(1));
    // A token of somebody else's does not help.
    let run = |who: &Who, token: &Who| {
        let arguments = ["jobs", "--tls", &who.tls, "--token", &token.token];
        cluster.run_as_nobody(&arguments)
    };
    assert_eq!(run(&bob, &bob).0, 0);
    let since = Instant::now();
    let revoke = ["certs", "revoke", "--dir", "certs", "--name", "bob"];
    assert_eq!(cluster.run(&revoke).0, 0);
    let tokens = std::fs::read_to_string(cluster.path().join("certs/tokens")).unwrap();
    assert!(!tokens.contains("bob ") && tokens.contains("ann "), "{tokens}");
    assert_ends(logs, since, "certificate: that of bob is revoked");
    for token in [&bob, &ann] {
        let (code, _, stderr) = run(&bob, token);
        assert_eq!(code, 1, "{stderr}");
    }
    let log = cluster.orchestrator.stderr();
    assert!(log.contains("refused a connection: certificate: that of bob is revoked"), "{log}");
    assert_eq!(run(&ann, &ann).0, 0);
    let (code, _, stderr) = cluster.run(&["certs", "revoke", "--dir", "certs", "--name", "nobody"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--name: expected one that was issued, got \"nobody\""), "{stderr}");
}

#[test]
fn streams_of_services_that_know_no_tokens_end_with_theirs() {
    let cluster = Cluster::secured(0);
    let names = ["eve", "bob", "ann"];
    let [eve, bob, ann] = names.map(|name| Who::issue(cluster.path(), "certs", name, "view"));
    let identity = |who: &Who| {
        let read = |name: &str| std::fs::read(cluster.path().join(&who.tls).join(name)).unwrap();
        Identity::from_pem(read("client.pem"), read("client.key"))
    };
    runtime().block_on(async {
        let mut streams = Vec::new();
        for (who, words) in
            [(&eve, "token: expected one issued"), (&bob, "certificate: that of bob"), (&ann, "")]
        {
            let channel = channel(&cluster, Some(identity(who))).await.unwrap();
            let request = with_token(HealthCheckRequest::default(), &who.token);
            let mut health = HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner();
            assert!(health.message().await.unwrap().is_some());
            let nothing = with_token(tokio_stream::pending(), &who.token);
            let reflection =
                ServerReflectionClient::new(channel).server_reflection_info(nothing).await.unwrap();
            streams.push((health, reflection.into_inner(), words));
        }
        remove_lines(&cluster.path().join("certs"), &["eve"]);
        let revoke = ["certs", "revoke", "--dir", "certs", "--name", "bob"];
        assert_eq!(cluster.run(&revoke).0, 0);
        let (mut health, mut reflection, _) = streams.pop().unwrap();
        for (mut health, mut reflection, words) in streams {
            let health = timeout(GRACE, health.message()).await.expect(words).map(drop);
            let reflection = timeout(GRACE, reflection.message()).await.expect(words).map(drop);
            for ended in [health, reflection] {
                let refused = ended.unwrap_err();
                assert_eq!(refused.code(), Code::Unauthenticated);
                assert!(refused.message().starts_with(words), "{refused}");
            }
        }
        // Those of somebody else go on.
        assert!(timeout(Duration::from_millis(500), health.message()).await.is_err());
        assert!(timeout(Duration::from_millis(500), reflection.message()).await.is_err());
    });
}
