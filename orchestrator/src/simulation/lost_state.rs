//! The orchestrator's state is lost, and another one begins from nothing over the same storage, with the same workers: it counts
//! its jobs from 1, as the first one did.

use super::store::SimStore;
use super::{SimEvent, World};

impl World {
    /// Clients submit jobs that have not ended again.
    pub(super) fn lose_state(&mut self) {
        (0..self.servers.len()).for_each(|server| self.kill_server(server));
        let state = self.store.state + 1;
        self.note([35, state, 0], || format!("the state is lost, state {state} begins"));
        self.checks.lose_state(&self.store.jobs);
        self.store = SimStore::of(state);
        self.checks.is_over = (0..self.plan.jobs.len()).all(|job| self.checks.is_submitted(job));
        let takes = self.random.between(50, 5_000);
        self.plan_in(takes, SimEvent::ServerStarts);
        for job in 0..self.plan.jobs.len() {
            if !self.checks.is_submitted(job) {
                let after = takes + self.random.between(1, 5_000);
                self.plan_in(
                    after.max(self.plan.jobs[job].at_ms.saturating_sub(self.now)),
                    SimEvent::Submit(job),
                );
            }
        }
    }
}
