//! The state as a snapshot: when one is due, and its parts. What is of no job comes first, then a part a job, made one at a
//! time, so that no record and no memory grows with the state.

use std::sync::Arc;

use contraflow_runtime::topology::JobId;
use tokio::task::JoinHandle;

use crate::core::facts::Fact;
use crate::core::jobs::{JobRecord, Jobs};
use crate::store::{Replay, Store, StoreError};

/// Facts after which a snapshot takes their place.
const SNAPSHOT_EVERY: u64 = 10_000;

/// What facts may take on the disk before a snapshot takes their place, or as much as the last snapshot took if that is more.
/// **Units**: bytes.
const SNAPSHOT_BYTES: u64 = 64 << 20;

/// Facts between a snapshot that could not be written and the next try.
const SNAPSHOT_AGAIN: u64 = 1_000;

/// When the next snapshot is due.
pub(super) struct Snapshots {
    facts_since: u64,
    bytes_since: u64,
    /// What the last one took.
    last_bytes: u64,
    /// The one that is being written, beside everything else.
    running: Option<JoinHandle<Result<u64, StoreError>>>,
}

impl Snapshots {
    /// The stored state, and what has been written since its snapshot.
    ///
    /// **Errors**: a part or record that this version cannot read.
    pub(super) fn replay(replay: &Replay) -> Result<(Jobs, Self), String> {
        let parts = replay.snapshot.as_ref().map_or(&[][..], |(_, parts)| parts);
        let mut snapshots = Snapshots {
            facts_since: 0,
            bytes_since: 0,
            last_bytes: parts.iter().map(|part| part.len() as u64).sum(),
            running: None,
        };
        let mut jobs = read(parts)?;
        for (number, bytes) in &replay.records {
            let fact: Fact =
                serde_json::from_slice(bytes).map_err(|error| format!("record {number}: {error}"))?;
            jobs.apply(&fact);
            snapshots.count(std::slice::from_ref(bytes));
        }
        Ok((jobs, snapshots))
    }

    /// Takes note of records of facts.
    pub(super) fn count(&mut self, facts: &[Vec<u8>]) {
        self.facts_since += facts.len() as u64;
        self.bytes_since += facts.iter().map(|fact| fact.len() as u64).sum::<u64>();
    }

    /// Begins to write the state after the record of this number, which is the latest.
    pub(super) fn begin(&mut self, store: Arc<Store>, number: u64, jobs: Jobs) {
        (self.facts_since, self.bytes_since) = (0, 0);
        let write = move || store.snapshot(number, parts(jobs));
        self.running = Some(tokio::task::spawn_blocking(write));
    }

    pub(super) fn is_due(&self) -> bool {
        let is_long = self.facts_since >= SNAPSHOT_EVERY;
        self.running.is_none() && (is_long || self.bytes_since >= SNAPSHOT_BYTES.max(self.last_bytes))
    }

    /// Takes note of one that has ended. One that failed is tried again later: the records are still there.
    pub(super) async fn look(&mut self) {
        let Some(running) = self.running.take_if(|running| running.is_finished()) else { return };
        match running.await {
            Ok(Ok(bytes)) => self.last_bytes = bytes,
            Ok(Err(error)) => self.failed(&error),
            Err(panic) => self.failed(&panic),
        }
    }

    fn failed(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!("the snapshot could not be written, the event log grows until the next try: {why}");
        self.facts_since = self.facts_since.max(SNAPSHOT_EVERY - SNAPSHOT_AGAIN);
    }
}

/// The parts of a state, in order.
fn parts(mut jobs: Jobs) -> impl Iterator<Item = Vec<u8>> {
    let all = std::mem::take(&mut jobs.all);
    // Each job has its key.
    jobs.by_key.clear();
    // A state is numbers, texts and lists.
    let head = serde_json::to_vec(&jobs).unwrap_or_default();
    std::iter::once(head).chain(all.into_iter().map(|job| serde_json::to_vec(&job).unwrap_or_default()))
}

/// The state of a snapshot. A first part that holds all jobs is one of format 2.
///
/// **Errors**: a part that this version cannot read.
fn read(parts: &[Vec<u8>]) -> Result<Jobs, String> {
    let Some((head, rest)) = parts.split_first() else { return Ok(Jobs::default()) };
    let mut jobs: Jobs = serde_json::from_slice(head).map_err(|error| format!("snapshot: {error}"))?;
    for (index, part) in (1..).zip(rest) {
        let (job, record): (JobId, JobRecord) =
            serde_json::from_slice(part).map_err(|error| format!("snapshot, part {index}: {error}"))?;
        if !record.spec.key.is_empty() {
            jobs.by_key.insert(record.spec.key.clone(), job);
        }
        jobs.all.insert(job, record);
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::recipe::{Recipe, RecipeSource};

    use super::*;
    use crate::core::facts::{End, JobSpec};

    fn submitted(number: u64, key: &str) -> Fact {
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        let spec = JobSpec {
            name: "job".into(),
            priority: 0,
            min_ranks: 1,
            max_ranks: 0,
            key: key.into(),
            user: "ann".into(),
            recipe: Arc::new(recipe),
            rank_bytes: 0,
            traceparent: String::new(),
            origin: None,
        };
        Fact::Submitted { job: JobId::new(number, 3), spec: Box::new(spec), at_ms: number }
    }

    fn state() -> Jobs {
        let ended = Fact::Ended {
            job: JobId::new(2, 3),
            end: End::Done,
            outcome: "done".into(),
            validation_loss: Some(1.5),
            at_ms: 9,
            stop: Default::default(),
        };
        let drained = Fact::Drained { node: "n1".into() };
        let mut jobs = Jobs::default();
        for fact in [submitted(1, ""), submitted(2, "two"), submitted(3, "three"), ended, drained] {
            jobs.apply(&fact);
        }
        jobs
    }

    #[test]
    fn a_state_comes_back_from_its_parts_and_from_one_value() {
        let jobs = state();
        let all: Vec<Vec<u8>> = parts(jobs.clone()).collect();
        assert_eq!(all.len(), 4, "a part a job, and one before");
        assert_eq!(read(&all).unwrap(), jobs);
        assert_eq!(read(&[serde_json::to_vec(&jobs).unwrap()]).unwrap(), jobs);
        assert_eq!(read(&[]).unwrap(), Jobs::default());
        let broken = [&all[..2], &[b"no part".to_vec()]].concat();
        assert!(read(&broken).unwrap_err().starts_with("snapshot, part 2: "));
    }

    #[test]
    fn a_snapshot_is_due_by_facts_and_by_bytes_and_again_after_a_failure() {
        let replay = Replay { snapshot: None, records: Vec::new(), incarnation: 1 };
        let fresh = || Snapshots::replay(&replay).unwrap().1;
        let mut snapshots = fresh();
        snapshots.count(&vec![Vec::new(); SNAPSHOT_EVERY as usize - 1]);
        assert!(!snapshots.is_due());
        snapshots.count(&[Vec::new()]);
        assert!(snapshots.is_due());
        let mut snapshots = fresh();
        (0..64).for_each(|_| snapshots.count(&[vec![0; 1 << 20]]));
        assert!(snapshots.is_due());
        snapshots.last_bytes = 65 << 20;
        assert!(!snapshots.is_due(), "a large state is not written again for little");
        let mut snapshots = fresh();
        snapshots.failed(&"no space");
        snapshots.count(&vec![Vec::new(); SNAPSHOT_AGAIN as usize - 1]);
        assert!(!snapshots.is_due());
        snapshots.count(&[Vec::new()]);
        assert!(snapshots.is_due());
    }
}
