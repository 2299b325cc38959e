//! Who comes and who goes: workers that attach, leave, are drained, or are lost, and what that means for the formations that
//! have ranks on them. How a formation breaks and who takes its places is not known here.

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::schedule::size;
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::attempts::Blame;
use super::events::{Attachment, Hosted, WorkerCommand};
use super::facts::{Fact, Formed};
use super::formation::Formation;
use super::jobs::{JobRecord, Phase};
use super::members::{Member, Registration};
use super::stall::{Stall, StallOf};
use super::{Core, Severity, list};

impl Core {
    pub(super) fn attached(&mut self, attachment: Attachment, now: u64) {
        let Attachment { registration, hosted, left, state, incarnation, storage_id, .. } = attachment;
        let worker = registration.worker;
        if let Err(why) = self.admit(&registration, (state, incarnation), &storage_id) {
            return self.send(worker, WorkerCommand::Reject { why });
        }
        if self.jobs.storage_id.is_empty() {
            self.persist(Fact::StorageIdentified { storage_id });
        }
        let is_expected = self.members.get(worker).is_some_and(|member| !member.is_known());
        self.members.attach(registration, now, self.times);
        self.is_open = true;
        self.send(worker, WorkerCommand::Welcome);
        let is_current = |hosted: &Hosted| self.formed(hosted.formation).is_some();
        let (current, stale): (Vec<_>, Vec<_>) = hosted.into_iter().partition(is_current);
        let is_known = |hosted: &Hosted| {
            let newest = self.jobs.all.get(&hosted.formation.job).map(JobRecord::generation);
            newest.is_some_and(|newest| hosted.formation.generation <= newest)
        };
        let (stale, foreign): (Vec<_>, Vec<_>) = stale.into_iter().partition(is_known);
        for Hosted { formation, .. } in stale {
            let keep = self.jobs.all.get(&formation.job).is_some_and(|record| record.in_memory);
            let _is_asked = self.await_survivor(worker, formation, now);
            let reason = "superseded by another formation".to_owned();
            self.send(worker, WorkerCommand::Release { formation, reason, keep });
        }
        foreign.iter().for_each(|hosted| self.foreign_attached(worker, hosted, now));
        left.into_iter().for_each(|left| self.left_before(worker, left, now));
        self.remind(worker, &current);
        if is_expected {
            self.assign_again(worker);
        }
    }

    /// The last worker of a formation has attached to a restarted orchestrator: only now the others can be notified
    /// where all of them are. Who hosts its ranks already ignores it.
    fn assign_again(&mut self, last: u64) {
        let is_known = |worker: &u64| self.members.get(*worker).is_some_and(Member::is_known);
        let whole = self.running().filter(|(_, formed)| formed.has(last));
        let whole = whole.filter(|(_, formed)| formed.workers().iter().all(is_known));
        let mut ranks_of: BTreeMap<(FormationId, u64), Vec<Rank>> = BTreeMap::new();
        let mut bring: Vec<(u64, FormationId, Rank)> = Vec::new();
        for (job, formed) in whole {
            let of = formed.bringers().filter(|(_, worker)| self.brings(*worker, job).is_some());
            bring.extend(of.map(|(place, worker)| (worker, formed.id(job), place)));
            for (rank, worker) in formed.ranks() {
                ranks_of.entry((formed.id(job), worker)).or_default().push(rank);
            }
        }
        for ((formation, worker), ranks) in ranks_of {
            self.send(worker, WorkerCommand::Assign { formation, ranks });
        }
        for (worker, formation, place) in bring {
            self.send(worker, WorkerCommand::Bring { formation, place });
        }
    }

    /// A worker's stream has ended.
    pub(super) fn detached(&mut self, worker: u64, now: u64) {
        let silent_ms = self.members.get(worker).map_or(0, |member| self.silent_ms(member));
        self.clock.closed(self.times);
        self.members.detach(worker, silent_ms, now, self.times);
    }

    fn admit(
        &self,
        registration: &Registration,
        (state, incarnation): (u64, u64),
        storage_id: &str,
    ) -> Result<(), String> {
        // Starts of another state say nothing of this one.
        if state == self.state && incarnation > self.incarnation {
            return Err(format!(
                "the worker has seen incarnation {incarnation} of the orchestrator, this is {}: another one has taken over",
                self.incarnation
            ));
        }
        let expected = &self.jobs.storage_id;
        if !expected.is_empty() && expected != storage_id {
            return Err(format!(
                "--storage of worker {}: expected the cluster's shared storage (id {expected}), got one with id {storage_id}; the same one, moved or copied, has its id in .contraflow-storage: copy that file too",
                registration.name
            ));
        }
        Ok(())
    }

