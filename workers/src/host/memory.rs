//! What this process keeps in memory of the state of jobs, by job, and how it is reported to the orchestrator.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_proto::{StepReport, v1};
use contraflow_runtime::topology::{FormationId, Generation, JobId};

use crate::replica::{ReplicaStore, ShardId};

/// By job, the latest formation that was here, and what is kept.
#[derive(Default)]
pub(super) struct Memory {
    jobs: BTreeMap<JobId, (Generation, Arc<ReplicaStore>)>,
}

impl Memory {
    /// A formation begins: from what is kept, or with nothing.
    pub(super) fn enter(&mut self, formation: FormationId, memory: Option<&v1::InMemory>) {
        let (generation, store) = self.jobs.entry(formation.job).or_default();
        *generation = formation.generation;
        match memory {
            Some(memory) => {
                store.resume_from(formation.generation, memory.step, memory.axes.is_none());
            }
            // Threads of the formation before may still hold the old one.
            None => *store = Arc::default(),
        }
    }

    /// What is kept of a job.
    pub(super) fn of(&mut self, job: JobId) -> Arc<ReplicaStore> {
        self.jobs.entry(job).or_default().1.clone()
    }

    /// Step reports up to this one are durable with the orchestrator.
    pub(super) fn durable(&self, job: JobId, step: u64) {
        if let Some((_, store)) = self.jobs.get(&job) {
            store.durable(step);
        }
    }

    /// Drops the replicas of a job, unless a later formation has been here.
    pub(super) fn drop_replicas(&mut self, FormationId { job, generation }: FormationId) {
        if self.jobs.get(&job).is_some_and(|(latest, _)| *latest <= generation) {
            self.jobs.remove(&job);
        }
    }

    /// What ranks have reported that may not be durable, as reports of the formation that was left.
    pub(super) fn reports(&self, FormationId { job, generation }: FormationId) -> Vec<StepReport> {
        let reports = self.jobs.get(&job).map(|(_, store)| store.all_reports()).unwrap_or_default();
        let of_left = |report| StepReport { generation: generation.number(), ..report };
        reports.into_iter().map(of_left).collect()
    }

    /// The replicas of a job, as reported to the orchestrator.
    pub(super) fn inventory(&self, job: JobId) -> Vec<v1::ReplicaShard> {
        self.jobs.get(&job).map(|(_, store)| inventory(store)).unwrap_or_default()
    }

    /// Formations of which something is kept while none of their job is here.
    pub(super) fn of_left(&self, is_here: impl Fn(JobId) -> bool) -> Vec<v1::Released> {
        let left = self.jobs.iter().filter(|(job, _)| !is_here(**job));
        let released = left.map(|(&job, (generation, store))| v1::Released {
            job: job.bits(),
            generation: generation.number(),
            replicas: inventory(store),
        });
        released.collect()
    }
}

fn inventory(store: &ReplicaStore) -> Vec<v1::ReplicaShard> {
    let shard = |(generation, step, rank): ShardId| v1::ReplicaShard {
        generation: generation.number(),
        step,
        rank: rank as u64,
    };
    store.inventory().into_iter().map(shard).collect()
}
