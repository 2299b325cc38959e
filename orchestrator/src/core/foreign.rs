//! Formations that this state does not know: their workers were members with another state, one that is lost, or that has
//! moved on after this copy of it was made. Their ranks finish the running step, it is saved in their own folder, and they
//! are released.
//!
//! Volatile, and nothing that becomes a fact: workers that attach again report again.

use std::collections::BTreeMap;

use contraflow_runtime::checkpoint::{Pinned, Position};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::topology::{FormationId, Rank};

use super::events::Hosted;
use super::facts::End;
use super::formation::Formation;
use super::{Core, FOREIGN_MS, Times, WorkerCommand};
use crate::job::{JobEffect, Outcome};

/// Ranks that a formation may have; of a larger one nothing is kept.
const MAX_WORLD: usize = 1 << 20;

/// Such a formation.
pub(super) struct Foreign {
    formation: Formation,
    world: usize,
    /// By rank, its worker, as far as they have attached.
    places: BTreeMap<Rank, u64>,
    /// It is released then, unless its ranks are known to train.
    until_ms: u64,
}

impl Foreign {
    /// The worker of a rank, if it has attached.
    pub(super) fn place_of(&self, rank: Rank) -> Option<u64> {
        self.places.get(&rank).copied()
    }

    fn is_complete(&self) -> bool {
        self.places.len() == self.world
    }

    /// Why it cannot be stopped in peace.
    fn is_over(&self, now: u64, times: Times) -> Option<String> {
        let trains = self.formation.is_training() && self.formation.reached() > 0;
        let is_late = !trains && self.until_ms <= now;
        let stall = || self.formation.stalled(now).map(|stall| stall.why);
        let late =
            || is_late.then(|| "not all of its ranks are present, or none has completed a step".to_owned());
        self.formation.is_broken(now, times).or_else(stall).or_else(late)
    }
}

impl Core {
    /// A worker hosts ranks of a formation that this state does not know.
    pub(super) fn foreign_attached(&mut self, worker: u64, hosted: &Hosted, now: u64) {
        let &Hosted { formation: of, world, steps, .. } = hosted;
        let fits = (1..=MAX_WORLD).contains(&world) && hosted.ranks.iter().all(|rank| rank.index() < world);
        if !fits
            || !self.has_slots_for(worker, hosted)
            || self.foreign.get(&of).is_some_and(|foreign| foreign.world != world)
        {
            let reason = "unknown formation".to_owned();
            return self.send(worker, WorkerCommand::Release { formation: of, reason, keep: false });
        }
        if !self.foreign.contains_key(&of) {
            self.log(
                of.job,
                format!("generation {} is of another state: its running step will be saved", of.generation),
            );
        }
        let foreign = self.foreign.entry(of).or_insert_with(|| Foreign {
            formation: Formation::unknown(world, steps),
            world,
            places: BTreeMap::new(),
            until_ms: now + self.times.adoption_ms(),
        });
        foreign.places.extend(hosted.ranks.iter().map(|&rank| (rank, worker)));
        if foreign.is_complete() {
            foreign.until_ms = now + FOREIGN_MS;
        }
        let repeated = foreign.formation.repeat(&hosted.ranks);
        self.apply_foreign_effects(of, repeated);
    }

    /// Whether a worker has slots for what it hosts beside what this state has placed there: if not, an earlier orchestrator of
    /// this state has released it, and the worker does not know yet.
    fn has_slots_for(&self, worker: u64, hosted: &Hosted) -> bool {
        let slots = self.members.get(worker).map_or(0, |member| member.registration.slots);
        // An older generation of the same job has given its slots up to this one.
        let (held, _) = self.held(&[hosted.formation.job]).get(&worker).copied().unwrap_or_default();
        let known = self.foreign.get(&hosted.formation);
        let known =
            known.map_or(0, |foreign| foreign.places.values().filter(|place| **place == worker).count());
        held - known + hosted.ranks.len() <= slots
    }

    fn foreign_of(&mut self, worker: u64, from: &RankAddress) -> Option<&mut Foreign> {
        let foreign = self.foreign.get_mut(&from.formation)?;
        (foreign.places.get(&from.rank) == Some(&worker)).then_some(foreign)
    }

    /// What a rank of such a formation says; whether it is of one.
    pub(super) fn foreign_event(
        &mut self,
        worker: u64,
        from: &RankAddress,
        event: &RankEvent,
        now: u64,
    ) -> bool {
        let Some(foreign) = self.foreign_of(worker, from) else { return false };
        let mut effects = foreign.formation.event(event.clone(), now);
        if foreign.formation.is_training() && !foreign.formation.is_moving() {
            effects.extend(foreign.formation.requeue("its orchestrator has another state".into()));
        }
        self.apply_foreign_effects(from.formation, effects);
        true
    }

