//! The durable part of the state: a fold over facts. Knows no member and no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use contraflow_runtime::checkpoint::Pinned;
use contraflow_runtime::topology::{Generation, JobId, Rank};
use serde::{Deserialize, Serialize};

use super::attempts::{Attempts, Blame};
use super::facts::{End, Fact, Formed, JobSpec};
use crate::metrics::goodput::Ledger;
use crate::rollback::{Checkpoint, RollBackCount};

/// State of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits in the queue.
    Queued,
    /// Has its ranks.
    Formed,
    /// Has lost them, all or some, and is due to be re-formed.
    Broken,
    /// Has ended.
    Ended(End),
}

/// What is known of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// As it was submitted.
    pub spec: JobSpec,
    /// **Units**: milliseconds since 1970.
    pub submitted_ms: u64,
    /// Its state.
    pub phase: Phase,
    /// The latest formation.
    pub formed: Option<Formed>,
    /// Ranks of the latest formation that were lost.
    pub lost: BTreeSet<Rank>,
    /// Ranks of the latest formation whose workers were lost after it had broken: it holds no slots for them. One whose worker is back
    /// has its place again if that is free.
    #[serde(default)]
    pub gone: BTreeSet<Rank>,
    /// When the latest formation broke. **Units**: milliseconds since 1970.
    pub broken_ms: u64,
    /// Step of the newest checkpoint; 0: there is none.
    pub last_checkpoint: u64,
    /// Sequences used when the newest checkpoint was made.
    #[serde(default)]
    pub last_checkpoint_cursor: u64,
    /// The checkpoint before the newest one, which is retained beside it; as long as the newest is not damaged.
    #[serde(default)]
    pub earlier_checkpoint: Option<Checkpoint>,
    /// [`JobRecord::cursor`] as it was with that checkpoint.
    #[serde(default)]
    pub earlier_cursor: u64,
    /// Whether the workers of the latest formation have a state of its history in memory.
    #[serde(default)]
    pub in_memory: bool,
    /// How many ranks it is to have next, between two formations; 0: as many as before.
    #[serde(default)]
    pub goal: usize,
    /// Sequences used, where that is more than the newest checkpoint says; else 0.
    pub cursor: u64,
    /// The checkpoint that the watch last sent it back to, and how often in a row.
    pub returns: RollBackCount,
    /// How many ranks it is to have at most, since somebody said so; 0: as it was submitted.
    #[serde(default)]
    pub target: usize,
    /// Formations that lost a rank.
    pub losses: u32,
    /// What its formations have come to.
    pub attempts: Attempts,
    /// Where its slot time has gone.
    #[serde(default)]
    pub ledger: Ledger,
    /// What happened last.
    pub why: String,
    /// Mean loss of the validation sequences, in nats per token.
    pub validation_loss: Option<f64>,
    /// **Units**: milliseconds since 1970; 0 as long as it has not ended.
    pub ended_ms: u64,
}

impl JobRecord {
    /// The running formation.
    pub fn running(&self) -> Option<&Formed> {
        self.formed.as_ref().filter(|_| self.phase == Phase::Formed)
    }

    /// Count of formations so far.
    pub fn generation(&self) -> Generation {
        self.formed.as_ref().map_or_else(Generation::default, |formed| formed.generation)
    }

    /// Slots of the latest formation.
    fn slots(&self) -> usize {
        self.formed.as_ref().map_or(0, |formed| formed.places.len())
    }

    /// Whether it holds the slot of a rank of its latest formation, as long as it holds any.
    pub fn holds(&self, rank: Rank) -> bool {
        !self.lost.contains(&rank) && !self.gone.contains(&rank)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// The checkpoints that it may be sent back to.
    pub fn pinned(&self) -> Pinned {
        let earlier = self.earlier_checkpoint.map_or(0, |earlier| earlier.step);
        Pinned { newest: self.last_checkpoint, earlier }
    }

    /// The newest checkpoint, if there is one.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        (self.last_checkpoint > 0)
            .then_some(Checkpoint { step: self.last_checkpoint, cursor: self.last_checkpoint_cursor })
    }
}

