//! What this process keeps in memory of the state of jobs, by job: how it is told to the orchestrator, and how it is written
//! down for another layout.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::{generation_of, ranks_of};
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use super::job::Prepared;
use crate::error::RankError;
use crate::kept::{Kept, ShardId};

/// By job, the latest formation that was here, and what is kept.
#[derive(Default)]
pub(super) struct Memory {
    jobs: BTreeMap<JobId, (Generation, Arc<Kept>)>,
    /// What ranks of formations that were left were made of.
    left: BTreeMap<JobId, (Generation, Arc<Prepared>)>,
}

impl Memory {
    /// A formation begins: from what is kept, or with nothing.
    pub(super) fn enter(&mut self, formation: FormationId, memory: Option<&v1::InMemory>) {
        let (generation, kept) = self.jobs.entry(formation.job).or_default();
        *generation = formation.generation;
        match memory {
            Some(memory) => kept.go_on_from(formation.generation, memory.step),
            // Threads of the formation before may still hold the old one.
            None => *kept = Arc::default(),
        }
    }

    /// What is kept of a job.
    pub(super) fn of(&mut self, job: JobId) -> Arc<Kept> {
        self.jobs.entry(job).or_default().1.clone()
    }

    /// Step reports up to this one are durable with the orchestrator.
    pub(super) fn durable(&self, job: JobId, step: u64) {
        if let Some((_, kept)) = self.jobs.get(&job) {
            kept.durable(step);
        }
    }

    /// Lets go of what is kept of a job, unless a formation after this one has been here.
    pub(super) fn let_go(&mut self, FormationId { job, generation }: FormationId) {
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

    /// What is kept of a job, as the orchestrator is told.
    pub(super) fn inventory(&self, job: JobId) -> Vec<v1::KeptShard> {
        self.jobs.get(&job).map(|(_, kept)| inventory(kept)).unwrap_or_default()
    }

    /// Formations of which something is kept while none of their job is here.
    pub(super) fn of_left(&self, is_here: impl Fn(JobId) -> bool) -> Vec<v1::Released> {
        let left = self.jobs.iter().filter(|(job, _)| !is_here(**job));
        let released = left.map(|(&job, (generation, kept))| v1::Released {
            job: job.bits(),
            generation: generation.number(),
            kept: inventory(kept),
        });
        released.collect()
    }
}

/// Which parts are to be written down.
pub(super) struct WriteDown {
    /// Of the formation that was left: what its ranks have reported is said in its name.
    left: Generation,
    /// Of the formation that made the step.
    made: Generation,
    step: u64,
    ranks: Vec<Rank>,
}

impl WriteDown {
    /// As it came.
    ///
    /// **Errors**: in words; a number that none of them has.
    pub(super) fn of(order: &v1::WriteDown) -> Result<Self, String> {
        Ok(WriteDown {
            left: generation_of(order.generation)?,
            made: generation_of(order.of_generation).map_err(|words| format!("of_{words}"))?,
            step: order.step,
            ranks: ranks_of(&order.ranks)?,
        })
    }
}

/// Writes parts down, each as its rank's shard of a checkpoint; what is to be said of each rank, in order.
pub(super) fn write_down(prepared: &Prepared, kept: &Kept, order: &WriteDown) -> Vec<RankEvent> {
    let mut events = Vec::new();
    for &rank in &order.ranks {
        for mut report in kept.reports(rank.index(), order.step) {
            report.generation = order.left.number();
            events.push(RankEvent::StepDone { report });
        }
        events.push(write_part(prepared, kept, order, rank).unwrap_or_else(|error| RankEvent::Failed {
            rank,
            action: format!("writing the state after step {} down", order.step),
            cause: error.to_string(),
            kind: error.kind(),
        }));
    }
    events
}

fn write_part(
    prepared: &Prepared,
    kept: &Kept,
    order: &WriteDown,
    rank: Rank,
) -> Result<RankEvent, RankError> {
    let image = kept.get((order.made, order.step, rank.index())).ok_or_else(|| RankError::Content {
        path: "memory".into(),
        message: format!("has no state of rank {rank} after step {}", order.step),
    })?;
    let dir = prepared.folder.unfinished(order.step);
    let shard = crate::checkpoint::write_image(&dir, rank.index(), &image.bytes)?;
    let (position, watch) = (image.position, image.watch.clone());
    Ok(RankEvent::ShardSaved { rank, position, watch, shard })
}

fn inventory(kept: &Kept) -> Vec<v1::KeptShard> {
    let shard = |(generation, step, rank): ShardId| v1::KeptShard {
        generation: generation.number(),
        step,
        rank: rank as u64,
    };
    kept.inventory().into_iter().map(shard).collect()
}
