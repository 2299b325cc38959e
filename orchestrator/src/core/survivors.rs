//! A broken formation: the replicas its surviving workers hold, queried before the job re-forms.
//!
//! Volatile, as the formation was: a restarted orchestrator learns it again from workers that attach. What a job can resume
//! from is decided in [`crate::recovery`].

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank, Topology};

use super::facts::Formed;
use super::jobs::{JobRecord, Phase};
use super::reshard::Reshard;
use super::{Core, Left, WorkerCommand};
use crate::recovery::{InMemory, ReplicaShard, newest_complete};

/// What is known of the workers of a broken formation.
#[derive(Debug)]
pub(super) struct Survivors {
    /// Members that have not reported their replicas yet.
    waiting: BTreeSet<u64>,
    /// By worker, what it keeps.
    replicas: BTreeMap<u64, Vec<ReplicaShard>>,
    /// Deadline of the wait for them.
    until_ms: u64,
    /// Until when workers that are not members may come back with what they keep.
    keepers_until_ms: u64,
    /// What is written down from memory, for another layout.
    pub(super) reshard: Option<Reshard>,
    /// It could not be written down.
    pub(super) has_failed: bool,
}

impl Survivors {
    fn new(waiting: BTreeSet<u64>, until_ms: u64) -> Self {
        Survivors {
            waiting,
            replicas: BTreeMap::new(),
            until_ms,
            keepers_until_ms: 0,
            reshard: None,
            has_failed: false,
        }
    }

    fn is_waiting(&self, now: u64) -> bool {
        !self.waiting.is_empty() && now < self.until_ms
    }
}

impl Core {
    /// The formation of a job has broken: its workers are asked by their release.
    pub(super) fn query_survivors(&mut self, job: JobId, now: u64) {
        let Some(places) = self.survivor_places(job) else { return };
        let waiting = places.into_iter().filter(|&worker| self.members.get(worker).is_some()).collect();
        self.survivors.insert(job, Survivors::new(waiting, now + self.times.left_ms()));
    }

    /// A worker that was lost is back with ranks of a broken formation: it will say what it keeps.
    pub(super) fn await_survivor(&mut self, worker: u64, formation: FormationId, now: u64) {
        let record = self.jobs.all.get(&formation.job);
        let is_latest = record.is_some_and(|record| record.generation() == formation.generation);
        if let Some(survivors) = self.survivors.get_mut(&formation.job).filter(|_| is_latest) {
            survivors.waiting.insert(worker);
            survivors.until_ms = survivors.until_ms.max(now + self.times.left_ms());
        }
    }

    /// A worker of a broken formation has fallen silent: it may be back, with state that nobody else has.
    pub(super) fn expect_keepers(&mut self, job: JobId, now: u64) {
        if let Some(survivors) = self.survivors.get_mut(&job) {
            survivors.keepers_until_ms = now + self.times.adoption_ms();
        }
    }

    /// Whether a job that would lose its state in memory waits for workers that may come back with it.
    pub(super) fn awaits_keepers(&self, job: JobId, topology: &Topology, places: &[u64], now: u64) -> bool {
        let may_return = |survivors: &Survivors| now < survivors.keepers_until_ms;
        let record = &self.jobs.all[&job];
        let was_in_memory = record.formed.as_ref().is_some_and(|formed| formed.memory.is_some());
        (record.attempts.has_stepped || was_in_memory)
            && self.survivors.get(&job).is_some_and(may_return)
            && self.in_memory(job, topology, places).is_err()
    }

    /// A restarted orchestrator finds a job broken: workers of its formation may still hold replicas.
    pub(super) fn expect_survivors(&mut self, job: JobId, now: u64) {
        let Some(record) = self.jobs.all.get(&job).filter(|record| record.resumes_from_memory()) else {
            return;
        };
        let ranks = record.formed.iter().flat_map(Formed::ranks);
        let survivors = ranks.filter(|(rank, _)| !record.lost.contains(rank));
        let waiting: BTreeSet<u64> = survivors.map(|(_, worker)| worker).collect();
        waiting.iter().for_each(|&worker| self.members.expect(worker, now, self.times));
        self.survivors.insert(job, Survivors::new(waiting, now + self.times.adoption_ms()));
    }

