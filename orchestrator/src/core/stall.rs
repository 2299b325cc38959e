//! Stall detection: the progress of a formation's ranks, and which of them has stalled when none makes progress. Knows no worker.
//!
//! Every beat of every rank comes by here: what it costs does not grow with the number of ranks.

use contraflow_runtime::topology::Rank;
use std::collections::BTreeMap;

use super::{Progress, STALL_FACTOR, STALL_MS};

/// A rank's position at its last progress, and whether it has been working since or waits for others.
#[derive(Clone, Copy, Debug)]
struct Watermark {
    step: u64,
    operations: u64,
    is_at_work: bool,
    since_ms: u64,
}

/// A formation without progress for so long that it will not recover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// The rank that blocks the others; `None` if each waits for another.
    pub(super) rank: Option<Rank>,
    /// Human-readable.
    pub(super) why: String,
}

/// The ranks of one formation.
#[derive(Clone, Debug, Default)]
pub(super) struct StallDetector {
    by_rank: BTreeMap<Rank, Watermark>,
    /// When some rank last made progress, and in which step.
    latest: Option<(u64, u64)>,
    /// The longest pause without progress that ended. **Units**: ms.
    longest_gap: u64,
}

impl StallDetector {
    /// Records a rank's progress report.
    pub(super) fn note(&mut self, progress: &Progress, now: u64) {
        let &Progress { rank, step, operations, is_at_work } = progress;
        let before = self.by_rank.get(&rank.rank);
        let before = before.filter(|mark| (mark.step, mark.operations) == (step, operations));
        let since_ms = before.map_or(now, |mark| mark.since_ms);
        if before.is_none() {
            // Before the first step ranks wait for the slowest to be made: that says nothing of how slow they are.
            if let Some((latest, 1..)) = self.latest {
                self.longest_gap = self.longest_gap.max(now.saturating_sub(latest));
            }
            self.latest = Some((now, step));
        }
        self.by_rank.insert(rank.rank, Watermark { step, operations, is_at_work, since_ms });
    }

    /// If no rank has made progress for `for_ms`: of the ranks that are working, the one that stopped first. The others wait
    /// for it, sooner or later.
    pub(super) fn stalled_for(&self, now: u64, for_ms: u64) -> Option<Stall> {
        let (latest, _) = self.latest.filter(|(latest, _)| latest + for_ms <= now)?;
        let at_work = self.by_rank.iter().filter(|(_, mark)| mark.is_at_work);
        let first = at_work.min_by_key(|(_, mark)| (mark.since_ms, mark.step, mark.operations));
        let Some((&rank, mark)) = first else {
            let seconds = (now - latest) / 1000;
            return Some(Stall {
                rank: None,
                why: format!("no progress for {seconds} s: every rank waits for another one"),
            });
        };
        let &Watermark { step, operations, since_ms, .. } = mark;
        let seconds = now.saturating_sub(since_ms) / 1000;
        let why = format!(
            "rank {rank} has made no progress for {seconds} s, in step {step} after {operations} operations"
        );
        Some(Stall { rank: Some(rank), why })
    }

    /// If no rank has made progress for much longer than ever before: which rank has stalled.
    pub(super) fn stalled(&self, now: u64) -> Option<Stall> {
        self.stalled_for(now, STALL_MS.max(STALL_FACTOR * self.longest_gap))
    }
}
