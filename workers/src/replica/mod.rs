//! In-memory replicas of a job's state: the shards of this worker's ranks after the latest steps, and replicas for ranks of
//! other workers, so that a lost worker costs at most a step, and a change of the layout none.
//!
//! It outlives formations: the next one resumes from here. The orchestrator decides which rank holds whose replica, and from
//! which step a formation resumes. A shard is stored as the bytes of a checkpoint's shard; nothing here knows tensors.

mod moves;
mod replicator;
mod restore;
#[cfg(test)]
mod tests;
mod transfer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::Generation;
use parking_lot::{Mutex, MutexGuard};

pub use replicator::{Circle, Replicate, Replicator, acknowledged, start, step_id};
pub use restore::{Rearranged, Recovered, Wanted, bring, rearrange, recover};

/// Maximum number of a rank's step reports that may not be durable with the orchestrator; beyond it the oldest are lost to
/// the metrics.
const MAX_REPORTS: usize = 1_000_000;

/// Buffers of parts that are out of date, for the next ones: as many as go out of date with one step.
const MAX_SPARE: usize = 4;

/// Identifies a shard of a state: generation, step, rank.
pub type ShardId = (Generation, u64, usize);

/// A rank's shard of the state after a step.
pub struct ShardReplica {
    /// Position of the run.
    pub position: Position,
    /// State of the stability watch.
    pub watch: StabilityWatch,
    /// As in a checkpoint's shard.
    pub bytes: Arc<Vec<u8>>,
}

/// The replicas of one job.
#[derive(Default)]
pub struct ReplicaStore {
    state: Mutex<StoreState>,
}

#[derive(Default)]
struct StoreState {
    /// Earlier formations are ignored.
    generation: Generation,
    replicas: BTreeMap<ShardId, Arc<ShardReplica>>,
    /// By rank, what may not be durable with the orchestrator; of consecutive steps.
    reports: BTreeMap<usize, VecDeque<StepReport>>,
    spare: Vec<Vec<u8>>,
}

impl ReplicaStore {
    fn lock(&self) -> MutexGuard<'_, StoreState> {
        // Every change is complete before the lock is released.
        self.state.lock()
    }

    /// A formation starts that resumes from a state in memory: late data of earlier formations is dropped, and steps after
    /// that state are repeated. In another layout no rank of it can repeat what others have reported; that has been said when they
    /// were left.
    pub fn resume_from(&self, generation: Generation, step: u64, is_same_layout: bool) {
        let mut state = self.lock();
        state.generation = generation;
        for reports in state.reports.values_mut() {
            reports.retain(|report| is_same_layout && report.step <= step);
        }
    }

    /// Puts a part in, with reports of its rank, as the formation `by` does.
    pub fn put(
        &self,
        by: Generation,
        id: ShardId,
        replica: Arc<ShardReplica>,
        reports: impl IntoIterator<Item = StepReport>,
    ) {
        let mut state = self.lock();
        if by < state.generation {
            return;
        }
        state.replicas.insert(id, replica);
        let kept = state.reports.entry(id.2).or_default();
        let newest = kept.back().map_or(0, |report| report.step);
        kept.extend(reports.into_iter().filter(|report| report.step > newest));
        let excess = kept.len().saturating_sub(MAX_REPORTS);
        kept.drain(..excess);
    }

    /// A part, if it is here.
    pub fn get(&self, id: ShardId) -> Option<Arc<ShardReplica>> {
        self.lock().replicas.get(&id).cloned()
    }

    /// What a rank has reported up to a step and may not be durable with the orchestrator.
    pub fn reports(&self, rank: usize, step: u64) -> Vec<StepReport> {
        let state = self.lock();
        let reports = state.reports.get(&rank).into_iter().flatten();
        reports.filter(|report| report.step <= step).cloned().collect()
    }

    /// Every rank of this formation and every buddy has this step: older ones are dropped.
    pub fn acknowledged(&self, generation: Generation, step: u64) {
        let mut state = self.lock();
        let current = state.replicas.split_off(&(generation, step, 0));
        for replica in std::mem::replace(&mut state.replicas, current).into_values() {
            // A replica in transfer stays until it has arrived.
            let buffer = Arc::into_inner(replica).and_then(|replica| Arc::into_inner(replica.bytes));
            if let Some(buffer) = buffer.filter(|_| state.spare.len() < MAX_SPARE) {
                state.spare.push(buffer);
            }
        }
    }

    /// All reports that may not be durable with the orchestrator.
    pub fn all_reports(&self) -> Vec<StepReport> {
        self.lock().reports.values().flatten().cloned().collect()
    }

    /// Reports up to this step are durable.
    pub fn durable(&self, step: u64) {
        for reports in self.lock().reports.values_mut() {
            let durable = reports.partition_point(|report| report.step <= step);
            reports.drain(..durable);
        }
    }

    /// Everything that is here.
    pub fn inventory(&self) -> Vec<ShardId> {
        self.lock().replicas.keys().copied().collect()
    }

    /// An empty buffer, used before where there is one: its pages are there already.
    fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }
}
