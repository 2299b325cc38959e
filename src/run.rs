//! A run with a folder: trains on an embedded cluster, keeps checkpoints, goes back to one where the watch says so. What
//! came of it is `summary`'s.

mod told;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_orchestrator::rollback::{self, RollBack, RollBackCount};
use contraflow_orchestrator::webhook::Happened;
use contraflow_runtime::checkpoint::{CheckpointFolder, Manifest, Position, RemoteFolder};
use contraflow_runtime::cost;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::files::UNFINISHED_SUFFIX;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::Plan;
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_runtime::topology::Generation;
use contraflow_workers::checkpoint::provenance::{companions, made_by, manifest};
use contraflow_workers::checkpoint::{Checkpoint, NewestWhole};
use contraflow_workers::data::batches::{Datasets, TaskKind};
use contraflow_workers::data::from_recipe::Text;
use contraflow_workers::engine::plans::{Plans, train_shape, validation_shape};
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::timelines::Timelines;
use parking_lot::Mutex;

use crate::dashboard::{Facts, Shown};
use crate::failure::Failure;
use crate::interrupt::{self, Signals};
use crate::local::{self, LocalCluster, LocalClusterSpec};
use crate::machine;
use crate::output::{count, quoted, say};
use crate::plan::pictures::Pictures;
use crate::progress::samples::Samples;
use crate::progress::tensorboard::EventFile;
use crate::progress::{Frame, Progress};
use crate::resume::Resumed;
use crate::run_dir;
use crate::runs::doctor;
use crate::telemetry::webhook::Telling;

/// Running totals over the steps of this process.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Tokens of them.
    pub tokens: u64,
    /// Sum of their bubble shares.
    pub bubble: f64,
    /// The latest step.
    pub last: StepRecord,
    /// Steps of this process.
    pub steps: u64,
    /// From the start of the cluster to the end of the last update, in seconds.
    pub seconds: f64,
    /// Mean validation loss at the end, in nats per token.
    pub validation_loss: Option<f64>,
    /// Lowest validation loss while it trained, in nats per token, and after which step.
    pub best_validation: Option<(f64, u64)>,
}

/// One formation of the cluster: the first, or one after a roll-back.
struct Attempt {
    resume: Option<Arc<Checkpoint>>,
    generation: Generation,
    returns: RollBackCount,
}

/// A run that has a folder.
pub struct Run {
    pub(crate) name: String,
    pub(crate) recipe: Arc<Recipe>,
    pub(crate) dir: PathBuf,
    pub(crate) frame: Frame,
    pub(crate) text: Text,
    /// What the run resumes from, if it is not fresh.
    resume: Option<Arc<Checkpoint>>,
    /// What manifests say of this run.
    manifest: Manifest,
    /// Where its checkpoints are.
    folder: CheckpointFolder,
    /// What viewers see of it.
    shown: Arc<Shown>,
    /// Who is told what happens to it.
    telling: Option<Arc<Telling>>,
    /// Keeps other processes out of the folder.
    _lock: File,
}

impl Run {
    /// A fresh run in a folder of its own.
    ///
    /// **Errors**: the folder cannot be made.
    pub fn create(name: &str, recipe: Recipe, text: Text) -> Result<Self, Failure> {
        let store = ready_store(&recipe)?;
        if let Some(store) = &store
            && let Some(step) =
                store.list().map_err(|fault| Failure::faults("checkpoint.store", &[fault]))?.last()
        {
            let at = store.location();
            let message = format!(
                "checkpoint.store: {at}: expected a prefix without checkpoints, got that of step {step}; --resume {at} goes on \
                 from it"
            );
            return Err(Failure::input(message));
        }
        let dir = new_folder(name)?;
        let lock = run_dir::lock(&dir)?;
        Run::new((dir, lock, store), recipe, text, None)
    }

