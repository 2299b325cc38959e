//! `contraflow bench`: figures about this machine, each in one run, as rates and as shares of a measured limit.

mod checkpoint;
mod fabric;
mod infer;
mod load;
mod placement;
mod processes;
mod simulation;
mod store;
mod update;

use std::sync::Arc;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use contraflow_runtime::cost;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Corpus, PackedDataset};
use contraflow_workers::engine::probe::Probe;
use parking_lot::Mutex;

use crate::failure::Failure;
use crate::local::{LocalCluster, LocalClusterSpec};
use crate::machine::measure_peak;
use crate::output::{Format, print};

/// Arguments of `contraflow bench`.
#[derive(clap::Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: BenchCommand,
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
    /// MaxVio of the tiny recipe with loss-free balancing off and on
    Balance {
        /// Steps of each run
        #[arg(long, default_value_t = 160)]
        steps: usize,
    },
    /// Placement of a job of 2,048 ranks on 4,096 slots: search time and quality
    Placement,
    /// An orchestrator under thousands of submissions, 1,000 workers and 10,000 finished jobs
    Load,
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
    /// Communication of the update that nothing hides, with and without overlap, between processes with delayed frames
    Update {
        /// Runs of either kind, which alternate
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Steps of a run that are measured, after two that are not
        #[arg(long, default_value_t = 10)]
        steps: usize,
        /// Output format
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
        /// Internal arguments of child processes
        #[arg(long, hide = true)]
        part: Option<String>,
    },
}

/// Runs the command; figures go to stdout.
///
/// **Errors**: code 2 for a model that is not built in; code 1 if a run fails.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    match &args.what {
        BenchCommand::Step { model, threads, steps } => step(model, *threads, *steps),
        BenchCommand::Infer { model, threads, repeats } => infer::run(model, *threads, *repeats),
        BenchCommand::Checkpoint { model, threads, saves } => checkpoint::run(model, *threads, *saves),
        BenchCommand::Balance { steps } => balance(*steps),
        BenchCommand::Placement => placement::run(),
        BenchCommand::Load => load::run(),
        BenchCommand::Store => store::run(),
        BenchCommand::Simulation { ranks, steps, seed } => simulation::run(*ranks, *steps, *seed),
        BenchCommand::Fabric { repeats, part } => fabric::run(*repeats, part.as_deref()),
        BenchCommand::Update { rounds, steps, format, part } => {
            update::run(*rounds, *steps, *format, part.as_deref())
        }
    }
}

/// Steps that warm caches and memory up.
const WARM_UP: usize = 2;

/// A benchmark model and sequences for it: seeded token ids, no balance of the experts, nothing written.
fn benchmark(model: &str, threads: usize, steps: usize) -> Result<(Recipe, Datasets), Failure> {
    let overrides = [
        format!("parallel.threads_per_rank={threads}"),
        format!("training.steps={steps}"),
        "balance.bias_speed=0".to_owned(),
        "checkpoint.save_model=false".to_owned(),
    ];
    let recipe = Recipe::load(&RecipeSource::Builtin(model.to_owned()), &overrides)?;
    let datasets = seeded_datasets(&recipe);
    Ok((recipe, datasets))
}

/// A global batch of seeded token ids.
fn seeded_datasets(recipe: &Recipe) -> Datasets {
    let length = recipe.training.sequence_length;
    let needed = recipe.training.global_batch_size * length;
    let train = PackedDataset::from_tokens(seeded_ids(needed + 1, recipe.model_config.vocab_size), length);
    Datasets { train, validation: PackedDataset::from_tokens(Vec::new(), length) }
}

