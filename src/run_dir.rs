//! The folder of a run: `runs/<name>`, then `runs/<name>-2` and so on, and `runs/latest` beside them.

use std::io;
use std::path::{Path, PathBuf};

/// Folder of all runs, in the working directory.
pub const RUNS: &str = "runs";

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
                point_latest(runs, &folder)?;
                return Ok(path);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the numbers do not end")
}

/// Gives a finished run, made by `make` under the path that it is told, the first free name, and points `latest` at it.
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
    point_latest(runs, &folder)?;
    Ok((path, made))
}

/// Replaces the link in one step, so that there is always one.
fn point_latest(runs: &Path, folder: &str) -> io::Result<()> {
    let fresh = runs.join(format!(".latest-{}", std::process::id()));
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder, &fresh)?;
    #[cfg(not(unix))]
    std::fs::write(&fresh, folder)?;
    std::fs::rename(&fresh, runs.join("latest"))
}

/// Finds a model: the folder itself if it holds weights, or the `model` in a run's folder, or that of a named run.
pub fn find_model(name: &str) -> Result<PathBuf, String> {
    let direct = PathBuf::from(name);
    let tried = [direct.clone(), direct.join("model"), Path::new(RUNS).join(name).join("model")];
    let found = tried.iter().find(|path| path.join("config.json").is_file());
    found.cloned().ok_or_else(|| {
        let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        format!(
            "{name}: expected a run or a folder with config.json and weights; looked in {}",
            tried.join(", ")
        )
    })
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
}