/// All that outlives the process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Jobs {
    /// By id, which sort by their numbers. These are given in order of submission, from 1.
    pub all: BTreeMap<JobId, JobRecord>,
    /// By idempotency key.
    pub by_key: BTreeMap<String, JobId>,
    /// Nodes that take no ranks.
    pub drained: BTreeSet<String>,
    /// The mark of the storage.
    pub storage_id: String,
    /// The newest job.
    pub newest: JobId,
    /// Facts taken in since the state was made.
    #[serde(default)]
    pub facts: u64,
    /// Finished jobs, in the order in which they ended.
    #[serde(default)]
    pub ended: VecDeque<JobId>,
}

impl Jobs {
    /// The job of a number, if it is known; else whether there has been one.
    ///
    /// **Errors**: there has been one, or never.
    pub fn of_number(&self, number: u64) -> Result<JobId, bool> {
        let known = JobId::all_of(number).and_then(|ids| Some(*self.all.range(ids).next()?.0));
        known.ok_or_else(|| (1..=self.newest.number()).contains(&number))
    }

    /// Takes a fact in.
    pub fn apply(&mut self, fact: &Fact) {
        self.facts += 1;
        match fact {
            Fact::StorageIdentified { storage_id } => self.storage_id.clone_from(storage_id),
            Fact::Drained { node } => drop(self.drained.insert(node.clone())),
            Fact::Undrained { node } => drop(self.drained.remove(node)),
            Fact::Submitted { job, spec, at_ms } => self.submitted(*job, spec, *at_ms),
            Fact::Forgotten { job } => {
                // Its key goes with it: reusing it creates another job.
                let record = self.all.remove(job);
                record.and_then(|record| self.by_key.remove(&record.spec.key));
                self.ended.retain(|ended| ended != job);
            }
            _ => {
                if let Some(record) = fact.job().and_then(|job| self.all.get_mut(&job)) {
                    record.apply(fact);
                }
                match fact {
                    Fact::Ended { job, .. } => self.ended.push_back(*job),
                    Fact::Retried { job, .. } => self.ended.retain(|ended| ended != job),
                    _ => {}
                }
            }
        }
    }

    fn submitted(&mut self, job: JobId, spec: &JobSpec, at_ms: u64) {
        if !spec.key.is_empty() {
            self.by_key.insert(spec.key.clone(), job);
        }
        self.newest = self.newest.max(job);
        let origin = spec.origin.as_ref();
        let begins = origin.map(|origin| origin.checkpoint);
        let mut ledger = Ledger::default();
        ledger.queued(at_ms);
        let record = JobRecord {
            spec: spec.clone(),
            submitted_ms: at_ms,
            phase: Phase::Queued,
            formed: None,
            lost: BTreeSet::new(),
            gone: BTreeSet::new(),
            broken_ms: 0,
            last_checkpoint: begins.map_or(0, |begins| begins.step),
            last_checkpoint_cursor: begins.map_or(0, |begins| begins.cursor),
            earlier_checkpoint: None,
            earlier_cursor: 0,
            in_memory: false,
            goal: 0,
            cursor: origin.map_or(0, |origin| origin.cursor),
            returns: RollBackCount::default(),
            target: 0,
            losses: 0,
            attempts: Attempts::default(),
            ledger,
            why: String::new(),
            validation_loss: None,
            ended_ms: 0,
        };
        self.all.insert(job, record);
    }
}

