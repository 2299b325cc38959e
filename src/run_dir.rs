//! The folder of a run: `runs/<name>`, then `runs/<name>-2` and so on, and `runs/latest` beside them.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::control::text::is_control;
use contraflow_runtime::files;
use contraflow_runtime::files::objects::{self, Location};
use contraflow_runtime::recipe::TokenizerSection;

use crate::failure::Failure;
use crate::output::say;

/// Folder of all runs, in the working directory.
pub const RUNS: &str = "runs";

/// Name of the link to the newest run.
pub const LATEST: &str = "latest";

/// Refuses what is no name of a folder in `runs`.
///
/// **Errors**: code 2 with the name.
pub fn check_name(name: &str) -> Result<(), Failure> {
    let is_plain = Path::new(name).file_name() == Some(name.as_ref()) && !name.contains(is_control);
    if is_plain && !name.starts_with('.') && name != LATEST {
        return Ok(());
    }
    let expected = "the name of a folder in runs/, which does not begin with a dot and is not \"latest\"";
    Err(Failure::input(format!("--name: expected {expected}, got {name:?}")))
}

/// Makes the folder of a new run and points `latest` at it.
///
/// **Errors**: what the system says.
pub fn create(runs: &Path, name: &str) -> io::Result<PathBuf> {
    std::fs::create_dir_all(runs)?;
    for number in 1.. {
        let folder = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
        let path = runs.join(&folder);
        match std::fs::create_dir(&path) {
            Ok(()) => {
                point_latest(runs, &folder);
                return Ok(path);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the numbers do not end")
}

/// Gives a finished run, made by `make` under the path that it is given, the first free name, and points `latest` at it.
///
/// **Errors**: those of `make`, and what the system says.
pub fn adopt<T, E: From<io::Error>>(
    runs: &Path,
    name: &str,
    make: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<(PathBuf, T), E> {
    std::fs::create_dir_all(runs)?;
    let numbered = |number: usize| if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
    let folder = (1..).map(numbered).find(|folder| !runs.join(folder).exists());
    let folder = folder.expect("the numbers do not end");
    let path = runs.join(&folder);
    let made = make(&path)?;
    point_latest(runs, &folder);
    Ok((path, made))
}

/// Every run, by name: the folders in the folder of all runs, without the link to the latest.
///
/// **Errors**: what the system says; where there is no such folder there are no runs.
pub fn list(runs: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(runs) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // Of a link this is false, whatever it leads to.
        if entry.file_type()?.is_dir() && !entry.file_name().to_string_lossy().starts_with('.') {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// When a run last made something: a step, a checkpoint, its model.
pub fn last_change(run: &Path) -> SystemTime {
    let parts = [METRICS, "checkpoints", "model", "recipe.toml"].map(|part| run.join(part));
    let times = parts.iter().filter_map(|part| std::fs::metadata(part).ok()?.modified().ok());
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The newest run that has what is looked for, where `latest` leads to one that has not: it may have failed at once. Says so.
///
/// A name that is not that of the latest run means the run of that name alone.
pub fn instead_of_latest(name: &str, what: &str, has: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let latest = Path::new(RUNS).join(LATEST);
    if Path::new(name) != latest && name != LATEST {
        return None;
    }
    let others = list(Path::new(RUNS)).ok()?.into_iter().filter(|run| has(run));
    let other = others.max_by_key(|run| (last_change(run), run.clone()))?;
    let latest =
        std::fs::read_link(latest).map_or_else(|_| "-".into(), |target| target.display().to_string());
    say(format_args!("note: the latest run, {latest}, has no {what}; taking {}", other.display()));
    Some(other)
}

/// Points `latest` at the newest run that is left, once the one that it leads to is gone.
///
/// **Errors**: what the system says.
pub fn repair_latest(runs: &Path) -> io::Result<()> {
    let link = runs.join(LATEST);
    if link.exists() {
        return Ok(());
    }
    let newest = list(runs)?.into_iter().max_by_key(|run| (last_change(run), run.clone()));
    match newest.as_deref().and_then(Path::file_name) {
        Some(name) => {
            point_latest(runs, &name.to_string_lossy());
            Ok(())
        }
        None => match std::fs::remove_file(link) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        },
    }
}

/// Replaces the link in one step, so that there is always one. A run is as good without: what stands in the way is said.
fn point_latest(runs: &Path, folder: &str) {
    let latest = runs.join(LATEST);
    let fresh = runs.join(format!(".latest-{}", std::process::id()));
    let is_folder = std::fs::symlink_metadata(&latest).is_ok_and(|metadata| metadata.is_dir());
    let pointed = if is_folder {
        Err("it is a folder and no link, and stays as it is; commands without a run's name mean it"
            .to_owned())
    } else {
        link(folder, &fresh)
            .and_then(|()| std::fs::rename(&fresh, &latest))
            .map_err(|error| error.to_string())
    };
    if let Err(why) = pointed {
        drop(std::fs::remove_file(&fresh));
        say(format_args!(
            "note: {} does not point at {}: {why}",
            latest.display(),
            runs.join(folder).display()
        ));
    }
}

#[cfg(unix)]
fn link(folder: &str, to: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(folder, to)
}

#[cfg(not(unix))]
fn link(folder: &str, to: &Path) -> io::Result<()> {
    std::fs::write(to, folder)
}

/// Name of the lock file of a run in use.
const LOCK: &str = ".lock";

/// Keeps other processes from working on a run as long as the file is held.
///
/// **Errors**: code 2 if another process holds it, or if it cannot be made.
pub fn lock(run: &Path) -> Result<File, Failure> {
    let path = run.join(LOCK);
    let failed = |error: io::Error| Failure::input(format!("{}: {error}", path.display()));
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match try_lock(&file) {
        Ok(()) => {
            file.set_len(0).map_err(failed)?;
            write!(file, "{}", std::process::id()).map_err(failed)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Who it is helps; without it the message still says what is wrong.
            drop(file.read_to_string(&mut holder));
            let message = format!(
                "{}: expected a run that is not in use, got one that process {holder} is training",
                run.display()
            );
            Err(Failure::input(message))
        }
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Tries again for a moment: whoever lists runs holds the lock for as long as it takes to find that it is free.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
    file.try_lock()
}

/// Whether a process is at work in a run.
pub fn is_in_use(run: &Path) -> bool {
    let Ok(file) = File::open(run.join(LOCK)) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// File with one line per step.
pub const METRICS: &str = "metrics.jsonl";

/// Takes over the metrics of a run up to a step; those after it will be made again.
///
/// **Errors**: what the system says.
pub fn keep_metrics(from: &Path, to: &Path, last_step: u64) -> io::Result<()> {
    let text = match files::read_to_string(&from.join(METRICS)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let is_kept = |line: &&str| {
        // A line that a crash has cut off is none.
        serde_json::from_str::<StepRecord>(line).is_ok_and(|record| record.step <= last_step)
    };
    let kept: String = text.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect();
    let part = to.join(format!("{METRICS}.part"));
    std::fs::write(&part, kept)?;
    std::fs::rename(part, to.join(METRICS))
}

/// The last line of a run's metrics that is whole.
pub fn last_record(run: &Path) -> Option<StepRecord> {
    let text = files::read_to_string(&run.join(METRICS)).ok()?;
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

/// Every step in a file of metrics. A line that a crash has cut off is none.
///
/// **Errors**: what the system says.
pub fn records(metrics: &Path) -> io::Result<Vec<StepRecord>> {
    let text = files::read_to_string(metrics)?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// The folder of a run, given by itself or by its name.
///
/// **Errors**: where it was looked for.
pub fn find_run(name: &str) -> Result<PathBuf, String> {
    let tried = [PathBuf::from(name), Path::new(RUNS).join(name)];
    let found = tried.iter().find(|path| is_run(path));
    found.cloned().ok_or_else(|| {
        format!("{name}: expected a run; looked in {}, {}", tried[0].display(), tried[1].display())
    })
}

/// Name of a run's folder, also where the path is a link or ends in dots.
pub fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned())
}

/// The run that `runs/latest` points at, under its own name.
pub fn without_link(path: &Path) -> PathBuf {
    match (path.parent(), std::fs::read_link(path)) {
        (Some(parent), Ok(target)) => parent.join(target),
        _ => path.to_owned(),
    }
}

/// Whether a folder holds what a run leaves, or an imported model.
pub fn is_run(dir: &Path) -> bool {
    [METRICS, "recipe.toml", "model/config.json"].iter().any(|part| dir.join(part).is_file())
}

/// What is wanted of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// What it has finished with, or else its newest checkpoint.
    Model,
    /// Its newest checkpoint: the average of the weights is nowhere else.
    Checkpoint,
}

impl Wanted {
    /// For the weights, or for their average.
    pub fn of(averaged: bool) -> Self {
        if averaged { Wanted::Checkpoint } else { Wanted::Model }
    }
}

/// Finds a model: the folder itself if it holds one, or that of a run, given by its folder or its name: what is
/// wanted of it. What lies in an object store is fetched.
pub fn find_model(name: &str, wanted: Wanted) -> Result<PathBuf, String> {
    if Location::is(name) {
        let dir = objects::fetch(Path::new(name)).map_err(|error| error.to_string())?;
        let missing =
            || format!("{name}: expected a folder with config.json and weights, got one without config.json");
        return is_model(&dir).then_some(dir).ok_or_else(missing);
    }
    let direct = PathBuf::from(name);
    let tried: Vec<PathBuf> = std::iter::once(Some(direct.clone()))
        .chain(models_of(&direct, wanted))
        .chain(models_of(&Path::new(RUNS).join(name), wanted))
        .flatten()
        .collect();
    let has_model = |run: &Path| models_of(run, wanted).iter().flatten().any(|path| is_model(path));
    let found = tried.iter().find(|path| is_model(path)).cloned();
    let found = found.or_else(|| {
        let other = instead_of_latest(name, "model and no checkpoint", has_model)?;
        models_of(&other, wanted).into_iter().flatten().find(|path| is_model(path))
    });
    found.ok_or_else(|| {
        let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        format!(
            "{name}: expected a run or a folder with config.json and weights; looked in {}",
            tried.join(", ")
        )
    })
}

fn is_model(dir: &Path) -> bool {
    dir.join("config.json").is_file()
}

/// Where a run has what is wanted.
fn models_of(run: &Path, wanted: Wanted) -> [Option<PathBuf>; 2] {
    let folder = CheckpointFolder::of_run(run);
    let newest = folder.list().ok().and_then(|steps| steps.last().map(|&step| folder.committed(step)));
    [(wanted == Wanted::Model).then(|| run.join("model")), newest]
}

/// The recipe of the run that a model's or a checkpoint's folder belongs to, if it belongs to one.
///
/// **Errors**: the folder is not there.
pub fn recipe_of(dir: &Path) -> io::Result<Option<PathBuf>> {
    let whole = dir.canonicalize()?;
    let mut above = whole.ancestors().skip(1).take(2).map(|folder| folder.join("recipe.toml"));
    Ok(above.find(|recipe| recipe.is_file()))
}

/// What the sample of the run began with that a model's or a checkpoint's folder belongs to.
pub fn sample_prompt(dir: &Path) -> Option<String> {
    let summary = recipe_of(dir).ok()??.with_file_name("summary.json");
    let summary: serde_json::Value = serde_json::from_str(&files::read_to_string(&summary).ok()?).ok()?;
    summary["sample_prompt"].as_str().filter(|prompt| !prompt.is_empty()).map(str::to_owned)
}

/// What the recipe of a model's run says about its tokenizer. `None` where there is no recipe that names one, be it bytes.
pub fn tokenizer_of(dir: &Path) -> Option<TokenizerSection> {
    let text = files::read_to_string(&recipe_of(dir).ok()??).ok()?;
    let recipe: toml::Table = text.parse().ok()?;
    let key = |name: &str| Some(recipe.get("tokenizer")?.get(name)?.as_str()?.to_owned());
    Some(TokenizerSection { path: key("path")?, end_of_document: key("end_of_document").unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_numbered_and_latest_is_the_newest() {
        let root = tempfile::tempdir().unwrap();
        let runs = root.path().join("runs");
        for expected in ["tiny", "tiny-2", "tiny-3"] {
            let path = create(&runs, "tiny").unwrap();
            assert_eq!(path, runs.join(expected));
            assert_eq!(runs.join("latest").canonicalize().unwrap(), path.canonicalize().unwrap());
        }
    }

    #[test]
    fn latest_is_repaired_once_its_run_is_gone_and_goes_with_the_last_run() {
        let root = tempfile::tempdir().unwrap();
        let runs = root.path().join("runs");
        let (first, second) = (create(&runs, "a").unwrap(), create(&runs, "b").unwrap());
        std::fs::remove_dir(second).unwrap();
        repair_latest(&runs).unwrap();
        assert_eq!(runs.join(LATEST).canonicalize().unwrap(), first.canonicalize().unwrap());
        std::fs::remove_dir(first).unwrap();
        repair_latest(&runs).unwrap();
        assert_eq!(runs.read_dir().unwrap().count(), 0);
    }

    #[test]
    fn a_folder_in_the_place_of_the_link_stays_and_the_run_is_made() {
        let root = tempfile::tempdir().unwrap();
        let runs = root.path().join("runs");
        std::fs::create_dir_all(runs.join("latest")).unwrap();
        std::fs::write(runs.join("latest/plan.txt"), "x").unwrap();
        assert_eq!(create(&runs, "tiny").unwrap(), runs.join("tiny"));
        assert!(runs.join("latest/plan.txt").is_file());
        let mut names: Vec<_> = runs.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["latest", "tiny"]);
    }

    #[test]
    fn a_name_is_that_of_a_folder_in_runs() {
        for name in ["tiny", "x y", "\u{e9}t\u{e9}", "a.b", "latest-2"] {
            assert_eq!(check_name(name), Ok(()));
        }
        for name in ["../x", "a/b", "", ".hidden", ".", "..", "a/", "/a", "latest", "a\nb", "a\u{1b}[2J"] {
            let failure = check_name(name).unwrap_err();
            assert!(failure.code == 2 && failure.message.starts_with("--name: expected "), "{failure}");
        }
    }

    #[test]
    fn metrics_are_kept_up_to_a_step_with_those_of_skipped_ones_and_without_a_line_that_was_cut_off() {
        let run = tempfile::tempdir().unwrap();
        let record = |step, loss| StepRecord { step, loss, ..StepRecord::default() };
        let records = [record(1, 2.5), record(2, f64::NAN), record(3, 2.0)];
        let lines: String = records.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect();
        std::fs::write(run.path().join(METRICS), lines.clone() + "{\"step\":1,\"lo").unwrap();
        keep_metrics(run.path(), run.path(), 2).unwrap();
        let kept = std::fs::read_to_string(run.path().join(METRICS)).unwrap();
        assert_eq!(kept.lines().collect::<Vec<_>>(), lines.lines().take(2).collect::<Vec<_>>());
        assert!(last_record(run.path()).unwrap().loss.is_nan());
    }
}
