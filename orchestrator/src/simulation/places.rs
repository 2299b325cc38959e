//! Whether what is damaged or out of reach was noticed for what it is: checkpoints that are left out, places that are used again
//! although ranks do not reach one another there.

use contraflow_runtime::topology::JobId;

use super::World;
use crate::core::facts::Formed;
use crate::core::jobs::Phase;

/// Formations that two workers which do not reach each other may break before one of them is left out.
const TRIES: u32 = 2;

impl World {
    /// A checkpoint is left out: it has to be damaged, and what was kept before it counts again.
    pub(super) fn check_damaged(&mut self, job: JobId, step: u64) {
        if self.storage.of(job).is_none_or(|folder| folder.damaged(step).is_none()) {
            let words = format!("{job}: the checkpoint of step {step} is whole and taken for damaged");
            return self.violate(words);
        }
        let (kept, rolled_back) = self.checks.kept_before.remove(&job).unwrap_or_default();
        self.checks.kept.insert(job, kept);
        self.checks.rolled_back.remove(&job);
        self.checks.rolled_back.extend(rolled_back.map(|cursor| (job, cursor)));
    }

    /// A formation breaks although all of its workers are alive: not again and again because of the same two, while there is room
    /// for the job on others.
    pub(super) fn check_apart(&mut self, job: JobId, why: &str) {
        let record = &self.store.jobs.all[&job];
        let Some(formed) = record.running().filter(|_| why.ends_with("re-forming")) else { return };
        let Some((one, other)) = self.workers_apart(formed) else { return };
        let has_room = self.free_beside(job, [one, other]) >= formed.places.len();
        let tries = self.checks.apart.entry((job, one, other)).or_default();
        *tries += 1;
        if *tries > TRIES && has_room {
            let words = format!(
                "workers {one} and {other} do not reach each other, {tries} formations have shown it"
            );
            self.violate(format!("{job}: {words}, and both are used again"));
        }
    }

    /// Two workers of a formation that do not reach each other.
    fn workers_apart(&self, formed: &Formed) -> Option<(u64, u64)> {
        let pair = |id: u64| Some((id, self.out_of_reach(id, formed.places.iter().copied())?));
        formed.places.iter().find_map(|&id| pair(id)).map(|(one, other)| (one.min(other), one.max(other)))
    }

    /// Slots that a job could have without these workers.
    fn free_beside(&self, job: JobId, without: [u64; 2]) -> usize {
        let core = &self.servers[self.newest_server()].core;
        let is_held = |phase: &Phase| matches!(phase, Phase::Formed | Phase::Broken);
        let others = core.jobs().all.iter().filter(|(of, record)| **of != job && is_held(&record.phase));
        let held = others
            .filter_map(|(_, record)| record.formed.as_ref())
            .flat_map(|formed| formed.places.iter().copied());
        let held: Vec<u64> = held.chain(core.held_by_foreign()).collect();
        let takes = core.members().filter(|member| member.is_attached && !core.is_draining(member));
        takes
            .map(|member| &member.registration)
            .filter(|registration| !without.contains(&registration.worker))
            .map(|registration| {
                let used = held.iter().filter(|worker| **worker == registration.worker).count();
                registration.slots.saturating_sub(used)
            })
            .sum()
    }
}