    /// Repeats what a worker that attaches may have missed.
    fn remind(&mut self, worker: u64, hosted: &[Hosted]) {
        let placed = self.running().map(|(job, formed)| {
            let here = formed.ranks().filter(|(_, place)| *place == worker);
            (formed.id(job), here.map(|(rank, _)| rank).collect())
        });
        let placed: Vec<(FormationId, Vec<Rank>)> = placed.collect();
        for (formation, placed) in placed {
            let here = hosted.iter().filter(|hosted| hosted.formation == formation);
            let here: Vec<Rank> = here.flat_map(|hosted| hosted.ranks.iter().copied()).collect();
            let ranks: Vec<Rank> = placed.iter().copied().filter(|rank| !here.contains(rank)).collect();
            if !ranks.is_empty() {
                self.send(worker, WorkerCommand::Assign { formation, ranks });
            }
            let job = formation.job;
            let repeated = self.formations.get(&job).map_or_else(Vec::new, |formed| formed.repeat(&placed));
            self.apply_effects(job, repeated, 0);
        }
    }

    pub(super) fn drain(&mut self, node: String, now: u64) {
        if self.jobs.drained.contains(&node) {
            return;
        }
        self.persist(Fact::Drained { node: node.clone() });
        self.vacate(|member| member.registration.node == node, &format!("node {node} is drained"), now);
    }

    pub(super) fn undrain(&mut self, node: String) {
        if self.jobs.drained.contains(&node) {
            self.persist(Fact::Undrained { node });
        }
    }

    /// The drained nodes, for a job that waits: why their slots do not count, and how they would again.
    pub(super) fn drained_nodes(&self) -> String {
        /// As many as a line has room for.
        const NAMED: usize = 5;
        let drained = &self.jobs.drained;
        if drained.is_empty() {
            return String::new();
        }
        let named: Vec<&str> = drained.iter().take(NAMED).map(String::as_str).collect();
        let more = match drained.len() - named.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("; drained: {}{more}, to be undone by contraflow drain --undo NODE", named.join(", "))
    }

    /// A worker asks to leave: it takes no new ranks, and its jobs continue elsewhere.
    pub(super) fn request_leave(&mut self, worker: u64, now: u64) {
        self.members.renew(worker, now, self.times);
        if let Some(name) = self.members.request_leave(worker) {
            self.vacate(
                |member| member.registration.worker == worker,
                &format!("worker {name} is leaving"),
                now,
            );
        }
    }

    /// Moves the jobs that have ranks on such members.
    fn vacate(&mut self, is_left: impl Fn(&Member) -> bool, why: &str, now: u64) {
        let is_there = |worker: &u64| self.members.get(*worker).is_some_and(&is_left);
        let is_moving = |job| self.formations.get(&job).is_some_and(Formation::is_moving);
        let moved: Vec<JobId> = self
            .running()
            .filter(|(job, formed)| formed.places.iter().any(is_there) && !is_moving(*job))
            .map(|(job, _)| job)
            .collect();
        for job in moved {
            self.requeue(job, why.to_owned(), now);
        }
    }

    /// A worker may not be a member any more, though it is there.
    pub(super) fn expelled(&mut self, worker: u64, why: &str, now: u64) {
        let Some(member) = self.members.remove(worker) else { return };
        let why = |Member { registration: Registration { name, node, .. }, .. }: &Member, lost: &[Rank]| {
            format!("rank {} lost: worker {name} on node {node} is no member any more: {why}", list(lost))
        };
        self.lose((&[member], false), why, now);
    }

    /// Workers are not members any more: every job that has ranks on them re-forms.
    pub(super) fn lost(&mut self, members: &[Member], now: u64) {
        let why = |member: &Member, lost: &[Rank]| {
            let silent = now.saturating_sub(member.heard_ms);
            let how = match (member.is_known(), member.is_attached) {
                (false, _) => "has not come back since the orchestrator started".into(),
                (true, true) => format!("is silent for {silent} ms"),
                (true, false) => format!("has left, last seen {silent} ms ago"),
            };
            let Registration { name, node, .. } = &member.registration;
            format!("rank {} lost: worker {name} on node {node} {how}", list(lost))
        };
        let hit = self.lose((members, true), why, now);
        if members.iter().any(|member| member.is_attached) {
            // A process may live and keep the state of its ranks: its network or ours is gone.
            hit.into_iter().for_each(|job| self.expect_keepers(job, now));
        }
    }

