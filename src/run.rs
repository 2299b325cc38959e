//! A run with a folder: trains on an embedded cluster, keeps checkpoints, and says what came of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::{StepSummary, Subscriber};
use contraflow_runtime::checkpoint::manifest::FORMAT_VERSION;
use contraflow_runtime::checkpoint::{CheckpointFolder, Manifest, Position, UNFINISHED_SUFFIX};
use contraflow_runtime::cost;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::recipe::{ErrorKind, Recipe};
use contraflow_runtime::schedule::Mode;
use contraflow_workers::checkpoint::Checkpoint;
use contraflow_workers::data::{Baselines, Corpus};
use contraflow_workers::loader::{Datasets, validation_index};
use contraflow_workers::plans::{Plans, train_shape, validation_shape};
use contraflow_workers::probe::Probe;
use serde::Serialize;

use crate::cluster::{Cluster, ClusterSpec};
use crate::failure::Failure;
use crate::generate;
use crate::interrupt;
use crate::machine::{made_by, measure_peak};
use crate::output::print;
use crate::progress::{Frame, Progress, minutes};
use crate::resume::Resumed;
use crate::run_dir;

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

/// Running totals over the steps of this process.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    tokens: u64,
    bubble: f64,
    last: StepSummary,
    /// Steps of this process.
    steps: u64,
    /// From the start of the cluster to the end of the last update, in seconds.
    seconds: f64,
    /// Mean validation loss in nats per byte.
    validation_loss: Option<f64>,
}

/// A run that has a folder.
pub struct Run {
    name: String,
    recipe: Arc<Recipe>,
    dir: PathBuf,
    frame: Frame,
    /// Name, hash and warning; the documents themselves are packed by now.
    corpus: Corpus,
    /// What the run goes on from, if it is not fresh.
    resume: Option<Arc<Checkpoint>>,
    /// What manifests say of this run.
    manifest: Manifest,
    /// Keeps other processes out of the folder.
    _lock: File,
}

impl Run {
    /// A fresh run in a folder of its own.
    ///
    /// **Errors**: the folder cannot be made.
    pub fn create(name: &str, recipe: Recipe, corpus: Corpus) -> Result<Self, Failure> {
        let dir = new_folder(name)?;
        let lock = run_dir::lock(&dir)?;
        Run::new((dir, lock), recipe, corpus, None)
    }

    /// A run that goes on: in its own folder from its newest checkpoint, in a new one from an earlier one.
    ///
    /// **Errors**: the folder cannot be made or written.
    pub fn resume(resumed: Resumed, recipe: Recipe, corpus: Corpus) -> Result<Self, Failure> {
        resumed.compare_origin(&made_by(&recipe));
        let name = resumed.name();
        let Resumed { run: from, checkpoint, lock, .. } = resumed;
        let (dir, lock) = match lock {
            Some(lock) => (from.clone(), lock),
            None => {
                let dir = new_folder(&name)?;
                let lock = run_dir::lock(&dir)?;
                (dir, lock)
            }
        };
        let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
        CheckpointFolder::of_run(&dir).tidy(recipe.checkpoint.keep).map_err(failed)?;
        run_dir::keep_metrics(&from, &dir, checkpoint.manifest.position.step).map_err(failed)?;
        Run::new((dir, lock), recipe, corpus, Some(checkpoint))
    }

    fn new(
        (dir, lock): (PathBuf, File),
        recipe: Recipe,
        corpus: Corpus,
        resume: Option<Arc<Checkpoint>>,
    ) -> Result<Self, Failure> {
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
        let manifest = manifest(&recipe, &corpus.hash)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let run = Run { name, recipe: Arc::new(recipe), dir, frame, corpus, resume, manifest, _lock: lock };
        run.write("recipe.toml", &run.recipe.resolved_toml())?;
        run.write("plan.txt", &run.plan_text()?)?;
        Ok(run)
    }

