//! Resharding: a job that continues in another layout: the replicas in memory are sharded by the old one, so the workers
//! write them as a checkpoint first, which any layout reads.

use std::collections::BTreeMap;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::{FormationId, JobId, Rank, Topology};

use super::facts::Fact;
use super::jobs::JobRecord;
use super::{Core, Effect, RESHARD_MS, Severity, WorkerCommand};

/// A state that is being written down.
#[derive(Debug)]
pub(super) struct Reshard {
    step: u64,
    world: usize,
    shards: BTreeMap<Rank, ShardFile>,
    /// Deadline.
    until_ms: u64,
    /// The worker that was told to commit it.
    committer: Option<u64>,
}

impl Core {
    /// Whether a job has to wait until its state is written down before it is formed with these axes; begins that where it has
    /// not begun.
    pub(super) fn reshards(&mut self, job: JobId, topology: &Topology, now: u64) -> bool {
        let record = &self.jobs.all[&job];
        let Some(before) = record.formed.as_ref().filter(|before| before.topology != *topology) else {
            return false;
        };
        let (formation, places, last_checkpoint) =
            (before.id(job), before.places.clone(), record.last_checkpoint);
        let Some(survivors) = self.survivors.get_mut(&job).filter(|survivors| !survivors.has_failed) else {
            return false;
        };
        if let Some(reshard) = &survivors.reshard {
            if now < reshard.until_ms {
                return true;
            }
            self.give_up_reshard(job, "it took too long");
            return false;
        }
        let Some(whole) =
            self.newest_complete_of(job, &places).ok().filter(|whole| whole.step > last_checkpoint)
        else {
            return false;
        };
        let mut ranks_of: BTreeMap<u64, Vec<Rank>> = BTreeMap::new();
        for (rank, holder) in whole.holders.iter().enumerate() {
            ranks_of.entry(places[holder.index()]).or_default().push(Rank::at(rank));
        }
        if let Some(survivors) = self.survivors.get_mut(&job) {
            let (step, world, shards) = (whole.step, places.len(), BTreeMap::new());
            survivors.reshard =
                Some(Reshard { step, world, shards, until_ms: now + RESHARD_MS, committer: None });
        }
        self.log(
            job,
            format!(
                "resharding: writing the state after step {} from memory as a checkpoint, for another layout",
                whole.step
            ),
        );
        for (worker, ranks) in ranks_of {
            let of = (whole.generation, whole.step);
            self.send(worker, WorkerCommand::WriteShards { formation, of, ranks });
        }
        true
    }

    /// Whether a state of this formation is being written down.
    pub fn is_resharding(&self, FormationId { job, generation }: FormationId) -> bool {
        let is_latest = self.jobs.all.get(&job).is_some_and(|record| record.generation() == generation);
        is_latest && self.survivors.get(&job).is_some_and(|survivors| survivors.reshard.is_some())
    }

    /// What a worker says of a rank whose part it writes down.
    pub(super) fn reshard_event(&mut self, worker: u64, from: &RankAddress, event: RankEvent) {
        let job = from.formation.job;
        if !self.is_resharding(from.formation) {
            return;
        }
        match event {
            RankEvent::StepDone { report } => {
                self.effects.push(Effect::Record { job, report: Box::new(report) });
            }
            RankEvent::ShardSaved { rank, position, watch, shard } => {
                self.part_written(worker, RankAddress { rank, ..*from }, (position, watch), shard);
            }
            RankEvent::Failed { cause, .. } => self.give_up_reshard(job, &cause),
            _ => {}
        }
    }

    fn part_written(
        &mut self,
        worker: u64,
        RankAddress { formation, rank }: RankAddress,
        (position, watch): (Position, StabilityWatch),
        shard: ShardFile,
    ) {
        let job = formation.job;
        let reshard = self.survivors.get_mut(&job).and_then(|survivors| survivors.reshard.as_mut());
        let Some(reshard) = reshard.filter(|reshard| reshard.step == position.step) else { return };
        reshard.shards.insert(rank, shard);
        if reshard.shards.len() == reshard.world {
            let shards = reshard.shards.values().cloned().collect();
            reshard.committer = Some(worker);
            let pinned = self.jobs.all.get(&job).map(JobRecord::pinned).unwrap_or_default();
            self.send(worker, WorkerCommand::CommitCheckpoint { formation, position, watch, shards, pinned });
        }
    }

    /// The worker that commits what a formation's workers have written down.
    pub(super) fn reshard_committer(&self, of: FormationId) -> Option<u64> {
        let reshard = || self.survivors.get(&of.job)?.reshard.as_ref()?.committer;
        self.is_resharding(of).then(reshard).flatten()
    }

    /// Result of the commit of a reshard.
    pub(super) fn reshard_committed(
        &mut self,
        of: FormationId,
        Position { step, cursor, .. }: Position,
        result: Result<(), String>,
    ) {
        let job = of.job;
        let reshard = self.survivors.get(&job).and_then(|survivors| survivors.reshard.as_ref());
        if !self.is_resharding(of) || reshard.is_none_or(|reshard| reshard.step != step) {
            return;
        }
        match result {
            Ok(()) => {
                if let Some(survivors) = self.survivors.get_mut(&job) {
                    survivors.reshard = None;
                }
                self.persist(Fact::CheckpointCommitted { job, step, cursor });
                self.may_recover.insert(job);
            }
            Err(cause) => self.give_up_reshard(job, &cause),
        }
    }

    fn give_up_reshard(&mut self, job: JobId, cause: &str) {
        if let Some(survivors) = self.survivors.get_mut(&job) {
            (survivors.reshard, survivors.has_failed) = (None, true);
        }
        self.log_as(
            Severity::Warn,
            job,
            format!("the state in memory cannot be written as a checkpoint: {cause}"),
        );
        self.may_recover.insert(job);
    }
}
