//! What must never be, and what has to come at last. Judges by what the simulated ranks have really done and what is really
//! durable, never by what the core believes of it.

use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};
use std::collections::{BTreeMap, BTreeSet};

use super::World;
use super::network::ToWorker;
use super::ranks::feed;
use super::storage::Trained;
use super::worker::Worker;
use crate::core::facts::{Fact, Formed};
use crate::core::jobs::{JobRecord, Jobs, Phase};
use crate::core::{Core, Effect, Event};

/// What has been seen so far.
#[derive(Default)]
pub(super) struct Checks {
    /// Every formation that was kept.
    formed: BTreeMap<FormationId, Formed>,
    /// Finished jobs, how they ended, and how many of them were removed.
    ended: Vec<JobId>,
    forgotten: usize,
    /// By job, its number in the plan.
    planned: BTreeMap<JobId, usize>,
    /// Who has been given a rank.
    owners: BTreeMap<(FormationId, Rank), u64>,
    pub(super) lines: BTreeMap<FormationId, Line>,
    /// By job, every step up to the newest kept checkpoint.
    pub(super) kept: BTreeMap<JobId, Vec<Trained>>,
    /// By job, what was kept before its newest checkpoint, and how far the watch had sent it back past that.
    pub(super) kept_before: BTreeMap<JobId, (Vec<Trained>, Option<u64>)>,
    /// By job and workers that do not reach each other, formations on both that broke of it since the orchestrator was started.
    pub(super) apart: BTreeMap<(JobId, u64, u64), u32>,
    /// By job, sequences used when the watch sent it back, unless a later checkpoint holds that.
    pub(super) rolled_back: BTreeMap<JobId, u64>,
    /// By job, the latest generation whose state in memory is of no history any more.
    left_behind: BTreeMap<JobId, Generation>,
    /// By formation, workers that have said what they keep, and to which orchestrator.
    pub(super) reported: BTreeMap<FormationId, BTreeSet<(u64, usize)>>,
    /// Formations known to have completed a step: by a stored fact, or by the newest orchestrator.
    pub(super) stepped: BTreeSet<FormationId>,
    pub(super) heard: BTreeSet<FormationId>,
    /// Jobs that are cancelled, and jobs that may fail.
    pub(super) cancelled: BTreeSet<JobId>,
    pub(super) excused: BTreeSet<JobId>,
    /// Which job may have more ranks for which there is room, and since when.
    pub(super) grows: Option<(JobId, u64)>,
    /// Who is first in line and could have slots that are lent, and since when.
    pub(super) lent: Option<(JobId, u64)>,
    /// By which orchestrator, who keeps slots that are of no use to it, and since when.
    pub(super) useless: Option<(usize, JobId, u64)>,
    /// All jobs of the plan have ended.
    pub(super) is_over: bool,
    /// Jobs whose state is lost, and those of the plan that have ended in any state.
    lost: BTreeSet<JobId>,
    over: BTreeSet<usize>,
}

/// What the ranks of one formation have done.
#[derive(Default)]
pub(super) struct Line {
    /// By step from 1.
    pub(super) history: Vec<Trained>,
    /// How many of them it resumed from.
    pub(super) resumed: usize,
    /// Where the next step begins in the order of the sequences.
    cursor: u64,
    diverged: Option<u64>,
    /// It has stopped after its last step, to go on in another layout.
    is_rearranged: bool,
    pub(super) validated: BTreeSet<Rank>,
    pub(super) exported: BTreeSet<Rank>,
}

impl Checks {
    /// A job's number in the plan; known for ever.
    pub(super) fn planned(&self, job: JobId) -> Option<usize> {
        self.planned.get(&job).copied()
    }

    /// Whether a job of the plan has been durable.
    pub(super) fn is_submitted(&self, planned: usize) -> bool {
        let is_known = |(job, number): (&JobId, &usize)| *number == planned && !self.lost.contains(job);
        self.over.contains(&planned) || self.planned.iter().any(is_known)
    }

    /// A job has ended.
    pub(super) fn end(&mut self, job: JobId) {
        self.ended.push(job);
        self.over.extend(self.planned.get(&job));
    }

    /// These jobs are no longer known.
    pub(super) fn lose_state(&mut self, jobs: &Jobs) {
        self.lost.extend(jobs.all.keys());
        self.ended.clear();
        (self.forgotten, self.lent, self.useless, self.grows) = (0, None, None, None);
    }

    pub(super) fn world(&self, formation: FormationId) -> Option<usize> {
        self.formed.get(&formation).map(|formed| formed.places.len())
    }
}

