//! What slots are used for: the account of a job as it is now, and that of the cluster since this process began.
//!
//! A job's account is a fold over facts and outlives the process. Who is a member is no fact: idle slots are counted as time
//! passes, and by this process alone.

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::topology::JobId;

use super::Core;
use super::facts::Fact;
use super::formation::Formation;
use crate::metrics::goodput::{Account, SlotTime, Stop};

/// Of the whole cluster.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// What all jobs had used when this process began.
    before: Account,
    /// What jobs had used that are no longer known.
    forgotten: Account,
    /// Slot time of no job. **Units**: milliseconds of one slot.
    idle: u64,
    /// Until when that is counted. **Units**: milliseconds since 1970.
    counted_ms: u64,
}

impl Usage {
    /// Of a process that begins with this state.
    pub(super) fn from(core: &Core) -> Self {
        Usage { before: core.of_all_jobs(), counted_ms: core.clock.wall_ms(), ..Usage::default() }
    }

    /// A job that has ended is not known any more.
    pub(super) fn forget(&mut self, of: Account) {
        self.forgotten = self.forgotten.and(of);
    }
}

impl Core {
    /// What a job has used.
    pub fn account(&self, job: JobId) -> Account {
        let Some(record) = self.jobs.all.get(&job) else { return Account::default() };
        let reached_ms = self.formations.get(&job).map_or(0, Formation::reached_ms);
        record.ledger.account(self.clock.wall_ms(), reached_ms)
    }

    fn of_all_jobs(&self) -> Account {
        self.jobs.all.keys().map(|&job| self.account(job)).fold(Account::default(), Account::and)
    }

    /// What the slots of all members were used for since this process began. What of a formation was not decided then counts from
    /// its beginning.
    pub fn cluster_account(&self) -> Account {
        let Usage { before, forgotten, idle, .. } = self.usage;
        let all = self.of_all_jobs().and(forgotten);
        let spent: SlotTime = all.spent.since(before.spent);
        Account { spent, idle, queued_ms: all.queued_ms.saturating_sub(before.queued_ms), ..all }
    }

    /// Where the latest formation of a job stands.
    pub(super) fn stop(&self, job: JobId) -> Stop {
        let formation = self.formations.get(&job);
        Stop {
            at_ms: self.clock.wall_ms(),
            step: formation.map_or(0, Formation::reached),
            step_ms: formation.map_or(0, Formation::reached_ms),
        }
    }

    /// A rank has perhaps made a step.
    pub(super) fn stepped(&mut self, job: JobId, event: &RankEvent) {
        let (RankEvent::StepDone { report }, Some(formation)) = (event, self.formations.get_mut(&job)) else {
            return;
        };
        let Some(step) = formation.own_step(event) else { return };
        let at_ms = self.clock.wall_ms();
        formation.made(step, at_ms);
        let record = &self.jobs.all[&job];
        let is_first = !record.attempts.has_stepped;
        if is_first || record.ledger.is_due(step) {
            // What a worker says of its time is not trusted to be a time.
            let took_ms =
                std::time::Duration::try_from_secs_f64(report.seconds).unwrap_or_default().as_millis();
            let began_ms = at_ms.saturating_sub(u64::try_from(took_ms).unwrap_or(u64::MAX));
            self.persist(Fact::Stepped { job, step, began_ms, at_ms });
        }
        if is_first {
            self.avoided.entry(job).or_default().stepped();
            self.findings.remove(&job);
        }
    }

    /// Counts the slots that no job holds.
    pub(super) fn count_idle(&mut self) {
        let (now, slots) =
            (self.clock.wall_ms(), self.members().map(|member| member.registration.slots as u64));
        let held: u64 = self.jobs.all.values().map(|record| record.ledger.slots()).sum();
        let idle = slots.sum::<u64>().saturating_sub(held);
        self.usage.idle += idle * now.saturating_sub(self.usage.counted_ms);
        self.usage.counted_ms = now;
    }
}
