//! `contraflow bench viewers`: what it costs a run to be recorded and shown, with one page open, and with viewers that do not read.
//!
//! Runs of the default recipe alternate: alone, without flight recorder, history and server; with all of them and one viewer, which asks
//! for what a page of the run asks for, as often; and with as many streams more as there may be, which nobody reads. Viewers are a process
//! of their own, so that the CPU time of the run is its own.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use contraflow_orchestrator::metrics::Subscriber;
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::layout::resident_bytes;
use contraflow_runtime::schedule::Mode;
use contraflow_runtime::topology::Generation;
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::timelines::Timelines;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::cluster::TempFolder;
use super::step::RecordingCost;
use super::{QuietRun, WARM_UP, benchmark, cpu_seconds};
use crate::dashboard::{Door, DoorArgs, Facts, Shown, Subject};
use crate::failure::Failure;
use crate::local;

const RECIPE: &str = "tiny";

/// Streams that nobody reads: all that there may be but the page's.
const STALLED: usize = 63;

/// The page draws a few times a second, and asks before that.
const PAUSE: Duration = Duration::from_millis(400);

/// Series that the page of a run begins with.
const SERIES: usize = 10;

/// How a run is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    Alone,
    ByOnePage,
    ByStalled,
}

/// What a process of viewers does.
#[derive(Debug, Serialize, Deserialize)]
struct Viewers {
    /// HOST:PORT.
    host: String,
    run: String,
    stalled: usize,
}

/// What a step takes. **Units**: milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct StepCost {
    wall_ms: f64,
    cpu_ms: f64,
    /// Memory of the process at the end. **Units**: MiB.
    resident_mib: f64,
}

/// What it costs beside a run that is alone, over the rounds. Shares of 1.
#[derive(Debug, Serialize)]
struct Cost {
    wall_share_median: f64,
    wall_share_quartiles: [f64; 2],
    cpu_share_median: f64,
    cpu_share_quartiles: [f64; 2],
    resident_mib_median: f64,
}

/// What the command prints as JSON. Units are in the names.
#[derive(Debug, Serialize)]
pub(super) struct ViewersFigures {
    recipe: &'static str,
    rounds: usize,
    steps_of_a_round: usize,
    step_ms_alone_median: f64,
    cpu_ms_alone_median: f64,
    resident_mib_alone_median: f64,
    one_page: Cost,
    stalled_viewers: usize,
    with_stalled: Cost,
    /// What is recorded in all of them.
    timeline: RecordingCost,
}

/// Measures it.
///
/// **Errors**: code 2 without rounds or steps; code 1 if a run fails or cannot be served.
pub(super) fn run(rounds: usize, steps: usize) -> Result<ViewersFigures, Failure> {
    if rounds == 0 || steps == 0 {
        return Err(Failure::input("--rounds and --steps: expected at least 1"));
    }
    let mut taken: [Vec<StepCost>; 3] = Default::default();
    let mut last = None;
    for round in 0..rounds {
        let mut order = [Watched::Alone, Watched::ByOnePage, Watched::ByStalled];
        // Each of them comes first, second and last equally often.
        order.rotate_left(round % 3);
        for watched in order {
            let (cost, timelines) = train(watched, steps)?;
            taken[watched as usize].push(cost);
            last = Some(timelines);
        }
    }
    let [alone, page, stalled] = taken;
    let step_ms = median(alone.iter().map(|cost| cost.wall_ms));
    let timelines = last.ok_or_else(|| Failure::run("no run"))?;
    Ok(ViewersFigures {
        recipe: RECIPE,
        rounds,
        steps_of_a_round: steps,
        step_ms_alone_median: step_ms,
        cpu_ms_alone_median: median(alone.iter().map(|cost| cost.cpu_ms)),
        resident_mib_alone_median: median(alone.iter().map(|cost| cost.resident_mib)),
        one_page: Cost::of(&alone, &page),
        stalled_viewers: STALLED,
        with_stalled: Cost::of(&alone, &stalled),
        timeline: RecordingCost::of(&timelines, step_ms / 1e3)?,
    })
}

