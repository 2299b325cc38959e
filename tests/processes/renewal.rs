//! Certificates and tokens that are renewed while they are in use: nobody is asked to start anything again.

use std::path::Path;
use std::time::{Duration, Instant};

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::cluster::{Cluster, ENDLESS, Process, Who, spawn, until};

/// A job of one rank.
const ALONE: [&str; 4] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b", ENDLESS];

/// How long an open stream may outlive the right to it.
const GRACE: Duration = Duration::from_secs(10);

fn certs(dir: &Path, arguments: &[&str]) -> String {
    let mut process = spawn(dir, "certs", &[&["certs"], arguments].concat());
    assert_eq!(process.wait(), Some(0), "{}", process.stderr());
    process.stderr()
}

fn lines_of(cluster: &Cluster, name: &str) -> Vec<String> {
    let tokens = std::fs::read_to_string(cluster.path().join("certs/tokens")).unwrap();
    tokens.lines().filter(|line| line.split(' ').next() == Some(name)).map(str::to_owned).collect()
}

/// Ends the first line of each of these names.
fn end_first_lines(cluster: &Cluster, names: &[&str]) {
    let path = cluster.path().join("certs/tokens");
    let mut tokens = std::fs::read_to_string(&path).unwrap();
    for name in names {
        let first = &lines_of(cluster, name)[0];
        let mut fields: Vec<&str> = first.split(' ').collect();
        fields[2] = "1000";
        tokens = tokens.replacen(first, &fields.join(" "), 1);
    }
    std::fs::write(path, tokens).unwrap();
}

fn follow(cluster: &Cluster, who: &Who, name: &str, command: &[&str]) -> Process {
    let orchestrator = ["--orchestrator", &cluster.address];
    spawn(cluster.path(), name, &[command, &orchestrator, &who.arguments()].concat())
}

/// Until when the only worker's token is good. **Units**: seconds since 1970.
fn worker_expires(cluster: &Cluster) -> Option<u64> {
    cluster.nodes().first()?["token_expires_unix_s"].as_u64()
}

/// Asserts that a job makes steps for longer than a withdrawn right lasts, in the formation that it began in.
fn assert_undisturbed(cluster: &Cluster, job: &str) {
    let began = Instant::now();
    until("a while to pass", || (began.elapsed() > GRACE).then_some(()));
    let reached = cluster.status(job).unwrap()["step"].as_u64().unwrap();
    cluster.until_step(job, reached + 3);
    let status = cluster.status(job).unwrap();
    assert_eq!((&status["generation"], &status["state"]), (&1.into(), &"running".into()), "{status}");
    assert_eq!(status["losses"], 0, "{status}");
}

#[test]
fn a_renewed_certificate_is_taken_up_by_a_running_worker_and_open_streams_before_the_old_one_ends() {
    let mut cluster = Cluster::secured(1);
    let eve = Who::issue(cluster.path(), "certs", "eve", "view");
    let job = cluster.submit(&ALONE, &[]);
    cluster.until_step(&job, 3);
    let mut watch = follow(&cluster, &eve, "watch", &["watch", &job]);
    let mut logs = follow(&cluster, &eve, "logs", &["logs", &job, "--follow"]);
    let before = worker_expires(&cluster).unwrap();
    for name in ["the-worker", "eve"] {
        certs(cluster.path(), &["renew", "--dir", "certs", "--name", name, "--expires", "700"]);
        assert_eq!(lines_of(&cluster, name).len(), 2);
    }
    let days = (worker_expires(&cluster).unwrap() - before) / 86_400;
    assert!(days == 0 || days >= 334, "{days}");
    until("the renewed certificate of the worker", || {
        worker_expires(&cluster).filter(|&expires| expires > before + 334 * 86_400)
    });
    end_first_lines(&cluster, &["the-worker", "eve"]);
    assert_undisturbed(&cluster, &job);
    let worker = cluster.workers[0].as_mut().unwrap();
    assert!(
        !worker.has_ended() && worker.stderr().contains("the certificate was renewed"),
        "{}",
        worker.stderr()
    );
    assert!(!watch.has_ended(), "{}", watch.stderr());
    assert!(!logs.has_ended(), "{}", logs.stderr());
    // The next renewal drops what has ended.
    certs(cluster.path(), &["renew", "--dir", "certs", "--name", "eve"]);
    assert_eq!(lines_of(&cluster, "eve").len(), 2);
    let log = cluster.run(&["logs", &job]).1;
    assert!(!log.contains("is no member"), "{log}");
}

