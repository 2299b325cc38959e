//! Who has no business here: refused with a message, logged, and the job that runs meanwhile does not notice.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use contraflow_orchestrator::server::access::{Role, Token};
use contraflow_proto::v1;
use contraflow_runtime::fabric::handshake::{Carrier, Hello};
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};
use tonic::codegen::tokio_stream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use v1::cluster_service_client::ClusterServiceClient;
use v1::control_service_client::ControlServiceClient;
use v1::job_service_client::JobServiceClient;

use crate::cluster::{Cluster, DEADLINE, ENDLESS, Process, Who, curve, spawn, until};

/// A job of two ranks.
const TWO: [&str; 3] = ["parallel.pipeline=2", "parallel.expert=1", ENDLESS];

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A connection with exactly these credentials.
pub async fn channel(
    cluster: &Cluster,
    identity: Option<Identity>,
) -> Result<Channel, tonic::transport::Error> {
    let ca = std::fs::read(cluster.path().join("certs/ca.pem")).unwrap();
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
    if let Some(identity) = identity {
        tls = tls.identity(identity);
    }
    let endpoint = Endpoint::from_shared(format!("https://{}", cluster.address)).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await
}

pub fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// Sends bytes that mean nothing here, and waits until the other end has had enough.
fn babble(address: &str, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // It may be cut off in the middle, and with a reset.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    let is_cut = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(ended.as_ref().err().is_none_or(is_cut), "{ended:?}");
    assert!(answer.len() < 1024, "it answered {} bytes", answer.len());
}

fn noise() -> Vec<u8> {
    (0..70_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn until_logged(process: &Process, words: &str) {
    until(&format!("a log line with {words:?}"), || process.stderr().contains(words).then_some(()));
}

#[test]
fn a_job_runs_over_tls_while_strangers_are_refused() {
    let cluster = Cluster::secured(2);
    let job = cluster.submit(&TWO, &[]);
    cluster.until_step(&job, 3);
    refused_for_their_tokens(&cluster, &job);
    refused_for_their_certificates(&cluster);
    let (code, ..) = cluster.run(&["status", &job]);
    assert_eq!(code, 0);
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&TWO, steps.len())));
    assert_eq!(steps.last().unwrap()["generation"], 1);
}

fn refused_for_their_tokens(cluster: &Cluster, job: &str) {
    let dir = cluster.path();
    let [view, submit, worker, gone] = [("v", "view"), ("s", "submit"), ("w", "worker"), ("gone", "admin")]
        .map(|(name, role)| Who::issue(dir, "certs", name, role));
    let tokens = std::fs::read_to_string(dir.join("certs/tokens")).unwrap();
    assert!(!tokens.contains(&view.token), "only a hash is kept");
    let kept: Vec<&str> = tokens.lines().filter(|line| !line.starts_with("gone ")).collect();
    let (role, hash) = (Role::Admin, Token::hash("old"));
    let old = Token { name: "old".into(), role, expires: 1_000, hash, certificate: None };
    std::fs::write(dir.join("certs/tokens"), format!("{}\n{old}\n", kept.join("\n"))).unwrap();

    let drain = &["drain", "n0"][..];
    let as_admin = "ClusterService/Drain needs the role admin, that of s has submit";
    let as_view = "ClusterService/Nodes needs the role view, that of w has worker";
    for (arguments, who, token, words) in [
        (&["jobs"][..], &view, None, "token: expected one (--token, CONTRAFLOW_TOKEN), got none"),
        (&["jobs"], &view, Some(""), "token: expected one (--token, CONTRAFLOW_TOKEN), got none"),
        (&["jobs"], &view, Some("guess"), "token: expected one issued by this cluster, got another"),
        (&["jobs"], &view, Some(&gone.token), "token: expected one issued by this cluster, got another"),
        (&["jobs"], &view, Some("old"), "token: that of old has expired"),
        (&["jobs"], &view, Some(&submit.token), "token: that of s is good with its own certificate only"),
        (&["cancel", job], &view, Some(&view.token), "Cancel needs the role submit, that of v has view"),
        (drain, &submit, Some(&submit.token), as_admin),
        (&["nodes"], &worker, Some(&worker.token), as_view),
    ] {
        let token = token.map_or_else(Vec::new, |token| vec!["--token", token]);
        let (code, out, stderr) = cluster.run_as_nobody(&[arguments, &["--tls", &who.tls], &token].concat());
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?} {token:?}: {stderr}");
        assert!(stderr.contains(words), "{stderr}");
        until_logged(&cluster.orchestrator, words);
    }
    for (who, arguments) in [(&view, ["status", job]), (&submit, ["logs", job])] {
        let (code, _, stderr) = cluster.run_as_nobody(&[&arguments[..], &who.arguments()].concat());
        assert_eq!(code, 0, "{stderr}");
    }
    let arguments = ["worker", "--join", &cluster.address, "--storage", "storage"];
    let mut impostor = spawn(dir, "impostor", &[&arguments[..], &submit.arguments()].concat());
    assert_eq!(impostor.wait(), Some(2));
    assert!(
        impostor.stderr().contains("ControlService/Attach needs the role worker"),
        "{}",
        impostor.stderr()
    );
    let log = cluster.orchestrator.stderr();
    let secrets = [&view, &submit, &worker, &gone].map(|who| &who.token);
    assert!(!secrets.iter().any(|token| log.contains(token.as_str())), "a token is in the log");
}

