//! A broken formation: what its workers still keep in memory, asked for before the job is formed anew.
//!
//! Volatile, like the formation was: an orchestrator that starts hears it again from workers that attach. What a job can go
//! on from is decided in [`crate::recovery`].

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank, Topology};

use super::facts::Formed;
use super::jobs::{JobRecord, Phase};
use super::writing_down::WritingDown;
use super::{ADOPTION_MS, Core, LEFT_MS, Left, Word};
use crate::recovery::{InMemory, KeptShard, newest_whole};

/// What is known of the workers of a broken formation.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Workers that are members and have not said what they keep.
    waiting: BTreeSet<u64>,
    /// By worker, what it keeps.
    kept: BTreeMap<u64, Vec<KeptShard>>,
    /// They are waited for no longer.
    until_ms: u64,
    /// What is written down from memory, for another layout.
    pub(super) writing: Option<WritingDown>,
    /// It could not be written down.
    pub(super) is_read_only: bool,
}

impl Leaving {
    fn new(waiting: BTreeSet<u64>, until_ms: u64) -> Self {
        Leaving { waiting, kept: BTreeMap::new(), until_ms, writing: None, is_read_only: false }
    }

    fn is_waiting(&self, now: u64) -> bool {
        !self.waiting.is_empty() && now < self.until_ms
    }
}

impl Core {
    /// The formation of a job has broken: its workers are asked by their release.
    pub(super) fn ask_for_kept(&mut self, job: JobId, now: u64) {
        let Some(places) = self.kept_places(job) else { return };
        let waiting = places.into_iter().filter(|&worker| self.members.get(worker).is_some()).collect();
        self.leaving.insert(job, Leaving::new(waiting, now + LEFT_MS));
    }

    /// An orchestrator that starts finds a job broken: whoever was in its formation may still keep something.
    pub(super) fn expect_kept(&mut self, job: JobId, now: u64) {
        let Some(record) = self.jobs.all.get(&job).filter(|record| record.goes_on_from_memory()) else {
            return;
        };
        let ranks = record.formed.iter().flat_map(Formed::ranks);
        let survivors = ranks.filter(|(rank, _)| !record.lost.contains(rank));
        let waiting: BTreeSet<u64> = survivors.map(|(_, worker)| worker).collect();
        waiting.iter().for_each(|&worker| self.members.expect(worker, now));
        self.leaving.insert(job, Leaving::new(waiting, now + ADOPTION_MS));
    }

    /// By rank, the workers of a broken formation that keeps its state in memory.
    fn kept_places(&self, job: JobId) -> Option<Vec<u64>> {
        let record = self.jobs.all.get(&job).filter(|record| record.goes_on_from_memory())?;
        Some(record.formed.as_ref()?.places.clone())
    }

    /// A worker has left a formation, and says what it keeps.
    pub(super) fn left(&mut self, worker: u64, Left { formation, kept }: Left) {
        let FormationId { job, generation } = formation;
        let record = self.jobs.all.get(&job);
        let is_asked = record.is_some_and(JobRecord::goes_on_from_memory);
        let is_current = is_asked && record.is_some_and(|record| record.generation() == generation);
        let goes_on_here = record.and_then(JobRecord::running);
        let goes_on_here = goes_on_here.is_some_and(|formed| formed.places.contains(&worker));
        if let Some(leaving) = self.leaving.get_mut(&job).filter(|_| is_current) {
            leaving.waiting.remove(&worker);
            leaving.kept.insert(worker, kept);
            // Whatever it was about to write it may not have heard of.
            leaving.writing = None;
            self.is_open = true;
        } else if !is_asked && !goes_on_here {
            let reason = "the job goes on without what is kept".to_owned();
            self.tell(worker, Word::Release { formation, reason, keep: false });
        }
    }

    /// A worker is not a member any more.
    pub(super) fn forget_kept(&mut self, worker: u64) {
        for leaving in self.leaving.values_mut() {
            leaving.waiting.remove(&worker);
            if leaving.kept.remove(&worker).is_some() {
                leaving.writing = None;
            }
        }
    }

    /// Whether it is still to be heard what the workers of a broken formation keep.
    pub(super) fn awaits_kept(&self, job: JobId, now: u64) -> bool {
        self.leaving.get(&job).is_some_and(|leaving| leaving.is_waiting(now))
    }

    /// The newest state that is whole in the memory of workers at these places.
    pub(super) fn whole_of(&self, job: JobId, places: &[u64]) -> Result<InMemory, Option<Rank>> {
        let record = &self.jobs.all[&job];
        let nothing = BTreeMap::new();
        let kept = self.leaving.get(&job).map_or(&nothing, |leaving| &leaving.kept);
        newest_whole(kept, places, |generation, step| record.is_of_history(generation, step))
    }

    /// Where a formation of these axes at these places goes on from: its state in memory, if that is whole and not older than
    /// the newest checkpoint. Else why not, in words; nothing if there is nothing to say.
    pub(super) fn in_memory(
        &self,
        job: JobId,
        topology: &Topology,
        places: &[u64],
    ) -> Result<InMemory, Option<String>> {
        let record = &self.jobs.all[&job];
        let (Some(before), true) = (&record.formed, record.goes_on_from_memory()) else { return Err(None) };
        if before.topology != *topology {
            return Err(None);
        }
        match self.whole_of(job, places) {
            Ok(whole) if whole.step >= record.kept => Ok(whole),
            Ok(_) => Err(None),
            Err(None) => Err(None),
            Err(Some(rank)) => Err(Some(format!(
                "nobody has the state of rank {rank} in memory any more: its buddy is lost too"
            ))),
        }
    }
}

impl JobRecord {
    /// Whether the job has lost a formation whose workers keep its state in memory.
    fn goes_on_from_memory(&self) -> bool {
        self.phase == Phase::Broken && self.in_memory
    }

    /// Whether a state that somebody keeps is of the latest formation, or the one that it went on from.
    fn is_of_history(&self, generation: Generation, step: u64) -> bool {
        self.formed.as_ref().is_some_and(|formed| {
            let base = formed.memory.as_ref().map(|memory| (memory.generation, memory.step));
            formed.generation == generation || base == Some((generation, step))
        })
    }
}
