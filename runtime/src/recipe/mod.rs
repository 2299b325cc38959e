//! The recipe: all settings of a run, as one checked value.
//!
//! First thing a job becomes. TOML text and `--set` overrides go through a table of keys (`keys`, `table`),
//! the model's `config.json` is read, relations are checked, and the typed sections come out, or every fault
//! at once. Knows no ranks at work, no data and no tensors.

pub mod builtin;
mod continued;
mod derived;
mod elastic;
mod keys;
#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod model_tests;
mod own_plan;
mod relations;
mod sections;
mod step_table;
mod suggest;
mod table;
#[cfg(test)]
mod tests;
mod values;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use toml::Value;

pub use continued::continuation;
pub use keys::{KEYS, KeyDefault, KeyDoc, KeyKind, NumberRange, reference};
pub use own_plan::parse_file as parse_plan;
pub use sections::{
    Accumulation, BYTE_TOKENS, BalanceSection, CheckpointSection, DataSection, Decay, END_OF_DOCUMENT,
    ElasticSection, FRESH, GradientScales, LogLevel, LogSection, LrSection, MemorySection, ModelSection,
    MtpSection, NumberFormat, OnFault, OnSpike, OptimizerSection, ParallelSection, PrecisionRecipe,
    PrecisionSection, Recomputed, SampleSection, StageRule, Stages, TokenizerSection, TrainingSection,
    ValidateSection, WatchSection,
};
pub use step_table::{StepTable, TableStep};

use crate::faults::Faults;
use crate::files;
use crate::files::objects::{Location, Sources};
use crate::model_config::{ModelConfig, builtin as models};
use crate::schedule::{Plan, ScheduleKind};
use crate::topology::Topology;
use continued::{is_set, text_to_continue};
use derived::derive;
use table::RecipeTable;

/// Where a recipe comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipeSource {
    /// A built-in recipe, by name.
    Builtin(String),
    /// A TOML file.
    File(PathBuf),
}

/// All settings of a run. [`Recipe::load`] makes it, after all checks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is trained.
    pub model: ModelSection,
    /// Over how many ranks, and in which order they work.
    pub parallel: ParallelSection,
    /// On which layouts a job of a cluster may run.
    pub elastic: ElasticSection,
    /// How long and in which portions.
    pub training: TrainingSection,
    /// AdamW.
    pub optimizer: OptimizerSection,
    /// In which formats it is computed.
    pub precision: PrecisionSection,
    /// What is computed again instead of being kept.
    pub memory: MemorySection,
    /// The learning rate.
    pub lr: LrSection,
    /// What keeps the routed experts evenly loaded.
    pub balance: BalanceSection,
    /// Multi-token prediction.
    pub mtp: MtpSection,
    /// What is read.
    pub data: DataSection,
    /// How text becomes tokens.
    pub tokenizer: TokenizerSection,
    /// Measuring on validation sequences while it trains.
    pub validate: ValidateSection,
    /// What the model writes, to see what it has learnt.
    pub sample: SampleSection,
    /// What is kept.
    pub checkpoint: CheckpointSection,
    /// The action on steps whose numbers are out of bounds.
    pub watch: WatchSection,
    /// What is said while it runs.
    pub log: LogSection,
    /// Keys of the model's `config.json` that the recipe sets by itself, as `model.<key>`.
    #[serde(skip)]
    pub model_keys: toml::Table,
    /// The architecture that `model.config` names, with these keys.
    #[serde(skip, default = "stand_in_model")]
    pub model_config: ModelConfig,
    /// The plan that `parallel.plan` names.
    #[serde(skip)]
    pub own_plan: Option<Arc<Plan>>,
}

/// The override that sets `data.paths`.
pub fn paths_override(paths: &[String]) -> String {
    format!("data.paths={}", Value::from(paths.to_vec()))
}

/// The override that sets a key to one path.
pub fn path_override(key: &str, path: &Path) -> String {
    format!("{key}={}", Value::from(path.to_string_lossy().into_owned()))
}

/// What relations that do not concern the model are checked with while the model is unknown.
fn stand_in_model() -> ModelConfig {
    models::model("tiny").expect("the model of the default recipe is built in")
}

impl RecipeSource {
    /// A built-in recipe if there is one of this name, else a file.
    pub fn parse(text: &str) -> Self {
        match builtin::recipe(text) {
            Some(_) => Self::Builtin(text.to_string()),
            None => Self::File(PathBuf::from(text)),
        }
    }

