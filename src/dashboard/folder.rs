//! A history from the folder of a run. It is read beside the server, so that a page is there at once and fills up; of a run that another
//! process trains, new lines are taken in as they come.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::files;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::text;
use serde_json::Value;

use super::shown::{Facts, Phase, Shown, planned_ranks};
use crate::progress::loads;
use crate::run_dir::{self, METRICS};

/// How often new lines are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// Lines that are taken in at once.
const BATCH: usize = 1_000;

/// What a folder says of its run, without its steps.
pub fn facts(run: &Path) -> Facts {
    let name = run_dir::name_of(run);
    let recipe = Recipe::load(&RecipeSource::File(run.join("recipe.toml")), &[]).ok().map(Arc::new);
    let plan = files::read_to_string(&run.join("plan.txt")).ok().and_then(|plan| text::parse(&plan).ok());
    Facts {
        id: name.clone(),
        name,
        folder: Some(run.to_owned()),
        steps: recipe.as_ref().map(|recipe| recipe.training.steps as u64),
        planned_ranks: recipe.as_ref().map(|recipe| planned_ranks(recipe)).unwrap_or_default(),
        recipe,
        plan,
        is_local: false,
    }
}

/// Steps of which a run's folder has checkpoints.
pub fn checkpoints(run: Option<&Path>) -> Vec<u64> {
    run.and_then(|run| CheckpointFolder::of_run(run).list().ok()).unwrap_or_default()
}

/// A run as its folder shows it. Its steps are read by a thread that ends when nobody shows the run any more.
///
/// **Errors**: the system gives no thread.
pub fn of_folder(run: &Path) -> std::io::Result<Arc<Shown>> {
    let shown = Shown::new(facts(run), Phase::Loading);
    let (run, weak) = (run.to_owned(), Arc::downgrade(&shown));
    std::thread::Builder::new().name("dashboard-read".into()).spawn(move || {
        let mut lines = Lines::default();
        while let Some(shown) = weak.upgrade() {
            lines.read(&run, &shown);
            let phase = phase(&run);
            if shown.read(|state| state.phase) != phase {
                annotate(&run, &shown);
                shown.change(|state| state.phase = phase);
            }
            drop(shown);
            std::thread::sleep(LOOK);
        }
    })?;
    Ok(shown)
}

fn phase(run: &Path) -> Phase {
    if run_dir::is_in_use(run) {
        Phase::Training
    } else if run.join("summary.json").is_file() {
        Phase::Done
    } else if CheckpointFolder::of_run(run).list().is_ok_and(|steps| !steps.is_empty()) {
        Phase::Stopped
    } else {
        Phase::Failed
    }
}

/// What the folder shows beside the steps: loads of experts, how it ended.
fn annotate(run: &Path, shown: &Shown) {
    let sampled = loads::read(run);
    let summary = files::read_to_string(&run.join("summary.json")).unwrap_or_default();
    let summary: Value = serde_json::from_str(&summary).unwrap_or_default();
    shown.change(|state| {
        let history = &mut state.history;
        sampled.iter().for_each(|line| history.put_loads(line.step, &line.loads));
        if let Some(loss) = summary["validation_loss"].as_f64() {
            let last = history.points().last().map_or(0, |last| last.step);
            history.annotate(last, "end", format!("validation loss {loss:.4} nats/token at the end"));
        }
    });
}

/// How far a file of metrics has been read.
#[derive(Default)]
struct Lines {
    read: u64,
}

impl Lines {
    /// Takes in what is new. A line that has no end yet is left for the next time.
    fn read(&mut self, run: &Path, shown: &Shown) {
        let Ok(mut file) = File::open(run.join(METRICS)) else { return };
        let Ok(length) = file.metadata().map(|metadata| metadata.len()) else { return };
        if length < self.read {
            // It was written anew, with fewer steps: what comes again replaces what there is.
            self.read = 0;
        }
        if length == self.read || file.seek(SeekFrom::Start(self.read)).is_err() {
            return;
        }
        let mut reader = BufReader::new(file).take(length - self.read);
        let (mut batch, mut line) = (Vec::new(), Vec::new());
        loop {
            line.clear();
            let is_whole = reader.read_until(b'\n', &mut line).is_ok() && line.ends_with(b"\n");
            if is_whole {
                self.read += line.len() as u64;
                batch.extend(serde_json::from_slice::<StepRecord>(&line).ok());
            }
            if batch.len() == BATCH || (!is_whole && !batch.is_empty()) {
                let records = std::mem::take(&mut batch);
                shown.change(|state| records.iter().for_each(|record| state.history.push(record, None)));
            }
            if !is_whole {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> String {
        serde_json::to_string(&StepRecord { step, loss: 2.0, ..StepRecord::default() }).unwrap() + "\n"
    }

    #[test]
    fn lines_are_taken_in_once_as_they_come_and_anew_where_the_run_went_back() {
        let run = tempfile::tempdir().unwrap();
        let shown = Shown::new(facts(run.path()), Phase::Loading);
        let mut lines = Lines::default();
        let mut steps = |text: &str| {
            std::fs::write(run.path().join(METRICS), text).unwrap();
            lines.read(run.path(), &shown);
            shown.read(|state| state.history.points().iter().map(|point| point.step).collect::<Vec<_>>())
        };
        let cut_off = line(3);
        let (half, _) = cut_off.split_at(cut_off.len() / 2);
        assert_eq!(steps(&(line(1) + &line(2) + half)), [1, 2]);
        assert_eq!(steps(&(line(1) + &line(2) + &line(3))), [1, 2, 3]);
        assert_eq!(steps(&(line(1) + &line(2) + &line(3))), [1, 2, 3]);
        assert_eq!(steps(&line(1)), [1]);
    }
}
