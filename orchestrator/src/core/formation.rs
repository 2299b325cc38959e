//! A running formation: the job machine of its ranks, what they report of their progress, and what is held against it.
//!
//! Volatile: after a restart of the orchestrator it is rebuilt from what the ranks report again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{MovedBytes, RankEvent};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::schedule::size;
use contraflow_runtime::stability::Divergence;
use contraflow_runtime::stability::evidence::EVIDENCE_FILE;
use contraflow_runtime::topology::{JobId, Rank};

use super::attempts::Blame;
use super::facts::{End, Fact};
use super::jobs::JobRecord;
use super::removal::low;
use super::stall::{Stall, StallDetector, StallOf};
use super::storage::StorageFaults;
use super::{
    ABORT_MS, Core, Effect, FORMING_MS, Progress, SLOW_STORAGE_MS, STALL_WARN_MS, Severity, Space, Times,
    WorkerCommand,
};
use crate::job::{Job, JobEffect, JobSetup, Outcome};
use crate::rollback::{RollBack, RollBackTarget};

/// What a job gives up its places for.
struct Move {
    why: String,
    /// It goes on at once, from memory, with so many ranks; `None`: it goes back in line, its state saved.
    ranks: Option<usize>,
}

/// A running formation.
pub(super) struct Formation {
    machine: Job,
    /// A rank has reported a lost peer: when, and its message.
    suspicion: Option<(u64, String)>,
    /// Ranks, each with one that it could not reach.
    apart: Vec<(Rank, Rank)>,
    /// When the latest rank became ready; before that, when time first passed.
    ready_ms: Option<u64>,
    /// When the ranks were told to abort.
    aborting_ms: Option<u64>,
    /// Why the job is to give up its places after the running step, and what comes then.
    moves: Option<Move>,
    /// Whether workers without a rank of it still have to bring the state that it began with.
    needs_bringers: bool,
    /// By rank, what it has taken over of a state in another layout.
    moved: BTreeMap<Rank, MovedBytes>,
    stalls: StallDetector,
    storage: StorageFaults,
    /// What room the storage had after the latest commit.
    pub(super) space: Option<Space>,
    /// Workers that spoke of its commits and do not make them.
    pub(super) refused: BTreeSet<u64>,
    /// The step that it resumed from, and the furthest that a rank has reported since.
    resumed: u64,
    reached: u64,
    /// When that was reported; 0: none was. **Units**: milliseconds since 1970.
    reached_ms: u64,
}

impl Formation {
    /// Of a job that has just been formed, or was running when the orchestrator started.
    pub(super) fn of(record: &JobRecord) -> Self {
        let formed = record.formed.as_ref();
        let setup = JobSetup {
            world: formed.map_or(0, |formed| formed.places.len()),
            steps_before: formed.map_or(0, |formed| formed.resume_step),
            steps: record.spec.steps(),
            keeps_checkpoints: true,
            // Where exactly is the workers' to know.
            export_dir: record.spec.recipe.checkpoint.save_model.then(PathBuf::new),
        };
        let needs_bringers = formed.is_some_and(|formed| formed.bringers().next().is_some());
        let formation = Formation::with(setup, record.last_checkpoint);
        let in_memory = formed.is_some_and(|formed| formed.memory.is_some());
        Formation { needs_bringers, machine: formation.machine.beginning_in_memory(in_memory), ..formation }
    }

    /// Of a job of which nothing is known but how many ranks it has, and its steps, if these are.
    pub(super) fn unknown(world: usize, steps: u64) -> Self {
        let steps = if steps == 0 { u64::MAX } else { steps };
        let setup = JobSetup { world, steps_before: 0, steps, keeps_checkpoints: true, export_dir: None };
        Formation::with(setup, 0)
    }

    fn with(setup: JobSetup, committed: u64) -> Self {
        let resumed = setup.steps_before;
        Formation {
            machine: Job::new(setup).with_committed(committed),
            suspicion: None,
            apart: Vec::new(),
            ready_ms: None,
            aborting_ms: None,
            moves: None,
            needs_bringers: false,
            moved: BTreeMap::new(),
            stalls: StallDetector::default(),
            storage: StorageFaults::default(),
            space: None,
            refused: BTreeSet::new(),
            resumed,
            reached: resumed,
            reached_ms: 0,
        }
    }

