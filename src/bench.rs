//! `contraflow bench`: figures about this machine, each in one run, as rates and as shares of a measured limit.

mod balance;
mod checkpoint;
mod cluster;
mod dashboard;
mod fabric;
mod infer;
mod load;
mod mtp;
mod overlap;
mod placement;
mod precision;
mod prediction;
mod processes;
mod profile;
mod rate;
mod schedules;
mod simulation;
mod step;
mod store;
mod study;
mod update;
mod viewers;

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::PackedDataset;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::timelines::Timelines;
use parking_lot::Mutex;
use serde::Serialize;

use self::prediction::PredictionArgs;
use self::profile::ProfileArgs;
use self::study::StudyArgs;
use crate::failure::Failure;
use crate::local::{LocalCluster, LocalClusterSpec};
use crate::output::{Format, print};

/// Arguments of `contraflow bench`.
#[derive(clap::Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: BenchCommand,
    /// Output format; in JSON units are in the names of the figures
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(clap::Subcommand, Debug)]
enum BenchCommand {
    /// Training steps of a benchmark model on one rank: seeded token ids, no MTP, no balance loss
    Step {
        /// The model: small or base
        #[arg(default_value = "small")]
        model: String,
        /// Compute threads of the rank
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// Measured steps, after two warm-up steps
        #[arg(long, default_value_t = 10)]
        steps: usize,
        /// Changes a value of the recipe, for instance precision.recipe=bf16; repeatable
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Reading a prompt and writing token by token with a benchmark model of random weights
    Infer {
        /// The model: small or base
        #[arg(default_value = "small")]
        model: String,
        /// Compute threads
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// Measured repeats, after one warm-up
        #[arg(long, default_value_t = 10)]
        repeats: usize,
        /// Changes a value of the recipe, for instance precision.recipe=bf16; repeatable
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Slowdown of a step while a checkpoint is written in the background, and the memory that takes
    Checkpoint {
        /// The model: small or base
        #[arg(default_value = "base")]
        model: String,
        /// Compute threads of the rank
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// Measured checkpoints; as many steps are measured without one
        #[arg(long, default_value_t = 5)]
        saves: usize,
    },
    /// Loss-free balancing beside auxiliary losses over sequences and batches: validation loss and MaxVio of the tiny recipe
    Balance(StudyArgs),
    /// What multi-token prediction does to the loss of the tiny recipe, and how many of its proposals would be accepted
    Mtp(StudyArgs),
    /// What BF16 and FP8 do to the loss of the tiny recipe, beside what the order of sums does
    Precision(StudyArgs),
    /// What operations of models take on this machine, as a profile for `contraflow plan --cluster`
    Profile(ProfileArgs),
    /// Steps in four layouts on this machine, beside what is predicted from its profile
    Prediction(PredictionArgs),
    /// Every schedule beside table 2 of the report: bubble, parameters, activations by formula, simulation and a run
    Schedules {
        /// Milliseconds that a forward pass waits in the runs
        #[arg(long, default_value_t = 100)]
        unit_ms: u64,
    },
    /// Placement of jobs of 2,048 and 16,384 ranks on twice as many slots: search time and quality
    Placement,
    /// An orchestrator under thousands of submissions, 1,000 workers and 10,000 finished jobs
    Load,
    /// The pages of 1,024 simulated ranks, 10,000 finished jobs and a run of a million steps: time, memory over an hour of steps
    Dashboard {
        /// Script that opens the pages in a browser: tests/dashboard/measure.mjs; without it, only the server is measured
        #[arg(long, value_name = "FILE")]
        pages: Option<String>,
    },
    /// What it costs a run to be recorded and shown: alone, with a page open, with viewers that do not read, in alternation
    Viewers {
        /// Runs of each kind
        #[arg(long, default_value_t = 12)]
        rounds: usize,
        /// Steps of a run that are measured, after two that are not
        #[arg(long, default_value_t = 100)]
        steps: usize,
        /// Internal arguments of child processes
        #[arg(long, hide = true)]
        part: Option<String>,
    },
    /// The orchestrator's event log: records synced per second, and restart time
    Store,
    /// The orchestrator's decisions for one job of 10,000 simulated ranks, with faults: events a second
    Simulation {
        /// Ranks of the job, 8 a worker
        #[arg(long, default_value_t = 10_000)]
        ranks: usize,
        /// Steps of the job
        #[arg(long, default_value_t = 1_000)]
        steps: u64,
        /// The same seed is the same run, to the last event
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Frames between 2 and 4 processes over TCP, Unix sockets and shared memory: time, rate and CPU time
    Fabric {
        /// Repeats of each measurement
        #[arg(long, default_value_t = 7)]
        repeats: usize,
        /// Internal arguments of child processes
        #[arg(long, hide = true)]
        part: Option<String>,
    },
    /// All-to-alls that nothing hides, with and without overlap, over links as slow as 0.25 to 1.5 times the computations
    Overlap {
        /// Time of the exchanges over time of the computations, separated by commas
        #[arg(long, value_delimiter = ',', default_values_t = overlap::RATIOS)]
        ratios: Vec<f64>,
        /// Sequences of 256 tokens in a micro-batch: fewer make exchanges short beside what it takes to wake their threads
        #[arg(long, default_value_t = 16)]
        sequences: usize,
        /// Runs of either kind for each ratio, which alternate
        #[arg(long, default_value_t = 1)]
        rounds: usize,
        /// Steps of a run that are measured, after two that are not
        #[arg(long, default_value_t = 2)]
        steps: usize,
    },
    /// Communication of the update that nothing hides, with and without overlap, between processes with delayed frames
    Update {
        /// Runs of either kind, which alternate
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Steps of a run that are measured, after two that are not
        #[arg(long, default_value_t = 10)]
        steps: usize,
        /// Internal arguments of child processes
        #[arg(long, hide = true)]
        part: Option<String>,
    },
}

/// Runs the command; figures go to stdout.
///
/// **Errors**: code 2 for a model that is not built in; code 1 if a run fails.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    let format = args.format;
    match &args.what {
        BenchCommand::Step { model, threads, steps, set } => {
            show(format, &step::run(model, *threads, *steps, set)?)
        }
        BenchCommand::Infer { model, threads, repeats, set } => {
            show(format, &infer::run(model, *threads, *repeats, set)?)
        }
        BenchCommand::Checkpoint { model, threads, saves } => {
            show(format, &checkpoint::run(model, *threads, *saves)?)
        }
        BenchCommand::Balance(args) => show(format, &balance::run(args)?),
        BenchCommand::Mtp(args) => show(format, &mtp::run(args)?),
        BenchCommand::Precision(args) => show(format, &precision::run(args)?),
        BenchCommand::Profile(args) => show(format, &profile::run(args)?),
        BenchCommand::Prediction(args) => show(format, &prediction::run(args)?),
        BenchCommand::Schedules { unit_ms } => {
            let figures = schedules::run(*unit_ms)?;
            show(format, &figures)?;
            figures.verdict()
        }
        BenchCommand::Placement => show(format, &placement::run()?),
        BenchCommand::Load => show(format, &load::run()?),
        BenchCommand::Dashboard { pages } => show(format, &dashboard::run(pages.as_deref())?),
        BenchCommand::Viewers { part: Some(part), .. } => viewers::be(part),
        BenchCommand::Viewers { rounds, steps, part: None } => show(format, &viewers::run(*rounds, *steps)?),
        BenchCommand::Store => show(format, &store::run()?),
        BenchCommand::Simulation { ranks, steps, seed } => {
            let figures = simulation::run(*ranks, *steps, *seed)?;
            show(format, &figures)?;
            figures.verdict()
        }
        BenchCommand::Fabric { part: Some(part), .. } => fabric::be(part),
        BenchCommand::Fabric { repeats, part: None } => show(format, &fabric::run(*repeats)?),
        BenchCommand::Overlap { ratios, sequences, rounds, steps } => {
            show(format, &overlap::run(ratios, *sequences, *rounds, *steps)?)
        }
        BenchCommand::Update { part: Some(part), .. } => update::be(part),
        BenchCommand::Update { rounds, steps, part: None } => {
            let figures = update::run(*rounds, *steps)?;
            show(format, &figures)?;
            figures.verdict()
        }
    }
}

/// Prints the figures of a command.
fn show(format: Format, figures: &(impl Serialize + Display)) -> Result<(), Failure> {
    print(&match format {
        Format::Text => figures.to_string(),
        Format::Json => {
            serde_json::to_string(figures).map_err(|error| Failure::run(error.to_string()))? + "\n"
        }
    })
}

/// Steps that warm caches and memory up.
const WARM_UP: usize = 2;

/// A benchmark model and sequences for it: seeded token ids, no balance of the experts, nothing written. `changes` are to its recipe.
fn benchmark(
    model: &str,
    threads: usize,
    steps: usize,
    changes: &[String],
) -> Result<(Recipe, Datasets), Failure> {
    let mut overrides = vec![
        format!("parallel.threads_per_rank={threads}"),
        format!("training.steps={steps}"),
        "balance.bias_speed=0".to_owned(),
        "checkpoint.save_model=false".to_owned(),
    ];
    overrides.extend_from_slice(changes);
    let recipe = Recipe::load(&RecipeSource::Builtin(model.to_owned()), &overrides)?;
    let datasets = seeded_datasets(&recipe);
    Ok((recipe, datasets))
}

/// A model's name with what differs from its recipe.
fn with_changes(model: &str, changes: &[String]) -> String {
    if changes.is_empty() { model.to_owned() } else { format!("{model} with {}", changes.join(", ")) }
}

/// A global batch of seeded token ids.
fn seeded_datasets(recipe: &Recipe) -> Datasets {
    let length = recipe.training.sequence_length;
    let needed = recipe.training.global_batch_size * length;
    let train = PackedDataset::from_tokens(seeded_ids(needed + 1, recipe.model_config.vocab_size), length);
    Datasets { train, validation: PackedDataset::from_tokens(Vec::new(), length) }
}

/// Token ids that depend on nothing but their number.
fn seeded_ids(len: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    (0..len).map(|_| next()).collect()
}

/// Runs a recipe without a folder; returns its step records, the process's CPU seconds at the end of each step, and what the ranks
/// have recorded of the last ones.
fn train_quietly(
    recipe: Recipe,
    datasets: Datasets,
) -> Result<(Vec<StepRecord>, Vec<f64>, Timelines), Failure> {
    let steps: Arc<Mutex<Vec<(StepRecord, f64)>>> = Arc::default();
    let shared = steps.clone();
    let subscriber: Subscriber = Box::new(move |record| {
        shared.lock().push((record.clone(), cpu_seconds()));
    });
    let run = QuietRun { recipe, datasets, checkpoints: None, export_dir: None, subscriber };
    let (_, timelines) = run.run()?;
    let (records, cpu_seconds) = std::mem::take(&mut *steps.lock()).into_iter().unzip();
    Ok((records, cpu_seconds, timelines))
}

/// A recipe that is run without a run's folder.
struct QuietRun {
    recipe: Recipe,
    datasets: Datasets,
    checkpoints: Option<Commits>,
    /// Where the weights go at the end; the folder exists.
    export_dir: Option<PathBuf>,
    subscriber: Subscriber,
}

impl QuietRun {
    /// Returns the validation loss at the end, if there is one, and what the ranks have recorded.
    ///
    /// **Errors**: code 1 if the run fails.
    fn run(self) -> Result<(Option<f64>, Timelines), Failure> {
        self.run_with(Probe::default(), Recorders::default())
    }

    /// The same, with a probe that looks in, and with flight recorders.
    fn run_with(self, probe: Probe, flight: Recorders) -> Result<(Option<f64>, Timelines), Failure> {
        let QuietRun { recipe, datasets, checkpoints, export_dir, subscriber } = self;
        let spec = LocalClusterSpec {
            recipe: Arc::new(recipe),
            datasets: Arc::new(datasets),
            generation: Generation::FIRST,
            peak_flops: None,
            resume: None,
            checkpoints,
            export_dir,
            network: LocalOptions::default(),
            flight,
            probe,
            subscribers: vec![subscriber],
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failure::run(error.to_string()))?;
        let (outcome, timelines) = runtime.block_on(async {
            let cluster = LocalCluster::start(spec).await.map_err(Failure::run)?;
            let timelines = cluster.timelines();
            Ok::<_, Failure>((cluster.wait().await, timelines))
        })?;
        match outcome {
            Outcome::Done { validation } => Ok((validation.map(|(loss, _)| loss), timelines)),
            outcome => Err(Failure::run(format!("expected the steps to complete, got {outcome:?}"))),
        }
    }
}

/// CPU time of this process so far, all threads, in seconds.
fn cpu_seconds() -> f64 {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}
