//! `contraflow checkpoint verify`: reads checkpoints from beginning to end and says which are damaged.

use std::path::{Path, PathBuf};

use contraflow_runtime::checkpoint::{CheckpointFolder, MANIFEST_FILE, is_unfinished};
use contraflow_workers::checkpoint::{Checkpoint, CheckpointFaults};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{Format, count, print};
use crate::run_dir;

/// Arguments of `contraflow checkpoint`.
#[derive(clap::Args, Debug)]
pub struct CheckpointArgs {
    #[command(subcommand)]
    command: CheckpointCommand,
}

#[derive(clap::Subcommand, Debug)]
enum CheckpointCommand {
    /// Check every checkpoint of a run or job: sizes, checksums, and that no part of a tensor is missing
    Verify(Verify),
}

#[derive(clap::Args, Debug)]
struct Verify {
    /// A run, a job, or the folder of a run, of a job or of one checkpoint
    #[arg(value_name = "RUN|JOB|DIR")]
    name: String,
    /// The cluster's storage, where jobs are looked up
    #[arg(long, value_name = "DIR")]
    storage: Option<PathBuf>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Runs the command.
///
/// **Errors**: code 2 if there is no checkpoint of that name; code 1 if one is damaged or cannot be read.
pub fn run(args: &CheckpointArgs) -> Result<(), Failure> {
    let CheckpointCommand::Verify(Verify { name, storage, format }) = &args.command;
    let found = find(name, storage.as_deref())?;
    let mut num_damaged = 0;
    for dir in &found {
        let checked = Checkpoint::open(dir);
        num_damaged += usize::from(checked.is_err());
        print(&match format {
            Format::Text => line(dir, &checked),
            Format::Json => format!("{}\n", record(dir, &checked)),
        })?;
    }
    match num_damaged {
        0 => Ok(()),
        _ => Err(Failure::run(format!("{num_damaged} of {} checkpoints damaged", found.len()))),
    }
}

type Checked = Result<Checkpoint, CheckpointFaults>;

/// **Units**: number of shards, bytes of all of them.
fn size(checkpoint: &Checkpoint) -> (usize, u64) {
    let shards = &checkpoint.manifest.shards;
    (shards.len(), shards.iter().map(|shard| shard.bytes).sum())
}

fn line(dir: &Path, checked: &Checked) -> String {
    let dir = dir.display();
    match checked {
        Ok(checkpoint) => {
            let (shards, bytes) = size(checkpoint);
            format!("{dir}: whole, {}, {:.1} MB\n", count(shards, "shard"), bytes as f64 / 1e6)
        }
        Err(faults) => format!("{dir}: damaged: {}\n", faults.to_string().replace('\n', "; ")),
    }
}

fn record(dir: &Path, checked: &Checked) -> serde_json::Value {
    let dir = dir.display().to_string();
    match checked {
        Ok(checkpoint) => {
            let (shards, bytes) = size(checkpoint);
            let step = checkpoint.manifest.position.step;
            json!({"checkpoint": dir, "whole": true, "step": step, "shards": shards, "bytes": bytes, "faults": []})
        }
        Err(CheckpointFaults(faults)) => {
            let faults = faults.iter().map(|fault| json!({"path": fault.path, "message": fault.message}));
            json!({"checkpoint": dir, "whole": false, "faults": faults.collect::<Vec<_>>()})
        }
    }
}

/// The folders of the checkpoints that a name refers to, ascending.
fn find(name: &str, storage: Option<&Path>) -> Result<Vec<PathBuf>, Failure> {
    let direct = PathBuf::from(name);
    if direct.join(MANIFEST_FILE).exists() || is_unfinished(&direct) || is_step(&direct) {
        return Ok(vec![direct]);
    }
    let mut tried = vec![direct, Path::new(run_dir::RUNS).join(name)];
    if let Some(jobs) = storage.map(|storage| storage.join("jobs")) {
        tried.extend([jobs.join(name), jobs.join(format!("job-{name}"))]);
    }
    for run in &tried {
        let folder = CheckpointFolder::of_run(run);
        let steps =
            folder.list().map_err(|error| Failure::input(format!("{}: {error}", folder.path().display())))?;
        if !steps.is_empty() {
            return Ok(steps.into_iter().map(|step| folder.committed(step)).collect());
        }
    }
    let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
    let hint = if storage.is_none() { "; --storage DIR looks jobs up" } else { "" };
    Err(Failure::input(format!(
        "{name}: expected a run or a job with a committed checkpoint; looked in {}{hint}",
        tried.join(", ")
    )))
}

/// Whether a folder that is there has the name of a committed checkpoint.
fn is_step(dir: &Path) -> bool {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let digits = name.strip_prefix("step-");
    dir.is_dir() && digits.is_some_and(|digits| digits.parse::<u64>().is_ok())
}
