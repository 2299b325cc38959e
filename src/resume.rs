//! Resuming a run, here or as a job of a cluster: finds its newest checkpoint, and refuses what would not be the same run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::{
    CheckpointError, CheckpointFolder, MANIFEST_FILE, MadeBy, RemoteFolder, is_unfinished,
};
use contraflow_runtime::files;
use contraflow_runtime::files::objects::Location;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::{Recipe, continuation};
use contraflow_workers::checkpoint::{Checkpoint, NewestWhole};

use crate::failure::Failure;
use crate::output::say;
use crate::run_dir::{self, name_of, without_link};

/// A run that can be resumed.
pub struct Resumed {
    /// The folder of the run.
    pub run: PathBuf,
    /// The checkpoint it resumes from, checked.
    pub checkpoint: Arc<Checkpoint>,
    /// Keeps other processes out of the run; `None` if the checkpoint is not the run's newest: then a new run begins.
    pub lock: Option<File>,
    /// Steps of later checkpoints that are damaged: they have to leave their place before these steps are made again.
    pub damaged: Vec<u64>,
    model: ModelConfig,
}

impl Resumed {
    /// Opens a run (its folder or its name) at its newest whole checkpoint, or the folder of a checkpoint.
    ///
    /// **Errors**: code 2 with every fault: no such run, no checkpoint, another process at work in the run, a checkpoint that
    /// is unfinished, damaged or of a newer format.
    pub fn open(name: &str) -> Result<Self, Failure> {
        match find(name)? {
            Found::Store(store) => Self::open_store(store),
            Found::Run(run) => Self::open_newest(run),
            Found::Checkpoint { run, dir } => Self::open_checkpoint(run, &dir),
        }
    }

    /// A new run, which continues the one whose checkpoints are in the store.
    fn open_store(store: RemoteFolder) -> Result<Self, Failure> {
        let refused = |fault: CheckpointError| Failure::faults("checkpoint", &[fault]);
        let at = store.location().clone();
        if store.list().map_err(refused)?.is_empty() {
            return Err(Failure::input(format!(
                "{at}: expected a committed checkpoint to resume from, got none"
            )));
        }
        run_dir::check_name(at.name())?;
        let runs = Path::new(run_dir::RUNS);
        let made = run_dir::create(runs, at.name());
        let run = made.map_err(|error| Failure::input(format!("{}: {error}", runs.display())))?;
        CheckpointFolder::of_run(&run).stored_in(Some(store)).pull().map_err(refused)?;
        Self::open_newest(run)
    }

    /// A damaged checkpoint is passed over, with a warning.
    fn open_newest(run: PathBuf) -> Result<Self, Failure> {
        let lock = run_dir::lock(&run)?;
        let pulled = CheckpointFolder::of_run(&run).stored_in(store_of(&run)).pull();
        pulled.map_err(|fault| Failure::faults("checkpoint", &[fault]))?;
        let newest = NewestWhole::find(&CheckpointFolder::of_run(&run), u64::MAX);
        let NewestWhole { checkpoint, damaged } =
            newest.map_err(|faults| Failure::faults("checkpoint", &faults.0))?;
        let Some(checkpoint) = checkpoint else {
            let faults: Vec<_> = damaged.iter().flat_map(|(_, faults)| &faults.0).collect();
            return Err(Failure::faults("checkpoint", &faults));
        };
        let resumes_at = checkpoint.manifest.position.step;
        for (step, faults) in &damaged {
            say(format_args!(
                "warning: the checkpoint of step {step} is damaged, resuming from that of step {resumes_at}:\n  {}",
                faults.to_string().replace('\n', "\n  ")
            ));
        }
        let damaged = damaged.into_iter().map(|(step, _)| step).collect();
        let model = model_of(&checkpoint)?;
        Ok(Resumed { run, checkpoint: Arc::new(checkpoint), lock: Some(lock), damaged, model })
    }

