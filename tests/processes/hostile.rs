//! Clients and workers that mean harm, over raw gRPC: what they send is refused with a message or made harmless, and everybody
//! else is served meanwhile.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use contraflow_proto::{Message as _, v1};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use v1::cluster_service_client::ClusterServiceClient;
use v1::control_service_client::ControlServiceClient;
use v1::from_worker::Message;
use v1::job_service_client::JobServiceClient;

use crate::cluster::{Cluster, ENDLESS, spawn, spawn_orchestrator_after, until};
use crate::http2::{
    self, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS, call, connect, frame,
    message, opening,
};

/// A job of one rank.
pub const ALONE: [&str; 3] = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];

/// How long anybody else may have to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub async fn plain(cluster: &Cluster) -> Channel {
    Channel::from_shared(format!("http://{}", cluster.address)).unwrap().connect().await.unwrap()
}

/// The jobs are listed soon, and the orchestrator is the same as before.
fn assert_serves(cluster: &Cluster) {
    let began = Instant::now();
    let (code, out, stderr) = cluster.run(&["jobs", "--format", "json"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert!(out.starts_with("{\"jobs\":["), "{out}");
    let (_, nodes, _) = cluster.run(&["nodes", "--format", "json"]);
    assert!(nodes.contains("\"incarnation\":1"), "{nodes}");
}

#[test]
fn texts_out_of_bounds_are_refused_by_their_fields() {
    let cluster = Cluster::start(0);
    let job = cluster.submit(&[], &[]);
    let recipe =
        || std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/tiny.toml")).unwrap();
    let submit = |change: &dyn Fn(&mut v1::SubmitRequest)| {
        let mut request = v1::SubmitRequest { recipe: recipe(), ..Default::default() };
        change(&mut request);
        request
    };
    let (long, rude) = ("y".repeat(3_900_000), "\u{1}".repeat(3_900_000));
    let refused: Vec<(Status, &str)> = runtime().block_on(async {
        let mut jobs = JobServiceClient::new(plain(&cluster).await);
        let mut nodes = ClusterServiceClient::new(plain(&cluster).await);
        let mut refused = Vec::new();
        for (reason, words) in [
            (&*long, "reason: expected at most 1024 bytes, got 3900000"),
            (&rude, "reason: expected at most 1024 bytes, got 3900000"),
            ("\u{1b}[2J", "reason: expected no control characters, got \\u{1b}"),
        ] {
            let request = v1::CancelRequest { job: job.clone(), reason: reason.into() };
            refused.push((jobs.cancel(request).await.unwrap_err(), words));
        }
        let path = format!("data.paths=['{}']", "\"".repeat(100_000));
        for (request, words) in [
            (submit(&|it| it.recipe += &format!("# {long}")), "recipe: expected at most 524288 bytes"),
            (
                submit(&|it| it.overrides = vec![path.clone()]),
                "data.paths: expected at most 4096 bytes, got 100000",
            ),
            (
                submit(&|it| it.overrides = vec!["a.b=1".into(); 1_025]),
                "overrides: expected at most 1024 entries",
            ),
            (submit(&|it| it.model_config = long.clone()), "model_config: expected at most 262144 bytes"),
            (
                submit(&|it| it.name = "a\u{1b}[31mb\nc".into()),
                "name: expected no control characters, got \\u{1b}",
            ),
            (submit(&|it| it.idempotency_key = "\u{202e}".into()), "idempotency_key: expected no control"),
            (
                submit(&|it| it.overrides = vec!["data.paths=[\"\\u001b[31m\"]".into()]),
                "data.paths: expected no control characters, got \\u{1b}",
            ),
        ] {
            refused.push((jobs.submit(request).await.unwrap_err(), words));
        }
        let id = || long.clone();
        let id_words = "job: expected at most 64 bytes, got 3900000";
        refused
            .push((jobs.get(v1::GetRequest { job: id(), with_recipe: true }).await.unwrap_err(), id_words));
        let watch = v1::WatchRequest { job: id(), ..Default::default() };
        refused.push((jobs.watch(watch).await.unwrap_err(), id_words));
        let logs = v1::LogsRequest { job: id(), ..Default::default() };
        refused.push((jobs.logs(logs).await.unwrap_err(), id_words));
        let list = v1::ListRequest { before: id(), ..Default::default() };
        refused.push((jobs.list(list).await.unwrap_err(), "before: expected at most 64 bytes"));
        let drain = v1::DrainRequest { node: id(), ..Default::default() };
        refused.push((nodes.drain(drain).await.unwrap_err(), "node: expected at most 256 bytes"));
        refused
    });
    for (refused, words) in refused {
        assert_eq!(refused.code(), Code::InvalidArgument, "{words}: {refused:?}");
        assert!(refused.message().contains(words), "{words}: {}", refused.message());
    }
    let (code, _, stderr) = cluster.run(&["submit", "tiny", "--name", "a\u{1b}[31mb\nc\rd"]);
    assert_eq!(code, 2);
    assert_eq!(stderr.trim(), "error: name: expected no control characters, got \\u{1b}");
    assert_eq!(cluster.status(&job).unwrap()["state"], "queued");
    assert_serves(&cluster);
}

/// As many recipes with as many faults as fit into them, at once.
#[test]
fn recipes_with_many_faults_hold_up_nobody() {
    let cluster = Cluster::start(0);
    let keys: String = (0..45_000).map(|number| format!("k{number}=1\n")).collect();
    let request = v1::SubmitRequest { recipe: format!("[a]\n{keys}"), ..Default::default() };
    runtime().block_on(async {
        let mut refused = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let (mut jobs, request) = (JobServiceClient::new(plain(&cluster).await), request.clone());
            refused.spawn(async move { jobs.submit(request).await.unwrap_err() });
        }
        let began = Instant::now();
        let mut jobs = JobServiceClient::new(plain(&cluster).await);
        jobs.list(v1::ListRequest::default()).await.unwrap();
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        while let Some(refused) = refused.join_next().await {
            let refused = refused.unwrap();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
            let lines: Vec<&str> = refused.message().lines().collect();
            assert_eq!(lines[0], "a.k0: unknown key (line 2)");
            assert!(lines.len() <= 101 && lines.last().unwrap().ends_with(" more"), "{lines:?}");
        }
    });
    assert_serves(&cluster);
}

/// A worker with one slot, by hand.
struct Impostor {
    up: tokio::sync::mpsc::Sender<v1::FromWorker>,
    down: Streaming<v1::ToWorker>,
}

impl Impostor {
    async fn attach(cluster: &Cluster) -> Self {
        let (up, messages) = tokio::sync::mpsc::channel(64);
        let fabric = Some(v1::FabricAddress { tcp: "127.0.0.1:1".into(), ..Default::default() });
        let hello = v1::Hello {
            version: env!("CARGO_PKG_VERSION").into(),
            worker: 7,
            name: "impostor".into(),
            slots: 1,
            node: "n0".into(),
            storage_id: "none".into(),
            fabric,
            ..Default::default()
        };
        up.send(v1::FromWorker { message: Some(Message::Hello(hello)) }).await.unwrap();
        let mut client = ControlServiceClient::new(plain(cluster).await);
        let down = client.attach(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Impostor { up, down }
    }

    async fn say(&self, message: Message) {
        self.up.send(v1::FromWorker { message: Some(message) }).await.unwrap();
    }

    /// The job that it gets.
    async fn assigned(&mut self) -> u64 {
        loop {
            let message = self.down.message().await.unwrap().expect("a stream that goes on");
            if let Some(v1::to_worker::Message::Assign(assign)) = message.message {
                return assign.job;
            }
            self.say(Message::Beat(v1::Beat::default())).await;
        }
    }
}

#[test]
fn what_a_worker_says_for_people_is_cut_and_printable() {
    let cluster = Cluster::start(0);
    let other = cluster.submit(&[], &[]);
    let job = cluster.submit(&ALONE, &["--priority", "1"]);
    let ended = runtime().block_on(async {
        let mut worker = Impostor::attach(&cluster).await;
        let id = worker.assigned().await;
        // There is no other place.
        assert_eq!(cluster.nodes()[0]["unreachable"], true);
        assert!(cluster.run(&["nodes"]).1.contains("data port does not answer"));
        let of_other = id - (1 << 24);
        let line = |job, rank, message: &str| v1::LogLine {
            job,
            rank,
            unix_ms: 1,
            level: "IN\u{1b}FO".into(),
            message: message.into(),
        };
        let lines = vec![
            line(id, 0, &format!("own\u{1b}]52;c;eA==\u{7}\nforged\r{}", "z".repeat(1_000_000))),
            line(id, 3, "not its rank"),
            line(of_other, 0, "not its job"),
        ];
        worker.say(Message::Logs(v1::LogLines { lines })).await;
        let failed = v1::Failed {
            action: "\u{1b}[2Jmultiplying".into(),
            cause: "\u{1}".repeat(1_900_000),
            kind: "config".into(),
            ..Default::default()
        };
        let event = Some(v1::rank_event::Event::Failed(failed));
        worker.say(Message::Event(v1::RankEvent { job: id, generation: 1, rank: 0, event })).await;
        let shard = Some(v1::ShardFile { file: "f".repeat(10_000), ..Default::default() });
        let event = Some(v1::rank_event::Event::ShardSaved(v1::ShardSaved { shard, ..Default::default() }));
        worker.say(Message::Event(v1::RankEvent { job: id, generation: 1, rank: 0, event })).await;
        loop {
            match worker.down.message().await {
                Ok(Some(_)) => {}
                ended => return ended.unwrap_err(),
            }
        }
    });
    assert_eq!(ended.code(), Code::InvalidArgument);
    assert_eq!(ended.message(), "ShardFile.file: expected at most 256 bytes, got 10000");
    until("the end of the job", || (cluster.status(&job)?["state"] == "failed").then_some(()));
    let logs = until("the worker's line", || {
        let (_, logs, _) = cluster.run(&["logs", &job]);
        logs.contains("own\\u{1b}]52;c;eA==\\u{7}\\nforged\\rzz").then_some(logs)
    });
    let status = cluster.run(&["status", &job]).1;
    assert!(status.contains("\\u{1b}[2Jmultiplying: \\u{1}\\u{1}"), "{status}");
    for shown in [&logs, &status, &cluster.run(&["jobs"]).1, &cluster.orchestrator.stderr()] {
        assert!(shown.len() < 64_000, "{} bytes", shown.len());
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
    }
    assert!(!logs.contains("not its"), "{logs}");
    assert_eq!(cluster.run(&["logs", &other]).1, "");
    assert_serves(&cluster);
}

#[test]
fn a_worker_with_a_label_that_acts_on_terminals_is_refused() {
    let cluster = Cluster::start(0);
    let arguments =
        ["worker", "--join", &cluster.address, "--storage", "storage", "--labels", "node=a\u{1b}[2Jb"];
    let mut worker = spawn(cluster.path(), "rude", &arguments);
    assert_eq!(worker.wait(), Some(2), "{}", worker.stderr());
    assert!(
        worker.stderr().contains("node: expected no control characters, got \\u{1b}"),
        "{}",
        worker.stderr()
    );
    assert!(cluster.nodes().is_empty());
}

#[test]
fn a_connection_has_one_clock_until_its_settings_are_whole() {
    let cluster = Cluster::start(0);
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 9]);
    let beginnings = [
        b"P".to_vec(),
        PREFACE[..23].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &settings[..8]].concat(),
        [PREFACE, &settings[..9]].concat(),
        [PREFACE, &settings[..14]].concat(),
    ];
    let began = Instant::now();
    let streams: Vec<TcpStream> =
        beginnings.iter().cycle().take(60).map(|bytes| connect(&cluster.address, bytes)).collect();
    let mut whole = connect(&cluster.address, &[PREFACE, &settings].concat());
    for mut stream in streams {
        drop(http2::rest(&mut stream));
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(!http2::is_closed(&mut whole), "who has said it all stays");
    let log = cluster.orchestrator.stderr();
    assert!(log.contains("refused a connection: no handshake within 5s"), "{log}");
    assert_serves(&cluster);
}