    /// The name runs are called after: of the recipe, or of the file without its ending.
    pub fn name(&self) -> String {
        match self {
            Self::Builtin(name) => name.clone(),
            Self::File(path) => path
                .file_stem()
                .map_or_else(|| "recipe".to_string(), |stem| stem.to_string_lossy().into_owned()),
        }
    }

    fn text(&self) -> Result<String, Faults> {
        let (name, reason) = match self {
            Self::Builtin(name) => match builtin::recipe(name) {
                Some(text) => return Ok(text.to_string()),
                None => (name.clone(), "no recipe of that name".to_string()),
            },
            Self::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => return Ok(text),
                Err(error) => (path.display().to_string(), error.to_string()),
            },
        };
        let names = builtin::recipe_names();
        let expected = format!("a built-in recipe ({}) or a TOML file", names.join(", "));
        let mut faults = Faults::default();
        faults.expected(&name, expected, format!("{reason}{}", suggest::for_name(&name, &names)));
        Err(faults)
    }

    /// The folder that relative paths in the recipe start from.
    fn folder(&self) -> &Path {
        match self {
            Self::Builtin(_) => Path::new(""),
            Self::File(path) => path.parent().unwrap_or(Path::new("")),
        }
    }
}

impl Recipe {
    /// Reads a recipe, applies `section.key=value` overrides, fills in defaults and checks everything.
    ///
    /// Override values are TOML; what is not TOML is taken as text. Relative paths start from the recipe's
    /// folder, those of overrides from the working directory; they come out absolute.
    ///
    /// **Errors**: every fault at once.
    pub fn load(source: &RecipeSource, overrides: &[String]) -> Result<Self, Faults> {
        let text = source.text()?;
        let name = match source {
            RecipeSource::Builtin(name) => name.clone(),
            RecipeSource::File(path) => path.display().to_string(),
        };
        Self::from_toml(&text, &name, source.folder(), overrides)
    }

    /// The recipe of an earlier run, with overrides. The model is the run's, wherever its `config.json` may be by now.
    ///
    /// **Errors**: every fault at once.
    pub fn reload(
        resolved_toml: &str,
        name: &str,
        overrides: &[String],
        model: ModelConfig,
    ) -> Result<Self, Faults> {
        let model = (!is_set(overrides, "model.config")).then_some(model);
        let text = text_to_continue(resolved_toml, overrides);
        Self::read((&text, name), Path::new(""), overrides, model)
    }

    /// The recipe of an earlier job, with overrides, as [`Recipe::submitted`]. The model is the job's.
    ///
    /// **Errors**: every fault at once.
    pub fn resubmitted(
        resolved_toml: &str,
        name: &str,
        overrides: &[String],
        model: ModelConfig,
    ) -> Result<Self, Faults> {
        let model = (!is_set(overrides, "model.config")).then_some(model);
        Self::submitted(&text_to_continue(resolved_toml, overrides), name, overrides, model)
    }

    /// As [`Recipe::load`], from a text that is called `name` in messages and is relative to `folder`.
    ///
    /// **Errors**: every fault at once.
    pub fn from_toml(text: &str, name: &str, folder: &Path, overrides: &[String]) -> Result<Self, Faults> {
        Self::read((text, name), folder, overrides, None)
    }

    /// A recipe as it is sent to another machine: its text, and the model's `config.json` where it names a file.
    ///
    /// **Errors**: every fault at once, those that [`Recipe::submitted`] would find there included.
    pub fn to_submit(source: &RecipeSource, overrides: &[String]) -> Result<(String, String), Faults> {
        let text = source.text()?;
        let mut table = RecipeTable::read(&source.name(), &text, overrides)?;
        let config = table.text("model.config");
        let model = if models::model_names().contains(&config.as_str()) {
            None
        } else {
            table.resolve_paths(source.folder());
            let model = read_model(&mut table, None);
            Some(table.faults.into_result(model)?)
        };
        Recipe::submitted(&text, &source.name(), overrides, model.clone())?;
        Ok((text, model.map_or_else(String::new, |model| model.to_hf_json())))
    }