    /// A resumed run: in its own folder from its newest checkpoint, in a new one from an earlier one.
    ///
    /// **Errors**: the folder cannot be made or written.
    pub fn resume(resumed: Resumed, recipe: Recipe, text: Text) -> Result<Self, Failure> {
        let store = ready_store(&recipe)?;
        resumed.compare_origin(&made_by(&recipe));
        let name = resumed.name();
        let Resumed { run: from, checkpoint, lock, damaged, .. } = resumed;
        let (dir, lock) = match lock {
            Some(lock) => (from.clone(), lock),
            None => {
                let dir = new_folder(&name)?;
                let lock = run_dir::lock(&dir)?;
                (dir, lock)
            }
        };
        let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
        let folder = CheckpointFolder::of_run(&dir).stored_in(store.clone());
        damaged.into_iter().try_for_each(|step| folder.set_aside(step).map(drop)).map_err(failed)?;
        folder.tidy(recipe.checkpoint.keep, None).map_err(failed)?;
        run_dir::keep_metrics(&from, &dir, checkpoint.manifest.position.step).map_err(failed)?;
        // The model of the steps so far is in the checkpoint; under its own name it would pass for the newest, and a summary for
        // that of a run that has ended.
        drop(std::fs::remove_dir_all(dir.join("model")));
        drop(std::fs::remove_file(dir.join("summary.json")));
        Run::new((dir, lock, store), recipe, text, Some(checkpoint))
    }

    fn new(
        (dir, lock, store): (PathBuf, File, Option<RemoteFolder>),
        recipe: Recipe,
        text: Text,
        resume: Option<Arc<Checkpoint>>,
    ) -> Result<Self, Failure> {
        let cores = machine::cores();
        let threads = recipe.topology().world() * recipe.parallel.threads_per_rank;
        let frame = Frame {
            steps: recipe.training.steps as u64,
            flops_per_token: cost::training_flops_per_token(
                &recipe.model_config,
                recipe.training.sequence_length,
            ) as f64,
            peak_flops: machine::peak(threads.min(cores)),
            oversubscribed: threads > cores,
        };
        let manifest =
            manifest(&recipe, &text.corpus.hash).map_err(|error| Failure::run(error.to_string()))?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = CheckpointFolder::of_run(&dir).stored_in(store);
        let plan = full_plan(&recipe)?;
        let plan_text = contraflow_runtime::schedule::text::write(&plan);
        let recipe = Arc::new(recipe);
        let shown = Shown::starting(Facts::of_local(&dir, recipe.clone(), plan));
        let telling = None;
        let run =
            Run { name, recipe, dir, frame, text, resume, manifest, folder, shown, telling, _lock: lock };
        run.write("recipe.toml", &run.recipe.resolved_toml())?;
        run.write("plan.txt", &plan_text)?;
        Ok(run)
    }

    /// What viewers see of it.
    pub fn shown(&self) -> Arc<Shown> {
        self.shown.clone()
    }

    /// Position of the run before the first step of this process.
    pub(crate) fn position(&self) -> Position {
        self.resume.as_ref().map(|checkpoint| checkpoint.manifest.position).unwrap_or_default()
    }

