//! Arms of a study: what is changed, trained once a seed, and kept as a file. Knows no question.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use contraflow_kernels::isa::instruction_set;
use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use contraflow_runtime::files::write_synced;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::data::batches::{Datasets, validation_index};
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::data::{Corpus, PackedDataset};
use contraflow_workers::infer::evaluate::Acceptance;
use contraflow_workers::infer::generate::Generator;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Runs, StudyArgs};
use crate::bench::{QuietRun, cpu_seconds};
use crate::failure::Failure;
use crate::output::say;

/// A way to train, and what the default recipe is changed by for it.
pub(in crate::bench) struct Arm {
    /// Part of the file's name.
    pub(in crate::bench) name: &'static str,
    /// Keys of the recipe.
    pub(in crate::bench) overrides: &'static [&'static str],
}

/// Arms that are compared.
pub(in crate::bench) struct Study {
    /// Folder within the results.
    pub(in crate::bench) name: &'static str,
    /// Of each training run, unless asked for others.
    pub(in crate::bench) steps: u64,
    /// The first is what the others are compared with.
    pub(in crate::bench) arms: &'static [Arm],
}

/// What a training run came to: the file of an arm and a seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::bench) struct TrainingRun {
    pub(in crate::bench) overrides: Vec<String>,
    /// What the bits depend on.
    instruction_set: String,
    seconds: f64,
    /// Of all threads.
    pub(in crate::bench) cpu_seconds: f64,
    /// At the end. **Units**: nats per token.
    pub(in crate::bench) validation_loss: f64,
    /// What multi-token prediction proposes on the validation's sequences, where the model has it.
    pub(in crate::bench) acceptance: Option<Acceptance>,
    /// Step by step. **Units**: nats per token.
    pub(in crate::bench) loss: Vec<f64>,
    /// Step by step, mean over the layers.
    pub(in crate::bench) max_vio: Vec<f64>,
}

/// Sequences on which the proposals of multi-token prediction are counted.
const PROPOSED_ON: usize = 32;

impl Study {
    /// How many steps each training run has.
    pub(in crate::bench) fn steps(&self, args: &StudyArgs) -> u64 {
        args.steps.unwrap_or(self.steps)
    }

    /// The runs that are there, and up to `at_most` more. Arms of one seed follow one another, so that an interrupted study can
    /// compare some.
    ///
    /// **Errors**: code 2 with every file that holds another run than the study asks for; code 1 if a run fails.
    pub(in crate::bench) fn run(&self, args: &StudyArgs) -> Result<Runs, Failure> {
        let folder = args.results.join(self.name);
        std::fs::create_dir_all(&folder).map_err(|error| file_failure(&folder, error))?;
        let mut by_arm: Vec<Vec<Option<TrainingRun>>> = Vec::new();
        let mut faults = Vec::new();
        for arm in self.arms {
            let known = (1..=args.seeds).map(|seed| {
                read(&file(&folder, arm, seed), &self.overrides(arm, args, seed)).unwrap_or_else(|fault| {
                    faults.push(fault);
                    None
                })
            });
            by_arm.push(known.collect());
        }
        if !faults.is_empty() {
            return Err(Failure::faults("--results", &faults));
        }
        let corpus = Corpus::load_default();
        let mut left = args.at_most.unwrap_or(usize::MAX);
        for seed in 1..=args.seeds {
            for (arm, runs) in self.arms.iter().zip(&mut by_arm) {
                let run = &mut runs[seed as usize - 1];
                if run.is_some() || left == 0 {
                    continue;
                }
                left -= 1;
                say(format_args!("{}: {}, seed {seed}", self.name, arm.name));
                let model = folder.join(format!(".model-{}", std::process::id()));
                let trained = train(&corpus, &self.overrides(arm, args, seed), &model);
                // No longer needed; if it cannot be removed, its name says what it is.
                drop(std::fs::remove_dir_all(&model));
                let trained = trained?;
                write(&file(&folder, arm, seed), &trained)?;
                *run = Some(trained);
            }
        }
        Ok(Runs { by_arm })
    }

    fn overrides(&self, arm: &Arm, args: &StudyArgs, seed: u64) -> Vec<String> {
        let of_run = [format!("training.steps={}", self.steps(args)), format!("training.seed={seed}")];
        of_run.into_iter().chain(arm.overrides.iter().map(|&text| text.to_owned())).collect()
    }
}

fn file(folder: &Path, arm: &Arm, seed: u64) -> PathBuf {
    folder.join(format!("{}-{seed}.json", arm.name))
}