/// The job of a rank that does not belong to the running formation.
pub(super) fn stale_job(core: &Core, event: &Event) -> Option<JobId> {
    let (of, (rank, worker)) = match event {
        Event::Rank { worker, from, .. } => (from.formation, (from.rank, worker)),
        Event::Committed { worker, formation, .. } => (*formation, (Rank::ZERO, worker)),
        _ => return None,
    };
    let formed = core.jobs().all.get(&of.job).and_then(|record| record.running());
    let is_current = formed
        .is_some_and(|formed| formed.generation == of.generation && formed.place_of(rank) == Some(*worker));
    (!is_current && !core.hears_left(of)).then_some(of.job)
}

/// The effect of a stale message on its job, which must be none.
pub(super) fn has_effect(job: JobId, effects: &[Effect]) -> Option<String> {
    let effect = effects.iter().find(|effect| match effect {
        Effect::Persist(
            Fact::CheckpointCommitted { job: of, .. }
            | Fact::Ended { job: of, .. }
            | Fact::RolledBack { job: of, .. },
        ) => *of == job,
        Effect::Record { job: of, .. } => *of == job,
        _ => false,
    });
    effect.map(|effect| format!("a message of an earlier formation has an effect: {effect:?}"))
}

impl World {
    pub(super) fn is_over(&self) -> bool {
        self.checks.is_over
    }

    /// After the faults every job has to end in time.
    pub(super) fn check_liveness(&mut self) {
        if self.now <= self.plan.calm_ms + self.plan.settle_ms {
            return;
        }
        // At worst one job after the other, each with way to go back. They may be more than planned: what has ended and is forgotten
        // runs again where a client submits it again.
        let jobs = self.checks.planned.values().map(|&planned| &self.plan.jobs[planned]);
        let work_ms: u64 = jobs.map(|job| 2 * job.spec.steps() * job.step_ms).sum();
        let allowed_ms = self.plan.settle_ms + work_ms;
        if self.now > self.plan.calm_ms + allowed_ms {
            let core = &self.servers[self.newest_server()].core;
            let open = self.store.jobs.all.iter().filter(|(_, record)| !record.has_ended());
            let open: Vec<String> = open
                .map(|(job, record)| format!("{job} ({:?}): {:?}", record.phase, core.waiting_for(*job)))
                .collect();
            self.violate(format!("not over {allowed_ms} ms after the last fault: {open:?}"));
        }
    }

    /// Every waiting job says what it waits for.
    pub(super) fn check_commands(&mut self, server: usize) {
        let core = &self.servers[server].core;
        let open = core.jobs().all.iter().filter(|(_, record)| !record.has_ended());
        let silent =
            open.map(|(&job, _)| job).find(|&job| !core.is_training(job) && core.waiting_for(job).is_empty());
        if let Some(job) = silent {
            self.violate(format!("{job} waits and does not say for what"));
        }
    }

    /// What is kept folds into what the orchestrator believes.
    pub(super) fn check_fold(&mut self, server: usize) {
        if self.servers[server].core.jobs() != &self.store.jobs {
            self.violate("the facts that are kept fold into another state than the core's".into());
        }
    }

    /// Data of finished jobs is bounded, and nothing remains of removed ones.
    pub(super) fn check_retention(&mut self) {
        let ended = self.store.jobs.all.values().filter(|record| record.has_ended()).count();
        if ended > self.plan.retained_jobs {
            self.violate(format!("{ended} jobs are over and known, more than {}", self.plan.retained_jobs));
        }
        let is_unknown = |job: &&JobId| !self.store.jobs.all.contains_key(job);
        if let Some(job) = self.store.steps.keys().find(is_unknown) {
            return self.violate(format!("{job} is forgotten, and its steps are not"));
        }
        if let Some(job) = self.store.jobs.by_key.values().find(is_unknown) {
            self.violate(format!("{job} is forgotten, and its key is not"));
        }
    }

    /// No worker has more ranks than slots.
    pub(super) fn check_slots(&mut self, server: usize) {
        let core = &self.servers[server].core;
        let mut used: BTreeMap<u64, usize> = BTreeMap::new();
        for formed in core.jobs().all.values().filter_map(|record| record.running()) {
            formed.places.iter().for_each(|worker| *used.entry(*worker).or_default() += 1);
        }
        let is_full = |worker: &u64, ranks: usize| {
            core.member(*worker)
                .is_some_and(|member| member.registration.slots > 0 && ranks > member.registration.slots)
        };
        if let Some((worker, ranks)) = used.into_iter().find(|(worker, ranks)| is_full(worker, *ranks)) {
            self.violate(format!("worker {worker} is to host {ranks} ranks, more than it has slots"));
        }
    }

