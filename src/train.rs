//! `contraflow train`: a recipe in, a run's folder out, with a whole cluster in between.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use contraflow_kernels::gemm::{Into, gemm};
use contraflow_kernels::par::Threads;
use contraflow_kernels::tensor::Tensor;
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::UNFINISHED_SUFFIX;
use contraflow_orchestrator::metrics::{StepSummary, Subscriber};
use contraflow_runtime::cost;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::recipe::{Recipe, RecipeSource, path_override, paths_override};
use contraflow_runtime::schedule::Mode;
use contraflow_workers::data::{Baselines, Corpus, PackedDataset};
use contraflow_workers::hf_check;
use contraflow_workers::loader::{Datasets, validation_index};
use contraflow_workers::plans::{Plans, batch_sizes, train_shape, validation_shape};
use contraflow_workers::probe::Probe;
use serde::Serialize;

use crate::cluster::{Cluster, ClusterSpec};
use crate::failure::Failure;
use crate::generate;
use crate::output::print;
use crate::progress::{Frame, Progress, minutes};
use crate::run_dir;
use crate::telemetry;

/// Arguments of `contraflow train`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A built-in recipe, or the path of a recipe file
    #[arg(default_value = "tiny")]
    pub recipe: String,
    /// Change a key of the recipe: section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Text files or folders to train on, in place of the default corpus
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub data: Vec<String>,
    /// Start from the weights of a run or of an HF directory, with a fresh optimizer; its model, unless model.config says
    /// another
    #[arg(long, value_name = "RUN|DIR")]
    pub init: Option<String>,
    /// Name of the run's folder in runs/; the recipe's name if not given
    #[arg(long)]
    pub name: Option<String>,
    /// Print the recipe with every key resolved, and stop
    #[arg(long)]
    pub print_recipe: bool,
}

/// What is left of a run in summary.json.
#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    steps: u64,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    mfu: f64,
    flops_per_token: f64,
    peak_gflops: f64,
    bubble_share: f64,
    oversubscribed: bool,
    final_loss: f64,
    max_vio: f64,
    validation_bits_per_byte: Option<f64>,
    validation_bytes: usize,
    baseline_bigram_bits_per_byte: f64,
    baseline_trigram_bits_per_byte: f64,
    baseline_zstd_bits_per_byte: f64,
    corpus: String,
    corpus_hash: String,
    parameters: u64,
    active_parameters: u64,
    world: usize,
    schedule: String,
}

/// Running totals over the steps.
#[derive(Clone, Debug, Default)]
struct Tally {
    tokens: u64,
    bubble: f64,
    last: StepSummary,
    /// From the start of the cluster to the end of the last update, in seconds.
    seconds: f64,
    /// Mean validation loss in nats per byte.
    validation_loss: Option<f64>,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of recipe and data at once; code 1 if the run failed; 130 if it was interrupted.
pub fn run(args: &Args) -> Result<(), Failure> {
    let mut overrides = args.overrides.clone();
    if !args.data.is_empty() {
        overrides.push(paths_override(&args.data));
    }
    if let Some(model) = &args.init {
        let dir = run_dir::find_model(model).map_err(Failure::input)?;
        // In front: what the user sets by hand comes last and holds.
        let config = path_override("model.config", &dir.join("config.json"));
        overrides.splice(0..0, [config, path_override("model.init", &dir)]);
    }
    let source = RecipeSource::parse(&args.recipe);
    let recipe = Recipe::load(&source, &overrides)?;
    if let Some(dir) = recipe.model.init_dir() {
        hf_check::check_against(&recipe.model_config, dir)
            .map_err(|faults| Failure::faults("model.init", &faults))?;
    }
    if args.print_recipe {
        return print(&recipe.resolved_toml());
    }
    telemetry::init(recipe.log.level);
    let began = Instant::now();
    let corpus = load_corpus(&recipe)?;
    let datasets = Arc::new(pack(&corpus, &recipe)?);
    say_plans(&recipe)?;
    let name = args.name.clone().unwrap_or_else(|| source.name());
    let run = Run::create(&name, recipe)?;
    let tally = run.train(&datasets)?;
    run.finish(&Corpus { train: Vec::new(), validation: Vec::new(), ..corpus }, &datasets, tally, began)
}

fn load_corpus(recipe: &Recipe) -> Result<Corpus, Failure> {
    let paths: Vec<PathBuf> = recipe.data.paths.iter().map(PathBuf::from).collect();
    let corpus = Corpus::load(&paths).map_err(|faults| Failure::faults("data.paths", &faults))?;
    if let Some(warning) = &corpus.warning {
        eprintln!("warning: {warning}");
    }
    Ok(corpus)
}

fn pack(corpus: &Corpus, recipe: &Recipe) -> Result<Datasets, Failure> {
    let length = recipe.training.sequence_length;
    let (train, validation) =
        (PackedDataset::pack(&corpus.train, length), PackedDataset::pack(&corpus.validation, length));
    if train.num_sequences() == 0 {
        let bytes: usize = corpus.train.iter().map(|document| document.text.len()).sum();
        let message = format!(
            "data.paths: expected text for at least one sequence of {length} tokens, got {bytes} bytes"
        );
        return Err(Failure::input(message));
    }
    Ok(Datasets { train, validation })
}

/// Makes and checks every plan that the run will need, and says aloud where a fallback runs.
fn say_plans(recipe: &Recipe) -> Result<(), Failure> {
    let mut plans = Plans::new(recipe).map_err(Failure::input)?;
    for size in batch_sizes(recipe) {
        let shape = train_shape(recipe, size);
        let planned = plans.get(shape.micro_batches, Mode::Train).map_err(Failure::input)?;
        if let Some(reason) = &planned.fallback {
            eprintln!("note: batches of {size} sequences: {reason}");
        }
    }
    Ok(())
}

/// FLOP/s of a large f32 product on `num_threads` threads: what MFU is measured against.
pub fn measure_peak(num_threads: usize) -> f64 {
    const SIZE: usize = 1024;
    /// A third of a second: on a shared machine the best of many is the peak.
    const PRODUCTS: usize = 30;
    let threads = Threads::new(num_threads);
    let values: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 13) as f32).collect();
    let (a, b) = (Tensor::from_vec(&[SIZE, SIZE], values.clone()), Tensor::from_vec(&[SIZE, SIZE], values));
    let mut out = Tensor::zeros(&[SIZE, SIZE]);
    let mut best = Duration::MAX;
    for _ in 0..PRODUCTS {
        let started = Instant::now();
        threads.run(|| gemm(out.mat_mut(), Into::Overwrite, 1.0, a.mat(), b.mat()));
        best = best.min(started.elapsed());
    }
    2.0 * (SIZE as f64).powi(3) / best.as_secs_f64()
}

