//! `contraflow runs`: the runs of this folder as things: listed, compared, measured, removed. What is read of one is in
//! `survey`, its curves are drawn by `plot`, what is wrong with one says `doctor`.

mod compare;
pub(crate) mod curves;
pub mod doctor;
mod page;
pub mod plot;
mod survey;
pub(crate) mod svg;

use std::path::{Path, PathBuf};

use contraflow_runtime::schedule::size;
use serde_json::json;

use self::survey::{Disk, Survey};
use crate::failure::Failure;
use crate::output::{Format, count, print, quoted, table};
use crate::run_dir::{self, RUNS};

/// Arguments of `contraflow runs`.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct RunsArgs {
    #[command(subcommand)]
    command: Option<RunsCommand>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(clap::Subcommand, Debug)]
enum RunsCommand {
    /// Set runs side by side: their figures, and the keys of their recipes that differ
    Compare {
        /// Runs, by folder or name
        #[arg(required = true, num_args = 2.., value_name = "RUN")]
        runs: Vec<String>,
        /// Output format
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Show what takes the disk: checkpoints, model, the rest
    Du {
        /// Runs, by folder or name [default: all]
        #[arg(value_name = "RUN")]
        runs: Vec<String>,
        /// Output format
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Remove runs with all that is in them; one that is in use is refused
    Rm {
        /// Runs, by folder or name
        #[arg(required = true, value_name = "RUN")]
        runs: Vec<String>,
    },
}

/// Runs the command.
///
/// **Errors**: code 2 with every run that is not there or in use, nothing removed; the same where the system refuses.
pub fn run(args: &RunsArgs) -> Result<(), Failure> {
    match &args.command {
        None => list(args.format),
        Some(RunsCommand::Compare { runs, format }) => compare::run(&find_all(runs)?, *format),
        Some(RunsCommand::Du { runs, format }) => disk(runs, *format),
        Some(RunsCommand::Rm { runs }) => remove(runs),
    }
}

/// The folders of runs.
///
/// **Errors**: code 2 with every one that is not there.
fn find_all(names: &[String]) -> Result<Vec<PathBuf>, Failure> {
    let found: Vec<Result<PathBuf, String>> = names.iter().map(|name| run_dir::find_run(name)).collect();
    let faults: Vec<&String> = found.iter().filter_map(|found| found.as_ref().err()).collect();
    if !faults.is_empty() {
        return Err(Failure::faults("runs", &faults));
    }
    Ok(found.into_iter().flatten().collect())
}

fn of_system(error: std::io::Error) -> Failure {
    Failure::input(format!("{RUNS}: {error}"))
}

/// The newest first.
fn list(format: Format) -> Result<(), Failure> {
    let folders = run_dir::list(Path::new(RUNS)).map_err(of_system)?;
    let mut runs: Vec<Survey> = folders.iter().map(|folder| Survey::of(folder)).collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run.changed));
    if format == Format::Json {
        return print(&format!("{}\n", json!({"runs": runs.iter().map(Survey::json).collect::<Vec<_>>()})));
    }
    if runs.is_empty() {
        return print(&format!("no runs in {RUNS}/; contraflow train makes the first\n"));
    }
    let rows = runs.iter().map(|run| {
        let number = |number: Option<f64>| number.map_or_else(String::new, |number| format!("{number:.4}"));
        let (size, age) = (size(run.disk.all()), survey::age(run.seconds_ago()));
        [
            run.name.clone(),
            run.state.to_string(),
            run.steps_text(),
            number(run.loss),
            number(run.validation()),
            size,
            age,
        ]
    });
    let header = ["RUN", "STATE", "STEP", "LOSS", "VALIDATION", "SIZE", "AGE"];
    print(&table(header, 2..7, rows))
}

fn disk(names: &[String], format: Format) -> Result<(), Failure> {
    let folders =
        if names.is_empty() { run_dir::list(Path::new(RUNS)).map_err(of_system)? } else { find_all(names)? };
    let mut runs: Vec<(String, Disk)> =
        folders.iter().map(|folder| (run_dir::name_of(folder), Disk::of(folder))).collect();
    runs.sort_by_key(|(_, disk)| std::cmp::Reverse(disk.all()));
    let total = runs.iter().map(|(_, disk)| *disk).sum::<Disk>();
    if format == Format::Json {
        let runs: Vec<_> = runs.iter().map(|(name, disk)| json!({"run": name, "bytes": disk})).collect();
        return print(&format!("{}\n", json!({"runs": runs, "bytes": total})));
    }
    let row = |(name, disk): (String, Disk)| {
        [name, size(disk.checkpoints), size(disk.model), size(disk.rest), size(disk.all())]
    };
    let rows = runs.into_iter().chain([("all".to_owned(), total)]).map(row);
    print(&table(["RUN", "CHECKPOINTS", "MODEL", "REST", "ALL"], 1..5, rows))
}

/// Why a folder is not removed: what passes for a run elsewhere may be a folder of the user's with a recipe in it.
fn not_to_remove(folder: &Path) -> Option<String> {
    let path = quoted(folder.display());
    if !["recipe.toml", "plan.txt"].iter().all(|part| folder.join(part).is_file()) {
        return Some(format!(
            "{path}: expected a run's folder, with recipe.toml and plan.txt, got another one"
        ));
    }
    let whole = folder.canonicalize().ok()?;
    let is_within = std::env::current_dir().is_ok_and(|dir| dir.starts_with(&whole));
    is_within.then(|| format!("{path}: expected a run's folder, got the current one or one around it"))
}

/// All are found and locked before the first is removed.
fn remove(names: &[String]) -> Result<(), Failure> {
    let mut folders = find_all(names)?;
    folders.iter_mut().for_each(|folder| *folder = run_dir::without_link(folder));
    folders.sort();
    folders.dedup();
    let faults: Vec<String> = folders.iter().filter_map(|folder| not_to_remove(folder)).collect();
    if !faults.is_empty() {
        return Err(Failure::faults("runs", &faults));
    }
    let locks: Vec<_> = folders.iter().map(|folder| run_dir::lock(folder)).collect();
    let faults: Vec<&str> =
        locks.iter().filter_map(|lock| Some(lock.as_ref().err()?.message.as_str())).collect();
    if !faults.is_empty() {
        return Err(Failure::faults("runs", &faults));
    }
    for folder in &folders {
        let freed = Disk::of(folder).all();
        std::fs::remove_dir_all(folder)
            .map_err(|error| Failure::input(format!("{}: {error}", folder.display())))?;
        print(&format!("{}: removed, {} freed\n", quoted(folder.display()), size(freed)))?;
    }
    let parents = folders.iter().filter_map(|folder| folder.parent());
    for runs in parents.filter(|parent| parent.ends_with(RUNS)) {
        run_dir::repair_latest(runs).map_err(of_system)?;
    }
    if folders.len() > 1 {
        print(&format!("{} removed\n", count(folders.len(), "run")))?;
    }
    Ok(())
}
