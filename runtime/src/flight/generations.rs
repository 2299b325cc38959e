//! Where the rings of a job's formations are: a folder each in that of the job, of which the last two stay. Knows no rank.

use std::io;
use std::path::{Path, PathBuf};

use super::{FOLDER, RankRing, read_folder};
use crate::files;
use crate::topology::Generation;

/// How the name of a formation's folder begins.
const PREFIX: &str = "generation-";

/// The rings of a formation, in the folder of its job.
pub fn generation_folder(job: &Path, generation: Generation) -> PathBuf {
    job.join(FOLDER).join(format!("{PREFIX}{:05}", generation.number()))
}

/// Formations with a folder, the earliest first.
fn generations(job: &Path) -> io::Result<Vec<Generation>> {
    let entries = match files::read_dir(&job.join(FOLDER)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let number = |name: &str| name.strip_prefix(PREFIX)?.parse().ok();
    let numbers = entries.iter().filter_map(|entry| number(&entry.file_name().to_string_lossy()));
    let mut generations: Vec<Generation> = numbers.map(Generation::new).collect();
    generations.sort_unstable();
    Ok(generations)
}

/// A formation begins: of those before it only the rings of the latest stay.
///
/// **Errors**: what the system says.
pub fn drop_old(job: &Path, begins: Generation) -> io::Result<()> {
    let mut before = generations(job)?;
    before.retain(|&generation| generation < begins);
    before.pop();
    before.into_iter().try_for_each(|old| match std::fs::remove_dir_all(generation_folder(job, old)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
}

/// All rings in the folder of a run or of a job, by formation, the latest first: in which folder, from there.
///
/// **Errors**: a folder cannot be read.
pub fn read_all(dir: &Path) -> io::Result<Vec<(PathBuf, Vec<RankRing>)>> {
    let generations = generations(dir)?;
    let of_run = generations.is_empty().then(|| dir.join(FOLDER));
    let folders = generations.iter().rev().map(|&generation| generation_folder(dir, generation));
    let from_here =
        |folder: PathBuf| folder.strip_prefix(dir).map_or_else(|_| folder.clone(), Path::to_owned);
    of_run
        .into_iter()
        .chain(folders)
        .map(|folder| Ok((from_here(folder.clone()), read_folder(&folder)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{About, Recorders};
    use super::*;
    use crate::topology::{FormationId, JobId};

    #[test]
    fn the_rings_of_the_last_two_formations_stay_and_are_read_the_latest_first() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(FOLDER)).unwrap();
        let begin = |number| {
            let generation = Generation::new(number);
            let about = About { formation: FormationId::new(JobId::new(3, 0), generation), world: 2 };
            drop(Recorders::join(&generation_folder(dir.path(), generation), 0..2, &about).unwrap());
            drop_old(dir.path(), generation).unwrap();
        };
        // Some formations come to nothing before they have a folder.
        for (number, left) in [(1, vec![1]), (2, vec![2, 1]), (9, vec![9, 2]), (10, vec![10, 9])] {
            begin(number);
            let read = read_all(dir.path()).unwrap();
            let of: Vec<_> =
                read.iter().map(|(_, rings)| rings[1].1.as_ref().unwrap().header.generation).collect();
            assert_eq!(of, left);
            assert_eq!(read[0].0, Path::new(FOLDER).join(format!("generation-{number:05}")));
        }
        // A worker that is late removes nothing of later formations.
        drop_old(dir.path(), Generation::new(9)).unwrap();
        assert_eq!(read_all(dir.path()).unwrap().len(), 2);
    }

    #[test]
    fn the_rings_of_a_run_are_those_of_its_one_formation() {
        let dir = tempfile::tempdir().unwrap();
        let none = read_all(dir.path()).unwrap();
        assert!(none.len() == 1 && none[0].1.is_empty());
        let about = About { formation: FormationId::default(), world: 1 };
        drop(Recorders::create(&dir.path().join(FOLDER), &about).unwrap());
        let read = read_all(dir.path()).unwrap();
        assert_eq!((read[0].0.as_path(), read[0].1.len()), (Path::new(FOLDER), 1));
    }
}
