//! A run that is shown: what does not change about it, and its history, which a writer adds to and any number of viewers read.
//!
//! Knows no page. The writer never waits for a viewer: the lock is held for as long as it takes to copy a step in, or to make one
//! answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::layout::{recipe_figures, resident_bytes};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Plan, RankFigures};
use contraflow_workers::engine::timelines::Timelines;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::history::History;

/// What does not change about a run while it is shown.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What it is called in addresses.
    pub id: String,
    /// What it is called on pages.
    pub name: String,
    /// Its folder, where it has one.
    pub folder: Option<PathBuf>,
    /// Steps of its recipe.
    pub steps: Option<u64>,
    /// Its recipe, where it is known and sound.
    pub recipe: Option<Arc<Recipe>>,
    /// The plan of a full batch.
    pub plan: Option<Plan>,
    /// By place in the pipeline, what `contraflow plan` says that a rank needs; empty where that is not known. **Units**: bytes.
    pub planned_ranks: Vec<u64>,
    /// Whether memory is that of this process, which hosts all of its ranks.
    pub is_local: bool,
}

impl Facts {
    /// Of a run whose ranks are all in this process.
    pub fn of_local(folder: &Path, recipe: Arc<Recipe>, plan: Plan) -> Self {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Facts {
            id: name.clone(),
            name,
            folder: Some(folder.to_owned()),
            steps: Some(recipe.training.steps as u64),
            planned_ranks: planned_ranks(&recipe),
            recipe: Some(recipe),
            plan: Some(plan),
            is_local: true,
        }
    }

    /// What its ranks need together. **Units**: bytes.
    pub fn planned_memory(&self) -> Option<u64> {
        planned_memory(self.recipe.as_ref()?, &self.planned_ranks)
    }
}

/// What a rank at each place in the pipeline needs; empty where the plan makes no sense. **Units**: bytes.
pub fn planned_ranks(recipe: &Recipe) -> Vec<u64> {
    recipe_figures(recipe)
        .map_or_else(|_| Vec::new(), |figures| figures.iter().map(RankFigures::bytes).collect())
}

/// What all ranks of a recipe need together, by what those of each place need. **Units**: bytes.
pub fn planned_memory(recipe: &Recipe, ranks: &[u64]) -> Option<u64> {
    (!ranks.is_empty()).then(|| recipe.topology().dp_size() as u64 * ranks.iter().sum::<u64>())
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its steps are being read.
    #[default]
    Loading,
    /// It waits.
    Queued,
    /// Its ranks are being brought up.
    Starting,
    /// It makes steps.
    Training,
    /// It has made all of them.
    Done,
    /// It has not, and can be resumed.
    Stopped,
    /// It has come to nothing.
    Failed,
}

/// What changes.
#[derive(Default)]
pub struct State {
    /// See [`Phase`].
    pub phase: Phase,
    /// Why it has ended, or what it waits for.
    pub outcome: String,
    /// Its steps.
    pub history: History,
    /// What its ranks record of their last steps, where they are in this process.
    pub timelines: Option<Timelines>,
}

/// A run that is shown.
pub struct Shown {
    /// What does not change.
    pub facts: Facts,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

impl Shown {
    /// A run without steps.
    pub fn new(facts: Facts, phase: Phase) -> Arc<Self> {
        let state = Mutex::new(State { phase, ..State::default() });
        Arc::new(Shown { facts, state, changes: watch::Sender::new(0) })
    }

    /// A run in this process that has made no step.
    pub fn starting(facts: Facts) -> Arc<Self> {
        Shown::new(facts, Phase::Starting)
    }

    /// Takes a step in, with the memory that this process has in use.
    pub fn step(&self, record: &StepRecord) {
        let memory = self.facts.is_local.then(resident_bytes).flatten();
        self.change(|state| {
            state.phase = Phase::Training;
            state.history.push(record, memory);
        });
    }

    /// Takes in the steps that were made before this process began.
    pub fn made_before(&self, records: &[StepRecord]) {
        let Some(last) = records.last() else { return };
        self.change(|state| {
            records.iter().for_each(|record| state.history.push(record, None));
            state.history.annotate(last.step, "resume", format!("resumed after step {}", last.step));
        });
    }

    /// The ranks have ended, as it stands in `words`.
    pub fn end(&self, phase: Phase, words: String) {
        self.change(|state| {
            let kind = if matches!(phase, Phase::Failed | Phase::Starting) { "failure" } else { "end" };
            let last = state.history.points().last().map_or(0, |last| last.step);
            state.history.annotate(last, kind, words.clone());
            (state.phase, state.outcome) = (phase, words);
        });
    }

    /// Changes something, and tells whoever looks.
    pub fn change(&self, how: impl FnOnce(&mut State)) {
        how(&mut self.state.lock());
        self.changes.send_modify(|count| *count += 1);
    }

    /// Reads something.
    pub fn read<T>(&self, what: impl FnOnce(&State) -> T) -> T {
        what(&self.state.lock())
    }

    /// Counts changes, for whoever waits for the next one.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_there_when_viewers_hear_of_it_and_memory_is_this_processs() {
        let shown = Shown::starting(Facts { is_local: true, ..Facts::default() });
        let mut changes = shown.changes();
        assert!(!changes.has_changed().unwrap());
        shown.step(&StepRecord { step: 1, loss: 2.0, ..StepRecord::default() });
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let (phase, memory) = shown.read(|state| (state.phase, state.history.peak_memory()));
        assert_eq!(phase, Phase::Training);
        assert!(memory > 1 << 20, "{memory}");
    }
}
