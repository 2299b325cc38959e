//! The folder of a run's checkpoints: which are committed, committing one, dropping the oldest.
//!
//! Every change is ordered for a crash at any point: files and folders are synced before the rename that commits, and a
//! checkpoint that is dropped loses its name before its first file. Knows no job and no rank.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::{MANIFEST_FILE, Manifest, ShardFile};
use super::{CheckpointError, JobFolder, Position, RemoteFolder};
use crate::failpoint::failpoint;
use crate::faults::ErrorKind;
use crate::files::{UNFINISHED_SUFFIX, bytes_below, make_dir, sync_dir, write_synced};
use crate::schedule::size;
use crate::topology::Generation;

/// Ending of the name of a folder that is being removed; it counts as unfinished.
const REMOVED: &str = ".removed.part";

/// Name of the folder in a run's folder.
const FOLDER: &str = "checkpoints";

/// Files that stand in a checkpoint beside manifest and shards, by name: what makes it readable as a model.
pub type Companions = std::sync::Arc<[(&'static str, Vec<u8>)]>;

/// Whether a checkpoint's folder has the name of one that was never finished.
pub fn is_unfinished(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name.to_string_lossy().ends_with(UNFINISHED_SUFFIX))
}

/// Steps of the checkpoints that the orchestrator, which decides where a job resumes, knows of; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pinned {
    /// The newest.
    pub newest: u64,
    /// The one before it, should the newest be damaged.
    pub earlier: u64,
}

/// Where a run keeps its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFolder {
    dir: PathBuf,
    /// Part of the names of what is not finished: what an earlier formation still writes is never in the way.
    generation: Generation,
    /// Checkpoints that stay, however old they are.
    pinned: Pinned,
    /// The job of a cluster in whose folder it is: nothing changes unless that is still so.
    job: Option<JobFolder>,
    /// What the job's folder may hold at most, if there is a limit. **Units**: bytes.
    quota: Option<u64>,
    /// Where checkpoints are committed first, if anywhere: this folder then holds what the store has, or had.
    remote: Option<RemoteFolder>,
}

impl CheckpointFolder {
    /// Of a run's folder; nothing is made yet.
    pub fn of_run(run: &Path) -> Self {
        CheckpointFolder {
            dir: run.join(FOLDER),
            generation: Generation::default(),
            pinned: Pinned::default(),
            job: None,
            quota: None,
            remote: None,
        }
    }

    /// Of the folder of a cluster's job.
    pub fn of_job(job: &JobFolder) -> Self {
        CheckpointFolder { job: Some(job.clone()), ..CheckpointFolder::of_run(job.path()) }
    }

    /// The same folder, for the ranks of one formation.
    pub fn in_generation(self, generation: Generation) -> Self {
        CheckpointFolder { generation, ..self }
    }

    /// The same folder, in which these stay, and the newest checkpoints up to them, whatever is committed after them.
    pub fn pinning(self, pinned: Pinned) -> Self {
        CheckpointFolder { pinned: self.pinned.max(pinned), ..self }
    }

    /// The same folder of a job that may hold so many bytes at most, if there is a limit.
    pub fn within(self, quota: Option<u64>) -> Self {
        CheckpointFolder { quota, ..self }
    }

    /// The same folder, whose checkpoints are committed in an object store.
    pub fn stored_in(self, remote: Option<RemoteFolder>) -> Self {
        CheckpointFolder { remote, ..self }
    }

    /// Whose formation's ranks it is for.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The folder of a committed checkpoint.
    pub fn committed(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }

    /// The folder into which ranks write the shards of a checkpoint.
    pub fn unfinished(&self, step: u64) -> PathBuf {
        let formation = match self.generation.number() {
            0 => String::new(),
            generation => format!(".g{generation}"),
        };
        self.dir.join(format!("step-{step:08}{formation}{UNFINISHED_SUFFIX}"))
    }

