//! `contraflow bench checkpoint`: what a step loses while the checkpoint before it is being written, and the memory that
//! takes.
//!
//! Every other step is followed by a checkpoint, so that steps with and without one alternate in one run.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use contraflow_orchestrator::job_actor::Commits;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::cost;
use contraflow_workers::checkpoint::provenance::{companions, manifest};
use contraflow_workers::data::Tokenizer;
use parking_lot::Mutex;
use serde::Serialize;

use super::{QuietRun, benchmark};
use crate::failure::Failure;
use crate::run_dir;

/// Steps before the first that is measured.
const WARM_UP: usize = 2;

/// What checkpoints cost.
#[derive(Debug, Serialize)]
pub(super) struct CheckpointCost {
    model: String,
    threads: usize,
    saves: usize,
    checkpoint_bytes: u64,
    parameters: u64,
    /// Medians.
    step_alone_s: f64,
    step_beside_checkpoint_s: f64,
    /// Share of a step that one beside a checkpoint loses.
    stall: f64,
    peak_memory_before_bytes: u64,
    extra_memory_bytes: u64,
}

/// Measures them.
///
/// **Errors**: code 2 for a model that is not built in; code 1 if the run fails.
pub(super) fn run(model: &str, threads: usize, saves: usize) -> Result<CheckpointCost, Failure> {
    let steps = WARM_UP + 2 * saves;
    let (mut recipe, datasets) = benchmark(model, threads, steps, &[])?;
    recipe.checkpoint.every = 2;
    recipe.checkpoint.keep = 1;
    let parameters = cost::parameters(&recipe.model_config);
    let dir = Path::new(run_dir::RUNS).join(format!(".bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|error| Failure::run(format!("{}: {error}", dir.display())))?;
    let folder = CheckpointFolder::of_run(&dir);
    let commits = Commits {
        folder: folder.clone(),
        keep: recipe.checkpoint.keep,
        manifest: manifest(&recipe, "").map_err(|error| Failure::run(error.to_string()))?,
        companions: companions(&recipe, &Tokenizer::Bytes),
    };
    let marks: Arc<Mutex<Vec<(Instant, u64)>>> = Arc::default();
    let shared = marks.clone();
    let note = move |_: &_| shared.lock().push((Instant::now(), peak_memory()));
    let subscriber = Box::new(note);
    let outcome =
        QuietRun { recipe, datasets, checkpoints: Some(commits), export_dir: None, subscriber }.run();
    let written =
        folder.list().ok().and_then(|steps| steps.last().map(|&step| size(&folder.committed(step))));
    // No longer needed; if it cannot be removed, its name says what it is.
    drop(std::fs::remove_dir_all(&dir));
    outcome?;
    let marks = marks.lock();
    let seconds: Vec<f64> = marks.windows(2).map(|pair| (pair[1].0 - pair[0].0).as_secs_f64()).collect();
    // Step WARM_UP is followed by the first save, so the first measured step has one beside it, the second has none.
    let measured = &seconds[WARM_UP - 1..];
    let (beside, alone) = (median(measured.iter().step_by(2)), median(measured.iter().skip(1).step_by(2)));
    let extra = marks[marks.len() - 1].1.saturating_sub(marks[WARM_UP - 1].1);
    Ok(CheckpointCost {
        model: model.to_owned(),
        threads,
        saves,
        checkpoint_bytes: written.unwrap_or(0),
        parameters: parameters.total + parameters.mtp,
        step_alone_s: alone,
        step_beside_checkpoint_s: beside,
        stall: beside / alone - 1.0,
        peak_memory_before_bytes: marks[WARM_UP - 1].1,
        extra_memory_bytes: extra,
    })
}

impl fmt::Display for CheckpointCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {} thread(s), one rank, {} checkpoints of {:.2} GiB ({:.1} M parameters with two moments)",
            self.model,
            self.threads,
            self.saves,
            gib(self.checkpoint_bytes),
            self.parameters as f64 / 1e6
        )?;
        writeln!(
            f,
            "step alone {:.3} s, beside a checkpoint {:.3} s: stall {:.1}% of that step, {:.2}% with one every 100 steps",
            self.step_alone_s,
            self.step_beside_checkpoint_s,
            100.0 * self.stall,
            self.stall
        )?;
        writeln!(
            f,
            "peak memory {:.2} GiB before the first checkpoint, {:.2} GiB more with them",
            gib(self.peak_memory_before_bytes),
            gib(self.extra_memory_bytes)
        )
    }
}

fn median<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    let mut values: Vec<f64> = values.copied().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

/// Bytes of the files in a folder.
fn size(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Peak memory of this process, in bytes; 0 if unknown.
pub(super) fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}
