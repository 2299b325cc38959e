//! How a job begins and ends, and what is kept of it then. What it does in between is not known here.

use contraflow_runtime::topology::JobId;

use super::facts::{End, Fact, JobSpec};
use super::jobs::Phase;
use super::{Core, RETAINED_BYTES, Severity};

impl Core {
    pub(super) fn submit(&mut self, spec: Box<JobSpec>) {
        if !self.jobs.by_key.contains_key(&spec.key) {
            let job = JobId::new(self.jobs.newest.number() + 1, self.nonce);
            let at_ms = self.clock.wall_ms();
            self.persist(Fact::Submitted { job, spec, at_ms });
        }
    }

    pub(super) fn cancel(&mut self, job: JobId, reason: &str) {
        let is_open = self.jobs.all.get(&job).is_some_and(|record| !record.has_ended());
        if is_open {
            let outcome = if reason.is_empty() { "cancelled" } else { reason };
            self.end(job, End::Cancelled, (outcome.to_owned(), None));
        }
    }

    pub(super) fn end(&mut self, job: JobId, end: End, (outcome, validation_loss): (String, Option<f64>)) {
        let stop = self.stop(job);
        self.release(job, &outcome, false);
        self.discard_unfinished(job);
        self.avoided.remove(&job);
        self.layouts.forget(job);
        if end != End::Failed {
            self.inquiries.remove(&job);
            self.findings.remove(&job);
        }
        let severity = if end == End::Failed { Severity::Error } else { Severity::Info };
        self.log_as(severity, job, format!("{}: {outcome}", format!("{end:?}").to_lowercase()));
        let at_ms = self.clock.wall_ms();
        self.persist(Fact::Ended { job, end, outcome, validation_loss, at_ms, stop });
    }

    /// Bounds the number of retained jobs, and what they take.
    pub(super) fn forget(&mut self) {
        let is_too_much =
            |core: &Self| core.jobs.ended.len() > core.retained_jobs || core.spec_bytes > RETAINED_BYTES;
        while let Some(&job) = self.jobs.ended.front().filter(|_| is_too_much(self)) {
            self.persist(Fact::Forgotten { job });
        }
    }

    /// A job that has failed or was cancelled goes back into the queue, and goes on from its newest checkpoint.
    pub(super) fn retry(&mut self, job: JobId) {
        let Some(record) = self.jobs.all.get(&job) else { return };
        if !matches!(record.phase, Phase::Ended(End::Failed | End::Cancelled)) {
            return;
        }
        let from = match record.last_checkpoint {
            0 => "from the start, for there is no checkpoint".into(),
            step => format!("from the checkpoint of step {step}"),
        };
        self.log_as(Severity::Info, job, format!("taken up again, {from}"));
        self.persist(Fact::Retried { job, at_ms: self.clock.wall_ms() });
    }
}