    fn open_checkpoint(run: PathBuf, dir: &Path) -> Result<Self, Failure> {
        let newest = CheckpointFolder::of_run(&run).list().ok().and_then(|steps| steps.last().copied());
        let is_newest =
            newest.is_some_and(|step| CheckpointFolder::of_run(&run).committed(step).ends_with(name_of(dir)));
        let lock = if is_newest { Some(run_dir::lock(&run)?) } else { None };
        let checkpoint = Checkpoint::open(dir).map_err(|faults| {
            let mut failure = Failure::faults("checkpoint", &faults.0);
            failure.message += &earlier(&run, dir);
            failure
        })?;
        let model = model_of(&checkpoint)?;
        Ok(Resumed { run, checkpoint: Arc::new(checkpoint), lock, damaged: Vec::new(), model })
    }

    /// Name of the run.
    pub fn name(&self) -> String {
        name_of(&self.run)
    }

    /// The run's recipe with changes.
    ///
    /// **Errors**: code 2 with every fault at once.
    pub fn recipe(&self, overrides: &[String]) -> Result<Recipe, Failure> {
        let origin = self.checkpoint.dir().join(MANIFEST_FILE).display().to_string();
        let text = &self.checkpoint.manifest.recipe;
        Ok(Recipe::reload(text, &origin, overrides, self.model.clone())?)
    }

    /// Refuses a recipe or data that would make it a different run, and warns of what is different.
    ///
    /// **Errors**: code 2 with every fault at once.
    pub fn check(&self, recipe: &Recipe, corpus_hash: &str) -> Result<(), Failure> {
        let manifest = &self.checkpoint.manifest;
        let before = self.recipe(&[])?;
        let mut faults = continuation(&before, recipe, manifest.position.step);
        if corpus_hash != manifest.corpus_hash {
            let expected = format!("data of blake3 {}, as in the run so far", manifest.corpus_hash);
            faults.expected("data.paths", expected, corpus_hash);
        }
        if !faults.list.is_empty() {
            return Err(faults.into());
        }
        changes(&before, recipe).iter().for_each(|change| say(format_args!("note: {change}")));
        Ok(())
    }

    /// Warns where the run will not be bit-identical to an undisturbed one.
    pub fn compare_origin(&self, now: &MadeBy) {
        let then = &self.checkpoint.manifest.made_by;
        if then.layout == now.layout
            && (then.binary != now.binary || then.instruction_set != now.instruction_set)
        {
            say(
                "note: the checkpoint was written by another build or on another machine: losses agree within rounding, not bit for bit",
            );
        }
    }
}

/// A checkpoint that a job of a cluster is to begin with.
pub struct ToResume {
    /// Name of its run.
    pub name: String,
    /// Its folder, as an absolute path.
    dir: PathBuf,
    checkpoint: Checkpoint,
}

impl ToResume {
    /// The newest checkpoint of a run (its folder or its name), or the one in this folder.
    ///
    /// **Errors**: code 2 with every fault: no such run, no checkpoint, one that is unfinished, damaged or of a newer format.
    pub fn open(name: &str) -> Result<Self, Failure> {
        let (run, dir) = match find(name)? {
            Found::Store(store) => {
                let message = format!(
                    "{}: expected a run or a checkpoint in a folder, got an object store",
                    store.location()
                );
                return Err(Failure::input(message));
            }
            Found::Checkpoint { run, dir } => (run, dir),
            Found::Run(run) => {
                let folder = CheckpointFolder::of_run(&run);
                let newest = folder.list().ok().and_then(|steps| steps.last().copied()).unwrap_or_default();
                (run, folder.committed(newest))
            }
        };
        let checkpoint = Checkpoint::open(&dir).map_err(|faults| {
            let mut failure = Failure::faults("checkpoint", &faults.0);
            failure.message += &earlier(&run, &dir);
            failure
        })?;
        let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
        Ok(ToResume { name: name_of(&run), dir: dir.canonicalize().map_err(failed)?, checkpoint })
    }

    /// Its run's recipe with these overrides, and its model.
    ///
    /// **Errors**: code 2 with every fault at once.
    pub fn to_submit(&self, overrides: &[String]) -> Result<(String, String), Failure> {
        let text = &self.checkpoint.manifest.recipe;
        let before = Recipe::reload(text, &self.name, &[], model_of(&self.checkpoint)?)?;
        let recipe = Recipe::resubmitted(text, &self.name, overrides, before.model_config.clone())?;
        let request = (recipe.resolved_toml(), recipe.model_config.to_hf_json());
        Ok(continuation(&before, &recipe, self.checkpoint.manifest.position.step).into_result(request)?)
    }

