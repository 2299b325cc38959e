//! `contraflow bench dashboard`: an orchestrator's pages under a thousand ranks, ten thousand finished jobs and a run of a million
//! steps; and what an hour of steps and viewers that do not read do to its memory.
//!
//! Ranks are those of fake workers (`cluster`). Pages are opened by a script, in a browser; without one, only the server is measured.

mod pages;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use v1::job_service_client::JobServiceClient;

use self::pages::Pages;
use super::cluster::{Play, ROUND, Server, answer, cancel, fake, submit};
use crate::failure::Failure;
use crate::interrupt;
use crate::output::say;

/// Rounds of submissions that are cancelled: finished jobs in the end, in thousands.
const ROUNDS: usize = 10;

/// Ranks of the job that is looked at: DeepSeek-V3's layout, with each expert held once.
const RANKS: usize = 1_024;

/// Steps that the long run has made before it is looked at.
const LONG: u64 = 1_000_000;

/// Requests of each kind that are timed.
const TIMES: usize = 7;

/// Steps of the hour at one a second, and how many of them warm up.
const HOUR: u64 = 3_600;
const WARM_UP: u64 = 600;

/// Times that memory is read in that hour.
const LOOKS: u64 = 10;

/// Steps made while viewers do not read, and how many viewers those are: all but one that there may be.
const STALLED_STEPS: u64 = 600;
const STALLED: usize = 63;

/// How far the ranks may be ahead of what the orchestrator has on disk. **Units**: steps.
const AHEAD: u64 = 8;

/// How long the orchestrator may take to do what it was told.
const PATIENCE: Duration = Duration::from_secs(240);

/// What came of it. Units are in the names.
#[derive(Debug, Serialize)]
pub(super) struct DashboardFigures {
    ranks: usize,
    finished_jobs: usize,
    steps_of_the_long_run: u64,
    requests: Vec<Request>,
    /// One a page, as the script has it.
    pages: Vec<Value>,
    hour: Hour,
    stalled: Stalled,
    /// What the pages hold after so many refreshes, as the script has it.
    refreshes: Vec<Value>,
}

#[derive(Debug, Serialize)]
struct Request {
    path: &'static str,
    ms_median: f64,
    ms_longest: f64,
    kib: f64,
}

/// Steps of an hour, one a second, in less time.
#[derive(Debug, Serialize)]
struct Hour {
    steps: u64,
    took_s: f64,
    /// After the warm-up, evenly spread.
    server_mib: Vec<f64>,
    /// Of the page of the run, after a collection of garbage, at the same times.
    page_mib: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Stalled {
    viewers: usize,
    steps: u64,
    server_mib_before: f64,
    server_mib_after: f64,
    server_mib_most: f64,
    /// Those that were let go by then.
    let_go: usize,
}

/// The cluster that is looked at.
struct Scene {
    server: Server,
    wide: Job,
    long: Job,
    _workers: JoinSet<Result<(), tonic::Status>>,
}

/// A job and the hand that makes its ranks go on.
struct Job {
    id: String,
    step: watch::Sender<u64>,
    durable: Arc<AtomicU64>,
}

/// Measures it.
///
/// **Errors**: code 1 if a process cannot be started or does not answer.
pub(super) fn run(script: Option<&str>) -> Result<DashboardFigures, Failure> {
    interrupt::runtime()?.block_on(async {
        let scene = Scene::set().await?;
        let requests = scene.requests().await?;
        let seconds = tokio::spawn(every_second(scene.wide.step.clone(), scene.long.step.clone()));
        let about = json!({"wide": scene.wide.id, "long": scene.long.id});
        let open = |scenario: &str| {
            script.map(|script| Pages::open(script, &scene.server.pages, scenario, &about)).transpose()
        };
        let pages = match open("frames")? {
            Some(pages) => pages.all().await?,
            None => Vec::new(),
        };
        seconds.abort();
        let hour = scene.hour(open("hour")?).await?;
        let stalled = scene.stalled().await?;
        let seconds = tokio::spawn(every_second(scene.wide.step.clone(), scene.long.step.clone()));
        let refreshes = match open("refreshes")? {
            Some(pages) => pages.all().await?,
            None => Vec::new(),
        };
        seconds.abort();
        Ok(DashboardFigures {
            ranks: RANKS,
            finished_jobs: ROUND * ROUNDS,
            steps_of_the_long_run: LONG,
            requests,
            pages,
            hour,
            stalled,
            refreshes,
        })
    })
}

async fn every_second(wide: watch::Sender<u64>, long: watch::Sender<u64>) {
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    loop {
        clock.tick().await;
        wide.send_modify(|step| *step += 1);
        long.send_modify(|step| *step += 1);
    }
}

impl Scene {
    async fn set() -> Result<Self, Failure> {
        let server = Server::start()?;
        let mut jobs = JobServiceClient::new(server.channel().await?);
        for _ in 0..ROUNDS {
            let names = submit(&jobs).await?;
            cancel(&jobs, names).await?;
        }
        let (wide, wide_play) = Job::new(RANKS, 3..61, 256);
        let (long, long_play) = Job::new(1, 1..4, 8);
        let tcp = data_port().await?;
        let plays = Arc::new(vec![wide_play, long_play]);
        let mut workers = JoinSet::new();
        for worker in 0..=RANKS as u64 {
            workers.spawn(fake(server.channel().await?, worker + 1, tcp.clone(), plays.clone()));
        }
        let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];
        let long = long.begun(&mut jobs, "tiny", &[&alone[..], &["training.steps=8000000"]].concat()).await?;
        long.step.send_replace(LONG);
        long.until(LONG).await?;
        let wide =
            wide.begun(&mut jobs, "deepseek-v3", &["parallel.data=1", "training.steps=8000000"]).await?;
        wide.step.send_replace(60);
        wide.until(60).await?;
        if let Some(ended) = workers.try_join_next() {
            return Err(Failure::run(format!("a worker's stream has ended: {ended:?}")));
        }
        Ok(Scene { server, wide, long, _workers: workers })
    }