    /// A submitted recipe: its paths stay as they are written, and must stay below the folder that they will be
    /// looked up in. Which locations of object stores may be read, workers say ([`Recipe::check_sources`]). `model` is the one that
    /// `model.config` names, if that is no built-in one.
    ///
    /// **Errors**: every fault at once.
    pub fn submitted(
        text: &str,
        name: &str,
        overrides: &[String],
        model: Option<ModelConfig>,
    ) -> Result<Self, Faults> {
        let mut table = RecipeTable::read(name, text, overrides)?;
        let config = table.text("model.config");
        let names = models::model_names();
        if model.is_none() && table.faults.spare(&["model.config"]) && !names.contains(&config.as_str()) {
            let expected =
                format!("a built-in model ({}) or its config.json with the recipe", names.join(", "));
            table.faults.expected("model.config", expected, format!("{config:?} alone"));
        }
        // Every other fault is reported with it; a stand-in for the model keeps its file from being looked for here.
        let is_known = model.is_some() || names.contains(&config.as_str());
        if !table.text("parallel.plan").is_empty() {
            let expected = "nothing: the ranks of a job make the plan of parallel.schedule by themselves; contraflow train runs one's own";
            table.fault("parallel.plan", expected);
        }
        let mut recipe = Self::finish(table, model.or_else(|| (!is_known).then(stand_in_model)), None)?;
        let mut faults = Faults::default();
        for (path, value) in recipe.paths() {
            match Location::parse(value) {
                Some(Err(fault)) => faults.push(path, fault),
                None if !is_below(value) => {
                    faults.expected(path, "a path below the workers' data root", format!("{value:?}"));
                }
                _ => {}
            }
        }
        if !recipe.checkpoint.store.is_empty() {
            let got = format!("{:?}", recipe.checkpoint.store);
            faults.expected("checkpoint.store", "nothing: a cluster has its checkpoints in its storage", got);
        }
        if !models::model_names().contains(&recipe.model.config.as_str()) {
            // The model goes with the recipe; where its file was means nothing elsewhere.
            recipe.model.config = "config.json".into();
        }
        faults.into_result(recipe)
    }

    /// Whether everything that it names in object stores may be read there.
    ///
    /// **Errors**: each key with a location that may not be.
    pub fn check_sources(&self, allowed: &Sources) -> Result<(), Faults> {
        let mut faults = Faults::default();
        for (path, value) in self.paths() {
            if let Some(Ok(location)) = Location::parse(value)
                && !allowed.allow(&location)
            {
                faults.expected(path, allowed, format!("{value:?}"));
            }
        }
        faults.into_result(())
    }

    /// A recipe that was [submitted](Recipe::submitted), with its paths below a folder of this machine.
    pub fn under(mut self, root: &Path) -> Self {
        let join = |path: &mut String| {
            if !Location::is(path) {
                *path = root.join(&*path).to_string_lossy().into_owned();
            }
        };
        self.data.paths.iter_mut().for_each(join);
        self.data.validation.iter_mut().for_each(join);
        if !self.tokenizer.path.is_empty() {
            join(&mut self.tokenizer.path);
        }
        if self.model.init_dir().is_some() {
            join(&mut self.model.init);
        }
        self
    }

    /// Whether anything is looked up in the file system where the job runs.
    pub fn names_paths(&self) -> bool {
        self.paths().iter().any(|(_, path)| !Location::is(path))
    }

    /// Every path or location that is looked up where the job runs, with its key.
    fn paths(&self) -> Vec<(&'static str, &str)> {
        let mut paths: Vec<_> = self.data.paths.iter().map(|path| ("data.paths", path.as_str())).collect();
        paths.extend(self.data.validation.iter().map(|path| ("data.validation", path.as_str())));
        if !self.tokenizer.path.is_empty() {
            paths.push(("tokenizer.path", &self.tokenizer.path));
        }
        if self.model.init_dir().is_some() {
            paths.push(("model.init", &self.model.init));
        }
        paths
    }

    fn read(
        (text, name): (&str, &str),
        folder: &Path,
        overrides: &[String],
        model: Option<ModelConfig>,
    ) -> Result<Self, Faults> {
        let mut table = RecipeTable::read(name, text, overrides)?;
        table.resolve_paths(folder);
        let own_plan = own_plan::read(&mut table);
        Self::finish(table, model, own_plan)
    }

    fn finish(
        mut table: RecipeTable,
        model: Option<ModelConfig>,
        own_plan: Option<Arc<Plan>>,
    ) -> Result<Self, Faults> {
        let model = read_model(&mut table, model);
        derive(&mut table, &model);
        let mut recipe: Recipe =
            Value::Table(table.sections()).try_into().expect("a checked table has the types of the sections");
        recipe.model_config = model;
        recipe.model_keys = table.model_keys;
        recipe.own_plan = own_plan;
        if let ScheduleKind::Interleaved(per_rank) = &mut recipe.parallel.schedule {
            *per_rank = recipe.parallel.virtual_stages;
        }
        let mut faults = table.faults;
        elastic::check(&recipe, &mut faults);
        relations::check(&recipe, &mut faults);
        faults.into_result(recipe)
    }