    /// Where it is.
    pub fn resume_from(&self) -> v1::ResumeFrom {
        let position = &self.checkpoint.manifest.position;
        let folder = self.dir.display().to_string();
        v1::ResumeFrom { job: String::new(), folder, step: position.step, cursor: position.cursor }
    }
}

fn model_of(checkpoint: &Checkpoint) -> Result<ModelConfig, Failure> {
    let manifest = checkpoint.dir().join(MANIFEST_FILE);
    ModelConfig::from_hf_json(&checkpoint.manifest.model.to_string())
        .map_err(|faults| Failure::input(format!("{}: model: {faults}", manifest.display())))
}

/// What a name refers to.
enum Found {
    /// The checkpoints of a run in an object store.
    Store(RemoteFolder),
    /// A run with a checkpoint.
    Run(PathBuf),
    /// One checkpoint of a run.
    Checkpoint { run: PathBuf, dir: PathBuf },
}

fn find(name: &str) -> Result<Found, Failure> {
    if let Some(location) = Location::parse(name) {
        location.map_err(Failure::input)?;
        return Ok(RemoteFolder::named(name).map(Found::Store).expect("it has just been read"));
    }
    let direct = PathBuf::from(name);
    if direct.join(MANIFEST_FILE).is_file() || is_unfinished(&direct) {
        let whole = direct.canonicalize().unwrap_or_else(|_| direct.clone());
        let run = whole.ancestors().nth(2).unwrap_or(&direct).to_owned();
        return Ok(Found::Checkpoint { run, dir: direct });
    }
    let tried = [direct, Path::new(run_dir::RUNS).join(name)];
    let Some(run) = tried.iter().find(|path| path.is_dir()).map(|path| without_link(path)) else {
        let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        return Err(Failure::input(format!("{name}: expected a run; looked in {}", tried.join(", "))));
    };
    let folder = CheckpointFolder::of_run(&run);
    let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", folder.path().display()));
    let has_checkpoint = |run: &Path| {
        CheckpointFolder::of_run(run).list().is_ok_and(|steps| !steps.is_empty())
            || store_of(run).is_some_and(|store| store.list().is_ok_and(|steps| !steps.is_empty()))
    };
    let instead = || run_dir::instead_of_latest(name, "checkpoint", has_checkpoint);
    folder.list().map_err(failed)?;
    match has_checkpoint(&run).then_some(run).or_else(instead) {
        Some(run) => Ok(Found::Run(run)),
        None => {
            let message = format!(
                "{}: expected a committed checkpoint to resume from, got none",
                folder.path().display()
            );
            Err(Failure::input(message))
        }
    }
}

/// The object store in which a run's checkpoints are, by its recipe.
fn store_of(run: &Path) -> Option<RemoteFolder> {
    let text = files::read_to_string(&run.join("recipe.toml")).ok()?;
    RemoteFolder::named(text.parse::<toml::Table>().ok()?.get("checkpoint")?.get("store")?.as_str()?)
}

/// How to resume from before a damaged checkpoint, if possible.
fn earlier(run: &Path, damaged: &Path) -> String {
    let folder = CheckpointFolder::of_run(run);
    let steps = folder.list().unwrap_or_default();
    let before = steps.into_iter().rfind(|&step| name_of(&folder.committed(step)) < name_of(damaged));
    let newest = before.and_then(|step| NewestWhole::find(&folder, step).ok()?.step());
    newest
        .map(|step| folder.committed(step))
        .map_or_else(String::new, |dir| format!("\nan earlier one is there: --resume {}", dir.display()))
}

/// What is different from the run so far, key by key.
fn changes(before: &Recipe, now: &Recipe) -> Vec<String> {
    let values = |recipe: &Recipe| recipe.resolved_toml().parse::<toml::Table>().unwrap_or_default();
    let (before, now) = (values(before), values(now));
    let mut changes = Vec::new();
    for (section, keys) in &now {
        for (key, value) in keys.as_table().into_iter().flatten() {
            let old = before.get(section).and_then(|section| section.get(key));
            if let Some(old) = old.filter(|old| *old != value) {
                changes.push(format!("{section}.{key} was {old}, is {value} from now on"));
            }
        }
    }
    changes
}
