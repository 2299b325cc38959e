//! Who comes and who goes: workers that attach, leave, are drained, or are lost, and what that means for the formations that
//! have ranks on them. How a formation breaks and who takes its places is not known here.

use std::collections::BTreeMap;

use contraflow_runtime::schedule::size;
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::facts::Fact;
use super::formation::Formation;
use super::jobs::JobRecord;
use super::members::{Introduction, Member};
use super::watermarks::Hang;
use super::words::{Hosted, Left, Word};
use super::{Core, list};

impl Core {
    pub(super) fn attached(
        &mut self,
        who: Introduction,
        hosted: &[Hosted],
        (state, incarnation, storage_mark): (u64, u64, String),
        left: Vec<Left>,
        now: u64,
    ) {
        let worker = who.worker;
        if let Err(why) = self.admit(&who, (state, incarnation), &storage_mark) {
            return self.tell(worker, Word::Refused { why });
        }
        if self.jobs.storage_mark.is_empty() {
            self.keep(Fact::StorageMarked { mark: storage_mark });
        }
        let is_expected = self.members.get(worker).is_some_and(|member| !member.is_known());
        self.members.attach(who, now);
        self.is_open = true;
        self.tell(worker, Word::Welcome);
        let is_current = |hosted: &Hosted| self.formed(hosted.formation).is_some();
        let (current, stale): (Vec<_>, Vec<_>) = hosted.iter().cloned().partition(is_current);
        let is_known = |hosted: &Hosted| {
            let newest = self.jobs.all.get(&hosted.formation.job).map(JobRecord::generation);
            newest.is_some_and(|newest| hosted.formation.generation <= newest)
        };
        let (stale, foreign): (Vec<_>, Vec<_>) = stale.into_iter().partition(is_known);
        for Hosted { formation, .. } in stale {
            let keep = self.jobs.all.get(&formation.job).is_some_and(|record| record.in_memory);
            let reason = "another formation has taken its place".to_owned();
            self.tell(worker, Word::Release { formation, reason, keep });
        }
        foreign.iter().for_each(|hosted| self.foreign_attached(worker, hosted, now));
        left.into_iter().for_each(|left| self.left(worker, left));
        self.remind(worker, &current);
        if is_expected {
            self.assign_again(worker);
        }
    }

    /// The last worker of a formation has come to an orchestrator that was started anew: only now the others can be told
    /// where all of them are. Who hosts its ranks already ignores it.
    fn assign_again(&mut self, last: u64) {
        let is_known = |worker: &u64| self.members.get(*worker).is_some_and(Member::is_known);
        let whole = self.running().filter(|(_, formed)| formed.places.contains(&last));
        let whole = whole.filter(|(_, formed)| formed.places.iter().all(is_known));
        let mut ranks_of: BTreeMap<(FormationId, u64), Vec<Rank>> = BTreeMap::new();
        for (job, formed) in whole {
            for (rank, worker) in formed.ranks() {
                ranks_of.entry((formed.id(job), worker)).or_default().push(rank);
            }
        }
        for ((formation, worker), ranks) in ranks_of {
            self.tell(worker, Word::Assign { formation, ranks });
        }
    }

    fn admit(
        &self,
        who: &Introduction,
        (state, incarnation): (u64, u64),
        storage_mark: &str,
    ) -> Result<(), String> {
        // Starts of another state say nothing of this one.
        if state == self.state && incarnation > self.incarnation {
            return Err(format!(
                "the worker has heard of incarnation {incarnation} of the orchestrator, this is {}: another one has taken over",
                self.incarnation
            ));
        }
        let expected = &self.jobs.storage_mark;
        if !expected.is_empty() && expected != storage_mark {
            return Err(format!(
                "--storage of worker {}: expected the cluster's shared storage (mark {expected}), got one of mark {storage_mark}",
                who.name
            ));
        }
        Ok(())
    }

