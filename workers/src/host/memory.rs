//! What this process keeps in memory of the state of jobs, by job: how it is reported to the orchestrator, and written as a
//! checkpoint for another layout.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::{generation_of, ranks_of};
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use super::job::Prepared;
use crate::error::RankError;
use crate::replica::{ReplicaStore, ShardId};

/// By job, the latest formation that was here, and what is kept.
#[derive(Default)]
pub(super) struct Memory {
    jobs: BTreeMap<JobId, (Generation, Arc<ReplicaStore>)>,
    /// What ranks of formations that were left were made of.
    left: BTreeMap<JobId, (Generation, Arc<Prepared>)>,
}

impl Memory {
    /// A formation begins: from what is kept, or with nothing.
    pub(super) fn enter(&mut self, formation: FormationId, memory: Option<&v1::InMemory>) {
        let (generation, store) = self.jobs.entry(formation.job).or_default();
        *generation = formation.generation;
        match memory {
            Some(memory) => store.resume_from(formation.generation, memory.step),
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
            self.left.remove(&job);
        }
    }

    /// A formation has been left.
    pub(super) fn note_left(&mut self, formation: FormationId, prepared: Option<Arc<Prepared>>) {
        if let Some(prepared) = prepared {
            self.left.insert(formation.job, (formation.generation, prepared));
        }
    }

    /// For writing down, and committing, a state of a formation that was left: what its ranks were made of. What they were still
    /// writing is not in the way.
    pub(super) fn of_next(&self, formation: FormationId) -> Option<Arc<Prepared>> {
        let (_, prepared) =
            self.left.get(&formation.job).filter(|(left, _)| *left == formation.generation)?;
        Some(Arc::new(prepared.between_formations()))
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

/// Which parts are to be written down.
pub(super) struct WriteShards {
    /// Of the formation that was left: what its ranks have reported is said in its name.
    left: Generation,
    /// Of the formation that made the step.
    made: Generation,
    step: u64,
    ranks: Vec<Rank>,
}

impl WriteShards {
    /// As it came.
    ///
    /// **Errors**: a number that none of them has.
    pub(super) fn of(order: &v1::WriteShards) -> Result<Self, String> {
        Ok(WriteShards {
            left: generation_of(order.generation)?,
            made: generation_of(order.of_generation).map_err(|words| format!("of_{words}"))?,
            step: order.step,
            ranks: ranks_of(&order.ranks)?,
        })
    }
}

/// Writes parts down, each as its rank's shard of a checkpoint; what is to be said of each rank, in order.
pub(super) fn write_shards(prepared: &Prepared, store: &ReplicaStore, order: &WriteShards) -> Vec<RankEvent> {
    let mut events = Vec::new();
    for &rank in &order.ranks {
        for mut report in store.reports(rank.index(), order.step) {
            report.generation = order.left.number();
            events.push(RankEvent::StepDone { report });
        }
        events.push(write_part(prepared, store, order, rank).unwrap_or_else(|error| RankEvent::Failed {
            rank,
            action: format!("writing the state after step {}", order.step),
            cause: error.to_string(),
            kind: error.kind(),
            peer: None,
        }));
    }
    events
}

fn write_part(
    prepared: &Prepared,
    store: &ReplicaStore,
    order: &WriteShards,
    rank: Rank,
) -> Result<RankEvent, RankError> {
    let replica = store.get((order.made, order.step, rank.index())).ok_or_else(|| RankError::Content {
        path: "memory".into(),
        message: format!("has no state of rank {rank} after step {}", order.step),
    })?;
    let dir = prepared.folder.make_unfinished(order.step)?;
    let written = crate::checkpoint::write_shard_bytes(&dir, rank.index(), &replica.bytes);
    let shard = written.map_err(RankError::in_storage)?;
    let (position, watch) = (replica.position, replica.watch.clone());
    Ok(RankEvent::ShardSaved { rank, position, watch, shard })
}

fn inventory(store: &ReplicaStore) -> Vec<v1::ReplicaShard> {
    let shard = |(generation, step, rank): ShardId| v1::ReplicaShard {
        generation: generation.number(),
        step,
        rank: rank as u64,
    };
    store.inventory().into_iter().map(shard).collect()
}
