//! A whole cluster in this process: a job, a worker that hosts every rank, and the local fabric between them.
//!
//! Composition only: who talks to whom is decided here, what they say is not.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use contraflow_orchestrator::job::{JobSetup, Outcome};
use contraflow_orchestrator::job_actor::{Commits, JobActor, JobActorSetup, JobMessage};
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::JobConstants;
use contraflow_runtime::fabric::{Activity, Endpoint, LocalNetwork, LocalOptions};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::files::STUCK;
use contraflow_runtime::flight::{self, About, Beats, Recorders};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};
use contraflow_runtime::trace::{self, TraceContext};
use contraflow_workers::checkpoint::Checkpoint;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::timelines::Timelines;
use contraflow_workers::rank::build::Assignment;
use contraflow_workers::rank::worker::{Worker, WorkerMessage};
use ractor::{Actor, ActorRef};
use tokio::sync::oneshot;

use crate::output::say;

/// What a cluster runs.
pub struct LocalClusterSpec {
    /// What to train and how.
    pub recipe: Arc<Recipe>,
    /// The sequences.
    pub datasets: Arc<Datasets>,
    /// Count of (re)formations of the job, from 1.
    pub generation: Generation,
    /// Measured peak of the cores in use, if measured. **Units**: FLOP/s.
    pub peak_flops: Option<f64>,
    /// What the run resumes from, if it is not fresh.
    pub resume: Option<Arc<Checkpoint>>,
    /// Where checkpoints are kept, if anywhere.
    pub checkpoints: Option<Commits>,
    /// Where the weights go at the end, if anywhere; the folder exists.
    pub export_dir: Option<PathBuf>,
    /// Timeout, delay injection and frame log of the fabric.
    pub network: LocalOptions,
    /// Take what the ranks do; none of a default.
    pub flight: Recorders,
    /// For tests.
    pub probe: Probe,
    /// Subscribers to the record of every step.
    pub subscribers: Vec<Subscriber>,
}

/// How long the last checkpoint is tried to be written while storage fails: who sees the run may make room.
const SAVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Begins the record of what the ranks of a run do, in its folder. A run is as good without: why there is none is said.
pub fn recorders(run: &Path, generation: Generation, world: usize) -> Recorders {
    let about = About { formation: FormationId::new(JobId::default(), generation), world };
    let folder = run.join(flight::FOLDER);
    Recorders::create(&folder, &about).unwrap_or_else(|error| {
        say(format_args!("warning: {}: {error}; what the ranks do is not recorded", folder.display()));
        Recorders::default()
    })
}

/// A running cluster.
pub struct LocalCluster {
    job: ActorRef<JobMessage>,
    ended: oneshot::Receiver<Outcome>,
    /// The fabric between the ranks.
    pub network: Arc<LocalNetwork>,
    timelines: Timelines,
    activities: Vec<Arc<Activity>>,
    flight: Recorders,
    beats: Beats,
}

impl LocalCluster {
    /// Starts the job and its ranks.
    ///
    /// **Errors**: if an actor cannot be started.
    pub async fn start(spec: LocalClusterSpec) -> Result<Self, String> {
        LocalCluster::start_over(spec, |network, rank| network.join(rank)).await
    }

