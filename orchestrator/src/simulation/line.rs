//! Whether the first job in line gets its slots, the free ones at once and those that are lent soon, and whether nobody keeps slots
//! that are of no use to it.

use std::collections::BTreeMap;

use contraflow_runtime::topology::{JobId, Rank};

use super::World;
use crate::core::jobs::{JobRecord, Phase};
use crate::core::{Core, Member};

/// How long a job on loan may take until it has given way: it finishes its step, and a checkpoint or two. **Units**: ms.
const GIVES_WAY_MS: u64 = 30_000;

/// How long a job may keep slots that are of no use to it: its workers are waited for. **Units**: ms.
const GIVES_UP_MS: u64 = 20_000;

impl World {
    /// A job that the cluster has no room for, even if it held nothing else, does not keep slots with which another could start.
    pub(super) fn check_useless(&mut self, server: usize) {
        let core = &self.servers[server].core;
        // One that hears nobody, or whose decisions cannot be kept, decides nothing.
        let is_idle = core.is_cut_off() || self.servers[server].disk_fails;
        let useless = if is_idle { None } else { useless(core) };
        let Some(job) = useless else { return self.checks.useless = None };
        let since = self.checks.useless.filter(|(by, of, _)| (*by, *of) == (server, job));
        let since = since.map_or(self.now, |(.., since)| since);
        self.checks.useless = Some((server, job, since));
        if self.now > since + GIVES_UP_MS {
            let reason = core.waiting_for(job);
            self.violate(format!(
                "{job} keeps slots that are of no use to it, and another job waits: {reason}"
            ));
        }
    }

    /// The first job in the queue gets what is free, and soon what is lent.
    pub(super) fn check_line(&mut self, server: usize) {
        let core = &self.servers[server].core;
        if core.is_cut_off() {
            // It places nobody.
            return self.checks.lent = None;
        }
        let queued = core.jobs().all.iter().filter(|(_, record)| record.phase == Phase::Queued);
        let head = queued.min_by_key(|(job, record)| (-record.spec.priority, **job));
        let head = head.map(|(&job, record)| (job, record.spec.priority, core.size(job).asked));
        let Some((head, priority, ranks)) = head else { return self.checks.lent = None };
        let (mut held, mut missing, mut lent): (BTreeMap<u64, usize>, _, _) = (BTreeMap::new(), 0, 0);
        let mut lenders: Vec<String> = Vec::new();
        for (&job, record) in &core.jobs().all {
            let Some(formed) =
                record.formed.as_ref().filter(|_| matches!(record.phase, Phase::Formed | Phase::Broken))
            else {
                continue;
            };
            let is_lost = |rank: &usize| record.phase == Phase::Broken && !record.holds(Rank::at(*rank));
            let (lost, left): (Vec<usize>, Vec<usize>) = (0..formed.places.len()).partition(is_lost);
            missing += lost.len();
            let is_behind = (-record.spec.priority, job) > (-priority, head);
            if formed.on_loan && is_behind {
                lent += left.len();
                lenders.push(format!("{job} ({:?}): {:?}", record.phase, core.waiting_for(job)));
            }
            left.iter().for_each(|&rank| *held.entry(formed.places[rank]).or_default() += 1);
        }
        let drained = &core.jobs().drained;
        // Ranks of a lost state hold their slots until they are released.
        core.held_by_foreign().for_each(|worker| *held.entry(worker).or_default() += 1);
        let takes = core
            .members()
            .filter(|member| member.is_attached && !drained.contains(&member.registration.node));
        let free = |member: &Member| {
            member
                .registration
                .slots
                .saturating_sub(held.get(&member.registration.worker).copied().unwrap_or(0))
        };
        let free = takes.map(free).sum::<usize>().saturating_sub(missing);
        if free >= ranks {
            let reason = core.waiting_for(head);
            return self.violate(format!(
                "{head} is first in line, needs {ranks} slots, and {free} are free: {reason:?}"
            ));
        }
        // A stalled job is preempted once the stall has been detected.
        let is_stalled = self.workers.values().any(|worker| worker.is_stalled);
        if !self.is_calm || is_stalled || free + lent < ranks {
            return self.checks.lent = None;
        }
        let since = self.checks.lent.filter(|(of, _)| *of == head).map_or(self.now, |(_, since)| since);
        self.checks.lent = Some((head, since));
        if self.now > since + GIVES_WAY_MS {
            let reason = core.waiting_for(head);
            let words =
                format!("{head} is first in line and waits for {lent} slots that are lent, {reason:?}");
            self.violate(format!("{words}: {lenders:?}"));
        }
    }
}

/// A job that has lost ranks, for which all workers have no room and with whose slots another one could start.
fn useless(core: &Core) -> Option<JobId> {
    let drained = &core.jobs().drained;
    let is_usable = |member: &&Member| member.is_attached && !drained.contains(&member.registration.node);
    let slots: usize = core.members().filter(is_usable).map(|member| member.registration.slots).sum();
    let holds = |record: &JobRecord| match (&record.phase, &record.formed) {
        (Phase::Formed, Some(formed)) => formed.places.len(),
        (Phase::Broken, Some(formed)) => formed.places.len() - record.lost.len() - record.gone.len(),
        _ => 0,
    };
    let held: usize = core.jobs().all.values().map(holds).sum::<usize>() + core.held_by_foreign().count();
    let waiting = core.jobs().all.values().filter(|record| record.phase == Phase::Queued);
    let least = waiting.map(|record| record.spec.topology().world()).min()?;
    let is_useless = |record: &JobRecord| {
        let needed =
            record.formed.as_ref().map_or(0, |formed| formed.places.len()).min(record.spec.min_ranks);
        // Others wait because their formations came to nothing.
        record.phase == Phase::Broken
            && record.attempts.pause_ms(0) == 0
            && needed > slots
            && least + held <= slots + holds(record)
    };
    core.jobs().all.iter().find(|(_, record)| is_useless(record)).map(|(&job, _)| job)
}