    /// Breaks every formation that has ranks on workers which are not members any more; the reason is given per worker and job,
    /// by its ranks. `is_silence`: they are not heard, that is all. Returns the jobs.
    fn lose(
        &mut self,
        (members, is_silence): (&[Member], bool),
        why: impl Fn(&Member, &[Rank]) -> String,
        now: u64,
    ) -> Vec<JobId> {
        let mut lost: BTreeMap<JobId, (Vec<Rank>, Vec<String>)> = BTreeMap::new();
        let mut lost_later: BTreeMap<JobId, (Vec<Rank>, Vec<String>)> = BTreeMap::new();
        let (mut suspects, mut paused) = (BTreeSet::new(), BTreeSet::new());
        for member in members {
            let registration = &member.registration;
            self.forget_survivor(registration.worker);
            self.lose_foreign(registration.worker);
            for (job, ranks) in self.left_on(registration.worker) {
                let (all, reasons) = lost_later.entry(job).or_default();
                reasons.push(why(member, &ranks));
                all.extend(ranks);
            }
            let hit = self.ranks_on(registration.worker);
            // Ranks may end their process; they do not cut it off.
            let suspect = if member.has_ended() { self.suspect(&hit) } else { None };
            let stands_still = is_silence && member.is_known() && !member.has_ended();
            for job in self.begin_with(registration.worker) {
                let name = &registration.name;
                let reason = format!("worker {name} is lost, which had parts of the state in memory");
                lost.entry(job).or_default().1.push(reason);
            }
            for (job, ranks) in hit {
                paused.extend(stands_still.then_some(job));
                let mut why = why(member, &ranks);
                if suspect == Some(job) {
                    why += &self.short_of_memory(job, ranks.len(), registration).unwrap_or_default();
                    self.avoided.entry(job).or_default().nodes.insert(registration.node.clone());
                    suspects.insert(job);
                }
                let (all, reasons) = lost.entry(job).or_default();
                all.extend(ranks);
                reasons.push(why);
            }
        }
        lost_later
            .into_iter()
            .for_each(|(job, (ranks, reasons))| self.lose_more(job, ranks, reasons.join("; ")));
        let jobs = lost.keys().copied().collect();
        for (job, (mut ranks, reasons)) in lost {
            ranks.sort_unstable();
            let blame = match (suspects.contains(&job), paused.contains(&job)) {
                (true, _) => Blame::Job,
                (false, true) => Blame::Pause,
                (false, false) => Blame::Nobody,
            };
            self.break_formation(job, ranks, reasons.join("; "), blame, now);
        }
        jobs
    }

    /// The ranks of running formations on a worker, by job.
    fn ranks_on(&self, worker: u64) -> Vec<(JobId, Vec<Rank>)> {
        let on_it = |(job, formed): (JobId, &Formed)| {
            let ranks = formed.ranks().filter(|(_, place)| *place == worker);
            (job, ranks.map(|(rank, _)| rank).collect::<Vec<_>>())
        };
        self.running().map(on_it).filter(|(_, ranks)| !ranks.is_empty()).collect()
    }

    /// The ranks on a worker for which jobs that have lost their formations hold slots.
    fn left_on(&self, worker: u64) -> Vec<(JobId, Vec<Rank>)> {
        let broken = self.jobs.all.iter().filter(|(_, record)| record.phase == Phase::Broken);
        let on_it = |(&job, record): (&JobId, &JobRecord)| {
            let ranks = record.formed.iter().flat_map(Formed::ranks);
            let ranks = ranks.filter(|(rank, place)| *place == worker && record.holds(*rank));
            (job, ranks.map(|(rank, _)| rank).collect::<Vec<_>>())
        };
        broken.map(on_it).filter(|(_, ranks)| !ranks.is_empty()).collect()
    }

    /// Ranks of a job that has lost its formation before are lost, too.
    fn lose_more(&mut self, job: JobId, mut lost: Vec<Rank>, why: String) {
        lost.sort_unstable();
        let generation = self.jobs.all[&job].generation();
        self.inquire_without(FormationId::new(job, generation), &lost);
        self.log_as(Severity::Warn, job, why.clone());
        self.persist(Fact::RanksLost { job, generation, lost, why, at_ms: self.clock.wall_ms() });
    }

    /// Workers of a job that have not come back since the orchestrator was started, while others say that they have lost them:
    /// they are members no more.
    pub(super) fn missed(&mut self, job: JobId, now: u64) -> Vec<Member> {
        let Some(formation) = self.formations.get(&job) else { return Vec::new() };
        let formed = self.jobs.all.get(&job).and_then(|record| record.running());
        let ranks = formation.missed_for(now, self.times.return_ms());
        let places = ranks.into_iter().filter_map(|rank| formed?.place_of(rank));
        let is_away = |worker: &u64| self.members.get(*worker).is_some_and(|member| !member.is_known());
        let away: BTreeSet<u64> = places.filter(is_away).collect();
        away.into_iter().filter_map(|worker| self.members.remove(worker)).collect()
    }

