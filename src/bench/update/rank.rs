//! One rank of a measured run, in a process of its own: trains from fresh weights, commanded by this file alone.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::fabric::{Endpoint, Transport};
use contraflow_runtime::schedule::Span;
use contraflow_runtime::topology::{FormationId, Rank};
use contraflow_runtime::trace::TraceContext;
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use contraflow_workers::engine::timelines::Timelines;
use contraflow_workers::rank::build::Assignment;
use contraflow_workers::rank::worker::{Worker, WorkerMessage};
use parking_lot::Mutex;
use ractor::Actor;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{DELAYS, ProcessRole};
use crate::bench::processes::{TIMEOUT, await_end, join};
use crate::bench::{WARM_UP, seeded_datasets};
use crate::run_dir;

/// What a rank has trained.
#[derive(Debug, Serialize, Deserialize)]
pub struct Trained {
    /// By step, as bits.
    pub losses_and_norms: Vec<[u64; 2]>,
    /// Hash of the weights that the rank would export at the end.
    pub weights: String,
    /// The measured steps.
    pub steps: Vec<Recorded>,
}

/// A step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recorded {
    /// When each operation ran. **Units**: seconds on the clock that all processes of the machine share.
    pub spans: Vec<Span>,
    /// **Units**: seconds, as the rank reports.
    pub step_s: f64,
    /// How long the compute lane waited for the update. **Units**: seconds.
    pub exposed_s: f64,
}

/// Plays the part, and writes what came of it to stdout.
///
/// **Errors**: whatever the rank says.
pub fn be(part: &ProcessRole) -> Result<(), Box<dyn Error>> {
    let network = join(part.rank, Transport::Auto, Some(DELAYS))?;
    let dir = Path::new(run_dir::RUNS).join(format!(".bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let trained = runtime.block_on(train(part, network.join(part.rank)?, dir.clone()));
    // No longer needed; if it cannot be removed, its name says what it is.
    drop(std::fs::remove_dir_all(&dir));
    println!("{}", serde_json::to_string(&trained?)?);
    await_end()?;
    network.close();
    Ok(())
}

async fn train(part: &ProcessRole, endpoint: Endpoint, dir: PathBuf) -> Result<Trained, Box<dyn Error>> {
    let recipe = part.recipe().map_err(|failure| failure.to_string())?;
    let last = recipe.training.steps as u64;
    let recorded: Arc<Mutex<Vec<Recorded>>> = Arc::default();
    let assignment = Box::new(Assignment {
        formation: FormationId::default(),
        endpoint,
        datasets: Arc::new(seeded_datasets(&recipe)),
        recipe: Arc::new(recipe),
        resume: None,
        recovered: None,
        replicator: None,
        checkpoints: None,
        save_timeout: Duration::ZERO,
        trace: TraceContext::default(),
        timelines: Timelines::new(1),
        flight: None,
        probe: recorder(recorded.clone(), WARM_UP as u64 + 1..last),
    });
    let (tell, mut events) = mpsc::unbounded_channel();
    // The receiver is gone once this has ended.
    let (worker, _) = Actor::spawn(None, Worker, Arc::new(move |event| drop(tell.send(event)))).await?;
    let rank = Rank::at(part.rank);
    worker.cast(WorkerMessage::Host { rank, assignment })?;
    let command =
        |command| worker.cast(WorkerMessage::Command { rank, command, trace: TraceContext::default() });
    let mut losses_and_norms = Vec::new();
    let file = loop {
        let event = tokio::time::timeout(2 * TIMEOUT, events.recv()).await;
        let event = event.map_err(|_| format!("rank {rank} has been silent for {:?}", 2 * TIMEOUT))?;
        match event.ok_or("the worker has ended")? {
            RankEvent::Ready { .. } => command(RankCommand::BeginStep { step: 1 })?,
            RankEvent::StepDone { report } => {
                losses_and_norms.push([report.loss, report.grad_norm].map(f64::to_bits));
                if report.step == last {
                    command(RankCommand::Export { dir: dir.clone() })?;
                }
            }
            RankEvent::Exported { file, .. } => break file.file,
            RankEvent::Failed { action, cause, .. } => {
                return Err(format!("rank {rank}, {action}: {cause}").into());
            }
            event => return Err(format!("expected rank {rank} to train, got {event:?}").into()),
        }
    };
    let weights = match file.as_str() {
        "" => String::new(),
        file => blake3::hash(&std::fs::read(dir.join(file))?).to_string(),
    };
    let steps = std::mem::take(&mut *recorded.lock());
    Ok(Trained { losses_and_norms, weights, steps })
}

/// Notes the steps in a range.
fn recorder(recorded: Arc<Mutex<Vec<Recorded>>>, steps: std::ops::Range<u64>) -> Probe {
    Probe::new(move |point| {
        if let ProbePoint::Recorded { step, recording, seconds, .. } = point
            && steps.contains(&step)
        {
            let zero = machine_seconds() - seconds;
            let shift = |span: &Span| Span { start: zero + span.start, end: zero + span.end };
            let spans = recording.timeline.spans.iter().flatten().map(shift).collect();
            let step = Recorded { spans, step_s: seconds, exposed_s: recording.idle.update };
            recorded.lock().push(step);
        }
    })
}

/// The clock that all processes of the machine share.
fn machine_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
