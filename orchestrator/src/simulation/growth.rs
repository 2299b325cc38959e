//! Whether jobs have no more and no fewer ranks than they may have, and grow into slots that nobody else has a use for.

use contraflow_runtime::topology::{JobId, Topology};

use super::World;
use crate::core::Core;
use crate::core::jobs::Phase;

/// How long a job may leave slots unused that it may grow into, when all is well: it finishes a step, and what it saves may find the
/// storage full at first. **Units**: ms.
const GROWS_MS: u64 = 60_000;

impl World {
    /// What is wrong with this layout of a job, if anything is.
    pub(super) fn wrong_size(&self, job: JobId, axes: &Topology) -> Option<String> {
        let spec = &self.plan.jobs[self.checks.planned(job)?].spec;
        let named = spec.named();
        if !named.is_empty() && !named.contains(axes) {
            return Some(format!("{job} forms {axes:?}, it may have {named:?}"));
        }
        let ranks = axes.world();
        let target = self.store.jobs.all[&job].target;
        let most = if target > 0 { target } else { spec.max_ranks };
        // A target below the fewest is met, too.
        let least = if target > 0 { 1 } else { spec.min_ranks };
        let is_wrong = !(least..=most).contains(&ranks);
        is_wrong.then(|| format!("{job} forms {ranks} ranks, it may have {least} to {most}"))
    }

    /// Slots that nobody waits for do not stay unused while a job may have them.
    pub(super) fn check_growth(&mut self, server: usize) {
        let core = &self.servers[server].core;
        let is_stalled = self.workers.values().any(|worker| worker.is_stalled);
        let is_quiet = self.is_calm && !is_stalled && !core.is_cut_off() && !self.servers[server].disk_fails;
        let Some(job) = self.growable(core).filter(|_| is_quiet) else { return self.checks.grows = None };
        let since = self.checks.grows.filter(|(of, _)| *of == job).map_or(self.now, |(_, since)| since);
        self.checks.grows = Some((job, since));
        if self.now > since + GROWS_MS {
            let words = core.waiting_for(job);
            self.violate(format!("{job} may grow, there is room, and it does not: {words:?}"));
        }
    }

    /// A job that trains with fewer ranks than the slots and its own wishes allow, where it is the only open one.
    fn growable(&self, core: &Core) -> Option<JobId> {
        let mut open = core.jobs().all.iter().filter(|(_, record)| !record.has_ended());
        let (&job, record) = open.next().filter(|_| core.held_by_foreign().next().is_none())?;
        if open.next().is_some() || record.phase != Phase::Formed || !core.is_training(job) {
            return None;
        }
        let formed = record.formed.as_ref()?;
        let spec = &self.plan.jobs[self.checks.planned(job)?].spec;
        let most = if record.target > 0 { record.target } else { spec.max_ranks };
        let drained = &core.jobs().drained;
        let takes = core
            .members()
            .filter(|member| member.is_attached && !drained.contains(&member.registration.node));
        let slots: usize = takes.map(|member| member.registration.slots).sum();
        let base = spec.topology();
        // As many columns as the batch can be divided among, whatever their number.
        let columns = slots.min(most) / base.expert;
        let largest = match &spec.named_ranks()[..] {
            [] => columns.min(8) * base.expert,
            named => named.iter().copied().rfind(|ranks| *ranks <= slots.min(most)).unwrap_or(0),
        };
        (columns >= base.data && largest > formed.places.len()).then_some(job)
    }
}
