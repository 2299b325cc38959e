//! `contraflow bench load`: an orchestrator under many submissions, many workers and many finished jobs.
//!
//! The orchestrator is a process of its own, started by this command, so that its CPU time can be separated from that of the
//! clients. The workers are fakes: real streams, real beats, no ranks.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use v1::control_service_client::ControlServiceClient;
use v1::from_worker::Message;
use v1::job_service_client::JobServiceClient;

use crate::failure::Failure;
use crate::interrupt;

/// Clients that submit at the same time.
const CLIENTS: usize = 32;

/// Jobs that are submitted, and then cancelled, in one go.
const ROUND: usize = 1_000;

/// Rounds: finished jobs in the end, in thousands.
const ROUNDS: usize = 10;

/// Lists of jobs that are asked for.
const LISTS: usize = 50;

/// Fake workers.
const WORKERS: u64 = 1_000;

/// How often each of them beats.
const BEAT: Duration = Duration::from_secs(1);

/// For how long their load is measured.
const WATCHED: Duration = Duration::from_secs(20);

/// A folder that goes with the command.
struct TempFolder(PathBuf);

impl Drop for TempFolder {
    fn drop(&mut self) {
        // No longer needed; if it cannot be removed, its name says what it is.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// An orchestrator that ends with this command.
struct Server {
    child: Child,
    address: String,
    _state: TempFolder,
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended is no fault.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Server {
    fn start() -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::run(format!("an orchestrator: {error}"));
        let dir = std::env::temp_dir().join(format!("contraflow-load-{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(failed)?;
        let state = TempFolder(dir);
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.arg("orchestrator").arg("--state").arg(&state.0).args(["--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
        let mut reported =
            BufReader::new(child.stderr.take().ok_or_else(|| Failure::run("no stderr"))?).lines();
        let first = reported.by_ref().map_while(Result::ok).find(|line| line.starts_with("orchestrator at "));
        let first = first.ok_or_else(|| Failure::run("the orchestrator has not started"))?;
        // Its further lines must go somewhere.
        std::thread::spawn(move || reported.for_each(drop));
        let address = first.split_whitespace().nth(2).unwrap_or_default().trim_end_matches(',').to_owned();
        Ok(Server { child, address, _state: state })
    }

    /// CPU time it has had so far, user and system.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // The name, in brackets, may contain spaces; the times are the 12th and 13th field after it.
        let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        Duration::from_millis((ticks(11) + ticks(12)) * 1000 / rustix::param::clock_ticks_per_second())
    }

    async fn channel(&self) -> Result<Channel, Failure> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address));
        let endpoint = endpoint.map_err(|error| Failure::run(error.to_string()))?;
        endpoint.connect().await.map_err(|error| Failure::run(error.to_string()))
    }
}

/// What the orchestrator made of it.
#[derive(Debug, Serialize)]
pub(super) struct LoadFigures {
    clients: usize,
    /// Each one durable: the median and the slowest of the rounds.
    submissions_per_second_median: f64,
    submissions_per_second_slowest: f64,
    finished_jobs: usize,
    /// A page of 100 jobs.
    list_ms_median: f64,
    list_ms_longest: f64,
    workers: u64,
    /// Share of one core, with a beat of each worker a second.
    cores: f64,
}

/// Measures it.
///
/// **Errors**: code 1 if the orchestrator cannot be started or does not answer.
pub(super) fn run() -> Result<LoadFigures, Failure> {
    let server = Server::start()?;
    interrupt::runtime()?.block_on(async {
        let jobs = JobServiceClient::new(server.channel().await?);
        let mut rates = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let names = submit(&jobs).await?;
            rates.push(ROUND as f64 / began.elapsed().as_secs_f64());
            cancel(&jobs, names).await?;
        }
        rates.sort_by(f64::total_cmp);
        let mut times = Vec::new();
        for _ in 0..LISTS {
            let began = Instant::now();
            let listed =
                jobs.clone().list(v1::ListRequest::default()).await.map_err(|status| answer(&status))?;
            assert_eq!(listed.into_inner().jobs.len(), 100, "a page of the list");
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let share = beats(&server).await?;
        Ok(LoadFigures {
            clients: CLIENTS,
            submissions_per_second_median: rates[ROUNDS / 2],
            submissions_per_second_slowest: rates[0],
            finished_jobs: ROUND * ROUNDS,
            list_ms_median: 1e3 * times[LISTS / 2],
            list_ms_longest: 1e3 * times[LISTS - 1],
            workers: WORKERS,
            cores: share,
        })
    })
}

impl fmt::Display for LoadFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:.0} submissions/s (median of {ROUNDS} rounds of {ROUND}; slowest {:.0}), {} at a time, each durable",
            self.submissions_per_second_median, self.submissions_per_second_slowest, self.clients
        )?;
        writeln!(
            f,
            "list of 100 among {} finished jobs: {:.1} ms median, {:.1} ms longest",
            self.finished_jobs, self.list_ms_median, self.list_ms_longest
        )?;
        writeln!(
            f,
            "{} workers that beat once a second: {:.0}% of one core",
            self.workers,
            100.0 * self.cores
        )
    }
}