/// **Errors**: the file holds something else than such a run.
fn read(path: &Path, overrides: &[String]) -> Result<Option<TrainingRun>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let run: TrainingRun = serde_json::from_str(&text)
        .map_err(|error| format!("{}: expected a run of a study, got: {error}", path.display()))?;
    if run.overrides != overrides {
        let (expected, got) = (overrides.join(" "), run.overrides.join(" "));
        return Err(format!(
            "{}: expected a run with {expected}, got one with {got}; another folder keeps both",
            path.display()
        ));
    }
    Ok(Some(run))
}

fn write(path: &Path, run: &TrainingRun) -> Result<(), Failure> {
    let text = serde_json::to_string(run).map_err(|error| Failure::run(error.to_string()))?;
    write_synced(path, (text + "\n").as_bytes()).map_err(|error| file_failure(path, error))
}

fn file_failure(path: &Path, error: std::io::Error) -> Failure {
    Failure::input(format!("{}: {error}", path.display()))
}

/// **Errors**: code 2 with what is wrong in the changes.
fn recipe(overrides: &[String]) -> Result<Recipe, Failure> {
    Ok(Recipe::load(&RecipeSource::Builtin("tiny".to_owned()), overrides)?)
}

/// Trains; `model_dir` is for the weights, which are read again at the end.
fn train(corpus: &Corpus, overrides: &[String], model_dir: &Path) -> Result<TrainingRun, Failure> {
    let recipe = recipe(overrides)?;
    let length = recipe.training.sequence_length;
    let datasets = Datasets {
        train: PackedDataset::pack(&corpus.train, length),
        validation: PackedDataset::pack(&corpus.validation, length),
    };
    let proposed_on = some_of(&datasets.validation);
    let has_mtp = recipe.model_config.mtp_layer().is_some();
    let records: Arc<Mutex<Vec<StepRecord>>> = Arc::default();
    let kept = records.clone();
    let subscriber = Box::new(move |record: &StepRecord| kept.lock().push(record.clone()));
    std::fs::create_dir_all(model_dir).map_err(|error| file_failure(model_dir, error))?;
    let (began, cpu_before) = (Instant::now(), cpu_seconds());
    let export_dir = Some(model_dir.to_owned());
    let run = QuietRun { recipe, datasets, checkpoints: None, export_dir, subscriber };
    let (validation, _) = run.run()?;
    let (seconds, cpu_seconds) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu_before);
    let acceptance = has_mtp.then(|| {
        let generator = Generator::load(model_dir).map_err(|error| Failure::run(error.to_string()))?;
        Ok::<_, Failure>(generator.acceptance(proposed_on))
    });
    let records = std::mem::take(&mut *records.lock());
    // Six decimals: a hundredth of what a run differs from another by in its order of sums.
    let rounded = |value: f64| (value * 1e6).round() / 1e6;
    Ok(TrainingRun {
        overrides: overrides.to_vec(),
        instruction_set: instruction_set(),
        seconds: rounded(seconds),
        cpu_seconds: rounded(cpu_seconds),
        validation_loss: validation.ok_or_else(|| Failure::run("expected a validation, got none"))?,
        acceptance: acceptance.transpose()?,
        loss: records.iter().map(|record| rounded(record.loss)).collect(),
        max_vio: records.iter().map(|record| rounded(mean_max_vio(record))).collect(),
    })
}

/// A few validation sequences, evenly spread.
fn some_of(validation: &PackedDataset) -> Sequences {
    let available = validation.num_sequences();
    let taken = PROPOSED_ON.min(available);
    let rows = (0..taken).map(|place| validation.sequence(validation_index(place, taken, available)));
    let (ids, targets): (Vec<_>, Vec<_>) = rows.unzip();
    Sequences::new(ids.concat(), targets.concat(), validation.sequence_length())
}

#[cfg(test)]
mod tests {
    use super::super::super::{balance, mtp, precision};
    use super::*;

    #[test]
    fn every_arm_is_a_recipe_of_its_own() {
        for study in [balance::STUDY, mtp::STUDY, precision::STUDY] {
            let args = StudyArgs { steps: None, seeds: 1, results: PathBuf::new(), at_most: None };
            let mut recipes: Vec<String> = Vec::new();
            for arm in study.arms {
                let recipe = recipe(&study.overrides(arm, &args, 1));
                let recipe = recipe.unwrap_or_else(|fault| panic!("{}, {}: {fault:?}", study.name, arm.name));
                recipes.push(recipe.resolved_toml());
            }
            assert!(recipes.len() > 1);
            for (at, recipe) in recipes.iter().enumerate() {
                assert!(!recipes[..at].contains(recipe), "{}: {}", study.name, study.arms[at].name);
            }
        }
    }
}
