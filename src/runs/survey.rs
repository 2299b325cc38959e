//! What one run is, as its folder shows it: how far it has come, in which state it is, what it takes of the disk. Reads; starts
//! and changes nothing.

use std::fmt;
use std::iter::Sum;
use std::path::Path;
use std::time::SystemTime;

pub use contraflow_orchestrator::metrics::record::StepRecord as Record;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::files;
use contraflow_runtime::stability::evidence::EVIDENCE_FILE;
use serde::Serialize;
use serde_json::{Value, json};

use crate::run_dir::{self, METRICS};

/// In which state a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// A process is at work in it.
    Training,
    /// It has made all its steps.
    Done,
    /// It has not, and can be resumed.
    Stopped,
    /// It has ended without a checkpoint, so that nothing of it can be used.
    Failed,
    /// A model that was trained elsewhere.
    Imported,
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RunState::Training => "training",
            RunState::Done => "done",
            RunState::Stopped => "stopped",
            RunState::Failed => "failed",
            RunState::Imported => "imported",
        })
    }
}

/// What the files of a run take. **Units**: bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Checkpoints, unfinished and damaged ones included.
    pub checkpoints: u64,
    /// The weights that it has ended with.
    pub model: u64,
    /// Metrics, recipe, plan, summary.
    pub rest: u64,
}

impl Disk {
    /// Of a run's folder. What cannot be read is not counted.
    pub fn of(run: &Path) -> Self {
        let checkpoints = bytes_below(CheckpointFolder::of_run(run).path());
        let model = bytes_below(&run.join("model"));
        Disk { checkpoints, model, rest: bytes_below(run).saturating_sub(checkpoints + model) }
    }

    /// All of it.
    pub fn all(&self) -> u64 {
        self.checkpoints + self.model + self.rest
    }
}

impl Sum for Disk {
    fn sum<I: Iterator<Item = Disk>>(disks: I) -> Disk {
        disks.fold(Disk::default(), |sum, disk| Disk {
            checkpoints: sum.checkpoints + disk.checkpoints,
            model: sum.model + disk.model,
            rest: sum.rest + disk.rest,
        })
    }
}

/// Sizes of all files in a folder; links are not followed.
fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes_of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(bytes_of).sum()
}

/// A run.
pub struct Survey {
    /// Name of its folder.
    pub name: String,
    /// See [`RunState`].
    pub state: RunState,
    /// Optimizer updates that are on record.
    pub step: u64,
    /// Those that its recipe asks for.
    pub steps: Option<u64>,
    /// Loss of the latest step, in nats per token.
    pub loss: Option<f64>,
    /// Every step.
    pub records: Vec<Record>,
    /// summary.json, of a run that is done; else null.
    pub summary: Value,
    /// The recipe, as it stands in the folder.
    pub recipe: toml::Table,
    /// What it takes of the disk.
    pub disk: Disk,
    /// When it last made something.
    pub changed: SystemTime,
    /// Whether it has left evidence of numbers that were not finite.
    pub has_evidence: bool,
}

impl Survey {
    /// Of a run's folder. What it does not have, or what cannot be read, is left out.
    pub fn of(run: &Path) -> Self {
        let records = run_dir::records(&run.join(METRICS)).unwrap_or_default();
        let text = |file: &str| files::read_to_string(&run.join(file)).unwrap_or_default();
        let recipe: toml::Table = text("recipe.toml").parse().unwrap_or_default();
        let steps = recipe.get("training").and_then(|training| training.get("steps")?.as_integer());
        let summary: Value = serde_json::from_str(&text("summary.json")).unwrap_or_default();
        Survey {
            name: run_dir::name_of(run),
            state: state(run, !recipe.is_empty(), !summary.is_null()),
            step: records.last().map_or(0, |record| record.step),
            steps: steps.and_then(|steps| u64::try_from(steps).ok()),
            loss: records.last().map(|record| record.loss).filter(|loss| loss.is_finite()),
            records,
            summary,
            recipe,
            disk: Disk::of(run),
            changed: run_dir::last_change(run),
            has_evidence: run.join(EVIDENCE_FILE).is_file(),
        }
    }

    /// Of records alone, such as those of a job that somebody has watched.
    pub fn of_records(name: String, records: Vec<Record>) -> Self {
        Survey {
            name,
            state: RunState::Stopped,
            step: records.last().map_or(0, |record| record.step),
            steps: None,
            loss: records.last().map(|record| record.loss).filter(|loss| loss.is_finite()),
            records,
            summary: Value::Null,
            recipe: toml::Table::new(),
            disk: Disk::default(),
            changed: SystemTime::UNIX_EPOCH,
            has_evidence: false,
        }
    }

