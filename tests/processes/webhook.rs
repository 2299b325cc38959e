//! An address is told what happens to jobs, signed, and again until it takes it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::cluster::{Cluster, ENDLESS, JOB, MODEL, Process, spawn_with, until};
use crate::hostile::ALONE;

/// What came: headers by name, and the body.
struct Call {
    headers: Vec<(String, String)>,
    body: String,
}

impl Call {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value)
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A server that answers the first calls with these statuses and all others with 204.
fn receiver(first: &'static [u16]) -> (String, Receiver<Call>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook?of=cluster", listener.local_addr().unwrap());
    let (calls, received) = channel();
    std::thread::spawn(move || {
        let mut statuses = first.iter();
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).unwrap_or_default() == 0 || line.trim().is_empty() {
                    break;
                }
                lines.push(line.trim().to_owned());
            }
            if lines.is_empty() {
                continue;
            }
            assert_eq!(lines[0], "POST /hook?of=cluster HTTP/1.1");
            let header = |line: &String| {
                let (name, value) = line.split_once(": ").unwrap();
                (name.to_lowercase(), value.to_owned())
            };
            let mut call = Call { headers: lines[1..].iter().map(header).collect(), body: String::new() };
            let length = call.header("content-length").parse().unwrap();
            stream.by_ref().take(length).read_to_string(&mut call.body).unwrap();
            let status = statuses.next().unwrap_or(&204);
            let answer =
                format!("HTTP/1.1 {status} as asked\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            if calls.send(call).is_err() {
                return;
            }
        }
    });
    (url, received)
}

#[test]
fn what_happens_to_jobs_is_told_signed_and_again_until_it_is_taken() {
    let (url, received) = receiver(&[503]);
    let next = || received.recv_timeout(Duration::from_secs(60)).expect("a notice");
    let mut cluster = Cluster::start(2);
    std::fs::write(cluster.path().join("secret"), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&["--webhook", &url, "--webhook-secret", "secret"]);
    let job = cluster.submit(&[&ALONE[..], &["training.steps=3"]].concat(), &["--name", "short"]);
    let (refused, taken) = (next(), next());
    assert_eq!(refused.body, taken.body);
    assert_eq!(refused.header("webhook-id"), taken.header("webhook-id"), "it is the same one");
    let told = taken.json();
    assert_eq!(
        (&told["type"], &told["job"], &told["name"]),
        (&"job.done".into(), &job.clone().into(), &"short".into())
    );
    assert_eq!((&told["step"], &told["steps"]), (&3.into(), &3.into()));
    assert!(told["words"].as_str().unwrap().starts_with("trained"), "{told}");
    assert_eq!(taken.header("content-type"), "application/json");
    // By the example's key; what is signed is what the library signs (orchestrator/src/webhook.rs).
    assert!(
        taken.header("webhook-signature").starts_with("v1,") && taken.header("webhook-signature").len() == 47
    );
    assert!(taken.header("webhook-timestamp").parse::<u64>().unwrap() > 1_700_000_000);

    let job = cluster.submit(&[&ALONE[..], &[ENDLESS]].concat(), &[]);
    cluster.until_step(&job, 2);
    let host = cluster.host_of(&job, 0);
    cluster.workers[host].take().unwrap().kill();
    let told = next().json();
    assert_eq!((&told["type"], &told["job"]), (&"job.lost_ranks".into(), &job.clone().into()));
    assert!(told["words"].as_str().unwrap().contains("rank 0 lost"), "{told}");
    until("a rank elsewhere", || (cluster.status(&job)?["generation"].as_u64()? == 2).then_some(()));
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    let told = next().json();
    assert_eq!((&told["type"], &told["words"]), (&"job.cancelled".into(), &"cancelled by the user".into()));

    for (arguments, words) in [
        (["--webhook", "ftp://example.org", "--webhook-secret", "secret"], "--webhook: expected an address"),
        (["--webhook", &url, "--webhook-secret", "missing"], "--webhook-secret missing: "),
    ] {
        let (code, _, errors) =
            cluster.run(&[&["orchestrator", "--state", "other"], &arguments[..]].concat());
        assert_eq!(code, 2, "{errors}");
        assert!(errors.contains(words), "{errors}");
    }
}

/// A run of two ranks in one process that tells this address.
fn train(folder: &std::path::Path, url: &str, steps: &str) -> Process {
    std::fs::write(folder.join("model.json"), MODEL).unwrap();
    std::fs::write(folder.join("secret"), "a secret").unwrap();
    let changes = ["parallel.pipeline=2", "parallel.expert=1", "checkpoint.every=100", steps];
    let mut arguments = vec!["train", "tiny", "--webhook", url, "--webhook-secret", "secret"];
    JOB.iter().chain(&changes).for_each(|change| arguments.extend(["--set", change]));
    spawn_with(folder, "train", &arguments, &Vec::new())
}

#[test]
fn a_run_in_one_process_tells_how_it_ended() {
    let (url, received) = receiver(&[503]);
    let next = || received.recv_timeout(Duration::from_secs(60)).expect("a notice");
    let folder = tempfile::tempdir().unwrap();
    let mut run = train(folder.path(), &url, "training.steps=2");
    assert_eq!(run.wait(), Some(0), "{}", run.stderr());
    let (refused, taken) = (next(), next());
    assert_eq!(refused.body, taken.body, "it is the same one, and was waited for");
    assert!(taken.header("webhook-signature").starts_with("v1,"));
    let told = taken.json();
    assert_eq!((&told["type"], &told["job"]), (&"job.done".into(), &"tiny".into()));
    assert_eq!((&told["step"], &told["steps"]), (&2.into(), &2.into()));
    assert!(told["words"].as_str().unwrap().ends_with("at the end"), "{told}");

    let mut run = train(folder.path(), &url, ENDLESS);
    until("a step", || {
        std::fs::read_to_string(folder.path().join("runs/tiny-2/metrics.jsonl"))
            .ok()?
            .lines()
            .next()
            .map(drop)
    });
    run.signal(Signal::INT);
    assert_eq!(run.wait(), Some(130), "{}", run.stderr());
    let told = next().json();
    assert_eq!((&told["type"], &told["job"]), (&"job.cancelled".into(), &"tiny-2".into()));
    assert!(told["words"].as_str().unwrap().starts_with("interrupted after step "), "{told}");
}

#[test]
fn a_run_waits_a_moment_for_an_address_that_does_not_answer_and_says_so() {
    // Connections are made and nothing is ever answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", silent.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut run = train(folder.path(), &url, "training.steps=2");
    assert_eq!(run.wait(), Some(0), "{}", run.stderr());
    let words = "the webhook has not taken 1 of the run's notices within 10 s of its end";
    assert!(run.stderr().contains(words), "{}", run.stderr());
}