    /// The step of a report, if it is one that this formation has made.
    pub(super) fn own_step(&self, event: &RankEvent) -> Option<u64> {
        match event {
            RankEvent::StepDone { report } => Some(report.step).filter(|step| *step > self.resumed),
            _ => None,
        }
    }

    /// The furthest step that it is known to have completed; else the one it resumed from.
    pub(super) fn reached(&self) -> u64 {
        self.reached
    }

    /// When that step was made; 0: it has made none that is known of. **Units**: milliseconds since 1970.
    pub(super) fn reached_ms(&self) -> u64 {
        self.reached_ms
    }

    /// A rank reports a step of this formation.
    pub(super) fn made(&mut self, step: u64, wall_ms: u64) {
        if step > self.reached {
            (self.reached, self.reached_ms) = (step, wall_ms);
        }
    }

    /// It was found by an orchestrator that starts: what had been counted as steps by then remains so, and its ranks may have made some that
    /// nobody has saved.
    pub(super) fn found(self, wall_ms: u64) -> Self {
        Formation { reached_ms: wall_ms, machine: self.machine.beginning_in_memory(true), ..self }
    }

    pub(super) fn is_aborting(&self) -> bool {
        self.machine.is_aborting()
    }

    pub(super) fn waiting_for(&self, now: u64) -> String {
        if let Some((_, why)) = &self.suspicion {
            return format!("a verdict on: {why}");
        }
        if let Some(words) = self.storage.describe(now) {
            return words;
        }
        match self.stalls.stalled_for(now, STALL_WARN_MS) {
            _ if !self.is_training() => self.machine.describe(),
            Some(stall) if stall.of == StallOf::Everyone && self.machine.is_committing() => {
                "the storage: a checkpoint is being committed".into()
            }
            stall => stall.map_or_else(String::new, |stall| stall.why),
        }
    }

    /// Which rank has stalled, if they train and none makes progress. Waiting for storage is no stall.
    pub(super) fn stalled(&self, now: u64) -> Option<Stall> {
        let stall = self.stalls.stalled(now).filter(|_| self.is_training())?;
        match stall.of {
            StallOf::Storage => None,
            StallOf::Everyone if self.machine.is_committing() => None,
            _ => Some(stall),
        }
    }

    /// What an operator should look at, though the job goes on: little room, or storage that takes long.
    pub(super) fn warning(&self, now: u64) -> Option<String> {
        self.space.and_then(low).or_else(|| self.stalls.slow_storage(now, SLOW_STORAGE_MS))
    }

    /// Notes that a checkpoint could not be committed, to be tried again; returns what to log.
    pub(super) fn commit_failed(&mut self, step: u64, cause: &str, now: u64) -> String {
        self.storage.commit_failed(step, cause.to_owned(), now);
        format!("the checkpoint of step {step} could not be committed, tried again: {cause}")
    }

    /// The rank whose place cannot write what others can, or commit, for long; and why.
    pub(super) fn bad_place(&self, now: u64) -> Option<(Rank, String)> {
        self.storage.bad_place(now)
    }

    pub(super) fn is_starting(&self) -> bool {
        self.machine.is_starting()
    }

    pub(super) fn is_training(&self) -> bool {
        self.machine.is_training()
    }

    pub(super) fn repeat(&self, ranks: &[Rank]) -> Vec<JobEffect> {
        self.machine.repeat(ranks)
    }

    /// Whether it is on its way out.
    pub(super) fn is_moving(&self) -> bool {
        self.moves.is_some()
    }

    /// Whether it may be stopped for another layout without harm: it has made a step, and the storage takes what it saves.
    pub(super) fn is_ready_to_move(&self, now: u64) -> bool {
        self.is_training() && self.reached > self.resumed && self.storage.describe(now).is_none()
    }

    pub(super) fn requeue(&mut self, why: String) -> Vec<JobEffect> {
        self.moves = Some(Move { why, ranks: None });
        self.machine.stop(false)
    }

    /// Has it stop after the running step with its state in memory, to go on with so many ranks.
    pub(super) fn rearrange(&mut self, why: String, ranks: usize) -> Vec<JobEffect> {
        self.moves = Some(Move { why, ranks: Some(ranks) });
        self.machine.stop(true)
    }

    /// Whether workers without a rank of it have the only copies of parts of the state that it began with: until every buddy has a later one.
    pub(super) fn needs_bringers(&self) -> bool {
        self.needs_bringers
    }