/// A run that has a folder.
struct Run {
    name: String,
    recipe: Arc<Recipe>,
    dir: PathBuf,
    frame: Frame,
}

impl Run {
    fn create(name: &str, recipe: Recipe) -> Result<Self, Failure> {
        let dir = run_dir::create(Path::new(run_dir::RUNS), name)
            .map_err(|error| Failure::run(format!("{}: {error}", run_dir::RUNS)))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = recipe.topology().world() * recipe.parallel.threads_per_rank;
        let frame = Frame {
            steps: recipe.training.steps as u64,
            flops_per_token: cost::training_flops_per_token(
                &recipe.model_config,
                recipe.training.sequence_length,
            ) as f64,
            peak_flops: measure_peak(threads.min(cores)),
            oversubscribed: threads > cores,
        };
        let run = Run { name: name.to_owned(), recipe: Arc::new(recipe), dir, frame };
        run.write("recipe.toml", &run.recipe.resolved_toml())?;
        run.write("plan.txt", &run.plan_text()?)?;
        Ok(run)
    }

    fn plan_text(&self) -> Result<String, Failure> {
        let mut plans = Plans::new(&self.recipe).map_err(Failure::input)?;
        let shape = train_shape(&self.recipe, self.recipe.training.global_batch_size);
        let planned = plans.get(shape.micro_batches, Mode::Train).map_err(Failure::input)?;
        Ok(contraflow_runtime::schedule::text::write(&planned.plan))
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self.dir.join(file);
        std::fs::write(&path, text).map_err(|error| Failure::run(format!("{}: {error}", path.display())))
    }

    fn train(&self, datasets: &Arc<Datasets>) -> Result<Tally, Failure> {
        let parallel = &self.recipe.parallel;
        eprintln!(
            "training {} in {}: {} ranks (pipeline {} x expert {} x data {}), {}, {} steps",
            self.name,
            self.dir.display(),
            self.recipe.topology().world(),
            parallel.pipeline,
            parallel.expert,
            parallel.data,
            parallel.schedule,
            self.frame.steps
        );
        let export_dir = if self.recipe.checkpoint.save_model {
            let dir = self.dir.join(format!("model{UNFINISHED_SUFFIX}"));
            std::fs::create_dir(&dir).map_err(|error| Failure::run(format!("{}: {error}", dir.display())))?;
            Some(dir)
        } else {
            None
        };
        let mut progress = Progress::new(&self.dir, self.frame)
            .map_err(|error| Failure::run(format!("{}: {error}", self.dir.display())))?;
        let tally: Arc<Mutex<Tally>> = Arc::default();
        let shared = tally.clone();
        let began = Instant::now();
        let subscriber: Subscriber = Box::new(move |summary| {
            progress.step(summary);
            let mut tally = shared.lock().unwrap_or_else(PoisonError::into_inner);
            tally.tokens += summary.tokens;
            tally.bubble += summary.bubble_share;
            tally.seconds = began.elapsed().as_secs_f64();
            tally.last = summary.clone();
        });
        let spec = ClusterSpec {
            recipe: self.recipe.clone(),
            datasets: datasets.clone(),
            export_dir,
            network: LocalOptions::default(),
            probe: Probe::default(),
            subscribers: vec![subscriber],
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|error| Failure::run(error.to_string()))?;
        let outcome = runtime.block_on(async {
            let cluster = Cluster::start(spec).await.map_err(Failure::run)?;
            let cancel = cluster.canceller();
            let interrupted = tokio::spawn(async move {
                if tokio::signal::ctrl_c().await.is_ok() {
                    cancel("interrupted");
                }
            });
            let outcome = cluster.wait().await;
            interrupted.abort();
            Ok::<Outcome, Failure>(outcome)
        })?;
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match outcome {
            Outcome::Done { validation } => {
                Ok(Tally { validation_loss: validation.map(|(loss, _)| loss), ..tally })
            }
            Outcome::Failed(message) if message == "interrupted" => {
                Err(Failure::interrupted(format!("interrupted after step {}", tally.last.step)))
            }
            Outcome::Failed(message) => Err(Failure::run(message)),
        }
    }