    /// Ranks of a job do not reach one another. Workers of it whose streams are not open are lost, whatever their leases say. If
    /// all are there, and it has happened before, the worker that most of the others do not reach is avoided for the job.
    pub(super) fn unreachable(&mut self, job: JobId, why: &str, now: u64) {
        let formed = self.jobs.all.get(&job).and_then(|record| record.running());
        let places: BTreeSet<u64> = formed.iter().flat_map(|formed| formed.places.iter().copied()).collect();
        let is_away = |worker: &u64| self.members.get(*worker).is_some_and(|member| !member.is_attached);
        let away: Vec<u64> = places.iter().copied().filter(is_away).collect();
        if !away.is_empty() {
            let gone: Vec<Member> =
                away.into_iter().filter_map(|worker| self.members.remove(worker)).collect();
            return self.lost(&gone, now);
        }
        if let Some(name) = self.has_just_returned(job, &places, now) {
            let why = format!("{why}; worker {name} was silent a moment before: re-forming");
            return self.break_formation(job, Vec::new(), why, Blame::Pause, now);
        }
        let apart = self.formations.get(&job).map(Formation::apart).unwrap_or_default();
        let place = |rank| formed.and_then(|formed| formed.place_of(rank));
        let apart = apart.into_iter().filter_map(|(from, to)| Some((place(from)?, place(to)?)));
        let apart: Vec<(u64, u64)> = apart.collect();
        let suspect = self.avoided.entry(job).or_default().broken(apart);
        let ranks = suspect.map(|worker| self.ranks_on(worker)).unwrap_or_default();
        let lost = ranks.into_iter().find(|(of, _)| *of == job).map(|(_, lost)| lost).unwrap_or_default();
        let why = match suspect.and_then(|worker| self.members.get(worker)) {
            Some(Member { registration: Registration { name, node, .. }, .. }) => {
                format!("{why}; worker {name} on node {node} is avoided: others do not reach it")
            }
            None => format!("{why}; all workers are alive: re-forming"),
        };
        self.break_formation(job, lost, why, Blame::Job, now);
    }

    /// Of these workers of a formation, the name of one that was silent in its time, until a moment ago: what its peers say of it was
    /// true then.
    fn has_just_returned(&self, job: JobId, places: &BTreeSet<u64>, now: u64) -> Option<String> {
        let before = self.jobs.all.get(&job)?.broken_ms;
        let mut members = places.iter().filter_map(|worker| self.members.get(*worker));
        let returned = members.find(|member| member.has_just_returned(before, now, self.times))?;
        Some(returned.registration.name.clone())
    }

    /// Of jobs that had ranks on one worker, the one that may have ended it: among those whose formation has made no step the
    /// one with the largest ranks. The others are its victims.
    fn suspect(&self, hit: &[(JobId, Vec<Rank>)]) -> Option<JobId> {
        let idle = hit.iter().filter(|(job, _)| !self.jobs.all[job].attempts.has_stepped);
        let bytes = |job: &JobId| self.jobs.all[job].running().map_or(0, |formed| formed.rank_bytes);
        idle.map(|(job, _)| *job).max_by_key(|job| (bytes(job), std::cmp::Reverse(*job)))
    }

    /// What ranks need and what their worker had, where that may be why it has ended: at least half of it.
    fn short_of_memory(&self, job: JobId, ranks: usize, registration: &Registration) -> Option<String> {
        let needed = self.jobs.all[&job].running()?.rank_bytes;
        let is_short = registration.memory_bytes > 0
            && needed.saturating_mul(2 * ranks as u64) >= registration.memory_bytes;
        is_short.then(|| {
            let (needed, has) = (size(needed), registration.memory());
            format!(
                "; it may have run out of memory: a rank needs at least {needed}, {has} and hosted {ranks}"
            )
        })
    }

    /// The ranks of a job make no progress although all workers are alive. The one that holds them up may hang where no message
    /// reaches, and would again in the next formation: its process has to end.
    pub(super) fn rank_stalled(&mut self, job: JobId, Stall { of, why }: Stall, now: u64) {
        let place = |rank| self.jobs.all.get(&job)?.running()?.place_of(rank);
        let rank = if let StallOf::Rank(rank) = of { Some(rank) } else { None };
        let Some(member) = rank.and_then(place).and_then(|worker| self.members.remove(worker)) else {
            return self.break_formation(job, Vec::new(), format!("{why}: re-forming"), Blame::Job, now);
        };
        let Registration { worker, name, node, .. } = &member.registration;
        let why = format!("{why}; worker {name} on node {node} must exit");
        self.send(*worker, WorkerCommand::Reject { why: format!("{why}: start it again") });
        drop(self.lose((&[member], false), |_, _| why.clone(), now));
    }
}
