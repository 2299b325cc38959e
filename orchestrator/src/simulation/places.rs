//! Whether what is damaged or out of reach was noticed for what it is: checkpoints that are left out, places that are used again
//! although ranks do not reach one another there.

use contraflow_runtime::topology::JobId;

use super::World;
use crate::core::facts::Formed;
use crate::core::jobs::Phase;

/// Formations that may fail to connect because two workers do not reach each other before one of them is left out. One that breaks in
/// the middle of a step is none of them: nobody knows its cause, and links may come and go without a formation between that connects.
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

    /// A formation does not connect although all of its workers are alive: counted, if two of them do not reach each other.
    pub(super) fn note_apart(&mut self, job: JobId, why: &str) {
        let record = &self.store.jobs.all[&job];
        let shows = why.contains("connecting") && why.ends_with("re-forming");
        let Some(formed) = record.running().filter(|_| shows) else { return };
        if let Some((one, other)) = self.workers_apart(formed) {
            *self.checks.apart.entry((job, one, other)).or_default() += 1;
        }
    }

    /// An orchestrator forms a job: not again and again on the same two that do not reach each other, while there is room for it
    /// on others.
    pub(super) fn check_reused(&mut self, server: usize, job: JobId, formed: &Formed) {
        let Some((one, other)) = self.workers_apart(formed) else { return };
        let tries = self.checks.apart.get(&(job, one, other)).copied().unwrap_or(0);
        if tries > TRIES && self.free_beside(server, job, [one, other]) >= formed.places.len() {
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
    fn free_beside(&self, server: usize, job: JobId, without: [u64; 2]) -> usize {
        let core = &self.servers[server].core;
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
