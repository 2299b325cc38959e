//! How a formation breaks, and what is noted of it: who was lost, which place is not used again, which checkpoint is left out. When
//! and where the job is formed again is not known here.

use std::collections::BTreeSet;

use contraflow_runtime::topology::{JobId, Rank};

use super::attempts::Blame;
use super::facts::{End, Fact};
use super::formation::Formation;
use super::{Core, Effect, Registration, Severity};

impl Core {
    /// A line in a job's log.
    pub(super) fn log_as(&mut self, severity: Severity, job: JobId, line: String) {
        self.effects.push(Effect::Log { job, severity, line });
    }

    /// A formation has ended: the job re-forms, unless it has failed too often. `blame`: who is, if it has come to nothing.
    pub(super) fn break_formation(
        &mut self,
        job: JobId,
        lost: Vec<Rank>,
        why: String,
        blame: Blame,
        now: u64,
    ) {
        self.inquire(job, &lost, now);
        let record = &self.jobs.all[&job];
        let generation = record.generation();
        let resumed = record.formed.as_ref().map_or(0, |formed| formed.resume_step);
        let reached = self.formations.get(&job).map_or(0, Formation::reached).max(resumed);
        let is_idle = !record.attempts.has_stepped && reached <= resumed;
        let blame = if is_idle || blame == Blame::Pause { blame } else { Blame::Nobody };
        let mut attempts = record.attempts.clone();
        attempts.ended(reached, blame, &format!("generation {generation}: {why}"));
        let workers: BTreeSet<u64> =
            record.formed.iter().flat_map(|formed| formed.places.iter().copied()).collect();
        if let Some(words) = attempts.given_up(workers.len()) {
            return self.end(job, End::Failed, (words, None));
        }
        let stop = self.stop(job);
        self.release(job, &why, true);
        self.log_as(Severity::Warn, job, why.clone());
        self.paused_until.insert(job, now + attempts.pause_ms(workers.len()));
        let [idle, unreadable, paused] = [Blame::Job, Blame::Storage, Blame::Pause].map(|of| of == blame);
        self.persist(Fact::Broken {
            job,
            generation,
            lost,
            reached,
            idle,
            unreadable,
            paused,
            why,
            at_ms: now,
            stop,
        });
        self.query_survivors(job, now);
    }

    /// The checkpoint that a formation resumes from is damaged: the next one takes the checkpoint before, if there is one. Returns
    /// whether there is.
    pub(super) fn falls_back(&mut self, job: JobId, why: &str, now: u64) -> bool {
        let record = &self.jobs.all[&job];
        let (newest, resumed) =
            (record.last_checkpoint, record.running().map_or(0, |formed| formed.resume_step));
        let Some(earlier) = record.earlier_checkpoint.filter(|_| resumed == newest) else { return false };
        self.persist(Fact::CheckpointDamaged { job, step: newest });
        let why = format!("{why}; going back to the checkpoint of step {}", earlier.step);
        self.break_formation(job, Vec::new(), why, Blame::Job, now);
        true
    }

    /// A rank's node cannot do its part: the rank goes to another one, if there is room.
    pub(super) fn node_failed(&mut self, job: JobId, rank: Rank, (what, blame): (&str, Blame), now: u64) {
        let place = self.jobs.all[&job].running().and_then(|formed| formed.place_of(rank));
        let registration =
            place.and_then(|worker| self.members.get(worker)).map(|member| member.registration.clone());
        let Registration { name, node, .. } = registration.unwrap_or_default();
        let why = format!("{what}; on worker {name}, node {node}");
        self.avoided.entry(job).or_default().nodes.insert(node);
        self.break_formation(job, vec![rank], why, blame, now);
    }
}
