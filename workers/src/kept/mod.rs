//! What a worker process keeps in memory of the state of a job: its ranks' parts after the latest steps, and the parts that
//! it keeps for ranks of other workers, so that a lost worker costs at most a step.
//!
//! It outlives formations: the next one goes on from here. Who keeps what for whom is the orchestrator's word, and so is
//! which step a formation goes on from. A part is the bytes of a checkpoint's shard; nobody here knows tensors.

mod courier;
mod keeper;
mod restore;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::topology::Generation;
use contraflow_runtime::watch::Watch;
use parking_lot::{Mutex, MutexGuard};

pub use keeper::{Keep, Keeper, acknowledged, start, step_id};
pub use restore::{Recovered, recover};

/// Step reports of a rank that may not be durable with the orchestrator, at most: beyond it the oldest are lost to the metrics.
const MAX_REPORTS: usize = 1_000_000;

/// Buffers of parts that are out of date, for the next ones: as many as go out of date with one step.
const MAX_SPARE: usize = 4;

/// Which part of which state: generation, step, rank.
pub type ShardId = (Generation, u64, usize);

/// A rank's part of the state after a step.
pub struct Image {
    /// Where the run stood.
    pub position: Position,
    /// What the watch remembered.
    pub watch: Watch,
    /// As in a checkpoint's shard.
    pub bytes: Arc<Vec<u8>>,
}

/// What is kept of one job.
#[derive(Default)]
pub struct Kept {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Formations before this one have nothing more to say.
    generation: Generation,
    images: BTreeMap<ShardId, Arc<Image>>,
    /// By rank, what may not be durable with the orchestrator; of consecutive steps.
    reports: BTreeMap<usize, VecDeque<StepReport>>,
    spare: Vec<Vec<u8>>,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is whole before the lock is let go.
        self.state.lock()
    }

    /// A formation begins that goes on from a state in memory: what comes late from those before is not taken any more, and
    /// steps after that state will be made again.
    pub fn go_on_from(&self, generation: Generation, step: u64) {
        let mut state = self.lock();
        state.generation = generation;
        for reports in state.reports.values_mut() {
            reports.retain(|report| report.step <= step);
        }
    }

    /// Puts a part in, with reports of its rank, as the formation `by` does.
    pub fn put(
        &self,
        by: Generation,
        id: ShardId,
        image: Arc<Image>,
        reports: impl IntoIterator<Item = StepReport>,
    ) {
        let mut state = self.lock();
        if by < state.generation {
            return;
        }
        state.images.insert(id, image);
        let kept = state.reports.entry(id.2).or_default();
        let newest = kept.back().map_or(0, |report| report.step);
        kept.extend(reports.into_iter().filter(|report| report.step > newest));
        let excess = kept.len().saturating_sub(MAX_REPORTS);
        kept.drain(..excess);
    }

    /// A part, if it is here.
    pub fn get(&self, id: ShardId) -> Option<Arc<Image>> {
        self.lock().images.get(&id).cloned()
    }

    /// What a rank has reported up to a step and may not be durable with the orchestrator.
    pub fn reports(&self, rank: usize, step: u64) -> Vec<StepReport> {
        let state = self.lock();
        let reports = state.reports.get(&rank).into_iter().flatten();
        reports.filter(|report| report.step <= step).cloned().collect()
    }

    /// Every rank of this formation and every buddy has this step: what is older goes.
    pub fn acknowledged(&self, generation: Generation, step: u64) {
        let mut state = self.lock();
        let current = state.images.split_off(&(generation, step, 0));
        for image in std::mem::replace(&mut state.images, current).into_values() {
            // What is on its way to somebody stays until it has arrived.
            let buffer = Arc::into_inner(image).and_then(|image| Arc::into_inner(image.bytes));
            if let Some(buffer) = buffer.filter(|_| state.spare.len() < MAX_SPARE) {
                state.spare.push(buffer);
            }
        }
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
        self.lock().images.keys().copied().collect()
    }

    /// An empty buffer, used before where there is one: its pages are there already.
    fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }
}