fn refused_for_their_certificates(cluster: &Cluster) {
    let dir = cluster.path();
    assert_eq!(spawn(dir, "init-2", &["certs", "init", "--dir", "other"]).wait(), Some(0));
    let stranger = Who::issue(dir, "other", "stranger", "admin");
    // Who trusts another authority does not even talk to this orchestrator.
    let (code, _, stderr) = cluster.run_as_nobody(&[&["jobs"][..], &stranger.arguments()].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("a certificate that other/stranger/ca.pem vouches for, got: invalid peer"),
        "{stderr}"
    );
    // Who trusts this one, and is issued by another.
    std::fs::copy(dir.join("certs/ca.pem"), dir.join("other/stranger/ca.pem")).unwrap();
    let (code, _, stderr) = cluster.run_as_nobody(&[&["jobs"][..], &stranger.arguments()].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("the orchestrator logs the certificates that it refuses"), "{stderr}");
    until_logged(&cluster.orchestrator, "refused a connection: TLS: invalid peer certificate");
    // Who has none.
    let answered = runtime().block_on(async {
        let channel = channel(cluster, None).await.ok()?;
        JobServiceClient::new(channel).list(v1::ListRequest::default()).await.ok()
    });
    assert!(answered.is_none(), "{answered:?}");
    until_logged(&cluster.orchestrator, "refused a connection: TLS: peer sent no certificates");
    // Plain-text clients, and garbage.
    let (code, _, stderr) = cluster.run_as_nobody(&["jobs"]);
    assert_eq!(code, 1, "{stderr}");
    let hint = "; an orchestrator with --tls closes those of clients and workers without";
    assert!(stderr.contains("the connection was closed: ") && stderr.trim_end().ends_with(hint), "{stderr}");
    let plain = spawn(dir, "plain", &["worker", "--join", &cluster.address, "--storage", "storage"]);
    until_logged(&plain, hint);
    assert!(!plain.stderr().contains("Unknown error"), "{}", plain.stderr());
    until_logged(&cluster.orchestrator, "refused a connection: expected TLS, got something else");
    let mut almost_tls = vec![22, 3, 1];
    almost_tls.extend(noise());
    for bytes in [noise(), almost_tls] {
        babble(&cluster.address, &bytes);
    }
}