    /// The whole recipe with every default written out and every key explained. Loads back to the same
    /// recipe.
    pub fn resolved_toml(&self) -> String {
        let values = Value::try_from(self).expect("a recipe is numbers, texts and lists of them");
        let text = keys::document(|key| {
            let (section, name) = key.parts();
            match &values[section][name] {
                Value::Float(small) if *small != 0.0 && *small < 1e-3 => format!("{name} = {small:e}"),
                value => format!("{name} = {value}"),
            }
        });
        if self.model_keys.is_empty() {
            return text;
        }
        let set = |(key, value): (&String, &Value)| format!("{key} = {value}\n");
        let keys: String = self.model_keys.iter().map(set).collect();
        text.replacen(
            "\n[parallel]\n",
            &format!("# Keys of its config.json that are set here.\n{keys}\n[parallel]\n"),
            1,
        )
    }

    /// The axes of the run.
    pub fn topology(&self) -> Topology {
        let &ParallelSection { pipeline, expert, data, .. } = &self.parallel;
        Topology { pipeline, expert, data }
    }

    /// Every batch is a multiple of this many sequences: one micro-batch for each column of ranks and each
    /// direction.
    pub fn batch_unit(&self) -> usize {
        self.training.micro_batch_size * self.topology().dp_size() * self.directions()
    }

    /// Micro-batches that each pipeline works on in a step of `batch_size` sequences, both directions
    /// together.
    pub fn micro_batches(&self, batch_size: usize) -> usize {
        batch_size / (self.training.micro_batch_size * self.topology().dp_size())
    }

    /// Ends of the pipeline at which micro-batches enter.
    fn directions(&self) -> usize {
        let is_two_way = self.own_plan.is_none() && self.parallel.schedule == ScheduleKind::Dualpipe;
        if is_two_way { 2 } else { 1 }
    }
}

/// Whether a path cannot lead out of the folder that it is looked up in.
fn is_below(path: &str) -> bool {
    use std::path::Component;
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// The model that `model.config` names, or `base` in place of it, with the keys that the recipe sets by itself. The stand-in,
/// with the faults noted, where there is none; where single keys are wrong the rest of it is what the file says.
fn read_model(table: &mut RecipeTable, base: Option<ModelConfig>) -> ModelConfig {
    const PATH: &str = "model.config";
    if let Some(base) = &base
        && table.model_keys.is_empty()
    {
        return base.clone();
    }
    let name = table.text(PATH);
    let built_in = models::text(&name).map(str::to_owned);
    let text = match base.map(|base| base.to_hf_json()).or(built_in) {
        Some(text) => text,
        None if !table.faults.spare(&[PATH]) => return stand_in_model(),
        None => match files::read_to_string(Path::new(&name)) {
            Ok(text) => text,
            Err(error) => {
                let names = models::model_names();
                let expected = format!("a built-in model ({}) or an HF config.json", names.join(", "));
                let stem = Path::new(&name).file_stem().map_or("".into(), |stem| stem.to_string_lossy());
                let got = format!("{error}: {name}{}", suggest::for_name(&stem, &names));
                table.faults.expected(PATH, expected, got);
                return stand_in_model();
            }
        },
    };
    match ModelConfig::with_keys(&text, &json_of(&table.model_keys)) {
        Ok((model, faults)) => {
            // A key that is set here is called by the path that it was set with.
            for fault in faults.list {
                let key = fault.path.split('.').next().unwrap_or_default();
                let prefix = if table.model_keys.contains_key(key) { "model" } else { PATH };
                table.faults.push(format!("{prefix}.{}", fault.path), fault.message);
            }
            table.faults.more += faults.more;
            model
        }
        Err(faults) => {
            table.faults.adopt(PATH, faults);
            stand_in_model()
        }
    }
}

/// Values as a `config.json` has them; TOML has no null.
fn json_of(keys: &toml::Table) -> serde_json::Map<String, serde_json::Value> {
    let json = |value: &Value| match value.as_str() {
        Some("null") => serde_json::Value::Null,
        _ => serde_json::to_value(value).unwrap_or_default(),
    };
    keys.iter().map(|(key, value)| (key.clone(), json(value))).collect()
}