    /// Starts the job and its ranks, each with the end of a fabric that `join` gives it.
    ///
    /// **Errors**: if an actor cannot be started.
    pub async fn start_over(
        spec: LocalClusterSpec,
        join: impl Fn(&Arc<LocalNetwork>, usize) -> Endpoint,
    ) -> Result<Self, String> {
        let LocalClusterSpec {
            recipe,
            datasets,
            generation,
            peak_flops,
            resume,
            checkpoints,
            export_dir,
            network,
            flight,
            probe,
            subscribers,
        } = spec;
        let folder = checkpoints.as_ref().map(|commits| commits.folder.clone());
        let network = LocalNetwork::new(network);
        let world = recipe.topology().world();
        let worker: Arc<OnceLock<ActorRef<WorkerMessage>>> = Arc::default();
        let to_worker = worker.clone();
        let send = move |rank, command| {
            if let Some(worker) = to_worker.get() {
                // A worker that is gone has reported so as the supervisor of its ranks.
                let trace = TraceContext::default();
                drop(worker.cast(WorkerMessage::Command { rank, command, trace }));
            }
        };
        let (tell_ended, ended) = oneshot::channel();
        let setup = JobActorSetup {
            job: JobSetup {
                world,
                steps_before: resume.as_ref().map_or(0, |checkpoint| checkpoint.manifest.position.step),
                steps: recipe.training.steps as u64,
                keeps_checkpoints: checkpoints.is_some(),
                export_dir,
            },
            checkpoints,
            model_config: recipe.model_config.to_hf_json(),
            constants: JobConstants::new(&recipe, world, peak_flops),
            send: Arc::new(send),
            subscribers,
            ended: tell_ended,
        };
        let failed = |error: ractor::SpawnErr| error.to_string();
        let (job, _) = Actor::spawn(None, JobActor, setup).await.map_err(failed)?;
        let to_job = job.clone();
        let tell = Arc::new(move |event| drop(to_job.cast(JobMessage::Event(event))));
        let (worker_actor, _) = Actor::spawn(None, Worker, tell).await.map_err(failed)?;
        let worker_actor = worker.get_or_init(|| worker_actor);
        let timelines = Timelines::new(world);
        let mut activities = Vec::new();
        for rank in 0..world {
            let endpoint = join(&network, rank);
            activities.push(endpoint.activity().clone());
            let assignment = Box::new(Assignment {
                formation: FormationId::new(JobId::default(), generation),
                recipe: recipe.clone(),
                endpoint,
                datasets: datasets.clone(),
                resume: resume.clone(),
                recovered: None,
                replicator: None,
                checkpoints: folder.clone(),
                save_timeout: SAVE_TIMEOUT,
                trace: trace::current(),
                timelines: timelines.clone(),
                flight: flight.of(rank),
                probe: probe.clone(),
            });
            worker_actor
                .cast(WorkerMessage::Host { rank: Rank::at(rank), assignment })
                .map_err(|error| error.to_string())?;
        }
        let beats = Beats::of(flight.clone());
        Ok(LocalCluster { job, ended, network, timelines, activities, flight, beats })
    }

    /// What the ranks record of their last steps, while the cluster runs and after its end: [`Timelines::latest`] is the newest step
    /// that all have ended, `StepTimeline::of` makes plain data of it.
    pub fn timelines(&self) -> Timelines {
        self.timelines.clone()
    }

    /// A handle that stops the run after the running step, which is kept.
    pub fn stopper(&self) -> impl Fn() + Send + Sync + 'static {
        let job = self.job.clone();
        move || drop(job.cast(JobMessage::Stop))
    }

    /// A handle that ends the job at once.
    pub fn canceller(&self) -> impl Fn(&str) + Send + Sync + 'static {
        let job = self.job.clone();
        move |reason| drop(job.cast(JobMessage::Cancel { reason: reason.to_owned() }))
    }

    /// Waits for the end of the job, and until no rank writes to storage or reads from it: who removes what the end has cut off must
    /// not have it made anew by a rank that is late. Storage that does not answer is given up after [`STUCK`].
    pub async fn wait(mut self) -> Outcome {
        let message = "the job actor ended without an outcome".into();
        let gone = || Outcome::Failed { message, kind: ErrorKind::Bug };
        let outcome = (&mut self.ended).await.unwrap_or_else(|_| gone());
        self.storage_is_left().await;
        if matches!(outcome, Outcome::Done { .. } | Outcome::Stopped { .. }) {
            self.flight.finish();
        }
        self.beats.end();
        outcome
    }

    async fn storage_is_left(&self) {
        let deadline = Instant::now() + STUCK;
        while self.activities.iter().any(|activity| activity.progress().uses_storage) {
            if Instant::now() >= deadline {
                tracing::warn!("the storage has not answered for {} s; it is left alone", STUCK.as_secs());
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
