//! What this process keeps in memory of the state of jobs, by job, and how it is told to the orchestrator.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_proto::v1;

use crate::kept::Kept;

/// By job, the latest formation that was here, and what is kept.
#[derive(Default)]
pub(super) struct Memory {
    jobs: BTreeMap<u64, (u32, Arc<Kept>)>,
}

impl Memory {
    /// A formation begins: from what is kept, or with nothing.
    pub(super) fn enter(&mut self, assign: &v1::Assign) {
        let (_, kept) = self.jobs.entry(assign.job).or_default();
        match &assign.memory {
            Some(memory) => kept.go_on_from(assign.generation, memory.step),
            // Threads of the formation before may still hold the old one.
            None => *kept = Arc::default(),
        }
        self.jobs.entry(assign.job).and_modify(|(generation, _)| *generation = assign.generation);
    }

    /// What is kept of a job.
    pub(super) fn of(&mut self, job: u64) -> Arc<Kept> {
        self.jobs.entry(job).or_default().1.clone()
    }

    /// Step reports up to this one are durable with the orchestrator.
    pub(super) fn durable(&self, job: u64, step: u64) {
        if let Some((_, kept)) = self.jobs.get(&job) {
            kept.durable(step);
        }
    }

    /// Lets go of what is kept of a job, unless a formation after this one has been here.
    pub(super) fn let_go(&mut self, job: u64, generation: u32) {
        if self.jobs.get(&job).is_some_and(|(latest, _)| *latest <= generation) {
            self.jobs.remove(&job);
        }
    }

    /// What is kept of a job, as the orchestrator is told.
    pub(super) fn inventory(&self, job: u64) -> Vec<v1::KeptShard> {
        self.jobs.get(&job).map(|(_, kept)| inventory(kept)).unwrap_or_default()
    }

    /// Formations of which something is kept while none of their job is here.
    pub(super) fn of_left(&self, is_here: impl Fn(u64) -> bool) -> Vec<v1::Released> {
        let left = self.jobs.iter().filter(|(job, _)| !is_here(**job));
        let released = left.map(|(&job, (generation, kept))| v1::Released {
            job,
            generation: *generation,
            kept: inventory(kept),
        });
        released.collect()
    }
}

fn inventory(kept: &Kept) -> Vec<v1::KeptShard> {
    let shard = |(generation, step, rank)| v1::KeptShard { generation, step, rank: rank as u32 };
    kept.inventory().into_iter().map(shard).collect()
}
