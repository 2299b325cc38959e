//! How far the ranks of a formation are, and which of them hangs where none gets on. Knows no worker.
//!
//! Every beat of every rank comes by here: what it costs does not grow with the number of ranks.

use contraflow_runtime::topology::Rank;
use std::collections::BTreeMap;

use super::{HANG_GAPS, HANG_MS, Progress};

/// How far a rank was when it last got on, and whether it is at work since or waits for others.
#[derive(Clone, Copy, Debug)]
struct Watermark {
    step: u64,
    operations: u64,
    is_at_work: bool,
    since_ms: u64,
}

/// Ranks that have not got on for so long that they will not any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hang {
    /// The rank that holds up the others; none where each waits for another.
    pub(super) rank: Option<Rank>,
    /// In words.
    pub(super) why: String,
}

/// The ranks of one formation.
#[derive(Clone, Debug, Default)]
pub(super) struct Watermarks {
    by_rank: BTreeMap<Rank, Watermark>,
    /// When some rank last got on, and in which step.
    latest: Option<(u64, u64)>,
    /// The longest that nobody got on so far, and then somebody did. **Units**: ms.
    longest_gap: u64,
}

impl Watermarks {
    /// What a rank tells of itself.
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

    /// Where nobody has got on for so long: of the ranks that are at work the one that stopped first. The others wait for it,
    /// soon or at last.
    pub(super) fn stands_still(&self, now: u64, for_ms: u64) -> Option<Hang> {
        let (latest, _) = self.latest.filter(|(latest, _)| latest + for_ms <= now)?;
        let at_work = self.by_rank.iter().filter(|(_, mark)| mark.is_at_work);
        let first = at_work.min_by_key(|(_, mark)| (mark.since_ms, mark.step, mark.operations));
        let Some((&rank, mark)) = first else {
            let seconds = (now - latest) / 1000;
            return Some(Hang {
                rank: None,
                why: format!("every rank waits for another one, for {seconds} s"),
            });
        };
        let &Watermark { step, operations, since_ms, .. } = mark;
        let seconds = now.saturating_sub(since_ms) / 1000;
        let why = format!(
            "rank {rank} does not get on for {seconds} s, in step {step} after {operations} operations"
        );
        Some(Hang { rank: Some(rank), why })
    }

    /// Where nobody has got on for much longer than ever before: which rank hangs.
    pub(super) fn hangs(&self, now: u64) -> Option<Hang> {
        self.stands_still(now, HANG_MS.max(HANG_GAPS * self.longest_gap))
    }
}