    /// How long the pages' requests take, nothing else going on.
    async fn requests(&self) -> Result<Vec<Request>, Failure> {
        let (wide, long) = (&self.wide.id, &self.long.id);
        // The first one begins to follow the run.
        get(&self.server.pages, &format!("/api/v1/runs/{long}")).await?;
        let began = Instant::now();
        loop {
            let overview = get(&self.server.pages, &format!("/api/v1/runs/{long}")).await?;
            let overview: Value = serde_json::from_slice(&overview).unwrap_or_default();
            if overview["step"].as_u64() >= Some(LONG) {
                break;
            }
            give_up_after(began, "a page's history of the long run")?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let loaded = began.elapsed();
        let asked = [
            ("/api/v1", String::new()),
            ("/api/v1/jobs", String::new()),
            ("/api/v1/nodes", String::new()),
            ("/api/v1/jobs/WIDE", format!("/api/v1/jobs/{wide}")),
            ("/api/v1/runs/WIDE", format!("/api/v1/runs/{wide}")),
            ("/api/v1/runs/WIDE/experts", format!("/api/v1/runs/{wide}/experts")),
            ("/api/v1/runs/WIDE/placement", format!("/api/v1/runs/{wide}/placement")),
            ("/api/v1/runs/WIDE/layers", format!("/api/v1/runs/{wide}/layers")),
            ("/api/v1/runs/WIDE/pipeline", format!("/api/v1/runs/{wide}/pipeline")),
            (
                "/api/v1/runs/WIDE/pipeline?view=operations",
                format!("/api/v1/runs/{wide}/pipeline?view=operations"),
            ),
            ("/api/v1/runs/LONG", format!("/api/v1/runs/{long}")),
            (
                "/api/v1/runs/LONG/series?figures=loss,mtp_loss",
                format!("/api/v1/runs/{long}/series?figures=loss,mtp_loss&points=900"),
            ),
            ("/api/v1/runs/LONG/series.csv", format!("/api/v1/runs/{long}/series.csv")),
            ("/metrics", String::new()),
        ];
        let first = loaded.as_secs_f64() * 1e3;
        let mut requests =
            vec![Request { path: "history of LONG, read", ms_median: first, ms_longest: first, kib: 0.0 }];
        for (path, real) in asked {
            let real = if real.is_empty() { path } else { &real };
            let (mut times, mut bytes) = (Vec::new(), 0);
            for _ in 0..TIMES {
                let began = Instant::now();
                bytes = get(&self.server.pages, real).await?.len();
                times.push(began.elapsed().as_secs_f64() * 1e3);
            }
            times.sort_by(f64::total_cmp);
            let (ms_median, ms_longest) = (times[TIMES / 2], times[TIMES - 1]);
            requests.push(Request { path, ms_median, ms_longest, kib: bytes as f64 / 1024.0 });
        }
        Ok(requests)
    }

    /// Makes steps as fast as they are taken in, looking in now and then.
    async fn play(
        &self,
        steps: u64,
        look_every: u64,
        mut look: impl AsyncFnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let first = *self.wide.step.borrow() + 1;
        for made in 0..steps {
            self.wide.step.send_replace(first + made);
            self.long.step.send_modify(|step| *step += 1);
            self.wide.until((first + made).saturating_sub(AHEAD)).await?;
            if (made + 1) % look_every == 0 {
                self.wide.until(first + made).await?;
                look(made + 1).await?;
            }
        }
        Ok(())
    }

    async fn hour(&self, page: Option<Pages>) -> Result<Hour, Failure> {
        let (mut server_mib, mut page_mib) = (Vec::new(), Vec::new());
        let mut page = page;
        if let Some(page) = &mut page {
            page.sample().await?;
        }
        self.play(WARM_UP, WARM_UP, async |_| Ok(())).await?;
        let warmed = Instant::now();
        self.play(HOUR, HOUR / LOOKS, async |made| {
            server_mib.push(self.server.resident());
            say(format_args!("{made} steps of an hour's {HOUR}"));
            if let Some(page) = &mut page {
                page_mib.push(page.sample().await?["mib"].as_f64().unwrap_or(f64::NAN));
            }
            Ok(())
        })
        .await?;
        let took_s = warmed.elapsed().as_secs_f64();
        Ok(Hour { steps: HOUR, took_s, server_mib, page_mib })
    }

    async fn stalled(&self) -> Result<Stalled, Failure> {
        let before = self.server.resident();
        let mut most = before;
        let mut held = Vec::new();
        for place in 0..STALLED {
            // Streams, and the largest answers that there are.
            let path = match place % 3 {
                0 => format!("/api/v1/runs/{}/series.csv", self.long.id),
                1 => format!("/api/v1/runs/{}/pipeline?view=operations", self.wide.id),
                _ => format!("/api/v1/runs/{}/live", self.wide.id),
            };
            held.push(asked(&self.server.pages, &path).await?);
            most = most.max(self.server.resident());
        }
        let began = Instant::now();
        self.play(STALLED_STEPS, 10, async |_| {
            most = most.max(self.server.resident());
            Ok(())
        })
        .await?;
        // A viewer is let go when it has not read for ten seconds.
        tokio::time::sleep(Duration::from_secs(25).saturating_sub(began.elapsed())).await;
        let mut let_go = 0;
        for tcp in &mut held {
            let_go += usize::from(is_closed(tcp).await);
        }
        Ok(Stalled {
            viewers: STALLED,
            steps: STALLED_STEPS,
            server_mib_before: before,
            server_mib_after: self.server.resident(),
            server_mib_most: most,
            let_go,
        })
    }
}

impl Job {
    fn new(world: usize, layers: std::ops::Range<u32>, experts: usize) -> (Self, Play) {
        let (step, made) = watch::channel(0);
        let durable: Arc<AtomicU64> = Arc::default();
        let play = Play { world, layers, experts, step: made, durable: durable.clone() };
        (Job { id: String::new(), step, durable }, play)
    }