    /// A fact becomes durable.
    pub(super) fn check_fact(&mut self, fact: &Fact) {
        let is_over = fact.job().filter(|job| self.checks.ended.contains(job));
        if let Some(job) = is_over.filter(|_| !matches!(fact, Fact::Forgotten { .. })) {
            return self.violate(format!("{job} has ended, and then: {fact:?}"));
        }
        match fact {
            Fact::Submitted { job, spec, .. } => {
                let records = &self.store.jobs.all;
                let planned = self.plan.jobs.iter().position(|planned| planned.spec.name == spec.name);
                let planned = planned.unwrap_or_default();
                let has_key = !self.plan.jobs[planned].spec.key.is_empty();
                let is_known = self.checks.planned.insert(*job, planned).is_some()
                    || has_key && records.values().any(|record| record.spec.name == spec.name);
                if is_known {
                    self.violate(format!("{job}, {:?}, is submitted twice", spec.name));
                }
            }
            Fact::Formed { job, formed, .. } => self.check_formed(*job, formed),
            Fact::CheckpointCommitted { job, step, cursor } => self.check_committed(*job, *step, *cursor),
            Fact::RolledBack { job, cursor, .. } => {
                let line = self.running(*job).and_then(|of| self.checks.lines.get(&of));
                if line.is_none_or(|line| line.diverged != Some(*cursor)) {
                    return self.violate(format!("{job} goes back past {cursor}, where no rank diverged"));
                }
                self.checks.rolled_back.insert(*job, *cursor);
                self.checks.left_behind.insert(*job, self.store.jobs.all[job].generation());
            }
            Fact::Ended { job, end, outcome, .. } => self.check_ended(*job, *end, outcome),
            Fact::Broken { job, .. } | Fact::Requeued { job, .. } => {
                // What was said of a worker that was silent is no evidence.
                if let Fact::Broken { why, paused: false, .. } = fact {
                    self.note_apart(*job, why);
                }
                let (is_requeued, record) =
                    (matches!(fact, Fact::Requeued { .. }), &self.store.jobs.all[job]);
                let has_slots = record.running().is_some() || is_requeued && record.phase == Phase::Broken;
                if is_requeued {
                    self.checks.left_behind.insert(*job, record.generation());
                }
                if !has_slots {
                    self.violate(format!("{job} has no formation to lose: {fact:?}"));
                }
            }
            Fact::RanksLost { job, lost, .. } => {
                let record = &self.store.jobs.all[job];
                let is_held = record.phase == Phase::Broken && lost.iter().all(|rank| record.holds(*rank));
                if !is_held {
                    self.violate(format!("{job} holds no slots to lose: {fact:?}"));
                }
            }
            Fact::Forgotten { job } => {
                let oldest = self.checks.ended.get(self.checks.forgotten);
                if oldest != Some(job) {
                    return self.violate(format!("{job} is forgotten where {oldest:?} ended first"));
                }
                self.checks.forgotten += 1;
            }
            Fact::CheckpointDamaged { job, step } => self.check_damaged(*job, *step),
            Fact::Stepped { job, step, .. } => self.check_stepped(*job, *step),
            // Nobody asks for it here.
            Fact::Retried { job, .. } => self.violate(format!("{job} is taken up again")),
            Fact::Rearranged { job, .. } => self.check_rearranged(*job),
            Fact::StorageIdentified { .. }
            | Fact::Drained { .. }
            | Fact::Undrained { .. }
            | Fact::Scaled { .. } => {}
        }
    }

    /// The running formation of a job, as far as it is kept.
    pub(super) fn running(&self, job: JobId) -> Option<FormationId> {
        Some(self.store.jobs.all.get(&job)?.running()?.id(job))
    }

    /// Whether a formation is the one that runs, as far as it is kept.
    pub(super) fn is_running(&self, of: FormationId) -> bool {
        self.running(of.job) == Some(of)
    }

    /// A job gives up its layout, and not what it has made.
    fn check_rearranged(&mut self, job: JobId) {
        let line = self.running(job).and_then(|of| self.checks.lines.get_mut(&of));
        match line {
            Some(line) => line.is_rearranged = line.history.len() > line.resumed,
            None => {
                self.violate(format!("{job} is to go on in another layout and has no formation to leave"))
            }
        }
    }