#[test]
fn a_worker_shows_its_certificate_again_if_the_one_in_its_place_is_refused() {
    let mut cluster = Cluster::secured(1);
    Who::issue(cluster.path(), "certs", "eve", "view");
    let job = cluster.submit(&ALONE, &[]);
    cluster.until_step(&job, 3);
    let path = |name: &str, file: &str| cluster.path().join("certs").join(name).join(file);
    for file in ["client.pem", "client.key"] {
        std::fs::copy(path("the-worker", file), path("the-worker", &format!("{file}.own"))).unwrap();
        std::fs::copy(path("eve", file), path("the-worker", file)).unwrap();
    }
    let words = "the renewed certificate is refused, the one before it is shown again";
    until("the worker's warning", || {
        cluster.workers[0].as_ref().unwrap().stderr().contains(words).then_some(())
    });
    assert_undisturbed(&cluster, &job);
    let worker = cluster.workers[0].as_mut().unwrap();
    assert!(!worker.has_ended(), "{}", worker.stderr());
}

/// Whether the orchestrator proves that it is `host`, to somebody with the worker's certificate and the authority's as it was then.
fn is_for(cluster: &Cluster, host: &str) -> bool {
    let read = |name: &str| std::fs::read(cluster.path().join("certs/the-worker").join(name)).unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.pem")))
        .identity(Identity::from_pem(read("client.pem"), read("client.key")))
        .domain_name(host);
    let endpoint = Endpoint::from_shared(format!("https://{}", cluster.address)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(endpoint.tls_config(tls).unwrap().connect()).is_ok()
}

#[test]
fn an_orchestrator_takes_up_its_renewed_certificate_and_more_hosts_while_it_runs() {
    let cluster = Cluster::secured(1);
    let job = cluster.submit(&ALONE, &[]);
    cluster.until_step(&job, 3);
    let read = |name: &str| std::fs::read(cluster.path().join("certs").join(name)).unwrap();
    let files = ["ca.pem", "server.pem", "server.key"];
    let (key, before) = (read("ca.key"), files.map(read));
    assert!(is_for(&cluster, "localhost") && !is_for(&cluster, "node9.example"));
    certs(
        cluster.path(),
        &["init", "--dir", "certs", "--add-host", "node9.example", "--add-host", "10.9.9.9"],
    );
    let added = files.map(read);
    for host in ["localhost", "node9.example", "10.9.9.9"] {
        assert!(is_for(&cluster, host), "{host}");
    }
    assert!(!is_for(&cluster, "node8.example"));
    certs(cluster.path(), &["renew", "--dir", "certs"]);
    let renewed = files.map(read);
    assert!(before.iter().zip(&added).chain(added.iter().zip(&renewed)).all(|(one, other)| one != other));
    assert_eq!(key, read("ca.key"), "it is the same authority");
    assert!(is_for(&cluster, "node9.example"), "hosts stay");
    assert!(cluster.orchestrator.stderr().matches("read again: certificates").count() >= 2);
    // Certificates of before and of after are good.
    let ann = Who::issue(cluster.path(), "certs", "ann", "view");
    assert_eq!(cluster.run_as_nobody(&[&["jobs"][..], &ann.arguments()].concat()).0, 0);
    assert_eq!(cluster.run(&["jobs"]).0, 0);
    assert_undisturbed(&cluster, &job);
}

#[test]
fn what_is_replaced_or_revoked_is_good_for_nothing_with_any_of_its_certificates() {
    let cluster = Cluster::secured(0);
    let path = |name: &str| cluster.path().join("certs").join(name);
    let jobs = |who: &Who| cluster.run_as_nobody(&[&["jobs"][..], &who.arguments()].concat());
    let keep = |to: &str| {
        std::fs::create_dir(path(to)).unwrap();
        for file in ["ca.pem", "client.pem", "client.key"] {
            std::fs::copy(path("ann").join(file), path(to).join(file)).unwrap();
        }
    };
    let ann = Who::issue(cluster.path(), "certs", "ann", "view");
    keep("first");
    certs(cluster.path(), &["renew", "--dir", "certs", "--name", "ann"]);
    keep("second");
    let with = |folder: &str, who: &Who| Who { tls: format!("certs/{folder}"), token: who.token.clone() };
    assert_eq!((jobs(&with("first", &ann)).0, jobs(&with("second", &ann)).0), (0, 0));
    let replace = ["certs", "issue", "--dir", "certs", "--name", "ann", "--role", "submit"];
    let (code, _, stderr) = cluster.run(&replace);
    assert!(code == 2 && stderr.contains("which has a token; --replace revokes that"), "{stderr}");
    let (code, token, stderr) = cluster.run(&[&replace[..], &["--replace"]].concat());
    assert_eq!(code, 0, "{stderr}");
    let new = Who { tls: "certs/ann".into(), token: token.trim().into() };
    assert_eq!(jobs(&new).0, 0);
    for (folder, who) in [("first", &ann), ("second", &ann), ("first", &new), ("second", &new)] {
        assert_ne!(jobs(&with(folder, who)).0, 0, "{folder}");
    }
    assert_eq!(jobs(&with("ann", &ann)).0, 2, "the old token with the new certificate");
    let lines = lines_of(&cluster, "ann");
    assert!(lines.len() == 1 && lines[0].starts_with("ann submit "), "{lines:?}");
    certs(cluster.path(), &["renew", "--dir", "certs", "--name", "ann"]);
    keep("third");
    certs(cluster.path(), &["revoke", "--dir", "certs", "--name", "ann"]);
    assert_ne!(jobs(&with("third", &new)).0, 0);
    assert!(lines_of(&cluster, "ann").is_empty());
    let revoked = std::fs::read_to_string(path("revoked")).unwrap();
    assert_eq!(revoked.lines().filter(|line| line.starts_with("ann ")).count(), 4, "{revoked}");
    for arguments in [["--name", "ann"], ["--name", "nobody"]] {
        let (code, _, stderr) =
            cluster.run(&[&["certs", "renew", "--dir", "certs"][..], &arguments].concat());
        assert!(code == 2 && stderr.contains("expected one that has a token"), "{stderr}");
    }
}

#[test]
fn an_end_is_warned_of_in_the_log_and_by_nodes() {
    let dir = tempfile::tempdir().unwrap();
    certs(dir.path(), &["init", "--dir", "certs"]);
    for (name, role, days) in [("w1", "worker", "5"), ("w2", "worker", "20"), ("ann", "admin", "31")] {
        let issue = ["issue", "--dir", "certs", "--name", name, "--role", role, "--expires", days];
        certs(dir.path(), &issue);
    }
    let orchestrator = spawn(
        dir.path(),
        "orchestrator",
        &["orchestrator", "--state", "state", "--listen", "127.0.0.1:0", "--tls", "certs"],
    );
    let log = until("two lines of the log", || {
        let log = orchestrator.stderr();
        (log.contains("certificate of w1") && log.contains("certificate of w2")).then_some(log)
    });
    let line = |words: &str| log.lines().find(|line| line.contains(words)).unwrap().to_owned();
    let w1 = line("the certificate of w1 expires in 5 days: contraflow certs renew --name w1");
    let w2 = line("the certificate of w2 expires in 20 days: contraflow certs renew --name w2");
    assert!(w1.contains("ERROR") && w2.contains("WARN"), "{log}");
    assert!(!log.contains("ann") && !log.contains("of the orchestrator"), "{log}");

    let cluster = Cluster::secured(1);
    let nodes = |format: &str| cluster.run(&["nodes", "--format", format]).1;
    let json: serde_json::Value = serde_json::from_str(&nodes("json")).unwrap();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let in_days = |expires: &serde_json::Value| (expires.as_u64().unwrap() - now).div_ceil(86_400);
    assert_eq!(in_days(&json["certificate_expires_unix_s"]), 3652);
    assert_eq!(in_days(&json["workers"][0]["token_expires_unix_s"]), 365);
    assert!(!nodes("text").contains("expires"));
    certs(cluster.path(), &["renew", "--dir", "certs", "--name", "the-worker", "--expires", "9"]);
    until("the worker's new certificate", || {
        nodes("text").contains("certificate expires in 9 days").then_some(())
    });
}