    pub(crate) fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self.dir.join(file);
        std::fs::write(&path, text).map_err(|error| Failure::input(format!("{}: {error}", path.display())))
    }

    /// Trains to the end of the recipe, and draws the last step where that is asked for.
    ///
    /// **Errors**: code 1 if the run failed, 2 if it could not write, 130 if it was interrupted; with a hint how to resume.
    pub fn train(&self, datasets: &Arc<Datasets>, pictures: &Pictures) -> Result<Tally, Failure> {
        let parallel = &self.recipe.parallel;
        say(format_args!(
            "training {} in {}: {} (pipeline {} x expert {} x data {}), {}, {}{}",
            self.name,
            self.dir.display(),
            count(self.recipe.topology().world(), "rank"),
            parallel.pipeline,
            parallel.expert,
            parallel.data,
            self.recipe.schedule_name(),
            count(self.frame.steps, "step"),
            match self.position().step {
                0 => String::new(),
                step => format!(", {step} of them before this run"),
            }
        ));
        if let Some(note) = self.no_validation(datasets) {
            say(format_args!("warning: {note}"));
        }
        let before = run_dir::records(&self.dir.join(run_dir::METRICS)).unwrap_or_default();
        self.shown.made_before(&before);
        let validated = before.iter().filter_map(|record| Some((record.validation_loss?, record.step - 1)));
        let best_validation = validated.min_by(|a, b| a.0.total_cmp(&b.0));
        let last = before.last().cloned().unwrap_or_default();
        let tally = Arc::new(Mutex::new(Tally { last, best_validation, ..Tally::default() }));
        let mut attempt = Attempt {
            resume: self.resume.clone(),
            generation: Generation::FIRST,
            returns: RollBackCount::default(),
        };
        loop {
            let (outcome, timelines) = run_cluster(self.cluster(datasets, &attempt, &tally)?, &self.shown)?;
            draw_last(pictures, &timelines);
            self.show_end(&outcome);
            let totals = || tally.lock();
            if !matches!(outcome, Outcome::Done { .. }) {
                self.clear_unfinished();
            }
            match outcome {
                Outcome::Done { validation } => {
                    return Ok(Tally {
                        validation_loss: validation.map(|(loss, _)| loss),
                        ..totals().clone()
                    });
                }
                Outcome::Stopped { step, .. } => {
                    return Err(Failure::interrupted(format!(
                        "interrupted after step {step}{}",
                        self.resume_hint()
                    )));
                }
                Outcome::Diverged { divergence, cursor } => {
                    attempt = self.diverged(&divergence, cursor, &attempt)?;
                    let kept =
                        attempt.resume.as_ref().map_or(0, |checkpoint| checkpoint.manifest.position.tokens);
                    // It may be an earlier one than that of the beginning, if that is damaged by now.
                    totals().tokens = kept.saturating_sub(self.position().tokens);
                }
                Outcome::Failed {
                    message,
                    kind: ErrorKind::Config | ErrorKind::Node | ErrorKind::Storage | ErrorKind::Damaged,
                } => {
                    return Err(Failure::input(format!("{message}{}", self.failure_hint())));
                }
                Outcome::Failed { message, .. } => {
                    return Err(Failure::run(format!("{message}{}", self.failure_hint())));
                }
            }
        }
    }

    /// Why nothing is validated, if that is so.
    pub(crate) fn no_validation(&self, datasets: &Datasets) -> Option<String> {
        self.recipe.no_validation(datasets.validation.num_sequences())
    }

    /// What follows the last step, before the figures are there.
    fn afterwards(&self, datasets: &Datasets) -> String {
        let shape = validation_shape(&self.recipe, datasets.validation.num_sequences());
        let validates = shape.map(|shape| format!("validating on {}", count(shape.global_batch, "sequence")));
        let writes = self.recipe.checkpoint.save_model.then(|| "writing the weights".to_owned());
        validates.into_iter().chain(writes).collect::<Vec<_>>().join(", ")
    }

    /// What the cluster is started with.
    fn cluster(
        &self,
        datasets: &Arc<Datasets>,
        attempt: &Attempt,
        tally: &Arc<Mutex<Tally>>,
    ) -> Result<LocalClusterSpec, Failure> {
        let samples = Samples::of(&self.recipe, &self.dir, self.sample_prompt(datasets));
        let unwritable = |error: std::io::Error| Failure::input(format!("{}: {error}", self.dir.display()));
        let events = self.recipe.log.tensorboard.then(|| EventFile::create(&self.dir)).transpose();
        let events = events.map_err(unwritable)?;
        let mut progress = Progress::new(&self.dir, self.frame, self.afterwards(datasets), samples, events)
            .map_err(unwritable)?;
        let (shared, shown, telling) = (tally.clone(), self.shown.clone(), self.telling.clone());
        let began = Instant::now();
        let before = shared.lock().seconds;
        let subscriber: Subscriber = Box::new(move |record| {
            progress.step(record);
            shown.step(record);
            telling.iter().for_each(|telling| telling.warned(record));
            let mut tally = shared.lock();
            tally.tokens += record.tokens;
            tally.steps += 1;
            tally.bubble += record.bubble_share;
            tally.seconds = before + began.elapsed().as_secs_f64();
            tally.last = record.clone();
            let lowest = tally.best_validation.map_or(f64::INFINITY, |(loss, _)| loss);
            if let Some(loss) = record.validation_loss.filter(|loss| *loss < lowest) {
                // It was measured before this step's update.
                tally.best_validation = Some((loss, record.step - 1));
            }
        });
        Ok(LocalClusterSpec {
            recipe: self.recipe.clone(),
            datasets: datasets.clone(),
            generation: attempt.generation,
            peak_flops: Some(self.frame.peak_flops),
            resume: attempt.resume.clone(),
            checkpoints: Some(Commits {
                folder: self.folder.clone(),
                keep: self.recipe.checkpoint.keep,
                manifest: self.manifest.clone(),
                companions: companions(&self.recipe, &self.text.tokenizer),
            }),
            export_dir: self.export_dir()?,
            network: LocalOptions::default(),
            flight: local::recorders(&self.dir, attempt.generation, self.recipe.topology().world()),
            probe: Probe::default(),
            subscribers: vec![subscriber],
        })
    }

    /// Leaves the evidence in the run's folder; then, where the watch wants to roll back, goes back to the newest checkpoint,
    /// and past the sequences that led to the divergence: the same ones would lead there again.
    ///
    /// **Errors**: code 1 with the reason, where the run was asked to stop or there is no way back.
    fn diverged(&self, divergence: &Divergence, cursor: u64, before: &Attempt) -> Result<Attempt, Failure> {
        let rolls_back = divergence.action == StepAction::RollBack;
        let checkpoint = if rolls_back { self.newest_whole()? } else { None };
        let newest = checkpoint.as_ref().map(|checkpoint| {
            let Position { step, cursor, .. } = checkpoint.manifest.position;
            rollback::Checkpoint { step, cursor }
        });
        let (returns, max_returns) = (before.returns, self.recipe.watch.max_skips);
        let decided =
            RollBack { newest, returns, max_returns }.decide(&self.with_evidence(divergence), cursor);
        let returned = decided.map_err(|why| {
            let says_all = newest.is_none() && rolls_back;
            let resume = if says_all { String::new() } else { self.resume_hint() };
            Failure::run(format!("{why}{resume}{}", doctor::hint(&self.dir)))
        })?;
        say(&returned.why);
        self.telling
            .iter()
            .for_each(|told| told.tell(Happened::RolledBack, divergence.step, &divergence.why));
        run_dir::keep_metrics(&self.dir, &self.dir, returned.to)
            .map_err(|error| Failure::run(format!("{}: {error}", self.dir.display())))?;
        let resume = checkpoint.map(|mut checkpoint| {
            checkpoint.manifest.position.cursor = cursor;
            Arc::new(checkpoint)
        });
        Ok(Attempt { resume, generation: before.generation.next(), returns: returned.returns })
    }

    /// The newest whole checkpoint, if there is one. Damaged ones after it leave their place, with a warning: their steps are made
    /// again.
    ///
    /// **Errors**: code 1; the folder cannot be read or written.
    fn newest_whole(&self) -> Result<Option<Checkpoint>, Failure> {
        let newest = NewestWhole::find(&self.folder, u64::MAX);
        let NewestWhole { checkpoint, damaged } =
            newest.map_err(|faults| Failure::run(faults.to_string()))?;
        for (step, faults) in &damaged {
            say(format_args!(
                "warning: the checkpoint of step {step} is damaged, the one before it is looked for:\n  {}",
                faults.to_string().replace('\n', "\n  ")
            ));
        }
        if checkpoint.is_some() {
            let failed = |error| Failure::run(format!("{}: {error}", self.folder.path().display()));
            damaged
                .iter()
                .try_for_each(|(step, _)| self.folder.set_aside(*step).map(drop))
                .map_err(failed)?;
        }
        Ok(checkpoint)
    }

    /// The same divergence, which says where its evidence is, if there is some.
    fn with_evidence(&self, divergence: &Divergence) -> Divergence {
        let mut divergence = divergence.clone();
        match divergence.evidence.as_ref().map(|evidence| evidence.write(&self.dir)) {
            Some(Ok(path)) => divergence.why += &format!("; see {}", path.display()),
            Some(Err(error)) => divergence.why += &format!("; {}: {error}", self.dir.display()),
            None => {}
        }
        divergence
    }

    /// Removes what the end of the run has cut off. What cannot be removed now is when the run is resumed.
    fn clear_unfinished(&self) {
        drop(self.folder.tidy(self.recipe.checkpoint.keep, None));
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
        for (name, bytes) in self.text.tokenizer.files() {
            std::fs::write(dir.join(name), bytes).map_err(failed)?;
        }
        Ok(Some(dir))
    }

    /// What follows the message of a run that failed: how to resume it, what held it up, and how to learn more.
    fn failure_hint(&self) -> String {
        self.resume_hint() + &doctor::hint(&self.dir)
    }

    /// A hint how to resume this run, appended to messages.
    fn resume_hint(&self) -> String {
        let steps = self.folder.list().unwrap_or_default();
        match steps.last() {
            Some(step) => {
                let dir = quoted(self.dir.display());
                format!("; step {step} is saved, resume with: contraflow train --resume {dir}")
            }
            None => "; no checkpoint has been made".into(),
        }
    }
}