    fn check_formed(&mut self, job: JobId, formed: &Formed) {
        self.report.formations += 1;
        let record = &self.store.jobs.all[&job];
        let is_before = |(&other, waits): (&JobId, &JobRecord)| {
            waits.phase == Phase::Queued && (-waits.spec.priority, other) < (-record.spec.priority, job)
        };
        let overtakes = record.phase == Phase::Queued && self.store.jobs.all.iter().any(is_before);
        if overtakes && !formed.on_loan {
            return self.violate(format!("{job} starts before its turn, and not on loan"));
        }
        let is_out = |worker: &&u64| {
            let node = self.workers.get(worker).map(|worker| format!("n{}", worker.node));
            node.is_some_and(|node| self.store.jobs.drained.contains(&node))
        };
        if let Some(worker) = formed.places.iter().find(is_out) {
            return self.violate(format!("{job} is formed on worker {worker}, whose node is drained"));
        }
        if let Some(words) = self.wrong_size(job, &formed.topology) {
            return self.violate(words);
        }
        let history = self.history_of(job, formed);
        let is_next = formed.generation == record.generation().next() && record.running().is_none();
        if !is_next || formed.resume_step != history.len() as u64 {
            let words = format!("generation {} from step {}", formed.generation, formed.resume_step);
            return self.violate(format!("{job} forms {words}; there is step {}", history.len()));
        }
        let mut cursor = history.last().map_or(0, |trained| trained.cursor);
        if formed.memory.is_none() {
            cursor = cursor.max(self.checks.rolled_back.get(&job).copied().unwrap_or(0));
            self.checks.left_behind.insert(job, formed.generation.previous());
        }
        let resumed = history.len();
        let line = Line { history, resumed, cursor, ..Line::default() };
        self.checks.lines.insert(formed.id(job), line);
        self.checks.formed.insert(formed.id(job), formed.clone());
    }

    /// The steps that lead to what a formation resumes from, as they were really made or kept.
    fn history_of(&self, job: JobId, formed: &Formed) -> Vec<Trained> {
        let Some(memory) = &formed.memory else {
            return self.checks.kept.get(&job).cloned().unwrap_or_default();
        };
        let is_present = self.checks.left_behind.get(&job).is_none_or(|left| memory.generation > *left);
        let line = self.checks.lines.get(&FormationId::new(job, memory.generation)).filter(|_| is_present);
        let made = line.and_then(|line| line.history.get(..memory.step as usize));
        made.map(<[Trained]>::to_vec).unwrap_or_default()
    }

    /// An orchestrator learns of a worker's replicas, or of a step that a rank has completed.
    pub(super) fn note_reported(&mut self, server: usize, event: &Event) {
        if let Event::Rank { from, event, .. } = event {
            return self.note_stepped(server, from.formation, event);
        }
        let Event::Left { worker, left } = event else { return };
        // A worker that was away when its job went back to the queue still has what the others have dropped by then.
        let FormationId { job, generation } = left.formation;
        if self.checks.left_behind.get(&job).is_none_or(|left| generation > *left) {
            self.checks.reported.entry(left.formation).or_default().insert((*worker, server));
        }
    }

    /// A job re-forms, in whatever layout: where every rank or its buddy is alive and has reported its replicas, that costs
    /// the running step and at most one that was not acknowledged; nothing, if it has stopped for that.
    pub(super) fn check_cost(&mut self, server: usize, job: JobId, formed: &Formed) {
        let of = FormationId::new(job, formed.generation.previous());
        let (Some(before), Some(line)) = (self.checks.formed.get(&of), self.checks.lines.get(&of)) else {
            return;
        };
        let reported = self.checks.reported.get(&of);
        let core = &self.servers[server].core;
        let has_reported = |worker: u64| {
            core.member(worker).is_some()
                && reported.is_some_and(|reported| reported.contains(&(worker, server)))
        };
        let is_planned = line.is_rearranged;
        let survives = |rank: &usize| {
            let buddy = before.buddies.get(*rank).map(|buddy| before.places[buddy.index()]);
            [Some(before.places[*rank]), buddy].into_iter().flatten().any(has_reported)
        };
        let is_comparable = is_planned || !before.buddies.is_empty();
        let made = line.history.len() as u64;
        let is_in_memory = server == self.newest_server() && line.diverged.is_none();
        if is_comparable
            && is_in_memory
            && (is_planned || made >= before.resume_step + 2)
            && (0..before.places.len()).all(|rank| survives(&rank))
        {
            let least = if is_planned { made } else { made - 1 };
            if formed.resume_step < least {
                let from = formed.resume_step;
                self.violate(format!(
                    "{}: goes on after step {from}, although {made} were made and every part of step {least} is in memory",
                    formed.id(job)
                ));
            }
        }
    }