/// With few files, connections that are held for nothing leave room for a worker, and for who asks and goes.
#[test]
fn a_crowd_of_connections_does_not_keep_workers_out() {
    let mut cluster = Cluster::start(0);
    cluster.orchestrator.kill();
    cluster.orchestrator = spawn_orchestrator_after(&cluster, "ulimit -n 160");
    until("an orchestrator", || (cluster.run(&["jobs"]).0 == 0).then_some(()));
    let crowd: Vec<TcpStream> = (0..200).map(|_| connect(&cluster.address, &opening(65_535))).collect();
    let worker = cluster.worker(0);
    until("a worker among the crowd", || (cluster.nodes().len() == 1).then_some(()));
    let job = cluster.submit(&[&ALONE[..], &[ENDLESS]].concat(), &[]);
    cluster.until_step(&job, 3);
    let held =
        crowd.into_iter().filter_map(|mut stream| (!http2::is_closed(&mut stream)).then_some(())).count();
    assert!(held <= 60, "{held} connections are held");
    let log = cluster.orchestrator.stderr();
    assert!(log.contains("others from its address are connected"), "{log}");
    assert!(!log.contains("could not be accepted"), "{log}");
    drop(worker);
}

#[test]
fn streams_that_are_reset_at_once_end_their_connection() {
    let cluster = Cluster::start(0);
    let mut stream = connect(&cluster.address, &opening(65_535));
    let headers = call("/contraflow.v1.JobService/List", ("x", "y"));
    let mut sent = 0;
    for number in 0..50_000_u32 {
        let id = 2 * number + 1;
        let both =
            [frame(HEADERS, END_HEADERS, id, &headers), frame(RST_STREAM, 0, id, &[0, 0, 0, 8])].concat();
        if stream.write_all(&both).is_err() {
            break;
        }
        sent = number;
    }
    assert!(sent < 49_999, "{sent} resets were taken");
    drop(http2::rest(&mut stream));
    assert_serves(&cluster);
}