    /// Whether these workers may go now; once.
    fn lets_bringers_go(&mut self) -> bool {
        // Every buddy had the state before a step when that one was made.
        let is_over = self.needs_bringers && self.reached >= self.resumed + 2;
        self.needs_bringers &= !is_over;
        is_over
    }

    /// Notes what a rank has taken over; of all ranks together, once all have said it.
    fn note_moved(&mut self, rank: Rank, moved: MovedBytes, world: usize) -> Option<MovedBytes> {
        let is_new = self.moved.insert(rank, moved).is_none();
        let is_whole = is_new && self.moved.len() == world;
        is_whole.then(|| self.moved.values().copied().fold(MovedBytes::default(), MovedBytes::and))
    }

    pub(super) fn event(&mut self, event: RankEvent, now: u64) -> Vec<JobEffect> {
        self.reached = self.own_step(&event).unwrap_or_default().max(self.reached);
        match event {
            RankEvent::SaveFailed { rank, step, cause } => {
                self.storage.save_failed(rank, step, cause, now);
                Vec::new()
            }
            // A rank that lost a peer is a victim: the leases show which worker is to blame.
            RankEvent::Failed { rank, action, cause, kind: ErrorKind::Lost, peer } => {
                self.suspicion.get_or_insert((now, format!("rank {rank}, {action}: {cause}")));
                self.apart.extend(peer.map(|peer| (rank, peer)));
                Vec::new()
            }
            event => {
                match event {
                    RankEvent::ShardSaved { rank, .. } => {
                        self.storage.saved(rank, now);
                        self.stalls.saved(rank);
                    }
                    RankEvent::Ready { .. } => self.ready_ms = Some(now),
                    _ => {}
                }
                self.machine.step(event)
            }
        }
    }

    pub(super) fn committed(
        &mut self,
        position: Option<Position>,
        result: Result<(), String>,
    ) -> Vec<JobEffect> {
        match position {
            Some(position) => {
                // A repeated answer to an earlier commit says nothing of the one that is to be tried again.
                if self.machine.commits(position.step) {
                    self.storage.committed();
                }
                self.machine.committed(position.step, result)
            }
            None => self.machine.weights_published(result),
        }
    }

    /// Ranks, each with one that it could not reach.
    pub(super) fn apart(&self) -> Vec<(Rank, Rank)> {
        self.apart.clone()
    }

    /// Why it is given up while it forms: no rank has become ready for too long.
    pub(super) fn is_forming_late(&mut self, now: u64) -> Option<String> {
        let since = *self.ready_ms.get_or_insert(now);
        let is_late = self.is_starting() && since + FORMING_MS <= now;
        is_late.then(|| format!("{} for {} s", self.machine.describe(), (now - since) / 1000))
    }

    pub(super) fn progress(&mut self, progress: &Progress, now: u64) {
        self.stalls.note(progress, now);
    }

    /// Ranks that others have lost for at least so long.
    pub(super) fn missed_for(&self, now: u64, ms: u64) -> Vec<Rank> {
        let is_over = self.suspicion.as_ref().is_some_and(|(since, _)| since + ms <= now);
        if is_over { self.apart.iter().map(|(_, peer)| *peer).collect() } else { Vec::new() }
    }

    /// Why it cannot continue although no lease has expired, if that has lasted long enough.
    pub(super) fn is_broken(&self, now: u64, times: Times) -> Option<String> {
        let (since, why) = self.suspicion.as_ref()?;
        (since + times.verdict_ms() <= now).then(|| why.clone())
    }

    pub(super) fn tick(&mut self, now: u64) -> Vec<JobEffect> {
        if !self.machine.is_aborting() {
            let is_due = self.storage.is_retry_due(now);
            return if is_due { self.machine.commit_next() } else { Vec::new() };
        }
        let since = *self.aborting_ms.get_or_insert(now);
        if since + ABORT_MS <= now { self.machine.give_up_waiting() } else { Vec::new() }
    }
}

