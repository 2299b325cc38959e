//! What the flight recorders of a formation tell that was lost: a worker is asked, since workers alone have the storage, and its answer is a
//! line of the job's log. Nothing waits for it.
//!
//! Volatile: an orchestrator that was restarted meanwhile does not ask again.

use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::jobs::JobRecord;
use super::members::Member;
use super::{Core, Severity, WorkerCommand};

/// How the line of a job's log begins that says what the recorders of a formation tell.
pub const FLIGHT_LINE: &str = "the ranks of generation ";

/// How long after the loss they are read: those who are left have stopped recording by then.
const SETTLE_MS: u64 = 300;
/// How long a worker may take to read them, until another one is asked.
const ANSWER_MS: u64 = 10_000;
/// How long there may be no worker that can be asked.
const PATIENCE_MS: u64 = 60_000;
/// How many workers are asked, one after the other.
const MOST_ASKED: usize = 3;

/// A question about a formation.
#[derive(Debug)]
pub(super) struct Inquiry {
    formation: FormationId,
    /// Ranks that were lost.
    lost: Vec<Rank>,
    /// When the next worker is asked.
    due_ms: u64,
    /// When the question is given up.
    until_ms: u64,
    asked: Vec<u64>,
}

impl Core {
    /// The formation of a job ends otherwise than it should: what its ranks were about is asked for.
    pub(super) fn inquire(&mut self, job: JobId, lost: &[Rank], now: u64) {
        let Some(formed) = self.jobs.all.get(&job).and_then(|record| record.running()) else { return };
        let inquiry = Inquiry {
            formation: formed.id(job),
            lost: lost.to_vec(),
            due_ms: now + SETTLE_MS,
            until_ms: now + PATIENCE_MS,
            asked: Vec::new(),
        };
        self.findings.remove(&job);
        self.inquiries.insert(job, inquiry);
    }

    /// More ranks of the latest formation, which had been lost before, are lost: nobody asks their workers.
    pub(super) fn inquire_without(&mut self, formation: FormationId, lost: &[Rank]) {
        let inquiry = self.inquiries.get_mut(&formation.job).filter(|inquiry| inquiry.formation == formation);
        if let Some(inquiry) = inquiry {
            inquiry.lost.extend(lost);
            inquiry.lost.sort_unstable();
        }
    }

    /// Asks where that is due.
    pub(super) fn tick_inquiries(&mut self, now: u64) {
        let is_known = |job: &JobId| self.jobs.all.contains_key(job);
        self.inquiries.retain(|job, inquiry| {
            let is_over =
                now >= inquiry.until_ms || inquiry.asked.len() == MOST_ASKED && now >= inquiry.due_ms;
            is_known(job) && !is_over
        });
        let due: Vec<JobId> =
            self.inquiries.iter().filter(|(_, inquiry)| inquiry.due_ms <= now).map(|(&job, _)| job).collect();
        for job in due {
            let Some(worker) = self.reader_of(job) else { continue };
            let Some(inquiry) = self.inquiries.get_mut(&job) else { continue };
            inquiry.asked.push(worker);
            inquiry.due_ms = now + ANSWER_MS;
            let (formation, lost) = (inquiry.formation, inquiry.lost.clone());
            self.send(worker, WorkerCommand::ReadFlight { formation, lost });
        }
    }

    /// Who is to be asked next: a worker of the job that is left, in the order of ranks, or else any other one.
    fn reader_of(&self, job: JobId) -> Option<u64> {
        let inquiry = self.inquiries.get(&job)?;
        let formed = self.jobs.all.get(&job)?.formed.as_ref();
        let left = formed.into_iter().flat_map(|formed| formed.ranks());
        let left = left.filter(|(rank, _)| !inquiry.lost.contains(rank)).map(|(_, worker)| worker);
        let is_there = |member: &Member| member.is_attached && member.is_known();
        let is_asked =
            |worker: u64| !inquiry.asked.contains(&worker) && self.members.get(worker).is_some_and(is_there);
        left.chain(self.members.iter().map(|(&worker, _)| worker)).find(|&worker| is_asked(worker))
    }

    /// A worker says what the recorders tell.
    pub(super) fn flight_read(&mut self, worker: u64, formation: FormationId, says: &str) {
        let job = formation.job;
        let is_asked = |inquiry: &Inquiry| inquiry.formation == formation && inquiry.asked.contains(&worker);
        if !self.inquiries.get(&job).is_some_and(is_asked) {
            return;
        }
        self.inquiries.remove(&job);
        if !says.is_empty() {
            let line = format!("{}{}: {says}", FLIGHT_LINE, formation.generation);
            self.log_as(Severity::Warn, job, line.clone());
            let goes_on = |record: &JobRecord| record.running().is_some() && record.attempts.has_stepped;
            if !self.jobs.all.get(&job).is_some_and(goes_on) {
                self.findings.insert(job, line);
            }
        }
    }

    /// What the recorders of a job's latest lost formation have told, until a later one makes a step.
    pub(super) fn finding(&self, job: JobId) -> Option<String> {
        self.findings.get(&job).cloned()
    }
}