    fn check_committed(&mut self, job: JobId, step: u64, cursor: u64) {
        // Of a broken formation it was written down from memory.
        let of = FormationId::new(job, self.store.jobs.all[&job].generation());
        let line = self.checks.lines.get(&of);
        let made = line.and_then(|line| line.history.get(..step as usize)).map(<[Trained]>::to_vec);
        let stands = self.storage.of(job).and_then(|folder| folder.stands(step));
        match (made, stands) {
            (Some(made), Some(stands)) if made.last() == Some(&stands) && stands.cursor == cursor => {
                let before = self.checks.kept.insert(job, made).unwrap_or_default();
                let rolled_back = self.checks.rolled_back.remove(&job);
                self.checks.kept_before.insert(job, (before, rolled_back));
            }
            (made, _) => {
                let made = made.and_then(|made| made.last().copied());
                let words = format!("{job} keeps step {step} of sequences up to {cursor}");
                self.violate(format!("{words}: {stands:?} stands, made was {made:?}"));
            }
        }
    }

    /// A command is sent: the facts it follows from are durable by then.
    pub(super) fn check_command(&mut self, server: usize, worker: u64, down: &ToWorker) {
        match down {
            ToWorker::Refused if self.is_well(server, worker) => {
                self.violate(format!("worker {worker} must exit, although it has not stalled"));
            }
            ToWorker::Assign { job, formed, .. }
                if self.checks.formed.get(&formed.id(*job)) != Some(&**formed) =>
            {
                self.violate(format!("{job}: ranks are assigned by a formation that is not kept"));
            }
            ToWorker::Release { formation, .. } => {
                let incarnation = self.servers[server].core.incarnation();
                if self.is_running(*formation) && !self.has_brought(*formation, worker) {
                    self.violate(format!("{incarnation} releases {formation}, which runs"));
                }
            }
            _ => {}
        }
    }

    /// Whether a worker without a rank of a formation has brought what it had, and nobody needs that again: every buddy has a later state.
    fn has_brought(&self, of: FormationId, worker: u64) -> bool {
        let formed = self.checks.formed.get(&of).filter(|formed| !formed.places.contains(&worker));
        let brings = formed.is_some_and(|formed| formed.bringers().any(|(_, bringer)| bringer == worker));
        brings && self.checks.lines.get(&of).is_some_and(|line| line.history.len() >= line.resumed + 2)
    }

    /// Whether a worker gives no reason to be sent away: it has not stalled, and has seen no later orchestrator.
    fn is_well(&self, server: usize, worker: u64) -> bool {
        let core = &self.servers[server].core;
        let is_earlier =
            |worker: &Worker| worker.state == core.state() && worker.incarnation > core.incarnation();
        self.workers.get(&worker).is_some_and(|worker| !worker.is_stalled && !is_earlier(worker))
    }

    /// A worker takes ranks.
    pub(super) fn check_assigned(&mut self, id: u64, (job, ranks): (JobId, &[Rank]), formed: &Formed) {
        for &rank in ranks {
            let owner = *self.checks.owners.entry((formed.id(job), rank)).or_insert(id);
            if owner != id || formed.place_of(rank) != Some(id) {
                let of = format!("rank {rank} of {}", formed.id(job));
                let place = formed.place_of(rank);
                return self
                    .violate(format!("{of}: worker {id} takes it, {owner} has it, {place:?} was meant"));
            }
        }
    }

    /// All ranks of a formation make a step, from this place in the order of the sequences on.
    pub(super) fn check_step(&mut self, of: FormationId, cursor: u64, made: Trained, diverges: bool) {
        let Some(line) = self.checks.lines.get_mut(&of) else {
            return self.violate(format!("{of}: a formation nobody kept trains"));
        };
        let before = line.history.last().copied().unwrap_or_default();
        let expected = feed(before.digest, before.step + 1, line.cursor);
        if (made.step, cursor, made.digest) != (before.step + 1, line.cursor, expected) {
            let words = format!("step {} begins at sequence {cursor}", made.step);
            let next = format!("step {} at {}", before.step + 1, line.cursor);
            return self.violate(format!("{of}: {words}, next is {next}"));
        }
        line.cursor = made.cursor;
        if diverges {
            line.diverged = Some(made.cursor);
        } else {
            line.history.push(made);
        }
    }

    /// A rank has run the validation, or written its weights.
    pub(super) fn check_part(&mut self, of: FormationId, rank: Rank, is_export: bool) {
        let Some(line) = self.checks.lines.get_mut(&of) else { return };
        let parts = if is_export { &mut line.exported } else { &mut line.validated };
        parts.insert(rank);
    }
}