impl Core {
    /// Turns the effects of a job's machine into those of the cluster.
    pub(super) fn apply_effects(&mut self, job: JobId, effects: Vec<JobEffect>, now: u64) {
        for effect in effects {
            let Some(record) = self.jobs.all.get(&job) else { return };
            let Some(formed) = record.running() else { return };
            let (formation, places, pinned) = (formed.id(job), &formed.places, record.pinned());
            match effect {
                JobEffect::Command { rank, command } => {
                    let to = RankAddress { formation, rank };
                    let worker = places[rank.index()];
                    self.send(worker, WorkerCommand::Rank { to, command });
                }
                JobEffect::Record(report) => {
                    self.effects.push(Effect::Record { job, report: Box::new(report) });
                }
                JobEffect::CommitCheckpoint { position, watch, shards } => {
                    let command =
                        WorkerCommand::CommitCheckpoint { formation, position, watch, shards, pinned };
                    let worker = places[0];
                    self.send(worker, command);
                }
                JobEffect::PublishWeights { files, .. } => {
                    let worker = places[0];
                    self.send(worker, WorkerCommand::PublishWeights { formation, files });
                }
                JobEffect::End(outcome) => self.conclude(job, outcome, now),
            }
        }
    }

    fn conclude(&mut self, job: JobId, outcome: Outcome, now: u64) {
        let moves = self.formations.get_mut(&job).and_then(|formation| formation.moves.take());
        match outcome {
            Outcome::Done { validation } => {
                let loss = validation.map(|(loss, _)| loss);
                let words = loss
                    .map_or_else(|| "trained".into(), |loss| format!("trained, validation loss {loss:.4}"));
                self.end(job, End::Done, (words, loss));
            }
            Outcome::Stopped { step, in_memory } => {
                let stopped = || Move { why: format!("stopped after step {step}"), ranks: None };
                let Move { why, ranks } = moves.unwrap_or_else(stopped);
                if in_memory {
                    return self.rearranged(job, why, ranks.unwrap_or_default(), now);
                }
                let stop = self.stop(job);
                self.release(job, &why, false);
                self.log(job, format!("{why}; step {step} is saved, back in the queue"));
                self.persist(Fact::Requeued { job, why, stop });
            }
            Outcome::Diverged { divergence, cursor } => self.diverged(job, *divergence, cursor),
            Outcome::Failed { message, kind: ErrorKind::Lost } => {
                self.break_formation(job, Vec::new(), message, Blame::Job, now)
            }
            Outcome::Failed { message, .. } => {
                self.inquire(job, &[], now);
                self.end(job, End::Failed, (message, None));
            }
        }
    }

    /// A rank has taken its state over in another layout; a line of the log, once all have.
    pub(super) fn moved(&mut self, job: JobId, rank: Rank, moved: MovedBytes) {
        let world = self.jobs.all[&job].running().map_or(0, |formed| formed.places.len());
        let formation = self.formations.get_mut(&job);
        let all = formation.and_then(|formation| formation.note_moved(rank, moved, world));
        if let Some(MovedBytes { moved, least, needed }) = all {
            let [moved, least, needed] = [moved, least, needed].map(size);
            let words =
                format!("of {needed} of state in memory {moved} moved between workers, {least} had to");
            self.log(job, words);
        }
    }

    /// Workers without a rank of a formation that had to keep what it began with may drop that, once it is of no use any more.
    pub(super) fn let_bringers_go(&mut self, job: JobId) {
        if !self.formations.get_mut(&job).is_some_and(Formation::lets_bringers_go) {
            return;
        }
        let Some(formed) = self.jobs.all[&job].running() else { return };
        let (formation, bringers) = (formed.id(job), formed.bringers().collect::<Vec<_>>());
        for (_, worker) in bringers {
            let reason = "the job continues without what this worker brought".to_owned();
            self.send(worker, WorkerCommand::Release { formation, reason, keep: false });
        }
    }

    /// Back to the newest checkpoint, past the sequences that led to the divergence, or to the end of the job.
    fn diverged(&mut self, job: JobId, mut divergence: Divergence, cursor: u64) {
        if divergence.evidence.is_some() {
            divergence.why += &format!("; see {EVIDENCE_FILE} in the job's folder");
        }
        let record = &self.jobs.all[&job];
        let (newest, returns) = (record.checkpoint(), record.returns);
        let roll_back = RollBack { newest, returns, max_returns: record.spec.recipe.watch.max_skips };
        match roll_back.decide(&divergence, cursor) {
            Ok(RollBackTarget { why, .. }) => {
                let stop = self.stop(job);
                self.release(job, &why, false);
                self.log_as(Severity::Warn, job, why);
                self.persist(Fact::RolledBack { job, cursor, why: divergence.why, stop });
            }
            Err(why) => self.end(job, End::Failed, (why, None)),
        }
    }
}
