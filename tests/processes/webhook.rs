//! An address is told what happens to jobs, signed, and again until it takes it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, ENDLESS, until};
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
