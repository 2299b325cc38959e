//! Files of jobs that have ended, which the orchestrator has removed here. Knows no ranks.

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::{CheckpointFolder, JobFolder, Owner, Storage};
use contraflow_runtime::control::wire::job_of;
use contraflow_runtime::topology::{FormationId, Generation};

use super::{Host, Input};
use crate::error::RankError;

impl Host {
    /// Removes files of a job that has ended, once nothing is being committed there.
    ///
    /// **Errors**: the job's id is none.
    pub(super) fn discard(&mut self, discard: v1::Discard) -> Result<(), String> {
        let v1::Discard { job, state, generation, everything } = discard;
        let id = job_of(job)?;
        if self.committing.iter().any(|(of, _)| of.job == id) {
            self.discards.push(discard);
            return Ok(());
        }
        // One that has never had ranks has no generation.
        let of = FormationId::new(id, Generation::new(generation));
        let (storage, inputs) = (self.storage.clone(), self.inputs.clone());
        tokio::task::spawn_blocking(move || {
            let removed = RankError::catch(|| remove(&storage, (state, of), everything));
            let error = removed.err().map_or_else(String::new, |error| error.to_string());
            if !error.is_empty() {
                tracing::warn!(job, "the files of {id}: {error}");
            }
            if everything {
                drop(inputs.send(Input::Discarded(v1::Discarded { job, error })));
                // Many files take their time; what is left is removed with the next job.
                if let Err(error) = JobFolder::sweep(&storage) {
                    tracing::warn!("what is left of removed jobs: {error}");
                }
            }
        });
        Ok(())
    }
}

fn remove(storage: &Storage, (state, of): (u64, FormationId), everything: bool) -> Result<(), RankError> {
    let FormationId { job, generation } = of;
    let Some(folder) = JobFolder::find(storage, Owner { state, job })? else { return Ok(()) };
    if everything {
        return Ok(folder.take_away(generation)?);
    }
    let checkpoints = CheckpointFolder::of_job(&folder).in_generation(generation);
    let dir = checkpoints.path().to_owned();
    checkpoints.drop_all_unfinished().map_err(|error| RankError::file(&dir)(error).in_storage())
}