    async fn begun(
        mut self,
        jobs: &mut JobServiceClient<Channel>,
        recipe: &str,
        overrides: &[&str],
    ) -> Result<Self, Failure> {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let (recipe, model_config) = Recipe::to_submit(&RecipeSource::Builtin(recipe.into()), &overrides)?;
        let request = v1::SubmitRequest { recipe, model_config, overrides, ..Default::default() };
        self.id = jobs.submit(request).await.map_err(|status| answer(&status))?.into_inner().job;
        Ok(self)
    }

    /// Waits until the orchestrator has all reports of a step on disk.
    async fn until(&self, step: u64) -> Result<(), Failure> {
        let began = Instant::now();
        while self.durable.load(Ordering::Relaxed) < step {
            give_up_after(began, &format!("step {step} of {}", self.id))?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

fn give_up_after(began: Instant, what: &str) -> Result<(), Failure> {
    if began.elapsed() < PATIENCE {
        return Ok(());
    }
    Err(Failure::run(format!("expected {what} within {} s, got nothing", PATIENCE.as_secs())))
}

/// A port that takes connections, for whoever looks whether the workers' data ports answer.
async fn data_port() -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::run(format!("a port: {error}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
        }
    });
    Ok(address.to_string())
}

/// A request whose answer is not read yet.
async fn asked(host: &str, path: &str) -> Result<TcpStream, Failure> {
    let failed = |error: std::io::Error| Failure::run(format!("{path}: {error}"));
    let mut tcp = TcpStream::connect(host).await.map_err(failed)?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.map_err(failed)?;
    Ok(tcp)
}

/// The body of an answer.
async fn get(host: &str, path: &str) -> Result<Vec<u8>, Failure> {
    let failed = |error: std::io::Error| Failure::run(format!("{path}: {error}"));
    let mut answer = Vec::new();
    asked(host, path).await?.read_to_end(&mut answer).await.map_err(failed)?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(0);
    if !answer.starts_with(b"HTTP/1.1 200") {
        return Err(Failure::run(format!(
            "{path}: expected 200, got {}",
            String::from_utf8_lossy(&answer[..end])
        )));
    }
    Ok(answer.split_off((end + 4).min(answer.len())))
}

/// Whether the other end has closed it; what had come by then is read.
async fn is_closed(tcp: &mut TcpStream) -> bool {
    let mut rest = vec![0; 1 << 16];
    loop {
        match tokio::time::timeout(Duration::from_millis(200), tcp.read(&mut rest)).await {
            Ok(Ok(0) | Err(_)) => return true,
            Ok(Ok(_)) => {}
            Err(_) => return false,
        }
    }
}

impl fmt::Display for DashboardFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DashboardFigures { ranks, finished_jobs, steps_of_the_long_run, .. } = self;
        writeln!(
            f,
            "{ranks} ranks (WIDE), {finished_jobs} finished jobs, a run of {steps_of_the_long_run} steps (LONG)"
        )?;
        for Request { path, ms_median, ms_longest, kib } in &self.requests {
            writeln!(f, "{path}: {ms_median:.1} ms median, {ms_longest:.1} ms longest, {kib:.0} KiB")?;
        }
        for page in &self.pages {
            writeln!(
                f,
                "page {}: interactive after {} ms median, {} ms longest; frames/s {} median, {} in the slowest second, longest \
                 frame {} ms",
                page["page"].as_str().unwrap_or_default(),
                page["interactive_ms_median"],
                page["interactive_ms_longest"],
                page["frames_per_second_median"],
                page["frames_per_second_least"],
                page["frame_ms_longest"],
            )?;
        }
        let listed =
            |values: &[f64]| values.iter().map(|value| format!("{value:.1}")).collect::<Vec<_>>().join(" ");
        let Hour { steps, took_s, server_mib, page_mib } = &self.hour;
        writeln!(f, "{steps} steps in {took_s:.0} s: server {} MiB", listed(server_mib))?;
        if !page_mib.is_empty() {
            writeln!(f, "its page, after collections of garbage: {} MiB", listed(page_mib))?;
        }
        for page in &self.refreshes {
            let name = page["page"].as_str().unwrap_or_default();
            writeln!(f, "page {name}, after {} refreshes: {} MiB", page["refreshes"], page["mib"])?;
        }
        let Stalled { viewers, steps, server_mib_before, server_mib_after, server_mib_most, let_go } =
            &self.stalled;
        writeln!(
            f,
            "{viewers} viewers that do not read, over {steps} steps: server {server_mib_before:.1} MiB before, {server_mib_most:.1} at \
             most, {server_mib_after:.1} after; {let_go} were let go"
        )
    }
}