#[test]
fn headers_beyond_all_use_are_refused() {
    let cluster = Cluster::start(0);
    let large = "h".repeat(12_000);
    let mut stream = connect(&cluster.address, &opening(65_535));
    let headers = call("/contraflow.v1.JobService/List", ("x-large", &large));
    stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &headers)).unwrap();
    // More and more of them, without an end.
    for _ in 0..2_000 {
        if stream.write_all(&frame(HEADERS, 0, 3, &headers)).is_err() {
            break;
        }
    }
    drop(http2::rest(&mut stream));
    assert_serves(&cluster);
}

/// Many who follow a job and never read what they are sent.
/// Streams of each connection that does not read.
const STREAMS: u64 = 50;

#[test]
fn readers_that_do_not_read_cost_bounded_memory_and_hold_up_nobody() {
    let cluster = Cluster::start(1);
    let job = cluster.submit(&[&ALONE[..], &[ENDLESS]].concat(), &[]);
    cluster.until_step(&job, 3);
    let before = cluster.orchestrator.memory();
    let request = v1::WatchRequest { job: job.clone(), from_step: 0 }.encode_to_vec();
    let streams: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = connect(&cluster.address, &opening(0));
            for number in 0..STREAMS as u32 {
                let id = 2 * number + 1;
                let headers = call("/contraflow.v1.JobService/Watch", ("x", "y"));
                stream.write_all(&frame(HEADERS, END_HEADERS, id, &headers)).unwrap();
                stream.write_all(&frame(DATA, END_STREAM, id, &message(&request))).unwrap();
            }
            stream
        })
        .collect();
    cluster.until_step(&job, 100);
    assert_serves(&cluster);
    // HTTP/2 buffers up to 400 KiB of each stream before its sender waits; beside it little more than a record is held.
    let bound = streams.len() as u64 * STREAMS * 400 / 1024 + 64;
    let grown = cluster.orchestrator.memory().saturating_sub(before) >> 20;
    assert!(grown < bound, "{grown} MiB for {} connections, expected less than {bound}", streams.len());
}