    /// Steps of the committed checkpoints, ascending.
    ///
    /// **Errors**: what the system says; a folder that does not exist has none.
    pub fn list(&self) -> io::Result<Vec<u64>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let digits = name.to_str().and_then(|name| name.strip_prefix("step-"));
            steps.extend(digits.and_then(|digits| digits.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Brings the newest whole checkpoint of the object store here, unless it is. One that is damaged there is set aside, with a
    /// warning. Only the process that owns the run may call this.
    ///
    /// **Errors**: the store refuses or fails; this folder cannot be written.
    pub fn pull(&self) -> Result<(), CheckpointError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let here = self.list().map_err(|error| CheckpointError::of_system(&self.dir, error))?;
        for step in remote.list()?.into_iter().rev().take_while(|step| !here.contains(step)) {
            match remote.fetch(step, &self.committed(step)) {
                Err(error) if error.kind == ErrorKind::Config => {
                    tracing::warn!(step, "the checkpoint in the store is damaged and set aside: {error}");
                    remote.set_aside(step)?;
                }
                fetched => return fetched,
            }
        }
        Ok(())
    }

    /// Removes what an earlier process left behind: unfinished checkpoints, those after step `newest` that an earlier formation
    /// has committed, and all before the newest `keep` up to the pinned one. What is after `newest` is of a history that was left,
    /// and would pass for the present one's. Only the process that owns the run may call this; if it comes late itself, a later formation does not
    /// suffer by it. An earlier one cannot commit any more afterwards: its folders are gone.
    ///
    /// **Errors**: what the system says; the folder is another job's.
    pub fn tidy(&self, keep: usize, newest: Option<u64>) -> io::Result<()> {
        self.verify().map_err(io::Error::other)?;
        if !self.dir.exists() {
            return Ok(());
        }
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if is_unfinished(&path) && !self.is_of_later(&path) {
                std::fs::remove_dir_all(path)?;
            }
        }
        for step in self.list()?.into_iter().filter(|step| newest.is_some_and(|newest| *step > newest)) {
            let manifest = Manifest::read(&self.committed(step));
            if manifest.map_or(true, |manifest| manifest.generation < self.generation) {
                self.drop(step)?;
            }
        }
        if let Some(remote) = &self.remote {
            remote.tidy().map_err(io::Error::other)?;
        }
        self.drop_oldest(keep, None)
    }

    /// Takes a damaged checkpoint out of the way, so that its step can be committed anew: where it is now. What is left of it
    /// stays for whoever wants to look at it. In the object store too, where it would count for what is made anew.
    ///
    /// **Errors**: what the system says; the store refuses or fails.
    pub fn set_aside(&self, step: u64) -> io::Result<PathBuf> {
        if let Some(remote) = &self.remote
            && remote.list().map_err(io::Error::other)?.contains(&step)
        {
            remote.set_aside(step).map_err(io::Error::other)?;
        }
        let to = self.dir.join(format!("damaged-step-{step:08}"));
        remove(&to)?;
        std::fs::rename(self.committed(step), &to)?;
        sync_dir(&self.dir)?;
        Ok(to)
    }

    /// Whether a later formation writes it: a process that stood still may be the one that is late.
    fn is_of_later(&self, path: &Path) -> bool {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let formation = name.strip_suffix(UNFINISHED_SUFFIX).and_then(|name| name.rsplit_once(".g"));
        let formation = formation.and_then(|(_, digits)| digits.parse::<u32>().ok());
        let own = self.generation.number();
        own > 0 && formation.is_some_and(|formation| formation > own)
    }

    /// Commits the checkpoint whose shards lie, synced, in the unfinished folder of its step: writes the manifest and
    /// renames the folder. Afterwards only the newest `keep` checkpoints remain: of those up to the pinned one, with all after it;
    /// fewer where the job's quota would not take another one.
    ///
    /// **Errors**: what the system says, with the path; a shard that is not there with its size; the folder is another job's. The
    /// checkpoint is not committed then.
    pub fn commit(
        &self,
        manifest: &Manifest,
        companions: &Companions,
        keep: usize,
    ) -> Result<(), CheckpointError> {
        let Position { step, .. } = manifest.position;
        let (from, to) = (self.unfinished(step), self.committed(step));
        self.verify()?;
        if to.exists() {
            // Committed before, by an earlier formation or with an answer that was lost: the state after a step is one.
            return remove(&from).map_err(|error| CheckpointError::of_storage(&from, error));
        }
        // The order may come late, after a later formation has tidied some of the shards away.
        manifest.shards.iter().try_for_each(|shard| shard.check_size(&from))?;
        self.rename_finished((manifest, companions), &from, &to)
            .map_err(|error| CheckpointError::of_storage(&to, error))?;
        self.drop_oldest(keep, Some(step))
            .and_then(|()| self.make_room(step))
            .map_err(|error| CheckpointError::of_storage(&self.dir, error))?;
        // Ranks write one after the other: none of them is still at one of an earlier step. It costs room only.
        if let Err(error) = self.drop_unfinished(|unfinished| unfinished < step) {
            tracing::warn!("{}: unfinished checkpoints stay: {error}", self.dir.display());
        }
        Ok(())
    }