    /// Says again what a worker that attaches may not have heard.
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
                self.tell(worker, Word::Assign { formation, ranks });
            }
            let job = formation.job;
            let repeated = self.formations.get(&job).map_or_else(Vec::new, |formed| formed.repeat(&placed));
            self.carry_out(job, repeated, 0);
        }
    }

    pub(super) fn drain(&mut self, node: String, now: u64) {
        if self.jobs.drained.contains(&node) {
            return;
        }
        self.keep(Fact::Drained { node: node.clone() });
        self.vacate(|member| member.who.node == node, &format!("node {node} is drained"), now);
    }

    /// A worker wants to end: it takes no new ranks, and its jobs go on elsewhere.
    pub(super) fn leaving(&mut self, worker: u64, now: u64) {
        self.members.heard(worker, now);
        if let Some(name) = self.members.leaving(worker) {
            self.vacate(|member| member.who.worker == worker, &format!("worker {name} is leaving"), now);
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
            self.move_away(job, why.to_owned(), now);
        }
    }

    /// A worker is not a member any more: every job that has ranks on it forms anew.
    pub(super) fn lost(&mut self, member: &Member, now: u64) {
        let silent = now.saturating_sub(member.heard_ms);
        let how = if member.is_attached { "is silent" } else { "has left, last heard of" };
        let ago = if member.is_attached { format!("for {silent} ms") } else { format!("{silent} ms ago") };
        let Introduction { name, node, .. } = &member.who;
        let why =
            |lost: &[Rank]| format!("rank {} lost: worker {name} on node {node} {how} {ago}", list(lost));
        self.lose(&member.who, why, now);
    }

    /// Breaks every formation that has ranks on a worker, which is not a member any more; why, each is told by its ranks.
    fn lose(&mut self, who: &Introduction, why: impl Fn(&[Rank]) -> String, now: u64) {
        self.forget_kept(who.worker);
        self.lose_foreign(who.worker);
        let hit: Vec<(JobId, Vec<Rank>)> = self
            .running()
            .map(|(job, formed)| {
                let lost = formed.ranks().filter(|(_, place)| *place == who.worker);
                (job, lost.map(|(rank, _)| rank).collect())
            })
            .filter(|(_, lost): &(JobId, Vec<Rank>)| !lost.is_empty())
            .collect();
        let suspect = self.suspect(&hit);
        for (job, lost) in hit {
            let is_suspect = suspect == Some(job);
            let mut why = why(&lost);
            if is_suspect {
                why += &self.short_of_memory(job, lost.len(), who).unwrap_or_default();
                self.avoided.entry(job).or_default().insert(who.node.clone());
            }
            self.break_formation(job, lost, why, is_suspect, now);
        }
    }

    /// Of jobs that had ranks on one worker, the one that may have ended it: among those whose formation has made no step the
    /// one with the largest ranks. The others are its victims.
    fn suspect(&self, hit: &[(JobId, Vec<Rank>)]) -> Option<JobId> {
        let idle = hit.iter().filter(|(job, _)| !self.jobs.all[job].attempts.has_stepped);
        let bytes = |job: &JobId| self.jobs.all[job].running().map_or(0, |formed| formed.rank_bytes);
        idle.map(|(job, _)| *job).max_by_key(|job| (bytes(job), std::cmp::Reverse(*job)))
    }

    /// What ranks need and what their worker had, where that may be why it has ended: at least half of it.
    fn short_of_memory(&self, job: JobId, ranks: usize, who: &Introduction) -> Option<String> {
        let needed = self.jobs.all[&job].running()?.rank_bytes;
        let is_short = who.memory_bytes > 0 && needed.saturating_mul(2 * ranks as u64) >= who.memory_bytes;
        is_short.then(|| {
            let (needed, has) = (size(needed), who.memory());
            format!(
                "; it may have run out of memory: a rank needs at least {needed}, {has} and hosted {ranks}"
            )
        })
    }

    /// The ranks of a job do not get on although every worker is there. The one that holds them up may hang in what no word
    /// reaches, and would again in the next formation: its process has to end.
    pub(super) fn hung(&mut self, job: JobId, Hang { rank, why }: Hang, now: u64) {
        let place = |rank| self.jobs.all.get(&job)?.running()?.place_of(rank);
        let Some(member) = rank.and_then(place).and_then(|worker| self.members.remove(worker)) else {
            return self.break_formation(job, Vec::new(), format!("{why}: formed anew"), true, now);
        };
        let Introduction { worker, name, node, .. } = &member.who;
        let why = format!("{why}; worker {name} on node {node} is to end");
        self.tell(*worker, Word::Refused { why: format!("{why}: start it again") });
        self.lose(&member.who, |_| why.clone(), now);
    }
}
