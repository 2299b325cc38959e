//! The shared storage as the simulated workers see it: shards that are written, checkpoints that are committed, weights.
//! Follows `runtime::checkpoint`'s `CheckpointFolder` and `JobFolder` call by call. Knows no orchestrator.

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::checkpoint::Pinned;
use contraflow_runtime::topology::{Generation, JobId, Rank};

/// The state after a step, identified by how it came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Trained {
    pub(super) step: u64,
    /// Sequences used.
    pub(super) cursor: u64,
    /// A digest of every batch that led here.
    pub(super) digest: u64,
}

/// Which checkpoints stay: this many of the newest up to the pinned one, all after it, and the one pinned before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retention {
    pub(super) keep: usize,
    pub(super) pinned: Pinned,
}

/// All folders, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Storage {
    folders: BTreeMap<String, Folder>,
    /// Nodes on which nothing can be written.
    pub(super) full: BTreeSet<usize>,
}

impl Storage {
    /// The folder that a job claims: its own, or a fresh one. With `takes_any` it does not look whose it is.
    pub(super) fn claim(&mut self, job: JobId, takes_any: bool) -> &mut Folder {
        let usual = job.to_string();
        let own = format!("{usual}-{:016x}", job.bits());
        let is_own = |name: &String| self.folders.get(name).is_some_and(|folder| folder.owner == job);
        let is_free = |name: &String| !self.folders.contains_key(name);
        let name = match (is_own(&own), is_own(&usual) || is_free(&usual) || takes_any) {
            (false, true) => usual,
            _ => own,
        };
        self.folders.entry(name).or_insert_with(|| Folder { owner: job, ..Folder::default() })
    }

    /// The folder that is a job's, to change it.
    pub(super) fn of_mut(&mut self, job: JobId) -> Option<&mut Folder> {
        self.folders.values_mut().find(|folder| folder.owner == job)
    }

    /// The folder that is a job's.
    pub(super) fn of(&self, job: JobId) -> Option<&Folder> {
        self.folders.values().find(|folder| folder.owner == job)
    }
}

/// A checkpoint.
#[derive(Clone, Copy, Debug)]
struct Committed {
    trained: Trained,
    /// The generation that made it.
    generation: Generation,
    /// Whose part is not what was written, if one is not.
    damaged: Option<Rank>,
}

/// One job's folder.
#[derive(Clone, Debug, Default)]
pub(super) struct Folder {
    /// Whose it is.
    pub(super) owner: JobId,
    /// The latest formation that has begun in it.
    begun: Generation,
    /// By step.
    committed: BTreeMap<u64, Committed>,
    /// By step and generation: shards by rank.
    unfinished: BTreeMap<(u64, Generation), BTreeMap<Rank, Trained>>,
    /// Those of which a later formation has removed shards: their writers may not know, and go on.
    removed: BTreeSet<(u64, Generation)>,
    /// Exported files by generation and rank.
    exported: BTreeMap<Generation, Vec<Rank>>,
    /// Generation whose weights stand.
    pub(super) placed: Option<Generation>,
}

impl Folder {
    /// The checkpoint of a step.
    pub(super) fn stands(&self, step: u64) -> Option<Trained> {
        self.committed.get(&step).map(|committed| committed.trained)
    }

    /// The oldest checkpoint.
    pub(super) fn oldest(&self) -> Option<Trained> {
        self.committed.first_key_value().map(|(_, committed)| committed.trained)
    }

    /// The part of a checkpoint that is damaged, if one is.
    pub(super) fn damaged(&self, step: u64) -> Option<Rank> {
        self.committed.get(&step)?.damaged
    }

    /// A part of the newest checkpoint rots; returns which checkpoint that is.
    pub(super) fn rot(&mut self, rank: Rank) -> Option<u64> {
        let (&step, newest) = self.committed.iter_mut().next_back()?;
        newest.damaged = Some(rank);
        Some(step)
    }

    /// A formation begins in it; whether none after it has.
    pub(super) fn begin(&mut self, generation: Generation) -> bool {
        let is_next = generation > self.begun;
        self.begun = self.begun.max(generation);
        is_next
    }

    /// The worker of rank 0 makes the folder ready for a formation.
    pub(super) fn tidy(&mut self, generation: Generation, retention: Retention, newest: Option<u64>) {
        let is_later = |(_, of): &(u64, Generation)| *of > generation;
        self.removed.extend(self.unfinished.keys().copied().filter(|of| !is_later(of)));
        self.unfinished.retain(|of, _| is_later(of));
        self.exported.retain(|of, _| *of > generation);
        self.committed
            .retain(|step, by| newest.is_none_or(|newest| *step <= newest) || by.generation >= generation);
        self.drop_oldest(retention, None);
    }

    fn drop_oldest(&mut self, Retention { keep, pinned }: Retention, fresh: Option<u64>) {
        let known = match pinned.newest {
            0 => self.committed.len(),
            pinned => self.committed.range(..=pinned).count(),
        };
        let old: BTreeSet<u64> = self.committed.keys().copied().take(known.saturating_sub(keep)).collect();
        self.committed
            .retain(|step, _| Some(*step) == fresh || *step == pinned.earlier || !old.contains(step));
    }

    pub(super) fn save(&mut self, of: Generation, rank: Rank, trained: Trained) {
        self.unfinished.entry((trained.step, of)).or_default().insert(rank, trained);
    }

    pub(super) fn export(&mut self, generation: Generation, rank: Rank) {
        self.exported.entry(generation).or_default().push(rank);
    }

    /// Commits a checkpoint of this many ranks.
    ///
    /// **Errors**: a message. A defect of those who asked for it is `Err(Err(..))`, what a storage says `Err(Ok(..))`.
    pub(super) fn commit(
        &mut self,
        (step, of): (u64, Generation),
        world: usize,
        retention: Retention,
    ) -> Result<Trained, Result<String, String>> {
        if let Some(stands) = self.stands(step) {
            return Ok(stands);
        }
        let shards = self.unfinished.remove(&(step, of));
        let shards = shards.ok_or_else(|| Ok(format!("step {step}: no such folder")))?;
        if self.removed.contains(&(step, of)) {
            return Err(Ok(format!("step {step}: shards are missing")));
        }
        if shards.len() != world || shards.keys().copied().ne(Rank::all(world)) {
            return Err(Err(format!(
                "step {step} is committed with shards of {:?} of {world}",
                shards.keys()
            )));
        }
        let one = shards[&Rank::ZERO];
        if shards.values().any(|shard| *shard != one) {
            return Err(Err(format!("step {step} is committed with shards of different histories")));
        }
        self.committed.insert(step, Committed { trained: one, generation: of, damaged: None });
        self.drop_oldest(retention, Some(step));
        Ok(one)
    }

    /// Gives the exported weights their name.
    ///
    /// **Errors**: a message.
    pub(super) fn place(&mut self, generation: Generation, world: usize) -> Result<(), String> {
        if self.placed.is_some() {
            return Ok(());
        }
        let files = self.exported.get(&generation).map_or(0, Vec::len);
        if files < world {
            return Err(format!("{files} files of {world}"));
        }
        self.placed = Some(generation);
        Ok(())
    }
}