    pub(super) fn foreign_progress(&mut self, worker: u64, progress: &super::Progress, now: u64) {
        if let Some(foreign) = self.foreign_of(worker, &progress.rank) {
            foreign.formation.progress(progress, now);
        }
    }

    pub(super) fn foreign_committed(
        &mut self,
        of: FormationId,
        position: Option<Position>,
        result: Result<(), String>,
    ) {
        let Some(foreign) = self.foreign.get_mut(&of) else { return };
        let effects = foreign.formation.committed(position, result);
        self.apply_foreign_effects(of, effects);
    }

    fn apply_foreign_effects(&mut self, of: FormationId, effects: Vec<JobEffect>) {
        for effect in effects {
            let Some(foreign) = self.foreign.get(&of) else { return };
            match effect {
                // Where ranks that have not begun would resume from is not known here.
                JobEffect::Command { command: RankCommand::BeginStep { .. }, .. } => {}
                JobEffect::Command { rank, command } => {
                    if let Some(&worker) = foreign.places.get(&rank) {
                        let to = RankAddress { formation: of, rank };
                        self.send(worker, WorkerCommand::Rank { to, command });
                    }
                }
                JobEffect::CommitCheckpoint { position, watch, shards } => {
                    if let Some(&worker) = foreign.places.get(&Rank::ZERO) {
                        // What its own orchestrator has pinned its workers know.
                        let (formation, pinned) = (of, Pinned::default());
                        let command =
                            WorkerCommand::CommitCheckpoint { formation, position, watch, shards, pinned };
                        self.send(worker, command);
                    }
                }
                JobEffect::End(Outcome::Stopped { step, .. }) => {
                    self.release_foreign(of, &format!("step {step} is saved in its folder"));
                }
                JobEffect::End(Outcome::Failed { message, .. }) => self.release_foreign(of, &message),
                JobEffect::End(_) => self.release_foreign(of, "it is over"),
                // Who watches such a job asks another orchestrator, and no weights are written.
                JobEffect::Record(_) | JobEffect::PublishWeights { .. } => {}
            }
        }
    }

    /// Time has passed.
    pub(super) fn tick_foreign(&mut self, now: u64) {
        let over =
            self.foreign.iter().filter_map(|(&of, foreign)| Some((of, foreign.is_over(now, self.times)?)));
        let over: Vec<(FormationId, String)> = over.collect();
        over.into_iter().for_each(|(of, why)| self.release_foreign(of, &why));
        let all: Vec<FormationId> = self.foreign.keys().copied().collect();
        for of in all {
            let effects = self.foreign.get_mut(&of).map(|foreign| foreign.formation.tick(now));
            self.apply_foreign_effects(of, effects.unwrap_or_default());
        }
    }

    /// A worker is not a member any more.
    pub(super) fn lose_foreign(&mut self, worker: u64) {
        let is_hit = |foreign: &Foreign| foreign.places.values().any(|place| *place == worker);
        let hit: Vec<FormationId> =
            self.foreign.iter().filter(|(_, foreign)| is_hit(foreign)).map(|(&of, _)| of).collect();
        hit.into_iter().for_each(|of| self.release_foreign(of, "a worker of it is lost"));
    }

    /// By slot that such a formation holds, the worker.
    pub fn held_by_foreign(&self) -> impl Iterator<Item = u64> + '_ {
        self.foreign.values().flat_map(|foreign| foreign.places.values().copied())
    }

    fn release_foreign(&mut self, formation: FormationId, why: &str) {
        let FormationId { job, generation } = formation;
        let Some(foreign) = self.foreign.remove(&formation) else { return };
        self.log(job, format!("generation {generation}, of another state, is released: {why}"));
        let mut workers: Vec<u64> = foreign.places.into_values().collect();
        workers.sort_unstable();
        workers.dedup();
        for worker in workers {
            let reason = format!("the orchestrator does not know this formation; {why}");
            self.send(worker, WorkerCommand::Release { formation, reason, keep: false });
        }
        self.is_open = true;
        if self.jobs.all.get(&job).is_some_and(|record| !record.has_ended()) {
            let outcome = format!(
                "{job} has moved on to generation {generation}, which this state does not know: it is older than \
                 the storage; {why}"
            );
            self.end(job, End::Failed, (outcome, None));
        }
    }
}
