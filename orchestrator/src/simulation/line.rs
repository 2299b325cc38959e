//! Whether the first job in line gets its slots: the free ones at once, and those that are lent soon.

use std::collections::BTreeMap;

use contraflow_runtime::topology::Rank;

use super::World;
use crate::core::Member;
use crate::core::jobs::Phase;

/// How long a job on loan may take until it has given way: it finishes its step, and a checkpoint or two. **Units**: ms.
const GIVES_WAY_MS: u64 = 30_000;

impl World {
    /// The first job in the queue gets what is free, and soon what is lent.
    pub(super) fn check_line(&mut self, server: usize) {
        let core = &self.servers[server].core;
        if core.is_cut_off() {
            // It places nobody.
            return self.checks.lent = None;
        }
        let queued = core.jobs().all.iter().filter(|(_, record)| record.phase == Phase::Queued);
        let head = queued.min_by_key(|(job, record)| (-record.spec.priority, **job));
        let head = head.map(|(&job, record)| (job, record.spec.priority, record.spec.topology().world()));
        let Some((head, priority, ranks)) = head else { return self.checks.lent = None };
        let (mut held, mut missing, mut lent): (BTreeMap<u64, usize>, _, _) = (BTreeMap::new(), 0, 0);
        let mut lenders: Vec<String> = Vec::new();
        for (&job, record) in &core.jobs().all {
            let Some(formed) =
                record.formed.as_ref().filter(|_| matches!(record.phase, Phase::Formed | Phase::Broken))
            else {
                continue;
            };
            let is_lost =
                |rank: &usize| record.phase == Phase::Broken && record.lost.contains(&Rank::at(*rank));
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
            return self
                .violate(format!("{head} is first in line, needs {ranks} slots, and {free} are free"));
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
