//! The durable store of the simulated orchestrators: facts as bytes, a snapshot now and then, reported steps. Follows
//! [`crate::store`]; knows no core.

use contraflow_runtime::topology::JobId;
use std::collections::BTreeMap;

use crate::core::facts::Fact;
use crate::core::jobs::Jobs;

/// Facts after which a snapshot takes their place.
const SNAPSHOT_EVERY: usize = 40;

/// What is durable.
#[derive(Default)]
pub(super) struct SimStore {
    /// Which state it is.
    pub(super) state: u64,
    pub(super) incarnation: u64,
    snapshot: Option<Vec<u8>>,
    facts: Vec<Vec<u8>>,
    /// By job, the steps that watchers see.
    pub(super) steps: BTreeMap<JobId, Vec<u64>>,
    /// The facts so far, folded as they came.
    pub(super) jobs: Jobs,
}

impl SimStore {
    /// A state from nothing.
    pub(super) fn of(state: u64) -> Self {
        SimStore { state, ..SimStore::default() }
    }

    /// Keeps a fact; the steps of a job that it forgets go with it, unless a rule is broken, and so do those that a job leaves
    /// behind where it goes back to a checkpoint.
    pub(super) fn append(&mut self, fact: &Fact, keeps_steps: bool) -> Result<(), String> {
        if let Fact::Forgotten { job } = fact
            && !keeps_steps
        {
            self.steps.remove(job);
        }
        if let Fact::RolledBack { job, .. } = fact {
            let to = self.jobs.all.get(job).map_or(0, |record| record.last_checkpoint);
            self.steps.entry(*job).or_default().retain(|step| *step <= to);
        }
        self.facts.push(serde_json::to_vec(fact).map_err(|error| error.to_string())?);
        self.jobs.apply(fact);
        if self.facts.len() > SNAPSHOT_EVERY {
            self.snapshot = Some(serde_json::to_vec(&self.jobs).map_err(|error| error.to_string())?);
            self.facts.clear();
        }
        Ok(())
    }

    /// What a start reads.
    pub(super) fn replay(&self) -> Result<Jobs, String> {
        let words = |error: serde_json::Error| error.to_string();
        let mut jobs = match &self.snapshot {
            Some(snapshot) => serde_json::from_slice(snapshot).map_err(words)?,
            None => Jobs::default(),
        };
        for fact in &self.facts {
            jobs.apply(&serde_json::from_slice(fact).map_err(words)?);
        }
        Ok(jobs)
    }

    /// Breaks the promise that what was acknowledged stays.
    pub(super) fn lose_last(&mut self) {
        self.facts.pop();
    }
}
