//! The folder of a cluster's job in the shared storage, and whose it is.
//!
//! Several orchestrators' states may use one storage, at once or one after the other, and each counts its jobs from 1. A
//! folder belongs to the job that has claimed it: its owner file says which one, and every process about to change the
//! folder or to resume from it looks there first. The file also holds the latest formation that has begun in the folder: an
//! earlier one, of a state that was put back from a copy or of a process that stood still, does not begin after it. Knows no
//! rank.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Storage;
use crate::faults::ErrorKind;
use crate::files::{self, make_dir, sync_dir, write_synced};
use crate::random::from_system;
use crate::topology::{Generation, JobId};

/// The file, in the job's folder.
pub const OWNER_FILE: &str = "owner.json";

/// Where jobs have their folders, in the storage.
const JOBS: &str = "jobs";

/// How the name of a folder begins that was taken away and is being removed.
const REMOVED: &str = ".removed-";

/// Who may change a job's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The orchestrator's state.
    pub state: u64,
    /// The job.
    pub job: JobId,
}

/// The folder of a job that has claimed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFolder {
    storage: Storage,
    dir: PathBuf,
    owner: Owner,
}

/// Why a job cannot have a folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The storage.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The storage is gone, or the folder in it.
    #[error("{}: {message}", path.display())]
    Gone {
        /// The storage or the folder.
        path: PathBuf,
        /// What was expected and what is there.
        message: String,
    },
    /// It is not this job's, or not this formation's.
    #[error("{}: {message}", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// What was expected and what is there.
        message: String,
    },
}

impl FolderError {
    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        match self {
            FolderError::File { .. } | FolderError::Gone { .. } => ErrorKind::Storage,
            FolderError::Foreign { .. } => ErrorKind::Config,
        }
    }
}

/// What the owner file says; ids in hex, as not every reader of JSON holds 64 bits.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct OwnerFile {
    state: String,
    job: String,
    /// Latest formation that has begun here.
    generation: Generation,
}

impl Owner {
    /// Names of its folder, the usual one first: that may be another state's.
    fn names(self) -> [String; 2] {
        let Owner { state, job } = self;
        [job.to_string(), format!("{job}-{state:016x}-{:06x}", job.nonce())]
    }

    fn file(self, generation: Generation) -> OwnerFile {
        let hex = |number: u64| format!("{number:016x}");
        OwnerFile { state: hex(self.state), job: hex(self.job.bits()), generation }
    }

    fn has(self, found: &OwnerFile) -> bool {
        *found == self.file(found.generation)
    }
}

impl JobFolder {
    /// The job's folder in a storage: the one that it has, or a fresh one of its own.
    ///
    /// # Errors
    /// The storage is gone, or cannot be read or written; what has the last name that is left is not the job's.
    pub fn claim(storage: &Storage, owner: Owner) -> Result<JobFolder, FolderError> {
        storage.verify()?;
        let jobs = storage.path().join(JOBS);
        make_dir(&jobs).map_err(file(&jobs))?;
        let folder = |name| JobFolder { storage: storage.clone(), dir: jobs.join(name), owner };
        if let Some(folder) = Self::find(storage, owner)? {
            return Ok(folder);
        }
        let [usual, own] = owner.names().map(folder);
        for folder in [usual, own.clone()] {
            // Another worker of the job may have been faster.
            if folder.make(&jobs)? || folder.read()?.is_some_and(|found| folder.is_own(&found)) {
                return Ok(folder);
            }
        }
        Err(own.foreign("expected a free name for the folder of this job, got one that is taken".into()))
    }

    /// The folder that a job has, if it has one.
    ///
    /// # Errors
    /// The storage is gone, or cannot be read.
    pub fn find(storage: &Storage, owner: Owner) -> Result<Option<JobFolder>, FolderError> {
        storage.verify()?;
        let jobs = storage.path().join(JOBS);
        let [usual, own] = owner.names();
        // The own name first: the usual one may have come free since.
        for name in [own, usual] {
            let folder = JobFolder { storage: storage.clone(), dir: jobs.join(name), owner };
            if folder.read()?.is_some_and(|found| folder.is_own(&found)) {
                return Ok(Some(folder));
            }
        }
        Ok(None)
    }

