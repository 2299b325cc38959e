//! What workers keep in memory of their ranks' state and of that of others, and how ranks resume from it. Follows the workers'
//! `replicas` and their host's `memory`.
//!
//! The ranks of one formation that have made a step hold the same digest, so one represents all.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use contraflow_proto::StepReport;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use super::mutation::Mutation;
use super::plan::BATCH;
use super::storage::Trained;
use super::worker::Worker;
use super::{RankTask, World};
use crate::core::Left;
use crate::core::facts::Formed;
use crate::recovery::{InMemory, ReplicaShard};

/// Typical transfer time of a part to a buddy or back, and how rarely it is late while there are faults. **Units**: ms.
const TRAVEL_MS: u64 = 60;
const LATE_MS: u64 = 2_000;
const ONE_IN: u64 = 16;

/// Parts on their way to a buddy.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    /// The worker that sends them.
    from: u64,
    trained: Trained,
    ranks: Vec<Rank>,
    /// Rank and step of reports of earlier steps, for a buddy that is new.
    reports: Vec<(Rank, u64)>,
}

/// What a worker keeps of one job.
#[derive(Clone, Debug, Default)]
pub(super) struct SimReplicas {
    /// The latest formation that was here.
    generation: Generation,
    /// By generation and step: the state, and whose parts of it are here.
    parts: BTreeMap<(Generation, u64), (Trained, BTreeSet<Rank>)>,
    /// By step, ranks whose report of it may not be durable.
    reports: BTreeMap<u64, BTreeSet<Rank>>,
}

impl SimReplicas {
    fn put(&mut self, (generation, trained): (Generation, Trained), ranks: &[Rank]) {
        self.put_parts((generation, trained), ranks);
        self.reports.entry(trained.step).or_default().extend(ranks);
    }

    fn put_parts(&mut self, (generation, trained): (Generation, Trained), ranks: &[Rank]) {
        let (_, all) =
            self.parts.entry((generation, trained.step)).or_insert_with(|| (trained, BTreeSet::new()));
        all.extend(ranks);
    }

    fn get(&self, (generation, step): (Generation, u64), rank: Rank) -> Option<Trained> {
        let (trained, ranks) = self.parts.get(&(generation, step))?;
        ranks.contains(&rank).then_some(*trained)
    }

    /// Whether a formation after this one has been here.
    pub(super) fn is_after(&self, generation: Generation) -> bool {
        self.generation > generation
    }

    fn reports_of(&self, ranks: &[Rank]) -> Vec<(Rank, u64)> {
        self.all_reports().into_iter().filter(|(rank, _)| ranks.contains(rank)).collect()
    }

    /// Every report that may not be durable.
    pub(super) fn all_reports(&self) -> Vec<(Rank, u64)> {
        let all = self.reports.iter();
        all.flat_map(|(&step, reported)| reported.iter().map(move |&rank| (rank, step))).collect()
    }

    pub(super) fn durable(&mut self, step: u64) {
        self.reports = self.reports.split_off(&(step + 1));
    }

    /// As it is reported to an orchestrator.
    pub(super) fn left(&self, job: JobId) -> Left {
        let shards = self.parts.iter().flat_map(|(&(generation, step), (_, ranks))| {
            ranks.iter().map(move |&rank| ReplicaShard { generation, step, rank })
        });
        Left { formation: FormationId::new(job, self.generation), replicas: shards.collect() }
    }
}

impl World {
    fn replicas(&mut self, id: u64, job: JobId) -> Option<&mut SimReplicas> {
        Some(self.workers.get_mut(&id)?.memory.entry(job).or_default())
    }

    /// A formation begins in a worker: from what is kept, or with nothing.
    pub(super) fn enter_memory(&mut self, id: u64, job: JobId, formed: &Formed) {
        let Some(replicas) = self.replicas(id, job) else { return };
        match &formed.memory {
            // Of another layout they were said when that was left.
            Some(InMemory { axes: Some(_), .. }) => replicas.reports.clear(),
            Some(memory) => drop(replicas.reports.split_off(&(memory.step + 1))),
            None => *replicas = SimReplicas::default(),
        }
        replicas.generation = formed.generation;
    }

    fn travel(&mut self) -> u64 {
        let is_late = self.random.is_one_in(ONE_IN) && !self.is_calm;
        let most = if is_late { LATE_MS } else { TRAVEL_MS };
        self.random.between(1, most + 1)
    }

    /// A worker's ranks have made a step: their parts are kept here and sent to their buddies.
    pub(super) fn keep_step(&mut self, id: u64, of: FormationId, formed: &Rc<Formed>, ranks: &[Rank]) {
        let FormationId { job, generation } = of;
        let Some(trained) = self.group(id, of).map(|group| group.trained) else { return };
        let is_first = trained.step == formed.resume_step + 1;
        let latest = if self.breaks(Mutation::LetsGoEarly) { trained.step } else { trained.step - 1 };
        let has_buddies = !formed.buddies.is_empty();
        let Some(replicas) = self.replicas(id, job) else { return };
        if !is_first {
            // Every buddy had the step before when this one was made.
            replicas.parts = replicas.parts.split_off(&(generation, latest));
        }
        replicas.put((generation, trained), ranks);
        let mut to: BTreeMap<u64, Vec<Rank>> = BTreeMap::new();
        for &rank in ranks.iter().filter(|_| has_buddies) {
            to.entry(formed.places[formed.buddies[rank.index()].index()]).or_default().push(rank);
        }
        for (buddy, ranks) in to {
            if let Some(group) = self.group(id, of) {
                group.unacknowledged.insert(buddy);
            }
            let reports =
                self.replicas(id, job).filter(|_| is_first).map(|replicas| replicas.reports_of(&ranks));
            let parts = Parts { from: id, trained, ranks, reports: reports.unwrap_or_default() };
            let takes = self.travel();
            self.plan_own(buddy, of, takes, RankTask::StoresReplicas(Box::new(parts)));
        }
    }

