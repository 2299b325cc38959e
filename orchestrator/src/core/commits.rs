//! Commits of checkpoints and weights: who is believed that one has been made, and what follows. What is committed when is the job
//! machine's business.

use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::topology::{FormationId, Rank};

use super::attempts::Blame;
use super::facts::Fact;
use super::{Core, Severity};

impl Core {
    /// A commit has been made, or could not be. Only the worker that commits for a formation is believed.
    pub(super) fn committed(
        &mut self,
        (worker, of): (u64, FormationId),
        position: Option<Position>,
        result: Result<(), String>,
        now: u64,
    ) {
        let (job, is_current) = (of.job, self.formed(of).is_some());
        match self.committer(of) {
            Some(committer) if committer == worker => {}
            Some(_) => return self.refuse_commit(worker, of),
            // Of a formation that is over: that comes late.
            None => return,
        }
        if self.foreign.contains_key(&of) {
            return self.foreign_committed(of, position, result);
        }
        let Some(formation) = self.formations.get_mut(&job).filter(|_| is_current) else { return };
        let stands = result.is_ok();
        if let Err(cause) = &result
            && !formation.is_aborting()
        {
            // A checkpoint can wait, the weights are the last of a job.
            return match position {
                Some(position) => {
                    let line = formation.commit_failed(position.step, cause, now);
                    self.log_as(Severity::Warn, job, line);
                }
                None => {
                    let what = format!("committing the weights: {cause}");
                    self.node_failed(job, Rank::ZERO, (&what, Blame::Job), now);
                }
            };
        }
        let effects = formation.committed(position, result);
        let last_checkpoint = self.jobs.all[&job].last_checkpoint;
        if let Some(Position { step, cursor, .. }) = position.filter(|at| stands && at.step > last_checkpoint)
        {
            self.persist(Fact::CheckpointCommitted { job, step, cursor });
        }
        self.apply_effects(job, effects, now);
    }

    /// The worker that commits for a formation, if it is one of which a commit is expected.
    fn committer(&self, of: FormationId) -> Option<u64> {
        let of_foreign = || self.foreign.get(&of)?.place_of(Rank::ZERO);
        let of_running = || self.formed(of)?.place_of(Rank::ZERO);
        of_foreign().or_else(of_running)
    }

    /// Somebody else speaks of a commit of this formation.
    fn refuse_commit(&mut self, worker: u64, of: FormationId) {
        let name = self.members.get(worker).map_or("", |member| &member.registration.name).to_owned();
        let words =
            format!("what worker {name} says of a commit of {of} is refused: that is another worker's");
        let formation = self.formations.get_mut(&of.job);
        // Once for each of them: a worker may repeat itself as often as it likes.
        if formation.is_some_and(|formation| formation.refused.insert(worker)) {
            self.log_as(Severity::Warn, of.job, words);
        }
    }
}
