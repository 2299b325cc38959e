//! A job as a worker process sees it: its folder in the shared storage, what is read and what is put in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::{
    CheckpointFolder, Companions, JobFolder, Manifest, Owner, Pinned, Position, Storage,
};
use contraflow_runtime::control::ExportedFile;
use contraflow_runtime::control::wire::job_of;
use contraflow_runtime::faults::count;
use contraflow_runtime::files::UNFINISHED_SUFFIX;
use contraflow_runtime::files::objects::Sources;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::publish::publish_weights;
use contraflow_runtime::recipe::{Recipe, continuation};
use contraflow_runtime::topology::{FormationId, Generation};
use v1::commit::What;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::provenance::{companions, manifest};
use crate::data::batches::Datasets;
use crate::data::from_recipe::{Text, fetched_anew, load_text};
use crate::error::{ErrorKind, RankError};

/// Minimum number of retained checkpoints: that of the newest commit, and the previous one, which the orchestrator resumes
/// from if it never learns of the commit.
const LEAST_KEPT: usize = 2;

/// Where a worker process finds things.
#[derive(Clone, Debug)]
pub struct Roots {
    /// Shared by all workers.
    pub storage: Storage,
    /// What paths of recipes are relative to, if any may be named.
    pub data: Option<PathBuf>,
    /// What of object stores is read for recipes.
    pub sources: Sources,
}

/// What ranks are made of, and what is said in manifests.
#[derive(Clone)]
pub struct Prepared {
    /// What to train and how.
    pub recipe: Arc<Recipe>,
    /// The sequences.
    pub datasets: Arc<Datasets>,
    /// Where checkpoints are kept.
    pub folder: CheckpointFolder,
    /// What the formation resumes from.
    pub resume: Option<Arc<Checkpoint>>,
    loaded: LoadedData,
    manifest: Manifest,
    companions: Companions,
    /// The job's, in the shared storage.
    pub(super) job: JobFolder,
    /// Checkpoints that stay.
    keep: usize,
}

/// What a process has loaded, for the next formation of the same job.
#[derive(Clone)]
pub struct LoadedData {
    text: Arc<Text>,
    datasets: Arc<Datasets>,
    /// Where the weights are that it begins with, if it names some: here, also those of an object store.
    init: String,
}

impl LoadedData {
    fn load(recipe: &Recipe) -> Result<Self, RankError> {
        let local = fetched_anew(recipe)?;
        let (text, datasets) = load_text(&local)?;
        Ok(LoadedData { text: Arc::new(text), datasets: Arc::new(datasets), init: local.model.init })
    }
}

impl Prepared {
    /// Reads what an assignment names: recipe, data (unless they are `loaded`), the checkpoint it resumes from.
    ///
    /// **Errors**: recipe, data or checkpoint are not what they should be; a file of this node cannot be read or written; the
    /// job's folder is not free for this formation.
    pub fn new(
        FormationId { job, generation }: FormationId,
        assign: &v1::Assign,
        roots: &Roots,
        loaded: Option<LoadedData>,
    ) -> Result<Self, RankError> {
        let content = |path: &str| {
            let path = path.to_owned();
            move |message: String| RankError::Content { path, message }
        };
        let model = ModelConfig::from_hf_json(&assign.model_config)
            .map_err(|faults| content("model.config")(faults.to_string()))?;
        let submitted = Recipe::submitted(&assign.recipe, "recipe", &assign.overrides, Some(model))
            .map_err(|faults| content("recipe")(faults.to_string()))?;
        let mut recipe = place(submitted.clone(), roots)?;
        let loaded = loaded.map_or_else(|| LoadedData::load(&recipe), Ok)?;
        let text = &loaded.text;
        recipe.model.init.clone_from(&loaded.init);
        recipe.model_config.eos_token_id = text.tokenizer.end_ids(&recipe.model_config.eos_token_id);
        let owner = Owner { state: assign.state, job };
        let job = JobFolder::claim(&roots.storage, owner)?;
        let pinned = Pinned { newest: assign.last_checkpoint, earlier: assign.earlier_checkpoint };
        let quota = Some(assign.quota_bytes).filter(|&bytes| bytes > 0);
        let folder = CheckpointFolder::of_job(&job).in_generation(generation).pinning(pinned).within(quota);
        let manifest = manifest(&submitted, &text.corpus.hash)
            .map_err(|error| content("model.config")(error.to_string()))?;
        let manifest = Manifest { generation, ..manifest };
        let companions = companions(&recipe, &text.tokenizer);
        let resume = match resume_dir(assign, &folder, roots)? {
            Some(dir) => Some(resume(&dir, assign, &manifest).map_err(RankError::in_storage)?),
            None => None,
        };
        let recipe = Arc::new(recipe);
        let keep = recipe.checkpoint.keep.max(LEAST_KEPT);
        let datasets = loaded.datasets.clone();
        let prepared = Prepared { recipe, datasets, folder, resume, loaded, manifest, companions, job, keep };
        if assign.ranks.contains(&0) {
            prepared.begin(generation, assign)?;
        }
        Ok(prepared)
    }