impl JobRecord {
    fn apply(&mut self, fact: &Fact) {
        match fact {
            Fact::Formed { formed, at_ms, .. } => {
                self.ledger.formed(formed.places.len(), *at_ms);
                self.phase = Phase::Formed;
                self.formed = Some(formed.clone());
                self.in_memory = !formed.buddies.is_empty() || formed.memory.is_some();
                self.goal = 0;
                self.lost.clear();
                self.gone.clear();
                self.why.clear();
                self.attempts.formed();
            }
            Fact::Broken {
                generation, lost, why, at_ms, reached, idle, unreadable, paused, stop, ..
            } => {
                self.ledger.lost(self.slots().saturating_sub(lost.len()), *stop);
                let blame = match (idle, unreadable, paused) {
                    (true, ..) => Blame::Job,
                    (_, true, _) => Blame::Storage,
                    (.., true) => Blame::Pause,
                    _ => Blame::Nobody,
                };
                self.attempts.ended(*reached, blame, &format!("generation {generation}: {why}"));
                self.phase = Phase::Broken;
                self.losses += u32::from(!lost.is_empty());
                self.lost = lost.iter().copied().collect();
                self.gone.clear();
                self.broken_ms = *at_ms;
                self.why.clone_from(why);
            }
            Fact::RanksLost { lost, why, at_ms, .. } => {
                self.why = format!("{}; {why}", self.why);
                self.losses += u32::from(self.lost.is_empty() && self.gone.is_empty());
                self.gone.extend(lost);
                let left = self.slots().saturating_sub(self.lost.len() + self.gone.len());
                self.ledger.left_with(left, *at_ms);
            }
            Fact::Requeued { why, stop, .. } => {
                self.ledger.gave_way(*stop);
                self.phase = Phase::Queued;
                self.in_memory = false;
                self.why.clone_from(why);
            }
            Fact::Rearranged { ranks, why, at_ms, stop, .. } => {
                self.ledger.rearranged(*stop);
                self.phase = Phase::Broken;
                self.goal = *ranks;
                self.in_memory = true;
                self.broken_ms = *at_ms;
                self.why.clone_from(why);
            }
            Fact::RolledBack { cursor, why, stop, .. } => {
                self.ledger.lost(self.slots(), *stop);
                self.phase = Phase::Broken;
                self.cursor = *cursor;
                self.in_memory = false;
                self.lost.clear();
                self.gone.clear();
                self.returns = self.returns.and_one_more(self.last_checkpoint);
                self.why.clone_from(why);
            }
            Fact::Retried { at_ms, .. } => {
                self.ledger.queued(*at_ms);
                self.phase = Phase::Queued;
                (self.attempts, self.returns) = Default::default();
                self.in_memory = false;
                self.lost.clear();
                self.gone.clear();
                (self.validation_loss, self.ended_ms) = (None, 0);
            }
            Fact::Scaled { ranks, .. } => self.target = *ranks,
            Fact::Stepped { step, began_ms, at_ms, .. } => {
                self.ledger.stepped(*step, *began_ms, *at_ms);
                self.attempts.stepped(*step);
            }
            Fact::CheckpointCommitted { step, cursor, .. } => {
                self.attempts.advanced(*step);
                if *step > self.last_checkpoint {
                    (self.earlier_checkpoint, self.earlier_cursor) = (self.checkpoint(), self.cursor);
                }
                (self.last_checkpoint, self.last_checkpoint_cursor) = (*step, *cursor);
                // The checkpoint holds the cursor from here on.
                self.cursor = 0;
            }
            Fact::CheckpointDamaged { step, .. } => {
                if let Some(Checkpoint { step, cursor }) =
                    self.earlier_checkpoint.take().filter(|_| *step == self.last_checkpoint)
                {
                    (self.last_checkpoint, self.last_checkpoint_cursor) = (step, cursor);
                    // What led astray after the damaged one is met again.
                    self.cursor = self.earlier_cursor;
                }
            }
            Fact::Ended { end, outcome, validation_loss, at_ms, stop, .. } => {
                self.ledger.ended(*end == End::Done, *stop);
                self.phase = Phase::Ended(*end);
                self.why.clone_from(outcome);
                self.validation_loss = *validation_loss;
                self.ended_ms = *at_ms;
            }
            Fact::StorageIdentified { .. }
            | Fact::Drained { .. }
            | Fact::Undrained { .. }
            | Fact::Submitted { .. }
            | Fact::Forgotten { .. } => {}
        }
    }
}
