//! The folder of a run: `runs/<name>`, then `runs/<name>-2` and so on, and `runs/latest` beside them.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::files;
use contraflow_runtime::recipe::TokenizerSection;

use crate::failure::Failure;

/// Folder of all runs, in the working directory.
pub const RUNS: &str = "runs";

/// Name of the link to the newest run.
const LATEST: &str = "latest";

/// Refuses what is no name of a folder in `runs`.
///
/// **Errors**: code 2 with the name.
pub fn check_name(name: &str) -> Result<(), Failure> {
    let is_plain = Path::new(name).file_name() == Some(name.as_ref()) && !name.contains(char::is_control);
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
        eprintln!("note: {} does not point at {}: {why}", latest.display(), runs.join(folder).display());
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
    match file.try_lock() {
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

/// The last line of a run's metrics.
pub fn last_record(run: &Path) -> Option<StepRecord> {
    let text = files::read_to_string(&run.join(METRICS)).ok()?;
    serde_json::from_str(text.lines().last()?).ok()
}

/// Finds a model: the folder itself if it holds one, or that of a run, given by its folder or its name: what it has
/// finished with, or else its newest checkpoint.
pub fn find_model(name: &str) -> Result<PathBuf, String> {
    let direct = PathBuf::from(name);
    let of_run = |run: PathBuf| {
        let folder = CheckpointFolder::of_run(&run);
        let newest = folder.list().ok().and_then(|steps| steps.last().map(|&step| folder.committed(step)));
        [Some(run.join("model")), newest]
    };
    let tried: Vec<PathBuf> = std::iter::once(Some(direct.clone()))
        .chain(of_run(direct))
        .chain(of_run(Path::new(RUNS).join(name)))
        .flatten()
        .collect();
    let found = tried.iter().find(|path| path.join("config.json").is_file());
    found.cloned().ok_or_else(|| {
        let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        format!(
            "{name}: expected a run or a folder with config.json and weights; looked in {}",
            tried.join(", ")
        )
    })
}

/// The recipe of the run that a model's or a checkpoint's folder belongs to, if it belongs to one.
///
/// **Errors**: the folder is not there.
pub fn recipe_of(dir: &Path) -> io::Result<Option<PathBuf>> {
    let whole = dir.canonicalize()?;
    let mut above = whole.ancestors().skip(1).take(2).map(|folder| folder.join("recipe.toml"));
    Ok(above.find(|recipe| recipe.is_file()))
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