    /// Where the run stands before the first step of this process.
    fn position(&self) -> Position {
        self.resume.as_ref().map(|checkpoint| checkpoint.manifest.position).unwrap_or_default()
    }

    fn plan_text(&self) -> Result<String, Failure> {
        let mut plans = Plans::new(&self.recipe).map_err(Failure::input)?;
        let shape = train_shape(&self.recipe, self.recipe.training.global_batch_size);
        let planned = plans.get(shape.micro_batches, Mode::Train).map_err(Failure::input)?;
        Ok(contraflow_runtime::schedule::text::write(&planned.plan))
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self.dir.join(file);
        std::fs::write(&path, text).map_err(|error| Failure::input(format!("{}: {error}", path.display())))
    }

    /// Trains to the end of the recipe.
    ///
    /// **Errors**: code 1 if the run failed, 2 if it could not write, 130 if it was interrupted; with the way to go on.
    pub fn train(&self, datasets: &Arc<Datasets>) -> Result<Tally, Failure> {
        let parallel = &self.recipe.parallel;
        eprintln!(
            "training {} in {}: {} ranks (pipeline {} x expert {} x data {}), {}, {} steps{}",
            self.name,
            self.dir.display(),
            self.recipe.topology().world(),
            parallel.pipeline,
            parallel.expert,
            parallel.data,
            parallel.schedule,
            self.frame.steps,
            match self.position().step {
                0 => String::new(),
                step => format!(", {step} of them made before"),
            }
        );
        let export_dir = self.export_dir()?;
        let mut progress = Progress::new(&self.dir, self.frame)
            .map_err(|error| Failure::run(format!("{}: {error}", self.dir.display())))?;
        let last = run_dir::last_summary(&self.dir).unwrap_or_default();
        let tally = Arc::new(Mutex::new(Tally { last, ..Tally::default() }));
        let shared = tally.clone();
        let began = Instant::now();
        let subscriber: Subscriber = Box::new(move |summary| {
            progress.step(summary);
            let mut tally = shared.lock().unwrap_or_else(PoisonError::into_inner);
            tally.tokens += summary.tokens;
            tally.steps += 1;
            tally.bubble += summary.bubble_share;
            tally.seconds = began.elapsed().as_secs_f64();
            tally.last = summary.clone();
        });
        let spec = ClusterSpec {
            recipe: self.recipe.clone(),
            datasets: datasets.clone(),
            resume: self.resume.clone(),
            checkpoints: Some(Commits {
                folder: CheckpointFolder::of_run(&self.dir),
                keep: self.recipe.checkpoint.keep,
                manifest: self.manifest.clone(),
            }),
            export_dir,
            network: LocalOptions::default(),
            probe: Probe::default(),
            subscribers: vec![subscriber],
        };
        let outcome = run_cluster(spec)?;
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !matches!(outcome, Outcome::Done { .. }) {
            self.clear_unfinished();
        }
        match outcome {
            Outcome::Done { validation } => {
                Ok(Tally { validation_loss: validation.map(|(loss, _)| loss), ..tally })
            }
            Outcome::Stopped { step } => {
                Err(Failure::interrupted(format!("interrupted after step {step}{}", self.way_on())))
            }
            Outcome::Failed { message, kind: ErrorKind::Config } => {
                Err(Failure::input(format!("{message}{}", self.way_on())))
            }
            Outcome::Failed { message, .. } => Err(Failure::run(format!("{message}{}", self.way_on()))),
        }
    }

    /// Removes what the end of the run has cut off. What cannot be removed now is when the run goes on.
    fn clear_unfinished(&self) {
        drop(CheckpointFolder::of_run(&self.dir).tidy(self.recipe.checkpoint.keep));
        drop(std::fs::remove_dir_all(self.dir.join(format!("model{UNFINISHED_SUFFIX}"))));
    }