/// Says again what a rank of the running formation has said in an earlier handshake: the secret is right, the nonce is old.
fn replay(cluster: &Cluster, job: &str, address: &str) {
    let key: [u8; 32] = std::fs::read(cluster.path().join("state/cluster.key")).unwrap().try_into().unwrap();
    let owner = std::fs::read(cluster.path().join(format!("storage/jobs/{job}/owner.json"))).unwrap();
    let owner: serde_json::Value = serde_json::from_slice(&owner).unwrap();
    let id = u64::from_str_radix(owner["job"].as_str().unwrap(), 16).unwrap();
    let secret =
        blake3::Hasher::new_keyed(&key).update(&id.to_le_bytes()).update(&1_u32.to_le_bytes()).finalize();
    let (version, nonce) = (contraflow_runtime::fabric::wire::VERSION, [9; 32]);
    let formation = FormationId::new(JobId::of(id), Generation::FIRST);
    let hello =
        Hello { version, carrier: Carrier::Socket, formation, from: Rank::ZERO, to: Rank::new(1), nonce };
    let proof = |who: &[u8], nonce: &[u8]| {
        blake3::Hasher::new_keyed(secret.as_bytes())
            .update(who)
            .update(&hello.encode())
            .update(nonce)
            .finalize()
    };
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(&hello.encode()).unwrap();
    let mut challenge = [0; 65];
    stream.read_exact(&mut challenge).unwrap();
    assert_eq!(
        proof(b"contraflow fabric: accepts.", &challenge[1..33]),
        challenge[33..],
        "the secret is right"
    );
    stream.write_all(proof(b"contraflow fabric: connects", &[3; 32]).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains("rank 0 does not know the secret of this formation"), "{answer}");
}

#[test]
fn garbage_on_every_port_does_not_disturb_a_job() {
    let cluster = Cluster::start(2);
    let job = cluster.submit(&TWO, &[]);
    cluster.until_step(&job, 3);
    let workers = runtime().block_on(async {
        let mut client = ClusterServiceClient::new(plain(&cluster).await);
        client.nodes(v1::NodesRequest {}).await.unwrap().into_inner().workers
    });
    assert_eq!(workers.len(), 2);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let broken = [preface, noise()].concat();
    for bytes in [noise(), b"GET / HTTP/1.1\r\n\r\n".to_vec(), broken, vec![22, 3, 1, 0, 9]] {
        babble(&cluster.address, &bytes);
        for worker in &workers {
            babble(&worker.address, &bytes);
        }
    }
    for worker in &workers {
        replay(&cluster, &job, &worker.address);
    }
    until_logged(&cluster.orchestrator, "refused a connection: expected HTTP/2, got something else");
    until_logged(&cluster.orchestrator, "refused a connection: expected plain HTTP/2, got TLS");
    for worker in cluster.workers.iter().flatten() {
        until_logged(worker, "not a hello of a rank");
        until_logged(worker, "does not know the secret of this formation");
    }
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&TWO, steps.len())));
    assert_eq!(steps.last().unwrap()["generation"], 1);
}

async fn plain(cluster: &Cluster) -> Channel {
    Channel::from_shared(format!("http://{}", cluster.address)).unwrap().connect().await.unwrap()
}

async fn attach(cluster: &Cluster, hello: v1::Hello) -> Status {
    let hello = v1::FromWorker { message: Some(v1::from_worker::Message::Hello(hello)) };
    let mut client = ControlServiceClient::new(plain(cluster).await);
    client.attach(tokio_stream::once(hello)).await.unwrap_err()
}

async fn submit(cluster: &Cluster, request: v1::SubmitRequest) -> Status {
    let recipe = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/tiny.toml")).unwrap();
    let request = v1::SubmitRequest { recipe, ..request };
    JobServiceClient::new(plain(cluster).await).submit(request).await.unwrap_err()
}