/// The plan of a step with the whole batch.
fn full_plan(recipe: &Recipe) -> Result<Plan, Failure> {
    let mut plans = Plans::new(recipe).map_err(Failure::input)?;
    let shape = train_shape(recipe, recipe.training.global_batch_size);
    let planned = plans.get(shape.micro_batches, TaskKind::Train).map_err(Failure::input)?;
    Ok(Plan::clone(&planned.plan))
}

/// The object store that a recipe names for its checkpoints, if it names one: access and conditional puts are tried.
fn ready_store(recipe: &Recipe) -> Result<Option<RemoteFolder>, Failure> {
    let store = RemoteFolder::named(&recipe.checkpoint.store);
    store
        .iter()
        .try_for_each(RemoteFolder::probe)
        .map_err(|fault| Failure::faults("checkpoint.store", &[fault]))?;
    Ok(store)
}

fn new_folder(name: &str) -> Result<PathBuf, Failure> {
    let runs = Path::new(run_dir::RUNS);
    run_dir::create(runs, name).map_err(|error| Failure::input(format!("{}: {error}", runs.display())))
}

/// Draws the last step that all ranks have ended. What has been trained counts more than a picture that cannot be written.
fn draw_last(pictures: &Pictures, timelines: &Timelines) {
    if let Some(step) = timelines.latest().filter(|_| !pictures.is_none())
        && let Err(failure) = pictures.draw_recorded(&step)
    {
        say(format_args!("warning: no picture of step {}: {failure}", step.step));
    }
}

/// Runs a cluster to its end, listening for interruptions; returns also what its ranks have recorded, which viewers see meanwhile.
fn run_cluster(spec: LocalClusterSpec, shown: &Shown) -> Result<(Outcome, Timelines), Failure> {
    interrupt::runtime()?.block_on(async {
        let cluster = LocalCluster::start(spec).await.map_err(Failure::run)?;
        let interrupted = tokio::spawn(interrupt::watch(Signals::listen()?, cluster.stopper()));
        let timelines = cluster.timelines();
        shown.change(|state| state.timelines = Some(timelines.clone()));
        let outcome = cluster.wait().await;
        interrupted.abort();
        Ok((outcome, timelines))
    })
}
