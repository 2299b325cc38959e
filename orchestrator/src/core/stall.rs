//! Stall detection: the progress of a formation's ranks, and which of them has stalled when none makes progress. Knows no worker.
//!
//! Every beat of every rank comes by here: what it costs does not grow with the number of ranks.

use contraflow_runtime::topology::Rank;
use std::collections::BTreeMap;

use super::{Progress, STALL_FACTOR, STALL_MS, list};

/// A rank's position at its last progress, and whether it has been working since or waits for others.
#[derive(Clone, Copy, Debug)]
struct Watermark {
    step: u64,
    operations: u64,
    is_at_work: bool,
    /// Since when it has been reading from or writing to storage.
    storage_ms: Option<u64>,
    since_ms: u64,
}

/// What a formation without progress waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StallOf {
    /// A rank that blocks the others.
    Rank(Rank),
    /// Storage that some rank reads or writes.
    Storage,
    /// Each rank waits for another one.
    Everyone,
}

/// A formation without progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// What it waits for.
    pub(super) of: StallOf,
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
        let &Progress { rank, step, operations, is_at_work, uses_storage } = progress;
        let before = self.by_rank.get(&rank.rank);
        let storage_ms = before.and_then(|mark| mark.storage_ms).or(Some(now)).filter(|_| uses_storage);
        let before = before.filter(|mark| (mark.step, mark.operations) == (step, operations));
        let since_ms = before.map_or(now, |mark| mark.since_ms);
        if before.is_none() {
            // Before the first step ranks wait for the slowest to be made: that says nothing of how slow they are.
            if let Some((latest, 1..)) = self.latest {
                self.longest_gap = self.longest_gap.max(now.saturating_sub(latest));
            }
            self.latest = Some((now, step));
        }
        self.by_rank.insert(rank.rank, Watermark { step, operations, is_at_work, storage_ms, since_ms });
    }

    /// If no rank has made progress for `for_ms`: of the ranks that are working, the one that stopped first. The others wait
    /// for it, sooner or later. Where none is working but some use storage, all wait for that.
    pub(super) fn stalled_for(&self, now: u64, for_ms: u64) -> Option<Stall> {
        let (latest, _) = self.latest.filter(|(latest, _)| latest + for_ms <= now)?;
        let at_work = self.by_rank.iter().filter(|(_, mark)| mark.is_at_work);
        let first = at_work.min_by_key(|(_, mark)| (mark.since_ms, mark.step, mark.operations));
        let Some((&rank, mark)) = first else {
            let seconds = (now - latest) / 1000;
            let users = self.by_rank.iter().filter(|(_, mark)| mark.storage_ms.is_some());
            let users: Vec<Rank> = users.map(|(&rank, _)| rank).collect();
            return Some(match users.is_empty() {
                true => Stall {
                    of: StallOf::Everyone,
                    why: format!("no progress for {seconds} s: every rank waits for another one"),
                },
                false => Stall {
                    of: StallOf::Storage,
                    why: format!("the storage: rank {} reads or writes for {seconds} s", list(&users)),
                },
            });
        };
        let &Watermark { step, operations, since_ms, .. } = mark;
        let seconds = now.saturating_sub(since_ms) / 1000;
        let why = format!(
            "rank {rank} has made no progress for {seconds} s, in step {step} after {operations} operations"
        );
        Some(Stall { of: StallOf::Rank(rank), why })
    }

    /// A rank has written its part of a checkpoint.
    pub(super) fn saved(&mut self, rank: Rank) {
        if let Some(mark) = self.by_rank.get_mut(&rank) {
            mark.storage_ms = None;
        }
    }

    /// Ranks that have been reading or writing for so long, whether or not they train meanwhile.
    pub(super) fn slow_storage(&self, now: u64, for_ms: u64) -> Option<String> {
        let since = |mark: &Watermark| mark.storage_ms.filter(|since| since + for_ms <= now);
        let slow = self.by_rank.iter().filter_map(|(&rank, mark)| Some((rank, since(mark)?)));
        let (ranks, since): (Vec<Rank>, Vec<u64>) = slow.unzip();
        let seconds = (now - since.into_iter().min()?) / 1000;
        Some(format!(
            "the storage: rank {} reads or writes for {seconds} s; checkpoints that become due meanwhile are skipped",
            list(&ranks)
        ))
    }

    /// If no rank has made progress for much longer than ever before: which rank has stalled.
    pub(super) fn stalled(&self, now: u64) -> Option<Stall> {
        self.stalled_for(now, STALL_MS.max(STALL_FACTOR * self.longest_gap))
    }
}