fn answer(status: &tonic::Status) -> Failure {
    Failure::run(format!("expected an answer, got {status}"))
}

async fn submit(jobs: &JobServiceClient<Channel>) -> Result<Vec<String>, Failure> {
    let (recipe, _) = Recipe::to_submit(&RecipeSource::Builtin("tiny".into()), &[])?;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (mut jobs, recipe) = (jobs.clone(), recipe.clone());
        let share = (client..ROUND).step_by(CLIENTS).count();
        clients.spawn(async move {
            let mut names = Vec::with_capacity(share);
            for _ in 0..share {
                let request =
                    v1::SubmitRequest { recipe: recipe.clone(), name: "load".into(), ..Default::default() };
                names.push(jobs.submit(request).await?.into_inner().job);
            }
            Ok(names)
        });
    }
    let mut all = Vec::new();
    while let Some(names) = clients.join_next().await {
        let names: Result<Vec<String>, tonic::Status> =
            names.map_err(|error| Failure::run(error.to_string()))?;
        all.extend(names.map_err(|status| answer(&status))?);
    }
    Ok(all)
}

async fn cancel(jobs: &JobServiceClient<Channel>, names: Vec<String>) -> Result<(), Failure> {
    let mut clients = JoinSet::new();
    for job in names {
        let mut jobs = jobs.clone();
        clients.spawn(async move { jobs.cancel(v1::CancelRequest { job, reason: "load".into() }).await });
    }
    while let Some(answered) = clients.join_next().await {
        answered.map_err(|error| Failure::run(error.to_string()))?.map_err(|status| answer(&status))?;
    }
    Ok(())
}

/// The share of a core that the orchestrator takes while many workers beat.
async fn beats(server: &Server) -> Result<f64, Failure> {
    let mut streams = JoinSet::new();
    for worker in 1..=WORKERS {
        let channel = server.channel().await?;
        streams.spawn(fake(channel, worker));
    }
    tokio::time::sleep(3 * BEAT).await;
    let (began, before) = (Instant::now(), server.cpu());
    tokio::time::sleep(WATCHED).await;
    let share = (server.cpu() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    if let Some(ended) = streams.try_join_next() {
        return Err(Failure::run(format!("a worker's stream has ended: {ended:?}")));
    }
    Ok(share)
}

/// A worker without ranks.
async fn fake(channel: Channel, worker: u64) -> Result<(), tonic::Status> {
    let (up, words) = tokio::sync::mpsc::channel(4);
    let hello = v1::Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        worker,
        name: format!("fake-{worker}"),
        slots: 1,
        node: format!("node-{worker}"),
        block: "block".into(),
        fabric: Some(v1::FabricAddress { tcp: "127.0.0.1:1".into(), ..v1::FabricAddress::default() }),
        storage_id: "bench".into(),
        ..v1::Hello::default()
    };
    let say = async move {
        let mut clock = tokio::time::interval(BEAT);
        let mut message = Message::Hello(hello);
        loop {
            clock.tick().await;
            if up.send(v1::FromWorker { message: Some(message) }).await.is_err() {
                return;
            }
            message = Message::Beat(v1::Beat::default());
        }
    };
    let hear = async move {
        let mut client = ControlServiceClient::new(channel);
        let mut down = client.attach(ReceiverStream::new(words)).await?.into_inner();
        while let Some(word) = down.next().await {
            if let Some(v1::to_worker::Message::Refused(why)) = word?.message {
                return Err(tonic::Status::aborted(why));
            }
        }
        Err(tonic::Status::aborted("the orchestrator has ended the stream"))
    };
    tokio::select! {
        () = say => Ok(()),
        heard = hear => heard,
    }
}