    /// Removes the unfinished checkpoints of a job that has ended, but for those of later formations.
    ///
    /// **Errors**: what the system says; the folder is another job's.
    pub fn drop_all_unfinished(&self) -> io::Result<()> {
        self.verify().map_err(io::Error::other)?;
        self.drop_unfinished(|_| true)
    }

    /// Removes the unfinished checkpoint of a step of a job: a part of it that nobody waits for was written after the others may have
    /// been removed. A run's own stays until it is resumed.
    ///
    /// **Errors**: what the system says.
    pub fn drop_given_up(&self, step: u64) -> io::Result<()> {
        match &self.job {
            Some(_) => remove_renamed(&self.unfinished(step)),
            None => Ok(()),
        }
    }

    fn drop_unfinished(&self, is_past: impl Fn(u64) -> bool) -> io::Result<()> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let step = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_prefix("step-")?.split('.').next()?.parse().ok());
            if is_unfinished(&path) && !self.is_of_later(&path) && step.is_some_and(&is_past) {
                remove_renamed(&path)?;
            }
        }
        Ok(())
    }

    /// Makes the folder into which ranks write the shards of a checkpoint, unless another rank has. The run's or the job's
    /// own folder is never made anew.
    ///
    /// **Errors**: what the system says; the storage is gone, the folder is another job's, or the job's quota is exhausted.
    pub fn make_unfinished(&self, step: u64) -> Result<PathBuf, CheckpointError> {
        self.verify()?;
        self.check_quota(step)?;
        let dir = self.unfinished(step);
        for dir in [&self.dir, &dir] {
            make_dir(dir).map_err(|error| CheckpointError::of_storage(dir, error))?;
        }
        Ok(dir)
    }

    /// Checks that the job's quota takes another checkpoint as large as the newest one, before the first rank writes to it.
    fn check_quota(&self, step: u64) -> Result<(), CheckpointError> {
        let (Some(quota), Some(job)) = (self.quota, &self.job) else { return Ok(()) };
        if self.unfinished(step).exists() {
            return Ok(());
        }
        let failed = |error| CheckpointError::of_storage(job.path(), error);
        let newest =
            self.list().map_err(failed)?.last().map_or(Ok(0), |&newest| bytes_below(&self.committed(newest)));
        let (used, next) = (bytes_below(job.path()).map_err(failed)?, newest.map_err(failed)?);
        if used + next <= quota {
            return Ok(());
        }
        let (quota, used, next) = (size(quota), size(used), size(next));
        let words = format!(
            "expected room for a checkpoint of {next} within the job's quota of {quota}, got {used} in use"
        );
        Err(failed(io::Error::new(io::ErrorKind::QuotaExceeded, words)))
    }

    /// Removes checkpoints beyond those that the orchestrator may go back to, the oldest first and the best one last, until the
    /// job's quota takes the next two: one is written while the other is committed.
    fn make_room(&self, fresh: u64) -> io::Result<()> {
        let (Some(quota), Some(job)) = (self.quota, &self.job) else { return Ok(()) };
        let next = bytes_below(&self.committed(fresh))?;
        let best = self.best_of(fresh);
        let is_needed =
            |step: u64| step >= self.pinned.newest || step == self.pinned.earlier || step == fresh;
        let mut old: Vec<u64> = self.list()?.into_iter().filter(|&step| !is_needed(step)).collect();
        old.sort_by_key(|&step| (Some(step) == best, step));
        for step in old {
            if bytes_below(job.path())? + 2 * next <= quota {
                break;
            }
            tracing::info!(step, "the checkpoint makes room within the job's quota of {}", size(quota));
            self.drop(step)?;
        }
        Ok(())
    }

    /// Checks that it is in the folder of its job in the storage, if it is to be in one.
    ///
    /// **Errors**: as [`JobFolder::verify`].
    pub fn verify(&self) -> Result<(), super::FolderError> {
        self.job.as_ref().map_or(Ok(()), JobFolder::verify)
    }

    fn rename_finished(
        &self,
        (manifest, companions): (&Manifest, &Companions),
        from: &Path,
        to: &Path,
    ) -> io::Result<()> {
        failpoint("checkpoint.shards-saved");
        for (name, bytes) in companions.iter() {
            write_synced(&from.join(name), bytes)?;
        }
        let companions = companions.iter().map(|(name, bytes)| ShardFile::of(name, bytes)).collect();
        let manifest = Manifest { companions, ..manifest.clone() };
        let text = serde_json::to_string_pretty(&manifest).map_err(io::Error::other)?;
        failpoint("checkpoint.manifest-begins");
        write_synced(&from.join(MANIFEST_FILE), text.as_bytes())?;
        sync_dir(from)?;
        failpoint("checkpoint.manifest-synced");
        if let Some(remote) = &self.remote {
            remote.commit(&manifest, from).map_err(io::Error::other)?;
        }
        std::fs::rename(from, to)?;
        failpoint("checkpoint.renamed");
        sync_dir(&self.dir)?;
        failpoint("checkpoint.committed");
        Ok(())
    }

    /// All but the newest up to the pinned one, those after it, and the one that has just been committed: those of later steps may
    /// be older. The one before the pinned one stays too, if others that the orchestrator never heard of are between them, and so
    /// does that with the lowest validation loss.
    fn drop_oldest(&self, keep: usize, fresh: Option<u64>) -> io::Result<()> {
        let mut steps = self.list()?;
        if let Some(remote) = &self.remote {
            steps.extend(remote.list().map_err(io::Error::other)?);
            steps.sort_unstable();
            steps.dedup();
        }
        let known = match self.pinned.newest {
            0 => steps.len(),
            pinned => steps.partition_point(|step| *step <= pinned),
        };
        let best = steps.last().and_then(|&step| self.best_of(step));
        let old = steps[..known.saturating_sub(keep.max(1))].iter();
        let stays = |step: u64| Some(step) == fresh || step == self.pinned.earlier || Some(step) == best;
        old.filter(|step| !stays(**step)).try_for_each(|&step| self.drop(step))
    }

    /// The step after which the validation loss was lowest, as the checkpoint of a step knows it, if its recipe keeps that one.
    fn best_of(&self, step: u64) -> Option<u64> {
        let manifest = Manifest::read(&self.committed(step)).ok()?;
        let recipe: toml::Table = manifest.recipe.parse().ok()?;
        let keeps = recipe.get("checkpoint")?.get("keep_best")?.as_bool()?;
        manifest.watch.validation.best.filter(|_| keeps).map(|best| best.step)
    }

    fn drop(&self, step: u64) -> io::Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(step).map_err(io::Error::other)?;
        }
        if !self.committed(step).exists() {
            return Ok(());
        }
        let doomed = self.dir.join(format!("step-{step:08}.dropped{UNFINISHED_SUFFIX}"));
        // A process that was killed here before may have left it.
        remove(&doomed)?;
        std::fs::rename(self.committed(step), &doomed)?;
        failpoint("checkpoint.dropped");
        std::fs::remove_dir_all(doomed)
    }
}

/// Removes a folder in which somebody may still create files: by another name first, so that nobody finds it.
pub(super) fn remove_renamed(dir: &Path) -> io::Result<()> {
    let mut doomed = dir.as_os_str().to_owned();
    doomed.push(REMOVED);
    let doomed = PathBuf::from(doomed);
    remove(&doomed)?;
    match std::fs::rename(dir, &doomed) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed?,
    }
    std::fs::remove_dir_all(doomed)
}

/// Removes a folder, if it is there.
fn remove(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