    /// What this process has loaded.
    pub fn loaded(&self) -> LoadedData {
        self.loaded.clone()
    }

    /// The job's folder.
    pub fn dir(&self) -> &Path {
        self.job.path()
    }

    /// Where the ranks write their weights.
    pub fn export_dir(&self) -> PathBuf {
        self.job.path().join(format!("model{UNFINISHED_SUFFIX}"))
    }

    /// Makes the job's folder ready for a formation, before any of its ranks may write: the worker of rank 0 does this.
    fn begin(&self, generation: Generation, assign: &v1::Assign) -> Result<(), RankError> {
        self.job.begin(generation)?;
        // From memory it continues the history in which everything here was committed.
        let newest = assign.memory.is_none().then_some(assign.resume_step);
        let dir = self.job.path();
        self.tidy(&assign.recipe, newest).map_err(|error| RankError::file(dir)(error).in_storage())
    }

    fn tidy(&self, recipe: &str, newest: Option<u64>) -> std::io::Result<()> {
        std::fs::write(self.job.path().join("recipe.toml"), recipe)?;
        self.folder.tidy(self.keep, newest)?;
        let dir = self.export_dir();
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        if !self.recipe.checkpoint.save_model {
            return Ok(());
        }
        std::fs::create_dir(&dir)?;
        let mut files = self.loaded.text.tokenizer.files().into_iter();
        files.try_for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes))
    }

    /// Puts in place what the ranks have written.
    ///
    /// **Errors**: the storage is gone or cannot be written; the folder is another job's; a malformed command.
    pub fn commit(&self, what: What) -> Result<(), RankError> {
        let missing = |what: &str| RankError::Content {
            path: "the commit".into(),
            message: format!("expected {what}"),
        };
        match what {
            What::Checkpoint(v1::Checkpoint {
                position,
                watch,
                shards,
                last_checkpoint: newest,
                earlier_checkpoint: earlier,
            }) => {
                let position: Position = position.ok_or_else(|| missing("a position"))?.into();
                let watch = watch.ok_or_else(|| missing("a stability state"))?.into();
                let shards = shards.into_iter().map(Into::into).collect();
                let manifest = Manifest { position, watch, shards, ..self.manifest.clone() };
                let folder = self.folder.clone().pinning(Pinned { newest, earlier });
                Ok(folder.commit(&manifest, &self.companions, self.keep)?)
            }
            What::Weights(v1::Weights { files }) => {
                self.job.verify()?;
                let dir = self.export_dir();
                if !dir.exists() && self.job.path().join("model").exists() {
                    // Done before, with an answer that was lost.
                    return Ok(());
                }
                let files: Vec<ExportedFile> = files.into_iter().map(Into::into).collect();
                publish_weights(&dir, &files, &self.recipe.model_config.to_hf_json())
                    .map_err(|error| RankError::file(&dir)(error).in_storage())
            }
        }
    }
}

/// Puts a recipe's paths below the data root. What it names in object stores is read only where the operator of this worker has
/// allowed it: credentials are the worker's.
fn place(recipe: Recipe, roots: &Roots) -> Result<Recipe, RankError> {
    recipe.check_sources(&roots.sources).map_err(|faults| RankError::Node { message: faults.to_string() })?;
    match &roots.data {
        Some(root) => Ok(recipe.under(root)),
        None if recipe.names_paths() => Err(RankError::Node {
            message: "the recipe names files: expected a worker with --data-root, got one without".into(),
        }),
        None => Ok(recipe),
    }
}

