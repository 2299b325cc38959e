//! What a formation's ranks say of storage that fails: since when, why, and whether the fault is that of one place. Pure.
//!
//! Training does not depend on one checkpoint: what could not be written is tried again, here the commits and on the ranks
//! their parts. A rank is moved only where others can write what it cannot.

use std::collections::BTreeMap;

use contraflow_runtime::topology::Rank;

/// A place that fails for this long while others do not is at fault itself. **Units**: ms.
pub const BAD_PLACE_MS: u64 = 60_000;

/// A commit that fails for this long is given up: the job continues elsewhere, or ends. **Units**: ms.
pub const GIVE_UP_MS: u64 = 600_000;

/// The first wait before a failed commit is tried again, and the longest. **Units**: ms.
const RETRY_MS: (u64, u64) = (1_000, 60_000);

/// One rank's storage, or that of rank 0's worker where checkpoints are committed.
#[derive(Clone, Debug)]
struct StorageFault {
    since_ms: u64,
    step: u64,
    cause: String,
}

/// What fails.
#[derive(Clone, Debug, Default)]
pub(super) struct StorageFaults {
    /// Ranks whose latest part of a checkpoint could not be written.
    saves: BTreeMap<Rank, StorageFault>,
    /// The commit that could not be made.
    commit: Option<StorageFault>,
    /// How many commits in a row have failed, and when the next one is tried.
    retries: u32,
    retry_ms: Option<u64>,
    /// When some rank last wrote its part.
    written_ms: Option<u64>,
}

impl StorageFaults {
    /// A rank could not write its part of a checkpoint.
    pub(super) fn save_failed(&mut self, rank: Rank, step: u64, cause: String, now: u64) {
        let since_ms = self.saves.get(&rank).map_or(now, |fault| fault.since_ms);
        self.saves.insert(rank, StorageFault { since_ms, step, cause });
    }

    /// A rank has written its part of one.
    pub(super) fn saved(&mut self, rank: Rank, now: u64) {
        self.saves.remove(&rank);
        self.written_ms = Some(now);
    }

    /// A checkpoint could not be committed.
    pub(super) fn commit_failed(&mut self, step: u64, cause: String, now: u64) {
        let since_ms = self.commit.as_ref().map_or(now, |fault| fault.since_ms);
        self.commit = Some(StorageFault { since_ms, step, cause });
        let (first, longest) = RETRY_MS;
        self.retry_ms = Some(now + (first << self.retries.min(16)).min(longest));
        self.retries += 1;
    }

    /// One was committed.
    pub(super) fn committed(&mut self) {
        (self.commit, self.retries, self.retry_ms) = (None, 0, None);
    }

    /// Whether a commit is to be tried again now.
    pub(super) fn is_retry_due(&mut self, now: u64) -> bool {
        self.retry_ms.take_if(|at| *at <= now).is_some()
    }

    /// What fails, for people.
    pub(super) fn describe(&self, now: u64) -> Option<String> {
        let failing = |what: String, fault: &StorageFault| {
            let seconds = now.saturating_sub(fault.since_ms) / 1000;
            format!("the storage: {what} of step {} fails for {seconds} s: {}", fault.step, fault.cause)
        };
        let commit = self.commit.iter().map(|fault| failing("committing the checkpoint".into(), fault));
        let saves = self
            .saves
            .iter()
            .map(|(rank, fault)| failing(format!("writing rank {rank}'s part of the checkpoint"), fault));
        let mut all = commit.chain(saves);
        let first = all.next()?;
        Some(match all.count() {
            0 => first,
            more => format!("{first}; and {more} more"),
        })
    }

    /// The rank whose place is at fault, and what failed there.
    pub(super) fn bad_place(&self, now: u64) -> Option<(Rank, String)> {
        let is_over = |fault: &&StorageFault, ms: u64| fault.since_ms + ms <= now;
        let others_write = |fault: &StorageFault| self.written_ms.is_some_and(|at| at >= fault.since_ms);
        let describe = |rank: Rank, fault: &StorageFault| {
            let StorageFault { step, cause, .. } = fault;
            (rank, format!("rank {rank}, saving step {step}: {cause}"))
        };
        let commit = self.commit.as_ref().filter(|fault| is_over(fault, GIVE_UP_MS));
        let commit = commit.map(|StorageFault { step, cause, .. }| {
            (Rank::ZERO, format!("committing the checkpoint of step {step}: {cause}"))
        });
        let save = self.saves.iter().find(|(_, fault)| is_over(fault, BAD_PLACE_MS) && others_write(fault));
        commit.or_else(|| save.map(|(&rank, fault)| describe(rank, fault)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_at_fault_where_others_write_and_it_does_not() {
        let mut faults = StorageFaults::default();
        let cause = || "disk: Input/output error".to_owned();
        faults.save_failed(Rank::new(1), 20, cause(), 1_000);
        faults.save_failed(Rank::new(1), 21, cause(), 50_000);
        assert_eq!(faults.bad_place(1_000 + BAD_PLACE_MS), None, "nobody else has written since");
        faults.saved(Rank::new(0), 2_000);
        assert_eq!(faults.bad_place(BAD_PLACE_MS), None, "too early");
        let (rank, why) = faults.bad_place(1_000 + BAD_PLACE_MS).unwrap();
        assert_eq!((rank, why.as_str()), (Rank::new(1), "rank 1, saving step 21: disk: Input/output error"));
        let words = "the storage: writing rank 1's part of the checkpoint of step 21 fails for 61 s: disk: Input/output error";
        assert_eq!(faults.describe(62_500).unwrap(), words);
        faults.saved(Rank::new(1), 70_000);
        assert_eq!((faults.bad_place(1_000_000), faults.describe(1_000_000)), (None, None));
    }

    #[test]
    fn a_commit_is_tried_again_and_given_up_after_long() {
        let mut faults = StorageFaults::default();
        let mut now = 500;
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            faults.commit_failed(20, "full".into(), now);
            assert!(!faults.is_retry_due(now + wait * 1_000 - 1));
            now += wait * 1_000;
            assert!(faults.is_retry_due(now) && !faults.is_retry_due(now), "once");
        }
        assert_eq!(faults.bad_place(GIVE_UP_MS), None);
        assert!(
            faults.bad_place(500 + GIVE_UP_MS).unwrap().1.starts_with("committing the checkpoint of step 20")
        );
        faults.committed();
        assert_eq!(faults.bad_place(500 + GIVE_UP_MS), None);
    }
}