fn step(model: &str, threads: usize, steps: usize) -> Result<(), Failure> {
    let (recipe, datasets) = benchmark(model, threads, steps + WARM_UP)?;
    let length = recipe.training.sequence_length;
    let flops_per_token = cost::training_flops_per_token(&recipe.model_config, length) as f64;
    let peak = measure_peak(threads);
    let tokens = (recipe.training.global_batch_size * length) as f64;
    let (records, cpu_seconds) = train_quietly(recipe, datasets)?;
    let mut seconds: Vec<f64> = records.iter().skip(WARM_UP).map(|record| record.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let (median, best) = (seconds[seconds.len() / 2], seconds[0]);
    // From the end of the warm-up on: making the model is no part of a step.
    let spent = cpu_seconds[cpu_seconds.len() - 1] - cpu_seconds[WARM_UP - 1];
    let cpu_rate = tokens * seconds.len() as f64 / spent.max(1e-9);
    let mfu = |seconds: f64| 100.0 * tokens * flops_per_token / seconds / peak;
    print(&format!(
        "{model}, {threads} thread(s), {} steps of {tokens} tokens\n\
         tokens/s: {:.0} median, {:.0} best; {cpu_rate:.0} per CPU second\n\
         MFU: {:.0}% median, {:.0}% best, of {:.0} GFLOP/s (f32 product of 1024 x 1024 on the same threads)\n\
         FLOP per token: {:.2} M (matrix products, causal half of attention, three times forward, no MTP)\n",
        seconds.len(),
        tokens / median,
        tokens / best,
        mfu(median),
        mfu(best),
        peak / 1e9,
        flops_per_token / 1e6,
    ))
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

fn balance(steps: usize) -> Result<(), Failure> {
    let corpus = Corpus::load_default();
    let mut lines = String::new();
    for words in ["off", "on"] {
        let mut overrides = vec![
            format!("training.steps={steps}"),
            "balance.sequence_alpha=0".to_owned(),
            "checkpoint.save_model=false".to_owned(),
        ];
        if words == "off" {
            overrides.push("balance.bias_speed=0".to_owned());
        }
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".to_owned()), &overrides)?;
        let length = recipe.training.sequence_length;
        let datasets = Datasets {
            train: PackedDataset::pack(&corpus.train, length),
            validation: PackedDataset::pack(&corpus.validation, length),
        };
        let (records, _) = train_quietly(recipe, datasets)?;
        let mean =
            |part: &[StepRecord]| part.iter().map(mean_max_vio).sum::<f64>() / part.len().max(1) as f64;
        let quarter = (records.len() / 4).max(1);
        let (early, late) = (mean(&records[quarter..2 * quarter]), mean(&records[records.len() - quarter..]));
        lines +=
            &format!("balance {words}: MaxVio {early:.2} in the second quarter, {late:.2} in the last\n");
    }
    print(&lines)
}

/// Runs a recipe without a folder; returns its step records, and the process's CPU seconds at the end of each step.
fn train_quietly(recipe: Recipe, datasets: Datasets) -> Result<(Vec<StepRecord>, Vec<f64>), Failure> {
    let steps: Arc<Mutex<Vec<(StepRecord, f64)>>> = Arc::default();
    let shared = steps.clone();
    let subscriber: Subscriber = Box::new(move |record| {
        shared.lock().push((record.clone(), cpu_seconds()));
    });
    run_quietly(recipe, datasets, None, subscriber)?;
    let steps = std::mem::take(&mut *steps.lock());
    Ok(steps.into_iter().unzip())
}

/// Runs a recipe without a run's folder.
fn run_quietly(
    recipe: Recipe,
    datasets: Datasets,
    checkpoints: Option<Commits>,
    subscriber: Subscriber,
) -> Result<(), Failure> {
    let spec = LocalClusterSpec {
        recipe: Arc::new(recipe),
        datasets: Arc::new(datasets),
        generation: Generation::FIRST,
        peak_flops: None,
        resume: None,
        checkpoints,
        export_dir: None,
        network: LocalOptions::default(),
        overlap: true,
        probe: Probe::default(),
        subscribers: vec![subscriber],
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::run(error.to_string()))?;
    let outcome = runtime.block_on(async {
        let cluster = LocalCluster::start(spec).await.map_err(Failure::run)?;
        Ok::<Outcome, Failure>(cluster.wait().await)
    })?;
    match outcome {
        Outcome::Done { .. } => Ok(()),
        outcome => Err(Failure::run(format!("expected the steps to complete, got {outcome:?}"))),
    }
}

/// CPU time of this process so far, all threads, in seconds.
fn cpu_seconds() -> f64 {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}