/// The folder of the checkpoint that a formation resumes from; `None` if it is a fresh start or the state is in memory.
fn resume_dir(
    assign: &v1::Assign,
    folder: &CheckpointFolder,
    roots: &Roots,
) -> Result<Option<PathBuf>, RankError> {
    if assign.resume_step == 0 || assign.memory.is_some() {
        return Ok(None);
    }
    let own = folder.committed(assign.resume_step);
    match assign.origin.as_ref().filter(|origin| origin.step == assign.resume_step) {
        // What the job has committed itself comes after what it began with.
        Some(origin) => origin_dir(origin, assign.state, roots).map(Some),
        None => Ok(Some(own)),
    }
}

fn origin_dir(origin: &v1::Origin, state: u64, roots: &Roots) -> Result<PathBuf, RankError> {
    let content = |message: String| RankError::Content { path: "resume".into(), message };
    if origin.job != 0 {
        let job = job_of(origin.job).map_err(content)?;
        let found = JobFolder::find(&roots.storage, Owner { state, job })?;
        let gone =
            || content(format!("expected the folder of {job} in the storage, got none: it was removed"));
        return Ok(CheckpointFolder::of_job(&found.ok_or_else(gone)?).committed(origin.step));
    }
    // A client names it: nothing is read outside of what the workers were given.
    let dir = Path::new(&origin.folder).canonicalize().map_err(RankError::file(Path::new(&origin.folder)))?;
    let allowed: Vec<PathBuf> = std::iter::once(roots.storage.path())
        .chain(roots.data.as_deref())
        .filter_map(|root| root.canonicalize().ok())
        .collect();
    match allowed.iter().any(|root| dir.starts_with(root)) {
        true => Ok(dir),
        false => {
            let allowed: Vec<String> = allowed.iter().map(|root| root.display().to_string()).collect();
            let got = dir.display();
            Err(content(format!("expected a checkpoint below {}, got {got}", allowed.join(" or "))))
        }
    }
}

/// Reads the checkpoint that a formation resumes from, which has to be of the same run.
fn resume(dir: &Path, assign: &v1::Assign, own: &Manifest) -> Result<Arc<Checkpoint>, RankError> {
    let mut checkpoint = Checkpoint::open(dir).map_err(|faults| {
        match faults.0.iter().any(|fault| fault.kind == ErrorKind::Node) {
            true => RankError::from(faults),
            false => RankError::Damaged { dir: dir.display().to_string(), message: faults.to_string() },
        }
    })?;
    if checkpoint.manifest.corpus_hash != own.corpus_hash {
        let message = format!(
            "expected data of blake3 {}, as in the run so far, got {}",
            checkpoint.manifest.corpus_hash, own.corpus_hash
        );
        return Err(RankError::Content { path: "data.paths".into(), message });
    }
    if let Some(origin) = assign.origin.as_ref().filter(|origin| origin.step == assign.resume_step) {
        same_run(&checkpoint.manifest, own, origin)?;
    }
    if assign.cursor > 0 {
        checkpoint.manifest.position.cursor = assign.cursor;
    }
    Ok(Arc::new(checkpoint))
}

/// What a client said of the checkpoint that its job begins with.
fn same_run(then: &Manifest, own: &Manifest, origin: &v1::Origin) -> Result<(), RankError> {
    let wrong = |message: String| RankError::Content { path: "resume".into(), message };
    let recipe_of = |manifest: &Manifest| {
        let model = ModelConfig::from_hf_json(&manifest.model.to_string())?;
        Recipe::reload(&manifest.recipe, "the checkpoint", &[], model)
    };
    let (before, now) = (recipe_of(then), recipe_of(own));
    let faults = before.and_then(|before| Ok(continuation(&before, &now?, then.position.step)));
    let mut faults = faults.map_err(|faults| wrong(faults.to_string()))?;
    let Position { step, cursor, .. } = then.position;
    if (step, cursor) != (origin.step, origin.cursor) {
        let said = format!("{} after {}", count(origin.cursor, "sequence"), count(origin.step, "step"));
        faults.expected(
            "checkpoint",
            said,
            format!("{} after {}", count(cursor, "sequence"), count(step, "step")),
        );
    }
    match faults.list.is_empty() {
        true => Ok(()),
        false => Err(wrong(faults.to_string())),
    }
}