#[test]
fn a_refused_call_names_the_field_and_the_reason() {
    let cluster = Cluster::start(0);
    let long = "x".repeat(2_000);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let fabric = Some(v1::FabricAddress { tcp: "127.0.0.1:1".into(), ..v1::FabricAddress::default() });
    let hello = v1::Hello { version, worker: 7, slots: 1, fabric, ..v1::Hello::default() };
    let request = v1::SubmitRequest::default();
    let refused = runtime().block_on(async {
        let mut jobs = JobServiceClient::new(plain(&cluster).await);
        [
            attach(&cluster, v1::Hello { slots: 0, ..hello.clone() }).await,
            attach(&cluster, v1::Hello { node: long.clone(), ..hello.clone() }).await,
            submit(&cluster, v1::SubmitRequest { name: long.clone(), ..request.clone() }).await,
            submit(&cluster, v1::SubmitRequest { idempotency_key: long, ..request.clone() }).await,
            submit(&cluster, v1::SubmitRequest { min_ranks: 999, ..request.clone() }).await,
            submit(&cluster, v1::SubmitRequest { overrides: vec!["training.steps=x".into()], ..request })
                .await,
            jobs.get(v1::GetRequest { job: "job-9".into(), with_recipe: true }).await.unwrap_err(),
            jobs.list(v1::ListRequest { before: "first".into(), limit: 1 }).await.unwrap_err(),
        ]
    });
    for (refused, (code, words)) in refused.iter().zip([
        (Code::InvalidArgument, "slots: expected 1 to 1024, got 0"),
        (Code::InvalidArgument, "node: expected at most 256 bytes, got 2000"),
        (Code::InvalidArgument, "name: expected at most 256 bytes, got 2000"),
        (Code::InvalidArgument, "idempotency_key: expected at most 256 bytes, got 2000"),
        (Code::InvalidArgument, "min_ranks: expected at most"),
        (Code::InvalidArgument, "training.steps"),
        (Code::NotFound, "job: expected the id of a job, got \"job-9\""),
        (Code::NotFound, "job: expected the id of a job, got \"first\""),
    ]) {
        assert_eq!(refused.code(), code, "{refused:?}");
        assert!(refused.message().contains(words), "{refused:?}");
    }
}

#[test]
fn a_worker_of_another_version_is_refused_with_a_message() {
    let cluster = Cluster::start(0);
    let hello = v1::Hello { version: "0.0.9".into(), worker: 7, slots: 1, ..v1::Hello::default() };
    let refused = runtime().block_on(attach(&cluster, hello));
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(
        refused.message(),
        format!("version of the worker: expected {own}, as the orchestrator, got 0.0.9")
    );
    assert!(cluster.nodes().is_empty());
}

#[test]
fn rate_limited_clients_get_a_message() {
    let cluster = Cluster::secured(0);
    let submit = Who::issue(cluster.path(), "certs", "eager", "submit");
    let read = |name: &str| std::fs::read(cluster.path().join(&submit.tls).join(name)).unwrap();
    let identity = Identity::from_pem(read("client.pem"), read("client.key"));
    let (submitted, guessed, after) = runtime().block_on(async {
        let mut jobs = JobServiceClient::new(channel(&cluster, Some(identity)).await.unwrap());
        let (mut submitted, mut guessed) = (Vec::new(), Vec::new());
        let request = v1::SubmitRequest { recipe: "no recipe".into(), ..v1::SubmitRequest::default() };
        while submitted.last() != Some(&Code::ResourceExhausted) && submitted.len() < 100_000 {
            let refused = jobs.submit(with_token(request.clone(), &submit.token)).await.unwrap_err();
            submitted.push(refused.code());
        }
        while guessed.last() != Some(&Code::ResourceExhausted) && guessed.len() < 100_000 {
            let request = with_token(v1::ListRequest::default(), &format!("guess {}", guessed.len()));
            guessed.push(jobs.list(request).await.unwrap_err().code());
        }
        // Who has a token still gets in.
        (submitted, guessed, jobs.list(with_token(v1::ListRequest::default(), &submit.token)).await)
    });
    assert_eq!(submitted.last(), Some(&Code::ResourceExhausted));
    assert!(submitted.len() > 200 && submitted[..200].iter().all(|code| *code == Code::InvalidArgument));
    assert_eq!(guessed.last(), Some(&Code::ResourceExhausted));
    assert!(guessed[..guessed.len() - 1].iter().all(|code| *code == Code::Unauthenticated));
    assert!(after.is_ok(), "{after:?}");
}

