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
use contraflow_runtime::recipe::{Recipe, RecipeSource, paths_override};
use contraflow_runtime::schedule::Mode;
use contraflow_workers::data::documents::DocumentEncoder;
use contraflow_workers::data::load::{Loaded, Wanted, load};
use contraflow_workers::data::{Baselines, Tokenizer, tokenizer};
use contraflow_workers::loader::{Datasets, Predicted, validation_index};
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
    baseline_bigram_bits_per_byte: Option<f64>,
    baseline_trigram_bits_per_byte: Option<f64>,
    baseline_zstd_bits_per_byte: Option<f64>,
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
    /// Mean validation loss in nats per token.
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
    let source = RecipeSource::parse(&args.recipe);
    let recipe = Recipe::load(&source, &overrides)?;
    if args.print_recipe {
        return print(&recipe.resolved_toml());
    }
    telemetry::init(recipe.log.level);
    let began = Instant::now();
    let tokenizer = load_tokenizer(&recipe)?;
    let (corpus, datasets) = load_data(&recipe, &tokenizer)?;
    say_plans(&recipe)?;
    let name = args.name.clone().unwrap_or_else(|| source.name());
    let run = Run::create(&name, recipe, tokenizer)?;
    let datasets = Arc::new(datasets);
    let tally = run.train(&datasets)?;
    run.finish(&corpus, &datasets, tally, began)
}

/// What summary.json says of the text.
struct CorpusName {
    name: String,
    hash: String,
}

/// **Errors**: code 2; the tokenizer cannot be read or has ids that the model has no row for.
fn load_tokenizer(recipe: &Recipe) -> Result<Tokenizer, Failure> {
    let section = &recipe.tokenizer;
    if section.path.is_empty() {
        return Ok(Tokenizer::Bytes);
    }
    let refused = |fault| Failure::faults("tokenizer.path", &[fault]);
    let tokenizer = Tokenizer::load(Path::new(&section.path), &section.end_of_document).map_err(refused)?;
    tokenizer.check_fits(recipe.model_config.vocab_size).map_err(refused)?;
    Ok(tokenizer)
}

fn load_data(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<(CorpusName, Datasets), Failure> {
    let encoder = DocumentEncoder::with_fim(tokenizer.clone(), recipe.data.fim_rate)
        .map_err(|fault| Failure::input(fault.to_string()))?;
    let paths: Vec<PathBuf> = recipe.data.paths.iter().map(PathBuf::from).collect();
    let length = recipe.training.sequence_length;
    let wanted =
        Wanted { paths: &paths, weights: &recipe.data.weights, encoder: &encoder, sequence_length: length };
    let loaded = load(wanted).map_err(|faults| Failure::faults("data.paths", &faults))?;
    loaded.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let Loaded { name, hash, train, validation, .. } = loaded;
    if let Some(number) = train.sources().iter().position(|(sequences, _)| *sequences == 0) {
        let source = if recipe.data.weights.is_empty() { "" } else { recipe.data.paths[number].as_str() };
        let of = if source.is_empty() { String::new() } else { format!(" of {source}") };
        let got = train.num_tokens();
        let got = if source.is_empty() { format!("{got} tokens") } else { "less".to_owned() };
        let message =
            format!("data.paths: expected text for at least one sequence of {length} tokens{of}, got {got}");
        return Err(Failure::input(message));
    }
    Ok((CorpusName { name, hash }, Datasets { train, validation }))
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
    tokenizer: Tokenizer,
    dir: PathBuf,
    frame: Frame,
}

impl Run {
    fn create(name: &str, recipe: Recipe, tokenizer: Tokenizer) -> Result<Self, Failure> {
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
        let run = Run { name: name.to_owned(), recipe: Arc::new(recipe), tokenizer, dir, frame };
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
            if let Some(json) = self.tokenizer.json() {
                let path = dir.join(tokenizer::FILE);
                std::fs::write(&path, json)
                    .map_err(|error| Failure::run(format!("{}: {error}", path.display())))?;
            }
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
        corpus: &CorpusName,
        datasets: &Datasets,
        tally: Tally,
        began: Instant,
    ) -> Result<(), Failure> {
        let available = datasets.validation.num_sequences();
        let taken = validation_shape(&self.recipe, available).map_or(0, |shape| shape.global_batch);
        let across = self.recipe.data.attend_across_documents;
        let predicted = Predicted::count(datasets, taken, &self.tokenizer, across);
        let baselines = self.baselines(datasets, taken, available);
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
            validation_bits_per_byte: tally.validation_loss.and_then(|loss| predicted.bits_per_byte(loss)),
            validation_bytes: predicted.bytes,
            baseline_bigram_bits_per_byte: baselines.map(|b| b.bigram_bits_per_byte),
            baseline_trigram_bits_per_byte: baselines.map(|b| b.trigram_bits_per_byte),
            baseline_zstd_bits_per_byte: baselines.map(|b| b.zstd_bits_per_byte),
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

    /// The yardsticks, where the same bytes can be read by them: bytes as tokens, in memory, documents not apart.
    fn baselines(&self, datasets: &Datasets, taken: usize, available: usize) -> Option<Baselines> {
        let ids: Vec<usize> = (0..taken).map(|place| validation_index(place, taken, available)).collect();
        let comparable = self.tokenizer.json().is_none() && self.recipe.data.attend_across_documents;
        comparable.then(|| Baselines::measure(&datasets.train, &datasets.validation, &ids)).flatten()
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
                "validation on {} bytes of {}, bits per byte:\n  this model    {bits:.3}\n",
                summary.validation_bytes, summary.corpus,
            );
            let baselines = [
                ("byte bigram ", summary.baseline_bigram_bits_per_byte),
                ("byte trigram", summary.baseline_trigram_bits_per_byte),
                ("zstd -19    ", summary.baseline_zstd_bits_per_byte),
            ];
            for (name, bits) in baselines {
                text += &bits.map_or(String::new(), |bits| format!("  {name}  {bits:.3}\n"));
            }
            if summary.baseline_zstd_bits_per_byte.is_none() {
                text += "  (n-gram and zstd baselines are for bytes as tokens, from one text in memory)\n";
            }
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