    /// Its latest validation loss, in nats per token.
    pub fn validation(&self) -> Option<f64> {
        let while_training = || self.records.iter().rev().find_map(|record| record.validation_loss);
        self.summary["validation_loss"].as_f64().or_else(while_training)
    }

    /// Its lowest validation loss, in nats per token, and after which step that was.
    pub fn best_validation(&self) -> Option<(f64, u64)> {
        self.validations().into_iter().map(|(step, loss)| (loss, step)).min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Every validation loss, in nats per token, with the step after which it was measured.
    pub fn validations(&self) -> Vec<(u64, f64)> {
        let measured = |record: &Record| Some((record.step.saturating_sub(1), record.validation_loss?));
        let mut all: Vec<(u64, f64)> = self.records.iter().filter_map(measured).collect();
        all.extend(self.summary["validation_loss"].as_f64().map(|loss| (self.step, loss)));
        all
    }

    /// `34/720`.
    pub fn steps_text(&self) -> String {
        self.steps.map_or_else(String::new, |steps| format!("{}/{steps}", self.step))
    }

    /// Since it last made something. **Units**: seconds.
    pub fn seconds_ago(&self) -> u64 {
        SystemTime::now().duration_since(self.changed).map_or(0, |past| past.as_secs())
    }

    /// A run of the list, for programs.
    pub fn json(&self) -> Value {
        json!({
            "run": self.name, "state": self.state.to_string(), "step": self.step, "steps": self.steps, "loss": self.loss,
            "validation_loss": self.validation(), "bytes": self.disk.all(), "seconds_ago": self.seconds_ago(),
            "has_evidence": self.has_evidence,
        })
    }
}

fn state(run: &Path, has_recipe: bool, has_summary: bool) -> RunState {
    let checkpoints = || CheckpointFolder::of_run(run).list().unwrap_or_default();
    let has_model = run.join("model/config.json").is_file();
    if run_dir::is_in_use(run) {
        RunState::Training
    } else if has_summary {
        RunState::Done
    } else if has_model && !has_recipe {
        RunState::Imported
    } else if !checkpoints().is_empty() {
        RunState::Stopped
    } else {
        RunState::Failed
    }
}

/// A time in its largest unit: `3 h`. **Units**: seconds.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_what_its_folder_shows() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let write = |file: &str, text: &str| {
            let path = run.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("recipe.toml", "[training]\nsteps = 7\n");
        let record = |step, loss, validation_loss| {
            let record = Record { step, loss, validation_loss, ..Record::default() };
            serde_json::to_string(&record).unwrap() + "\n"
        };
        write(METRICS, &(record(1, 3.0, None) + &record(2, 2.5, Some(2.75)) + "{\"step\":3,"));
        let survey = Survey::of(&run);
        assert_eq!(
            (survey.state, survey.steps_text(), survey.loss),
            (RunState::Failed, "2/7".into(), Some(2.5))
        );
        // It was measured before the second update.
        assert_eq!((survey.validations(), survey.best_validation()), (vec![(1, 2.75)], Some((2.75, 1))));

        write("checkpoints/step-00000002/manifest.json", "12345");
        assert_eq!(Survey::of(&run).state, RunState::Stopped);
        write("model/config.json", "123");
        write("summary.json", r#"{"validation_loss": 2.25}"#);
        let survey = Survey::of(&run);
        assert_eq!((survey.state, survey.validation()), (RunState::Done, Some(2.25)));
        assert_eq!(survey.best_validation(), Some((2.25, 2)));
        assert_eq!((survey.disk.checkpoints, survey.disk.model), (5, 3));
        let files =
            ["recipe.toml", METRICS, "summary.json"].map(|file| run.join(file).metadata().unwrap().len());
        assert_eq!(survey.disk.rest, files.iter().sum::<u64>());

        let lock = run_dir::lock(&run).unwrap();
        assert_eq!(Survey::of(&run).state, RunState::Training);
        drop(lock);
        assert_eq!(Survey::of(&run).state, RunState::Done);
    }

    #[test]
    fn a_model_without_a_recipe_is_an_imported_one() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("model")).unwrap();
        std::fs::write(root.path().join("model/config.json"), "{}").unwrap();
        assert_eq!(Survey::of(root.path()).state, RunState::Imported);
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let cases = [(59, "59 s"), (60, "1 min"), (7_199, "1 h"), (172_799, "47 h"), (172_800, "2 d")];
        for (seconds, words) in cases {
            assert_eq!(age(seconds), words);
        }
    }
}