/// A connection that says nothing is not kept.
#[test]
fn a_silent_connection_is_closed() {
    let cluster = Cluster::start(0);
    let mut stream = TcpStream::connect(&cluster.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    until_logged(&cluster.orchestrator, "refused a connection: no handshake within 5s");
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

#[test]
fn off_loopback_certificates_are_required() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (&["orchestrator", "--state", "state", "--listen", "0.0.0.0:0"][..], "certs init --dir DIR"),
        (&["orchestrator", "--state", "state", "--listen", "[::]:0"], "expected --tls DIR"),
        (&["orchestrator", "--state", "state", "--tls", "nowhere"], "nowhere/server.key"),
        (&["worker", "--join", "192.0.2.1:7070", "--storage", "storage"], "expected --tls DIR"),
        (&["jobs", "--orchestrator", "cluster.example:7070"], "certs issue --dir DIR"),
        (&["jobs", "--orchestrator", "http://cluster.example:7070"], "certs issue --dir DIR"),
        (&["jobs", "--tls", "nowhere"], "nowhere/client.key"),
        (
            &["certs", "issue", "--dir", "nowhere", "--name", "a", "--role", "view"],
            "--dir: nowhere: No such file",
        ),
    ] {
        let mut process = spawn(dir.path(), "command", arguments);
        assert_eq!(process.wait(), Some(2), "{arguments:?}: {}", process.stderr());
        assert!(process.stderr().contains(words), "{arguments:?}: {}", process.stderr());
    }
    let mut names: Vec<_> = dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["command.log", "command.out"], "the commands wrote no file of their own");
}

#[test]
fn certificates_are_for_their_owner_alone_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join("certs").join(name);
    let run = |arguments: &[&str]| {
        let mut process = spawn(dir.path(), "command", &[&["certs"], arguments].concat());
        (process.wait().unwrap(), process.stderr())
    };
    assert_eq!(run(&["init", "--dir", "certs", "--host", "node7.example", "--host", "10.0.0.7"]).0, 0);
    Who::issue(dir.path(), "certs", "ann", "view");
    for name in ["ca.key", "server.key", "tokens", "ann/client.key"] {
        assert_eq!(mode(&path(name)), 0o600, "{name}");
    }
    let names =
        ["ca.pem", "ca.key", "server.pem", "server.key", "tokens", "ann/client.pem", "ann/client.key"];
    let before = names.map(|name| std::fs::read(path(name)).unwrap());
    for (arguments, words) in [
        (&["init", "--dir", "certs"][..], "expected a new folder"),
        (
            &["issue", "--dir", "certs", "--name", "ann", "--role", "admin"],
            "expected a new name, got \"ann\"",
        ),
        (&["issue", "--dir", "certs", "--name", "tokens", "--role", "admin"], "expected a new folder"),
        (&["issue", "--dir", "certs", "--name", "../ann", "--role", "admin"], "--name: expected letters"),
        (
            &["issue", "--dir", "certs", "--name", "bob", "--role", "boss"],
            "expected view, submit, admin or worker",
        ),
    ] {
        let (code, stderr) = run(arguments);
        assert_eq!(code, 2, "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
    }
    assert_eq!(names.map(|name| std::fs::read(path(name)).unwrap()), before);
    assert_eq!(path("").read_dir().unwrap().count(), 6, "five files and ann's folder");
}
