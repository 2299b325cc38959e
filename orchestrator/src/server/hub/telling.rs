//! What of a job is told to the webhook. Where that goes is [`crate::webhook`]'s.

use contraflow_runtime::topology::JobId;

use super::keeping::CommitBatch;
use super::{Hub, now_ms};
use crate::core::facts::{End, Fact};
use crate::webhook::{Happened, Notice};

impl Hub {
    /// Whoever wants to know is told once it is kept.
    pub(super) fn notify(&self, job: JobId, happened: Happened, words: &str, batch: &mut CommitBatch) {
        let Some(record) = self.core.jobs().all.get(&job).filter(|_| self.notices.is_some()) else { return };
        batch.notices.push(Notice {
            happened,
            unix_ms: now_ms(),
            job: job.to_string(),
            name: record.spec.name.clone(),
            step: self.steps.get(&job).map_or(0, |steps| steps.last),
            steps: record.spec.steps(),
            words: words.to_owned(),
        });
    }

    pub(super) fn notify_of(&self, fact: &Fact, batch: &mut CommitBatch) {
        match fact {
            Fact::Ended { job, end, outcome, .. } => {
                let happened = match end {
                    End::Done => Happened::Done,
                    End::Failed => Happened::Failed,
                    End::Cancelled => Happened::Cancelled,
                };
                self.notify(*job, happened, outcome, batch);
            }
            Fact::Broken { job, lost, why, .. } if !lost.is_empty() => {
                self.notify(*job, Happened::LostRanks, why, batch);
            }
            Fact::RanksLost { job, why, .. } => self.notify(*job, Happened::LostRanks, why, batch),
            Fact::RolledBack { job, why, .. } => self.notify(*job, Happened::RolledBack, why, batch),
            _ => {}
        }
    }
}