    /// Parts of another worker's ranks arrive: taken in once the own ranks have made that step, then said to be here.
    pub(super) fn keeps(&mut self, id: u64, of: FormationId, parts: Parts) {
        let is_early = self.group(id, of).is_none_or(|group| group.trained.step < parts.trained.step);
        if is_early {
            return self.plan_own(id, of, 5, RankTask::StoresReplicas(Box::new(parts)));
        }
        let Parts { from, trained, ranks, reports } = parts;
        if let Some(replicas) = self.replicas(id, of.job) {
            replicas.put((of.generation, trained), &ranks);
            for (rank, step) in reports {
                replicas.reports.entry(step).or_default().insert(rank);
            }
        }
        let takes = self.travel();
        self.plan_own(from, of, takes, RankTask::Acknowledged(id));
    }

    pub(super) fn acknowledged(&mut self, id: u64, of: FormationId, buddy: u64) {
        if let Some(group) = self.group(id, of) {
            group.unacknowledged.remove(&buddy);
        }
        self.stop_if_kept(id, of);
    }

    /// Without a buddy nothing is kept step by step: the state that the formation began with would only get older.
    pub(super) fn forget_earlier(&mut self, id: u64, of: FormationId, step: u64) {
        if let Some(replicas) = self.replicas(id, of.job) {
            replicas.parts = replicas.parts.split_off(&(of.generation, step));
        }
    }

    /// Brings a worker's ranks the state they resume from, and repeats what they had reported; false if the worker that is
    /// to bring it is gone.
    pub(super) fn recover(&mut self, id: u64, of: FormationId, formed: &Formed, memory: &InMemory) -> bool {
        let ranks = self.group(id, of).map(|group| group.ranks.clone()).unwrap_or_default();
        let all: Vec<u64> = formed.places.iter().chain(&memory.bringers).copied().collect();
        let is_same = memory.axes.is_none();
        // In another layout a rank needs something of every part, as far as anybody can tell here.
        let parts = if is_same { ranks.clone() } else { Rank::all(memory.holders.len()).collect() };
        let mut reports: BTreeSet<(Rank, u64)> = BTreeSet::new();
        let mut recovered: Vec<Trained> = Vec::new();
        for part in parts {
            let has = |worker: &Worker| {
                let replicas = worker.memory.get(&of.job)?;
                replicas.get((memory.generation, memory.step), part)
            };
            let has_own = !is_same && self.workers.get(&id).and_then(has).is_some();
            let holder = if has_own { id } else { all[memory.holders[part.index()].index()] };
            let Some(worker) = self.workers.get(&holder) else {
                self.lose_all(id, of, "the holder of the state is gone");
                return false;
            };
            let replicas = worker.memory.get(&of.job);
            let Some(trained) = has(worker) else {
                // Dropped after another formation, unknown to this worker, superseded this one.
                if replicas.is_none_or(|replicas| replicas.generation != of.generation) {
                    self.lose_all(id, of, "the holder of the state has left");
                } else {
                    self.violate(format!(
                        "worker {holder} is to bring rank {part} the state of {memory:?} and has none"
                    ));
                }
                return false;
            };
            if is_same {
                let reported =
                    replicas.into_iter().flat_map(|replicas| replicas.reports.range(..=memory.step));
                let of_rank = reported.filter(|(_, ranks)| ranks.contains(&part));
                reports.extend(of_rank.map(|(&step, _)| (part, step)));
            }
            let earlier = || replicas?.get((memory.generation, memory.step - 1), part);
            let takes_earlier = !is_same && self.breaks(Mutation::MovesStale);
            recovered.push(earlier().filter(|_| takes_earlier).unwrap_or(trained));
        }
        let Some(&trained) = recovered.first() else { return true };
        if recovered.iter().any(|other| *other != trained) {
            self.violate(format!("{of}: the state of {memory:?} is put together of several"));
            return false;
        }
        if let Some(replicas) = self.replicas(id, of.job).filter(|_| is_same) {
            replicas.put_parts((memory.generation, trained), &ranks);
            for &(rank, step) in &reports {
                replicas.reports.entry(step).or_default().insert(rank);
            }
        }
        if let Some(group) = self.group(id, of) {
            group.trained = trained;
            group.reports = reports;
        }
        true
    }

    /// Once the ranks are ready they say again what they had reported.
    pub(super) fn repeat_reports(&mut self, id: u64, of: FormationId) {
        let reports = self.group(id, of).map(|group| std::mem::take(&mut group.reports)).unwrap_or_default();
        if self.breaks(Mutation::RecoversInSilence) {
            return;
        }
        for (rank, step) in reports {
            self.send_event(id, of, step_done(of.generation, rank, step));
        }
    }

    fn lose_all(&mut self, id: u64, of: FormationId, cause: &str) {
        let Some(group) = self.group(id, of) else { return };
        group.give_up();
        for rank in group.ranks.clone() {
            let (action, cause) = ("building the model".to_owned(), cause.to_owned());
            self.send_event(
                id,
                of,
                RankEvent::Failed { rank, action, cause, kind: ErrorKind::Lost, peer: None },
            );
        }
    }
}

/// A rank's report of a step.
pub(super) fn step_done(generation: Generation, rank: Rank, step: u64) -> RankEvent {
    RankEvent::StepDone {
        report: StepReport {
            rank: rank.number(),
            generation: generation.number(),
            step,
            tokens: BATCH,
            ..StepReport::default()
        },
    }
}
