//! An orchestrator under a bench, and its workers.
//!
//! The orchestrator is a process of its own, started by this command, so that its CPU time and memory can be told from those of the
//! clients. The workers are fakes: real streams, real beats, and ranks that report steps without making any.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use contraflow_proto::{GradientNorms, LayerLoad, StepReport, v1};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;
use v1::control_service_client::ControlServiceClient;
use v1::from_worker::Message;
use v1::job_service_client::JobServiceClient;
use v1::rank_command::Command as Order;
use v1::rank_event::Event;

use crate::failure::Failure;

/// Clients that submit at the same time.
pub(super) const CLIENTS: usize = 32;

/// Jobs that are submitted, and then cancelled, in one go.
pub(super) const ROUND: usize = 1_000;

/// How often a fake worker beats.
pub(super) const BEAT: Duration = Duration::from_secs(1);

/// Reports of one rank between two looks at what else there is to do: it has to beat.
const REPORTS: u64 = 256;

/// A folder that goes with the command.
pub(super) struct TempFolder(pub(super) PathBuf);

impl TempFolder {
    /// **Errors**: what the system says.
    pub(super) fn create(name: &str) -> std::io::Result<Self> {
        let dir = std::env::temp_dir().join(format!("contraflow-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(TempFolder(dir))
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        // No longer needed; if it cannot be removed, its name says what it is.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// An orchestrator that ends with this command.
pub(super) struct Server {
    child: Child,
    /// Where clients and workers connect: HOST:PORT.
    pub(super) address: String,
    /// Where its pages are: HOST:PORT.
    pub(super) pages: String,
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
    pub(super) fn start() -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::run(format!("an orchestrator: {error}"));
        let state = TempFolder::create("load").map_err(failed)?;
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.arg("orchestrator").arg("--state").arg(&state.0);
        command.args(["--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
        let mut reported =
            BufReader::new(child.stderr.take().ok_or_else(|| Failure::run("no stderr"))?).lines();
        let mut said = |what: &str| {
            let line = reported.by_ref().map_while(Result::ok).find_map(|line| {
                let rest = line.strip_prefix(what)?.split([',', ' ']).next()?;
                Some(rest.trim_start_matches("http://").trim_end_matches('/').to_owned())
            });
            line.ok_or_else(|| Failure::run("the orchestrator has not started"))
        };
        let (address, pages) = (said("orchestrator at ")?, said("dashboard: ")?);
        // Its further lines must go somewhere.
        std::thread::spawn(move || reported.for_each(drop));
        Ok(Server { child, address, pages, _state: state })
    }

    /// CPU time it has had so far, user and system.
    pub(super) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // The name, in brackets, may contain spaces; the times are the 12th and 13th field after it.
        let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        Duration::from_millis((ticks(11) + ticks(12)) * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Memory that it has in use. **Units**: MiB.
    pub(super) fn resident(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        kib.unwrap_or(f64::NAN) / 1024.0
    }

    pub(super) async fn channel(&self) -> Result<Channel, Failure> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address));
        let endpoint = endpoint.map_err(|error| Failure::run(error.to_string()))?;
        endpoint.connect().await.map_err(|error| Failure::run(error.to_string()))
    }
}

pub(super) fn answer(status: &Status) -> Failure {
    Failure::run(format!("expected an answer, got {status}"))
}

/// Submits a round of small jobs, many at a time; their ids.
pub(super) async fn submit(jobs: &JobServiceClient<Channel>) -> Result<Vec<String>, Failure> {
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
        let names: Result<Vec<String>, Status> = names.map_err(|error| Failure::run(error.to_string()))?;
        all.extend(names.map_err(|status| answer(&status))?);
    }
    Ok(all)
}

pub(super) async fn cancel(jobs: &JobServiceClient<Channel>, names: Vec<String>) -> Result<(), Failure> {
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

/// What the ranks of the jobs of one size report.
#[derive(Clone)]
pub(super) struct Play {
    /// Ranks of the job.
    pub(super) world: usize,
    /// Mixture layers, of which as many ranks report the tokens per expert as there are places in the pipeline.
    pub(super) layers: std::ops::Range<u32>,
    /// Routed experts of a layer.
    pub(super) experts: usize,
    /// The last step that the ranks have made.
    pub(super) step: watch::Receiver<u64>,
    /// The last step whose reports the orchestrator has called durable.
    pub(super) durable: Arc<AtomicU64>,
}

/// Ranks that report loads.
const LOADED: u32 = 16;

/// A number from 0 to 1 that looks like chance and is the same each time.
fn noise(seed: u64) -> f64 {
    let mixed = (seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

impl Play {
    fn report(&self, rank: u32, generation: u32, step: u64) -> StepReport {
        let chance = |what: u64| noise(what << 48 ^ step << 16 ^ u64::from(rank));
        let load = |layer: u32| {
            let count =
                |expert: u64| (800.0 + 400.0 * noise(step << 24 ^ u64::from(layer) << 12 ^ expert)) as u64;
            LayerLoad { layer, counts: (0..self.experts as u64).map(count).collect() }
        };
        let layers = self.layers.clone().filter(|layer| rank < LOADED && layer % LOADED == rank);
        let norms = || GradientNorms {
            embedding: 0.4,
            layers: (0..=self.layers.end).map(|layer| 0.1 + 0.01 * f64::from(layer)).collect(),
            head: 0.3,
        };
        // The same on every rank.
        let shared = noise(step);
        StepReport {
            rank,
            generation,
            step,
            tokens: 4_096,
            loss: 2.0 + 9.0 / (1.0 + step as f64 / 500.0).sqrt() + 0.05 * shared,
            grad_norm: 0.5 + 0.2 * shared,
            learning_rate: 2.2e-4,
            seconds: 0.9 + 0.05 * chance(1),
            bubble_seconds: 0.1 + 0.02 * chance(2),
            peak_live_chunks: 17,
            sent_bytes: 1 << 24,
            loads: layers.map(load).collect(),
            gradient_norms: (rank == 0).then(norms),
            unix_ms: unix_ms(),
            link_seconds: 0.05 * chance(3),
            memory_bytes: 60 << 30,
            ..StepReport::default()
        }
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A rank that a fake worker hosts.
struct FakeRank {
    play: Play,
    job: u64,
    generation: u32,
    rank: u64,
    /// The first step that it has not reported, once it was told to begin.
    next: Option<u64>,
}

impl FakeRank {
    fn event(&self, event: Event) -> Message {
        let (job, generation, rank) = (self.job, self.generation, self.rank);
        Message::Event(v1::RankEvent { job, generation, rank, event: Some(event) })
    }

    /// The next reports, when there are some.
    async fn reports(&mut self) -> Vec<Message> {
        let Some(next) = self.next else { return std::future::pending().await };
        let Ok(last) = self.play.step.wait_for(|step| *step >= next).await.map(|step| *step) else {
            return std::future::pending().await;
        };
        let last = last.min(next + REPORTS - 1);
        self.next = Some(last + 1);
        let rank = u32::try_from(self.rank).unwrap_or(u32::MAX);
        (next..=last)
            .map(|step| self.event(Event::StepDone(self.play.report(rank, self.generation, step))))
            .collect()
    }

    fn progress(&self) -> v1::Progress {
        let step = self.next.unwrap_or(0);
        let (job, generation, rank) = (self.job, self.generation, self.rank);
        // Its operations go on whether a step ends or not.
        v1::Progress { job, rank, generation, step, operations: unix_ms(), ..v1::Progress::default() }
    }
}

/// A worker with one slot, until its stream ends; of a job of a play's size it takes a rank. `tcp` is where its data port would be.
pub(super) async fn fake(
    channel: Channel,
    worker: u64,
    tcp: String,
    plays: Arc<Vec<Play>>,
) -> Result<(), Status> {
    let ended = || Status::aborted("the orchestrator has ended the stream");
    let (up, words) = mpsc::channel(64);
    let say =
        |message| async { up.send(v1::FromWorker { message: Some(message) }).await.map_err(|_| ended()) };
    let hello = v1::Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        worker,
        name: format!("fake-{worker}"),
        slots: 1,
        node: format!("node-{}", worker / 8),
        block: "block".into(),
        fabric: Some(v1::FabricAddress { tcp, ..v1::FabricAddress::default() }),
        storage_id: "bench".into(),
        ..v1::Hello::default()
    };
    say(Message::Hello(hello)).await?;
    let mut client = ControlServiceClient::new(channel);
    let mut down = client.attach(ReceiverStream::new(words)).await?.into_inner();
    let mut clock = tokio::time::interval(BEAT);
    let mut hosted: Option<FakeRank> = None;
    loop {
        let reports = async {
            match &mut hosted {
                Some(rank) => rank.reports().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = clock.tick() => {
                let progress = hosted.iter().map(FakeRank::progress).collect();
                say(Message::Beat(v1::Beat { progress })).await?;
            }
            reports = reports => for report in reports { say(report).await? },
            word = down.message() => {
                let word = word?.ok_or_else(ended)?.message;
                if let Some(reply) = heard(word, &plays, &mut hosted)? {
                    say(reply).await?;
                }
            }
        }
    }
}

/// What a fake worker makes of a message, and its answer.
fn heard(
    word: Option<v1::to_worker::Message>,
    plays: &[Play],
    hosted: &mut Option<FakeRank>,
) -> Result<Option<Message>, Status> {
    use v1::to_worker::Message as Word;
    match word {
        Some(Word::Refused(why)) => return Err(Status::aborted(why)),
        Some(Word::Assign(assign)) => {
            let play = plays.iter().find(|play| play.world == assign.workers.len());
            if let (Some(play), Some(&rank)) = (play, assign.ranks.first()) {
                let (play, job, generation) = (play.clone(), assign.job, assign.generation);
                let rank = hosted.insert(FakeRank { play, job, generation, rank, next: None });
                return Ok(Some(rank.event(Event::Ready(v1::Empty {}))));
            }
        }
        Some(Word::Command(command)) => {
            if let (Some(rank), Some(Order::BeginStep(step))) = (hosted, command.command) {
                rank.next.get_or_insert(step);
            }
        }
        Some(Word::Durable(durable)) => {
            if let Some(rank) = hosted.as_ref().filter(|rank| rank.rank == 0) {
                rank.play.durable.fetch_max(durable.step, Ordering::Relaxed);
            }
        }
        Some(Word::Release(_)) => *hosted = None,
        _ => {}
    }
    Ok(None)
}