/// The part of viewers in it, given as JSON. Ends when the run is no longer served.
///
/// **Errors**: code 1 if the run cannot be reached.
pub(super) fn be(part: &str) -> Result<(), Failure> {
    let viewers: Viewers = serde_json::from_str(part).map_err(|error| Failure::run(error.to_string()))?;
    viewers.look().map_err(|error| Failure::run(format!("a viewer: {error}")))
}

impl Cost {
    fn of(alone: &[StepCost], watched: &[StepCost]) -> Cost {
        let shares = |of: fn(&StepCost) -> f64| {
            let pairs = alone.iter().zip(watched);
            let mut shares: Vec<f64> = pairs.map(|(alone, watched)| of(watched) / of(alone) - 1.0).collect();
            shares.sort_by(f64::total_cmp);
            shares
        };
        let quartiles = |shares: &[f64]| [shares[shares.len() / 4], shares[shares.len() * 3 / 4]];
        let (wall, cpu) = (shares(|cost| cost.wall_ms), shares(|cost| cost.cpu_ms));
        Cost {
            wall_share_median: wall[wall.len() / 2],
            wall_share_quartiles: quartiles(&wall),
            cpu_share_median: cpu[cpu.len() / 2],
            cpu_share_quartiles: quartiles(&cpu),
            resident_mib_median: median(watched.iter().map(|cost| cost.resident_mib)),
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A run of so many steps, after some that warm up.
fn train(watched: Watched, steps: usize) -> Result<(StepCost, Timelines), Failure> {
    let (recipe, datasets) = benchmark(RECIPE, 1, WARM_UP + steps, &[])?;
    let folder = TempFolder::create("viewers").map_err(|error| Failure::run(error.to_string()))?;
    let world = recipe.topology().world();
    let (shown, served) = match watched {
        Watched::Alone => (None, None),
        _ => {
            let shown = shown(&recipe, &folder.0)?;
            let dashboard = served(&shown)?;
            let stalled = if watched == Watched::ByStalled { STALLED } else { 0 };
            let viewers =
                Viewers { host: dashboard.address().to_string(), run: shown.facts.id.clone(), stalled };
            let child = viewers.start()?;
            (Some(shown), Some((dashboard, child)))
        }
    };
    let flight = match watched {
        Watched::Alone => Recorders::default(),
        _ => local::recorders(&folder.0, Generation::FIRST, world),
    };
    let ends: Arc<Mutex<Vec<(Instant, f64)>>> = Arc::default();
    let noted = ends.clone();
    let subscriber: Subscriber = Box::new(move |record| {
        shown.iter().for_each(|shown| shown.step(record));
        noted.lock().push((Instant::now(), cpu_seconds()));
    });
    let run = QuietRun { recipe, datasets, checkpoints: None, export_dir: None, subscriber };
    let (_, timelines) = run.run_with(Probe::default(), flight)?;
    let resident_mib = resident_bytes().unwrap_or(0) as f64 / f64::from(1 << 20);
    if let Some((dashboard, child)) = served {
        drop(dashboard);
        end(child)?;
    }
    let ends = std::mem::take(&mut *ends.lock());
    let ((began, before), (ended, after)) = (ends[WARM_UP - 1], ends[ends.len() - 1]);
    let each = |seconds: f64| 1e3 * seconds / steps as f64;
    let cost =
        StepCost { wall_ms: each((ended - began).as_secs_f64()), cpu_ms: each(after - before), resident_mib };
    Ok((cost, timelines))
}

fn shown(recipe: &contraflow_runtime::recipe::Recipe, folder: &Path) -> Result<Arc<Shown>, Failure> {
    let parallel = &recipe.parallel;
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let plan = parallel.schedule.plan(parallel.pipeline, micro_batches, Mode::Train);
    let (plan, _) = plan.map_err(|fault| Failure::run(fault.to_string()))?;
    Ok(Shown::starting(Facts::of_local(folder, Arc::new(recipe.clone()), plan)))
}

fn served(shown: &Arc<Shown>) -> Result<crate::dashboard::Dashboard, Failure> {
    let listen = "127.0.0.1:0".parse().map_err(Failure::run)?;
    let door = Door::open(&DoorArgs { listen: Some(listen), token: None })?;
    door.ok_or_else(|| Failure::run("no door"))?.serve(Subject::of_runs(vec![shown.clone()]))
}

/// Ends a process of viewers, whose streams have ended.
fn end(mut child: Child) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::run(format!("viewers: {error}"));
    match child.try_wait().map_err(failed)? {
        Some(status) if !status.success() => Err(Failure::run(format!("viewers: {status}"))),
        _ => child.kill().and_then(|()| child.wait()).map(drop).map_err(failed),
    }
}

impl Viewers {
    fn start(&self) -> Result<Child, Failure> {
        let failed = |error: std::io::Error| Failure::run(format!("viewers: {error}"));
        let part = serde_json::to_string(self).map_err(|error| Failure::run(error.to_string()))?;
        let program = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        command.args(["bench", "viewers", "--part", &part]).stdin(Stdio::null()).spawn().map_err(failed)
    }

    fn look(&self) -> std::io::Result<()> {
        let run = format!("/api/v1/runs/{}", self.run);
        let _stalled = (0..self.stalled)
            .map(|_| self.ask(&format!("{run}/live?after=0")))
            .collect::<std::io::Result<Vec<_>>>()?;
        for path in ["/", "/assets/app.js", "/api/v1", &run] {
            self.get(path)?;
        }
        (0..SERIES).try_for_each(|_| self.get(&format!("{run}/series?figures=loss,mtp_loss&points=900")))?;
        let mut lines = BufReader::new(self.ask(&format!("{run}/live?after=0"))?).lines();
        let mut latest = Instant::now();
        while let Some(Ok(line)) = lines.next() {
            if line.starts_with("event: s") && latest.elapsed() >= PAUSE {
                latest = Instant::now();
                if self.get(&run).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn ask(&self, path: &str) -> std::io::Result<TcpStream> {
        let mut tcp = TcpStream::connect(&self.host)?;
        write!(tcp, "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.host)?;
        Ok(tcp)
    }

    fn get(&self, path: &str) -> std::io::Result<()> {
        self.ask(path)?.read_to_end(&mut Vec::new()).map(drop)
    }
}

impl fmt::Display for ViewersFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ViewersFigures { recipe, rounds, steps_of_a_round, stalled_viewers, .. } = self;
        writeln!(
            f,
            "{recipe}, {rounds} rounds of {steps_of_a_round} steps: {:.2} ms a step and {:.2} ms of CPU time alone, {:.0} MiB",
            self.step_ms_alone_median, self.cpu_ms_alone_median, self.resident_mib_alone_median
        )?;
        let with_stalled = format!("and {stalled_viewers} streams that nobody reads");
        for (words, cost) in [("recorded, one page", &self.one_page), (&*with_stalled, &self.with_stalled)] {
            let share = |share: f64| format!("{:+.2}%", 100.0 * share);
            let [low, high] = cost.wall_share_quartiles;
            let [cpu_low, cpu_high] = cost.cpu_share_quartiles;
            writeln!(
                f,
                "{words}: step time {} ({} to {}), CPU time {} ({} to {}); {:.0} MiB",
                share(cost.wall_share_median),
                share(low),
                share(high),
                share(cost.cpu_share_median),
                share(cpu_low),
                share(cpu_high),
                cost.resident_mib_median
            )?;
        }
        writeln!(f, "the timeline, recorded in all of them: {:.3}% of a step", 100.0 * self.timeline.share)
    }
}