    /// By rank, the workers of a broken formation that keeps its state in memory.
    fn survivor_places(&self, job: JobId) -> Option<Vec<u64>> {
        let record = self.jobs.all.get(&job).filter(|record| record.resumes_from_memory())?;
        Some(record.formed.as_ref()?.places.clone())
    }

    /// A worker has left a formation, and says what it keeps.
    pub(super) fn left(&mut self, worker: u64, Left { formation, replicas }: Left) {
        let FormationId { job, generation } = formation;
        let record = self.jobs.all.get(&job);
        let is_asked = record.is_some_and(JobRecord::resumes_from_memory);
        let is_current = is_asked && record.is_some_and(|record| record.generation() == generation);
        let goes_on_here = record.and_then(JobRecord::running);
        let goes_on_here = goes_on_here.is_some_and(|formed| formed.places.contains(&worker));
        if let Some(survivors) = self.survivors.get_mut(&job).filter(|_| is_current) {
            survivors.waiting.remove(&worker);
            survivors.replicas.insert(worker, replicas);
            // It may have missed the order to write shards.
            survivors.reshard = None;
            self.may_recover.insert(job);
        } else if !is_asked && !goes_on_here {
            let reason = "the job continues without the replicas".to_owned();
            self.send(worker, WorkerCommand::Release { formation, reason, keep: false });
        }
    }

    /// A worker is not a member any more.
    pub(super) fn forget_survivor(&mut self, worker: u64) {
        for survivors in self.survivors.values_mut() {
            survivors.waiting.remove(&worker);
            if survivors.replicas.remove(&worker).is_some() {
                survivors.reshard = None;
            }
        }
    }

    /// Whether reports of a broken formation's survivors are still outstanding.
    pub(super) fn awaits_survivors(&self, job: JobId, now: u64) -> bool {
        self.survivors.get(&job).is_some_and(|survivors| survivors.is_waiting(now))
    }

    /// The newest state that is whole in the memory of workers at these places.
    pub(super) fn newest_complete_of(&self, job: JobId, places: &[u64]) -> Result<InMemory, Option<Rank>> {
        let record = &self.jobs.all[&job];
        let nothing = BTreeMap::new();
        let replicas = self.survivors.get(&job).map_or(&nothing, |survivors| &survivors.replicas);
        newest_complete(replicas, places, |generation, step| record.is_of_history(generation, step))
    }

    /// Where a formation of these axes at these places resumes from: its state in memory, if that is whole and not older than
    /// the newest checkpoint. Otherwise why not, if there is anything to report.
    pub(super) fn in_memory(
        &self,
        job: JobId,
        topology: &Topology,
        places: &[u64],
    ) -> Result<InMemory, Option<String>> {
        let record = &self.jobs.all[&job];
        let (Some(before), true) = (&record.formed, record.resumes_from_memory()) else { return Err(None) };
        if before.topology != *topology {
            return Err(None);
        }
        match self.newest_complete_of(job, places) {
            Ok(whole) if whole.step >= record.last_checkpoint => Ok(whole),
            Ok(_) => Err(None),
            Err(None) => Err(None),
            Err(Some(rank)) => Err(Some(format!(
                "no worker holds the state of rank {rank} in memory: its buddy is lost too"
            ))),
        }
    }
}

impl JobRecord {
    /// Whether the job has lost a formation whose workers keep its state in memory.
    fn resumes_from_memory(&self) -> bool {
        self.phase == Phase::Broken && self.in_memory
    }

    /// Whether a replica is of the latest formation, or of the state it resumed from.
    fn is_of_history(&self, generation: Generation, step: u64) -> bool {
        self.formed.as_ref().is_some_and(|formed| {
            let base = formed.memory.as_ref().map(|memory| (memory.generation, memory.step));
            formed.generation == generation || base == Some((generation, step))
        })
    }
}
