//! A job that is to go on in another layout: what its workers keep in memory is cut along the old one, so they write it down as
//! a checkpoint first, which any layout reads.

use std::collections::BTreeMap;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::topology::{FormationId, JobId, Rank, Topology};
use contraflow_runtime::watch::Watch;

use super::facts::Fact;
use super::{Core, Effect, WRITE_DOWN_MS, Word};

/// A state that is being written down.
#[derive(Debug)]
pub(super) struct WritingDown {
    step: u64,
    world: usize,
    shards: BTreeMap<Rank, ShardFile>,
    /// Nobody waits any longer.
    until_ms: u64,
}

impl Core {
    /// Whether a job has to wait until its state is written down before it is formed with these axes; begins that where it has
    /// not begun.
    pub(super) fn writes_down(&mut self, job: JobId, topology: &Topology, now: u64) -> bool {
        let record = &self.jobs.all[&job];
        let Some(before) = record.formed.as_ref().filter(|before| before.topology != *topology) else {
            return false;
        };
        let (formation, places, kept) = (before.id(job), before.places.clone(), record.kept);
        let Some(leaving) = self.leaving.get_mut(&job).filter(|leaving| !leaving.is_read_only) else {
            return false;
        };
        if let Some(writing) = &leaving.writing {
            if now < writing.until_ms {
                return true;
            }
            self.give_up_writing(job, "it takes too long");
            return false;
        }
        let Some(whole) = self.whole_of(job, &places).ok().filter(|whole| whole.step > kept) else {
            return false;
        };
        let mut ranks_of: BTreeMap<u64, Vec<Rank>> = BTreeMap::new();
        for (rank, holder) in whole.holders.iter().enumerate() {
            ranks_of.entry(places[holder.index()]).or_default().push(Rank::at(rank));
        }
        if let Some(leaving) = self.leaving.get_mut(&job) {
            let (step, world, shards) = (whole.step, places.len(), BTreeMap::new());
            leaving.writing = Some(WritingDown { step, world, shards, until_ms: now + WRITE_DOWN_MS });
        }
        self.log(
            job,
            format!("the state after step {} is written down from memory, for another layout", whole.step),
        );
        for (worker, ranks) in ranks_of {
            let of = (whole.generation, whole.step);
            self.tell(worker, Word::WriteDown { formation, of, ranks });
        }
        true
    }

    /// Whether a state of this formation is being written down.
    pub fn is_writing_down(&self, FormationId { job, generation }: FormationId) -> bool {
        let is_latest = self.jobs.all.get(&job).is_some_and(|record| record.generation() == generation);
        is_latest && self.leaving.get(&job).is_some_and(|leaving| leaving.writing.is_some())
    }

    /// What a worker says of a rank whose part it writes down.
    pub(super) fn written_down(&mut self, worker: u64, from: &RankAddress, event: RankEvent) {
        let job = from.formation.job;
        if !self.is_writing_down(from.formation) {
            return;
        }
        match event {
            RankEvent::StepDone { report } => {
                self.effects.push(Effect::Record { job, report: Box::new(report) });
            }
            RankEvent::ShardSaved { rank, position, watch, shard } => {
                self.part_written(worker, RankAddress { rank, ..*from }, (position, watch), shard);
            }
            RankEvent::Failed { cause, .. } => self.give_up_writing(job, &cause),
            _ => {}
        }
    }

    fn part_written(
        &mut self,
        worker: u64,
        RankAddress { formation, rank }: RankAddress,
        (position, watch): (Position, Watch),
        shard: ShardFile,
    ) {
        let job = formation.job;
        let writing = self.leaving.get_mut(&job).and_then(|leaving| leaving.writing.as_mut());
        let Some(writing) = writing.filter(|writing| writing.step == position.step) else { return };
        writing.shards.insert(rank, shard);
        if writing.shards.len() == writing.world {
            let shards = writing.shards.values().cloned().collect();
            let kept = self.jobs.all.get(&job).map_or(0, |record| record.kept);
            self.tell(worker, Word::CommitCheckpoint { formation, position, watch, shards, kept });
        }
    }

    /// What was written down stands, or not.
    pub(super) fn down_committed(
        &mut self,
        of: FormationId,
        Position { step, cursor, .. }: Position,
        result: Result<(), String>,
    ) {
        let job = of.job;
        let writing = self.leaving.get(&job).and_then(|leaving| leaving.writing.as_ref());
        if !self.is_writing_down(of) || writing.is_none_or(|writing| writing.step != step) {
            return;
        }
        match result {
            Ok(()) => {
                if let Some(leaving) = self.leaving.get_mut(&job) {
                    leaving.writing = None;
                }
                self.keep(Fact::Kept { job, step, cursor });
                self.is_open = true;
            }
            Err(cause) => self.give_up_writing(job, &cause),
        }
    }

    fn give_up_writing(&mut self, job: JobId, cause: &str) {
        if let Some(leaving) = self.leaving.get_mut(&job) {
            (leaving.writing, leaving.is_read_only) = (None, true);
        }
        self.log(job, format!("the state in memory cannot be written down: {cause}"));
        self.is_open = true;
    }
}