    fn finish(
        &self,
        corpus: &Corpus,
        datasets: &Datasets,
        tally: Tally,
        began: Instant,
    ) -> Result<(), Failure> {
        let available = datasets.validation.num_sequences();
        let taken = validation_shape(&self.recipe, available).map_or(0, |shape| shape.global_batch);
        let sequence_ids: Vec<usize> =
            (0..taken).map(|place| validation_index(place, taken, available)).collect();
        let baselines = Baselines::measure(&datasets.train, &datasets.validation, &sequence_ids);
        let parameters = cost::parameters(&self.recipe.model_config);
        let tokens_per_second = tally.tokens as f64 / tally.seconds.max(1e-9);
        let steps = tally.last.step;
        let summary = Summary {
            name: self.name.clone(),
            steps,
            tokens: tally.tokens,
            seconds: began.elapsed().as_secs_f64(),
            tokens_per_second,
            mfu: tokens_per_second * self.frame.flops_per_token / self.frame.peak_flops,
            flops_per_token: self.frame.flops_per_token,
            peak_gflops: self.frame.peak_flops / 1e9,
            bubble_share: tally.bubble / (steps.max(1) as f64),
            oversubscribed: self.frame.oversubscribed,
            final_loss: tally.last.loss,
            max_vio: tally.last.mean_max_vio(),
            validation_bits_per_byte: tally.validation_loss.map(|loss| loss / std::f64::consts::LN_2),
            validation_bytes: baselines.num_bytes,
            baseline_bigram_bits_per_byte: baselines.bigram_bits_per_byte,
            baseline_trigram_bits_per_byte: baselines.trigram_bits_per_byte,
            baseline_zstd_bits_per_byte: baselines.zstd_bits_per_byte,
            corpus: corpus.name.clone(),
            corpus_hash: corpus.hash.clone(),
            parameters: parameters.total + parameters.mtp,
            active_parameters: parameters.active,
            world: self.recipe.topology().world(),
            schedule: self.recipe.parallel.schedule.to_string(),
        };
        let text = serde_json::to_string_pretty(&summary).map_err(|error| Failure::run(error.to_string()))?;
        self.write("summary.json", &format!("{text}\n"))?;
        self.say(&summary)
    }

    /// The results, on stdout.
    fn say(&self, summary: &Summary) -> Result<(), Failure> {
        let crowded = if summary.oversubscribed { " (oversubscribed)" } else { "" };
        let mut text = format!(
            "{} steps, {} tokens in {}\n{:.0} tokens/s, MFU {:.0}% of {:.0} GFLOP/s ({:.1} MFLOP per token: causal, with MTP), \
             bubble {:.0}%{crowded}\n",
            summary.steps,
            summary.tokens,
            minutes(summary.seconds),
            summary.tokens_per_second,
            100.0 * summary.mfu,
            summary.peak_gflops,
            summary.flops_per_token / 1e6,
            100.0 * summary.bubble_share,
        );
        if let Some(bits) = summary.validation_bits_per_byte {
            text += &format!(
                "validation on {} bytes of {}, bits per byte:\n  this model    {bits:.3}\n  byte bigram   {:.3}\n  \
                 byte trigram  {:.3}\n  zstd -19      {:.3}\n",
                summary.validation_bytes,
                summary.corpus,
                summary.baseline_bigram_bits_per_byte,
                summary.baseline_trigram_bits_per_byte,
                summary.baseline_zstd_bits_per_byte
            );
        }
        if self.recipe.checkpoint.save_model {
            let sample = generate::sample(&self.dir.join("model"), self.recipe.training.seed)?;
            text += &format!("a sample, after \"{}\":\n", generate::SAMPLE_PROMPT.trim_end());
            sample.lines().for_each(|line| text += &format!("  | {line}\n"));
            let dir = self.dir.display();
            text += &format!(
                "next: contraflow generate {dir} --prompt \"impl \"   (weights in HF format: {dir}/model)\n"
            );
        }
        print(&text)
    }
}