    /// Takes the folder of a job that has ended away, if no formation after generation `last` has begun in it. Where its files are from now
    /// on: they are still to be removed, see [`JobFolder::sweep`].
    ///
    /// # Errors
    /// The storage is gone or cannot be changed; a later formation has begun.
    pub fn take_away(&self, last: Generation) -> Result<(), FolderError> {
        let latest = self.latest()?;
        if latest > last {
            return Err(self
                .foreign(format!("expected no formation after generation {last}, got generation {latest}")));
        }
        let random = u64::from_le_bytes(from_system().map_err(file(&self.dir))?);
        let jobs = self.storage.path().join(JOBS);
        std::fs::rename(&self.dir, jobs.join(format!("{REMOVED}{random:016x}"))).map_err(file(&self.dir))?;
        sync_dir(&jobs).map_err(file(&jobs))
    }

    /// Removes the files of folders that were taken away, also by processes that were killed meanwhile.
    ///
    /// # Errors
    /// The storage cannot be read or changed.
    pub fn sweep(storage: &Storage) -> Result<(), FolderError> {
        let jobs = storage.path().join(JOBS);
        let entries = match std::fs::read_dir(&jobs) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(file(&jobs))?,
        };
        for entry in entries {
            let entry = entry.map_err(file(&jobs))?;
            if entry.file_name().to_string_lossy().starts_with(REMOVED) {
                match std::fs::remove_dir_all(entry.path()) {
                    // Another worker is at it, too.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(file(&entry.path())(error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Whether a folder is this owner's, as its owner file says.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn is_of(dir: &Path, owner: Owner) -> Result<bool, FolderError> {
        Ok(read_owner(dir)?.is_some_and(|found| owner.has(&found)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Checks that the storage is there and the folder still the job's.
    ///
    /// # Errors
    /// It is gone or cannot be read; it is another job's, or has no owner file any more.
    pub fn verify(&self) -> Result<(), FolderError> {
        self.latest().map(drop)
    }

    /// A formation begins in it.
    ///
    /// # Errors
    /// As for [`JobFolder::verify`]; this formation or a later one has begun before; the file cannot be written.
    pub fn begin(&self, generation: Generation) -> Result<(), FolderError> {
        let latest = self.latest()?;
        if latest >= generation {
            return Err(self.foreign(format!(
                "expected no formation of the job after generation {}, got generation {latest}: the state of the \
                 orchestrator is older than the storage",
                generation.previous()
            )));
        }
        let part = self.dir.join(format!("{OWNER_FILE}.g{generation}"));
        self.write(&part, generation)?;
        std::fs::rename(&part, self.dir.join(OWNER_FILE)).map_err(file(&part))?;
        sync_dir(&self.dir).map_err(file(&self.dir))
    }

    /// Latest formation that has begun in it, if it is the job's.
    fn latest(&self) -> Result<Generation, FolderError> {
        self.storage.verify()?;
        match self.read()? {
            Some(found) if self.is_own(&found) => Ok(found.generation),
            None if !self.dir.exists() => {
                let message = "expected the folder of the job, got none: it was removed".into();
                Err(FolderError::Gone { path: self.dir.clone(), message })
            }
            found => {
                let of = |found: OwnerFile| format!("that of job {} of state {}", found.job, found.state);
                let got = found.map_or_else(|| "one without an owner".into(), of);
                let Owner { state, job } = self.owner;
                let expected = format!("the folder of job {:016x} of state {state:016x}", job.bits());
                Err(self.foreign(format!("expected {expected}, got {got}")))
            }
        }
    }

    fn is_own(&self, found: &OwnerFile) -> bool {
        self.owner.has(found)
    }

    fn foreign(&self, message: String) -> FolderError {
        FolderError::Foreign { path: self.dir.clone(), message }
    }

    /// The contents of its owner file; `None` if there is none that can be read.
    fn read(&self) -> Result<Option<OwnerFile>, FolderError> {
        read_owner(&self.dir)
    }

    /// Makes it unless there is one of its name; whether it is the job's now. At once and whole: a second process finds the
    /// file of the first.
    fn make(&self, jobs: &Path) -> Result<bool, FolderError> {
        if self.dir.exists() {
            return Ok(false);
        }
        let random = u64::from_le_bytes(from_system().map_err(file(jobs))?);
        let fresh = jobs.join(format!(".claim-{random:016x}"));
        std::fs::create_dir(&fresh).map_err(file(&fresh))?;
        self.write(&fresh.join(OWNER_FILE), Generation::default())?;
        sync_dir(&fresh).map_err(file(&fresh))?;
        match std::fs::rename(&fresh, &self.dir) {
            Ok(()) => {
                sync_dir(jobs).map_err(file(jobs))?;
                Ok(true)
            }
            Err(error) => {
                std::fs::remove_dir_all(&fresh).map_err(file(&fresh))?;
                match error.kind() {
                    io::ErrorKind::AlreadyExists
                    | io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::NotADirectory => {
                        Ok(self.read()?.is_some_and(|found| self.is_own(&found)))
                    }
                    _ => Err(file(&self.dir)(error)),
                }
            }
        }
    }

    fn write(&self, path: &Path, generation: Generation) -> Result<(), FolderError> {
        let text = serde_json::to_vec_pretty(&self.owner.file(generation)).map_err(io::Error::other);
        text.and_then(|text| write_synced(path, &text)).map_err(file(path))
    }
}

fn read_owner(dir: &Path) -> Result<Option<OwnerFile>, FolderError> {
    let path = dir.join(OWNER_FILE);
    match files::read(&path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file(&path)(error)),
    }
}

fn file(path: &Path) -> impl Fn(io::Error) -> FolderError + use<> {
    let path = path.to_owned();
    move |source| FolderError::File { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(state: u64, number: u64, nonce: u32) -> Owner {
        Owner { state, job: JobId::new(number, nonce) }
    }

    fn claim(storage: &Path, owner: Owner) -> JobFolder {
        JobFolder::claim(&Storage::open(storage).unwrap(), owner).unwrap()
    }

    fn name(folder: &JobFolder) -> String {
        folder.path().file_name().unwrap().to_string_lossy().into_owned()
    }

    #[test]
    fn jobs_of_one_number_have_a_folder_each_and_find_it_again() {
        let storage = tempfile::tempdir().unwrap();
        // Another state, and the same state put back from a copy.
        let owners = [owner(1, 1, 5), owner(2, 1, 5), owner(1, 1, 6)];
        let names = ["job-1", "job-1-0000000000000002-000005", "job-1-0000000000000001-000006"];
        for _ in 0..2 {
            assert_eq!(owners.map(|owner| name(&claim(storage.path(), owner))), names);
        }
        assert_eq!(name(&claim(storage.path(), owner(1, 2, 5))), "job-2");
        // The usual name becomes free: a job with another one keeps it.
        std::fs::remove_dir_all(storage.path().join("jobs/job-1")).unwrap();
        assert_eq!(name(&claim(storage.path(), owners[1])), names[1]);
        let left = std::fs::read_dir(storage.path().join("jobs")).unwrap().count();
        assert_eq!(left, 3, "nothing is left of claims that failed");
    }

    #[test]
    fn a_folder_without_an_owner_is_left_alone() {
        let storage = tempfile::tempdir().unwrap();
        let old = storage.path().join("jobs/job-1/checkpoints");
        std::fs::create_dir_all(&old).unwrap();
        assert_ne!(claim(storage.path(), owner(1, 1, 5)).path(), old.parent().unwrap());
        let entries: Vec<_> = std::fs::read_dir(old.parent().unwrap()).unwrap().collect();
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn of_claims_at_the_same_time_each_ends_with_its_own() {
        let storage = tempfile::tempdir().unwrap();
        let owners: Vec<Owner> = (0..16).map(|number| owner(number / 4, 1, 5)).collect();
        let claimed: Vec<JobFolder> = std::thread::scope(|scope| {
            let storage = storage.path();
            let claims: Vec<_> =
                owners.iter().map(|&owner| scope.spawn(move || claim(storage, owner))).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        for (one, owner) in claimed.iter().zip(&owners) {
            one.verify().unwrap();
            let same =
                claimed.iter().zip(&owners).filter(|(other, of)| other.path() == one.path() && of != &owner);
            assert_eq!(same.count(), 0);
            let apart =
                claimed.iter().zip(&owners).filter(|(other, of)| *of == owner && other.path() != one.path());
            assert_eq!(apart.count(), 0, "all workers of a job have one folder");
        }
    }

    #[test]
    fn a_folder_taken_over_by_another_job_is_detected() {
        let storage = tempfile::tempdir().unwrap();
        let folder = claim(storage.path(), owner(1, 1, 5));
        folder.verify().unwrap();
        let file = folder.path().join(OWNER_FILE);
        std::fs::write(&file, serde_json::to_vec(&owner(2, 1, 5).file(Generation::new(3))).unwrap()).unwrap();
        let reported = folder.verify().unwrap_err().to_string();
        assert!(
            reported.contains("of state 0000000000000001, got that of job 0000000001000005 of state"),
            "{reported}"
        );
        std::fs::remove_file(file).unwrap();
        assert!(
            folder.begin(Generation::new(4)).unwrap_err().to_string().contains("got one without an owner")
        );
    }

    #[test]
    fn a_folder_that_was_removed_is_gone_and_so_is_one_in_a_storage_that_is() {
        let storage = tempfile::tempdir().unwrap();
        let folder = claim(storage.path(), owner(1, 1, 5));
        std::fs::remove_dir_all(folder.path()).unwrap();
        let error = folder.verify().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert!(
            error.to_string().ends_with("expected the folder of the job, got none: it was removed"),
            "{error}"
        );
        std::fs::remove_file(storage.path().join(crate::checkpoint::storage::MARK_FILE)).unwrap();
        for error in [folder.verify().unwrap_err(), folder.begin(Generation::new(1)).unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Storage);
            assert!(error.to_string().contains("the storage is gone: expected the mark "), "{error}");
        }
    }

    #[test]
    fn a_folder_is_taken_away_from_its_own_job_alone_and_not_under_a_later_formation() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        assert_eq!(JobFolder::find(&storage, owner(1, 1, 5)).unwrap(), None);
        assert!(!JobFolder::is_of(dir.path(), owner(1, 1, 5)).unwrap(), "no job's");
        JobFolder::sweep(&storage).unwrap();
        let [own, other] = [1, 2].map(|state| claim(dir.path(), owner(state, 1, 5)));
        std::fs::write(own.path().join("file"), "some").unwrap();
        own.begin(Generation::new(3)).unwrap();
        let found = JobFolder::find(&storage, owner(1, 1, 5)).unwrap().unwrap();
        assert_eq!(found, own);
        for (state, number, nonce, is_own) in
            [(1, 1, 5, true), (2, 1, 5, false), (1, 2, 5, false), (1, 1, 6, false)]
        {
            assert_eq!(JobFolder::is_of(own.path(), owner(state, number, nonce)).unwrap(), is_own);
        }
        let late = found.take_away(Generation::new(2)).unwrap_err().to_string();
        assert!(late.contains("expected no formation after generation 2, got generation 3"), "{late}");
        assert!(own.path().join("file").exists());
        found.take_away(Generation::new(3)).unwrap();
        assert_eq!(JobFolder::find(&storage, owner(1, 1, 5)).unwrap(), None);
        let names = || {
            let entries = std::fs::read_dir(dir.path().join("jobs")).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names().len(), 2, "{:?}", names());
        JobFolder::sweep(&storage).unwrap();
        assert_eq!(names(), [name(&other)]);
        other.verify().unwrap();
    }

    #[test]
    fn no_formation_begins_after_a_later_one() {
        let storage = tempfile::tempdir().unwrap();
        let folder = claim(storage.path(), owner(1, 1, 5));
        folder.begin(Generation::new(1)).unwrap();
        folder.begin(Generation::new(3)).unwrap();
        for late in [2, 3] {
            let reported = folder.begin(Generation::new(late)).unwrap_err().to_string();
            assert!(
                reported.contains("got generation 3: the state of the orchestrator is older"),
                "{reported}"
            );
        }
        claim(storage.path(), owner(1, 1, 5)).begin(Generation::new(4)).unwrap();
    }
}
