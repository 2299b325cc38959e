//! A formation that has ended while its job goes on: the replicas that its workers hold, queried before the job re-forms.
//!
//! Volatile, as the formation was: a restarted orchestrator learns it again from workers that attach. What a job can resume
//! from is decided in [`crate::recovery`].

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank, Topology};

use super::facts::Formed;
use super::formation::Formation;
use super::jobs::{JobRecord, Phase};
use super::{Core, Effect, Left, WorkerCommand};
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
}

impl Survivors {
    fn new(waiting: BTreeSet<u64>, until_ms: u64) -> Self {
        Survivors { waiting, replicas: BTreeMap::new(), until_ms, keepers_until_ms: 0 }
    }

    fn is_waiting(&self, now: u64) -> bool {
        !self.waiting.is_empty() && now < self.until_ms
    }
}

impl Core {
    /// The formation of a job has broken: its workers are asked by their release.
    pub(super) fn query_survivors(&mut self, job: JobId, now: u64) {
        let Some(workers) = self.survivor_workers(job) else { return };
        let waiting = workers.into_iter().filter(|&worker| self.members.get(worker).is_some()).collect();
        self.survivors.insert(job, Survivors::new(waiting, now + self.times.left_ms()));
    }

    /// A worker is back with ranks of a broken formation, or what it keeps of their state: it will say that. Whether there is such a
    /// formation.
    pub(super) fn await_survivor(&mut self, worker: u64, formation: FormationId, now: u64) -> bool {
        let record = self.jobs.all.get(&formation.job);
        let is_latest = record.is_some_and(|record| record.generation() == formation.generation);
        let survivors = self.survivors.get_mut(&formation.job).filter(|_| is_latest);
        if let Some(survivors) = survivors {
            survivors.waiting.insert(worker);
            survivors.until_ms = survivors.until_ms.max(now + self.times.left_ms());
            return true;
        }
        false
    }

    /// A worker that attaches keeps something of a formation that it has left. Before it says what, it repeats what its ranks had
    /// reported, for no rank of another layout can; so it is asked again.
    pub(super) fn left_before(&mut self, worker: u64, left: Left, now: u64) {
        let formation = left.formation;
        if self.await_survivor(worker, formation, now) {
            let reason = "the job goes on".to_owned();
            self.send(worker, WorkerCommand::Release { formation, reason, keep: true });
        } else if let Some((formation, place)) = self.brings(worker, formation.job) {
            self.send(worker, WorkerCommand::Bring { formation, place });
        } else {
            self.left(worker, left);
        }
    }

    /// The running formation of a job, if a worker without a rank of it has to bring it something, and by what it goes there.
    pub(super) fn brings(&self, worker: u64, job: JobId) -> Option<(FormationId, Rank)> {
        let formed = self.jobs.all.get(&job).and_then(JobRecord::running)?;
        let (place, _) = formed.bringers().find(|(_, bringer)| *bringer == worker)?;
        let is_needed = self.formations.get(&job).is_some_and(Formation::needs_bringers);
        is_needed.then(|| (formed.id(job), place))
    }

    /// The jobs that cannot begin without what a worker brings, which has no rank of them. Where a step has been made it has brought that.
    pub(super) fn begin_with(&self, worker: u64) -> Vec<JobId> {
        let starting = self.formations.iter().filter(|(_, formation)| formation.is_starting());
        let idle = starting.map(|(&job, _)| job).filter(|job| !self.jobs.all[job].attempts.has_stepped);
        idle.filter(|&job| self.brings(worker, job).is_some()).collect()
    }

    /// What ranks of a formation that was left had reported, as a worker of it says: it counts until the job is formed again.
    pub(super) fn report_of_left(&mut self, worker: u64, of: FormationId, event: RankEvent) {
        let is_known = || self.in_memory_of(of.job).is_some_and(|formed| formed.has(worker));
        if let RankEvent::StepDone { report } = event
            && self.hears_left(of)
            && is_known()
        {
            self.effects.push(Effect::Record { job: of.job, report: Box::new(report) });
        }
    }

    /// Whether the workers of a formation that has ended are asked what they keep of it.
    pub fn hears_left(&self, FormationId { job, generation }: FormationId) -> bool {
        let record = self.jobs.all.get(&job).filter(|record| record.generation() == generation);
        record.is_some_and(|record| record.phase == Phase::Broken) && self.survivors.contains_key(&job)
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
        let Some(formed) = &record.formed else { return };
        let lost: BTreeSet<u64> = record.lost.iter().filter_map(|rank| formed.place_of(*rank)).collect();
        let waiting: BTreeSet<u64> = formed.workers().difference(&lost).copied().collect();
        waiting.iter().for_each(|&worker| self.members.expect(worker, now, self.times));
        self.survivors.insert(job, Survivors::new(waiting, now + self.times.adoption_ms()));
    }

    /// Everybody who may have parts of the state of a broken formation that keeps it in memory.
    fn survivor_workers(&self, job: JobId) -> Option<BTreeSet<u64>> {
        self.in_memory_of(job).map(Formed::workers)
    }

    /// The formation of a job whose state is in memory.
    fn in_memory_of(&self, job: JobId) -> Option<&Formed> {
        self.jobs.all.get(&job).filter(|record| record.resumes_from_memory())?.formed.as_ref()
    }

    /// A worker has left a formation, and says what it keeps. One that is no member any more has said it too late: nobody can be told
    /// where it is. When it attaches it says it again.
    pub(super) fn left(&mut self, worker: u64, Left { formation, replicas }: Left) {
        if self.members.get(worker).is_none() {
            return;
        }
        let FormationId { job, generation } = formation;
        let record = self.jobs.all.get(&job);
        let is_asked = record.is_some_and(JobRecord::resumes_from_memory);
        let is_current = is_asked && record.is_some_and(|record| record.generation() == generation);
        let goes_on_here = record.and_then(JobRecord::running);
        let goes_on_here = goes_on_here.is_some_and(|formed| formed.places.contains(&worker))
            || self.brings(worker, job).is_some();
        if let Some(survivors) = self.survivors.get_mut(&job).filter(|_| is_current) {
            survivors.waiting.remove(&worker);
            survivors.replicas.insert(worker, replicas);
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
            survivors.replicas.remove(&worker);
        }
    }

    /// Whether reports of a broken formation's survivors are still outstanding.
    pub(super) fn awaits_survivors(&self, job: JobId, now: u64) -> bool {
        self.survivors.get(&job).is_some_and(|survivors| survivors.is_waiting(now))
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
        let survivors = self.survivors.get(&job).filter(|_| record.resumes_from_memory());
        let Some(survivors) = survivors else { return Err(None) };
        let layout_of = |generation, step| record.layout_of(generation, step);
        match newest_complete(&survivors.replicas, (topology, places), layout_of) {
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

    /// In which layout a state is, if it is of the latest formation, or the one that this began with.
    fn layout_of(&self, generation: Generation, step: u64) -> Option<Topology> {
        let formed = self.formed.as_ref()?;
        let base =
            formed.memory.as_ref().filter(|memory| (memory.generation, memory.step) == (generation, step));
        match base {
            Some(memory) => Some(memory.axes.unwrap_or(formed.topology)),
            None => (formed.generation == generation).then_some(formed.topology),
        }
    }
}