    /// The folder that the weights go to at the end, under the name of one that is not finished.
    fn export_dir(&self) -> Result<Option<PathBuf>, Failure> {
        if !self.recipe.checkpoint.save_model {
            return Ok(None);
        }
        let dir = self.dir.join(format!("model{UNFINISHED_SUFFIX}"));
        let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
        if dir.exists() {
            std::fs::remove_dir_all(&dir).map_err(failed)?;
        }
        std::fs::create_dir(&dir).map_err(failed)?;
        Ok(Some(dir))
    }

    /// How to go on with this run, for the end of a message.
    fn way_on(&self) -> String {
        let steps = CheckpointFolder::of_run(&self.dir).list().unwrap_or_default();
        match steps.last() {
            Some(step) => {
                format!("; step {step} is kept, go on with: contraflow train --resume {}", self.dir.display())
            }
            None => "; no checkpoint has been made".into(),
        }
    }

    /// Measures the baselines, writes the summary and says it.
    ///
    /// **Errors**: a file cannot be written.
    pub fn finish(&self, datasets: &Datasets, tally: Tally, began: Instant) -> Result<(), Failure> {
        let available = datasets.validation.num_sequences();
        let taken = validation_shape(&self.recipe, available).map_or(0, |shape| shape.global_batch);
        let sequence_ids: Vec<usize> =
            (0..taken).map(|place| validation_index(place, taken, available)).collect();
        let baselines = Baselines::measure(&datasets.train, &datasets.validation, &sequence_ids);
        let parameters = cost::parameters(&self.recipe.model_config);
        let tokens_per_second = tally.tokens as f64 / tally.seconds.max(1e-9);
        let summary = Summary {
            name: self.name.clone(),
            steps: self.frame.steps,
            tokens: self.position().tokens + tally.tokens,
            seconds: began.elapsed().as_secs_f64(),
            tokens_per_second,
            mfu: tokens_per_second * self.frame.flops_per_token / self.frame.peak_flops,
            flops_per_token: self.frame.flops_per_token,
            peak_gflops: self.frame.peak_flops / 1e9,
            bubble_share: tally.bubble / (tally.steps.max(1) as f64),
            oversubscribed: self.frame.oversubscribed,
            final_loss: tally.last.loss,
            max_vio: tally.last.mean_max_vio(),
            validation_bits_per_byte: tally.validation_loss.map(|loss| loss / std::f64::consts::LN_2),
            validation_bytes: baselines.num_bytes,
            baseline_bigram_bits_per_byte: baselines.bigram_bits_per_byte,
            baseline_trigram_bits_per_byte: baselines.trigram_bits_per_byte,
            baseline_zstd_bits_per_byte: baselines.zstd_bits_per_byte,
            corpus: self.corpus.name.clone(),
            corpus_hash: self.corpus.hash.clone(),
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

fn new_folder(name: &str) -> Result<PathBuf, Failure> {
    let runs = Path::new(run_dir::RUNS);
    run_dir::create(runs, name).map_err(|error| Failure::input(format!("{}: {error}", runs.display())))
}

/// What all manifests of a run have in common.
///
/// **Errors**: never, in truth: the model's configuration is JSON of our own.
pub fn manifest(recipe: &Recipe, corpus_hash: &str) -> Result<Manifest, Failure> {
    let model = serde_json::from_str(&recipe.model_config.to_hf_json());
    Ok(Manifest {
        format_version: FORMAT_VERSION,
        position: Position::default(),
        recipe: recipe.resolved_toml(),
        model: model.map_err(|error| Failure::run(error.to_string()))?,
        corpus_hash: corpus_hash.to_owned(),
        made_by: made_by(recipe),
        shards: Vec::new(),
    })
}

/// Runs a cluster to its end, listening for interruptions.
fn run_cluster(spec: ClusterSpec) -> Result<Outcome, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::run(error.to_string()))?;
    runtime.block_on(async {
        let cluster = Cluster::start(spec).await.map_err(Failure::run)?;
        let interrupted = tokio::spawn(interrupt::watch(cluster.stopper()));
        let outcome = cluster.wait().await;
        interrupted.abort();
        Ok(outcome)
    })
}
