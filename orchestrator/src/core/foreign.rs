//! Formations that this state does not know: their workers were members with another state, one that is lost, or that has gone
//! on after this copy of it was made. Their ranks finish the running step, it is kept in their own folder, and they are let go.
//!
//! Volatile, and nothing that becomes a fact: whoever attaches again is heard again.

use std::collections::BTreeMap;

use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::topology::{FormationId, Rank};

use super::facts::End;
use super::formation::Formation;
use super::words::Hosted;
use super::{ADOPTION_MS, Core, WRITE_DOWN_MS, Word};
use crate::job::{self, Outcome};

/// Ranks that a formation may have; of a larger one nothing is kept.
const MAX_WORLD: usize = 1 << 20;

/// Such a formation.
pub(super) struct Foreign {
    formation: Formation,
    world: usize,
    /// By rank, its worker, as far as they have attached.
    places: BTreeMap<Rank, u64>,
    /// It is let go then, unless its ranks are known to train.
    until_ms: u64,
}

impl Foreign {
    fn is_complete(&self) -> bool {
        self.places.len() == self.world
    }

    /// Why it cannot be stopped in peace.
    fn is_over(&self, now: u64) -> Option<String> {
        let trains = self.formation.is_training() && self.formation.reached() > 0;
        let is_late = !trains && self.until_ms <= now;
        let hang = || self.formation.hangs(now).map(|hang| hang.why);
        let late = || is_late.then(|| "its ranks are not all there, or have made no step".to_owned());
        self.formation.is_broken(now).or_else(hang).or_else(late)
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
            let reason = "nobody knows of this formation".to_owned();
            return self.tell(worker, Word::Release { formation: of, reason, keep: false });
        }
        if !self.foreign.contains_key(&of) {
            self.log(
                of.job,
                format!("generation {} is of another state: its running step is to be kept", of.generation),
            );
        }
        let foreign = self.foreign.entry(of).or_insert_with(|| Foreign {
            formation: Formation::unknown(world, steps),
            world,
            places: BTreeMap::new(),
            until_ms: now + ADOPTION_MS,
        });
        foreign.places.extend(hosted.ranks.iter().map(|&rank| (rank, worker)));
        if foreign.is_complete() {
            foreign.until_ms = now + WRITE_DOWN_MS;
        }
        let repeated = foreign.formation.repeat(&hosted.ranks);
        self.carry_out_foreign(of, repeated);
    }

    /// Whether a worker has slots for what it hosts beside what this state has placed there: if not, an earlier orchestrator of
    /// this state has let it go, and the worker has not heard so.
    fn has_slots_for(&self, worker: u64, hosted: &Hosted) -> bool {
        let slots = self.members.get(worker).map_or(0, |member| member.who.slots);
        // An older generation of the same job has given its slots up to this one.
        let (held, _) = self.held(Some(hosted.formation.job)).get(&worker).copied().unwrap_or_default();
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
            effects.extend(foreign.formation.move_away("its orchestrator has another state".into()));
        }
        self.carry_out_foreign(from.formation, effects);
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
        self.carry_out_foreign(of, effects);
    }

    fn carry_out_foreign(&mut self, of: FormationId, effects: Vec<job::Effect>) {
        for effect in effects {
            let Some(foreign) = self.foreign.get(&of) else { return };
            match effect {
                // Where ranks that have not begun would go on from is not known here.
                job::Effect::Command { command: RankCommand::BeginStep { .. }, .. } => {}
                job::Effect::Command { rank, command } => {
                    if let Some(&worker) = foreign.places.get(&rank) {
                        let to = RankAddress { formation: of, rank };
                        self.tell(worker, Word::Command { to, command });
                    }
                }
                job::Effect::CommitCheckpoint { position, watch, shards } => {
                    if let Some(&worker) = foreign.places.get(&Rank::ZERO) {
                        // What its own orchestrator has pinned its workers know.
                        let (formation, kept) = (of, 0);
                        let word = Word::CommitCheckpoint { formation, position, watch, shards, kept };
                        self.tell(worker, word);
                    }
                }
                job::Effect::End(Outcome::Stopped { step }) => {
                    self.let_foreign_go(of, &format!("step {step} is kept in its folder"));
                }
                job::Effect::End(Outcome::Failed { message, .. }) => self.let_foreign_go(of, &message),
                job::Effect::End(_) => self.let_foreign_go(of, "it is over"),
                // Who watches such a job asks another orchestrator, and no weights are written.
                job::Effect::Record(_) | job::Effect::PlaceWeights { .. } => {}
            }
        }
    }

    /// Time has passed.
    pub(super) fn tick_foreign(&mut self, now: u64) {
        let over = self.foreign.iter().filter_map(|(&of, foreign)| Some((of, foreign.is_over(now)?)));
        let over: Vec<(FormationId, String)> = over.collect();
        over.into_iter().for_each(|(of, why)| self.let_foreign_go(of, &why));
        let all: Vec<FormationId> = self.foreign.keys().copied().collect();
        for of in all {
            let effects = self.foreign.get_mut(&of).map(|foreign| foreign.formation.tick(now));
            self.carry_out_foreign(of, effects.unwrap_or_default());
        }
    }

    /// A worker is not a member any more.
    pub(super) fn lose_foreign(&mut self, worker: u64) {
        let is_hit = |foreign: &Foreign| foreign.places.values().any(|place| *place == worker);
        let hit: Vec<FormationId> =
            self.foreign.iter().filter(|(_, foreign)| is_hit(foreign)).map(|(&of, _)| of).collect();
        hit.into_iter().for_each(|of| self.let_foreign_go(of, "a worker of it is lost"));
    }

    /// By slot that such a formation holds, the worker.
    pub fn held_by_foreign(&self) -> impl Iterator<Item = u64> + '_ {
        self.foreign.values().flat_map(|foreign| foreign.places.values().copied())
    }

    fn let_foreign_go(&mut self, formation: FormationId, why: &str) {
        let FormationId { job, generation } = formation;
        let Some(foreign) = self.foreign.remove(&formation) else { return };
        self.log(job, format!("generation {generation}, of another state, is let go: {why}"));
        let mut workers: Vec<u64> = foreign.places.into_values().collect();
        workers.sort_unstable();
        workers.dedup();
        for worker in workers {
            let reason = format!("the orchestrator does not know this formation; {why}");
            self.tell(worker, Word::Release { formation, reason, keep: false });
        }
        self.is_open = true;
        if self.jobs.all.get(&job).is_some_and(|record| !record.has_ended()) {
            let outcome = format!(
                "{job} has gone on to generation {generation}, of which this state knows nothing: it is older than \
                 the storage; {why}"
            );
            self.end(job, End::Failed, (outcome, None), self.awake_ms);
        }
    }
}
