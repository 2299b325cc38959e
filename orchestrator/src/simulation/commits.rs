//! The last change in the storage of a checkpoint or of weights, made by one worker for all. What the storage then holds is
//! in [`super::storage`].

use contraflow_runtime::checkpoint::{Pinned, Position};
use contraflow_runtime::random::mix;
use contraflow_runtime::topology::{FormationId, Generation, JobId};

use super::World;
use super::mutation::Mutation;
use super::network::FromWorker;
use super::storage::{Folder, Retention};
use crate::core::jobs::JobRecord;

impl World {
    /// The checkpoint's or the weights' last change in the storage.
    pub(super) fn commit(
        &mut self,
        id: u64,
        of: FormationId,
        (position, pinned): (Option<Position>, Pinned),
        world: Option<usize>,
    ) {
        let FormationId { job, generation } = of;
        let step = position.map(|position| position.step);
        let world = world.or_else(|| self.checks.world(of)).unwrap_or(0);
        let retention = self.retention(pinned);
        let (is_full, is_said) = (self.plan.fills_up, self.breaks(Mutation::CommitsInWords));
        let now = self.now;
        let Some(folder) = self.folder(job) else { return };
        let result = match step {
            _ if is_said => Ok(()),
            Some(step) if is_full && finds_it_full(job, step, generation, now) => {
                Err("the storage is full".into())
            }
            Some(step) => match folder.commit((step, generation), world, retention) {
                Err(Err(defect)) => return self.violate(format!("{job}: {defect}")),
                Err(Ok(words)) => Err(words),
                Ok(_) => Ok(()),
            },
            None => folder.place(generation, world),
        };
        self.check_known(job);
        self.note([16, job.bits(), step.unwrap_or(0)], || {
            format!("worker {id} commits {step:?} of {of}: {result:?}")
        });
        let committed = FromWorker::Committed { formation: of, position, result };
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if let Some(hosted) = worker.hosted_mut(of) {
            hosted.committed = Some(committed.clone());
        }
        if let Some((link, true)) = worker.link {
            self.send_up(link, committed);
        }
    }

    /// The folder that a job's worker takes for the job's.
    pub(super) fn folder(&mut self, job: JobId) -> Option<&mut Folder> {
        let takes_any = self.breaks(Mutation::TakesAnyFolder);
        let owner = self.storage.claim(job, takes_any).owner;
        if owner != job {
            self.violate(format!("{job} takes the folder of {owner} for its own"));
            return None;
        }
        Some(self.storage.claim(job, takes_any))
    }

    /// The checkpoints in a job's event log exist, whatever has changed in its folder.
    pub(super) fn check_known(&mut self, job: JobId) {
        let Pinned { newest, earlier } =
            self.store.jobs.all.get(&job).map(JobRecord::pinned).unwrap_or_default();
        let folder = self.storage.of(job);
        let is_gone = |step: &u64| *step > 0 && folder.is_none_or(|folder| folder.stands(*step).is_none());
        if let Some(step) = [newest, earlier].into_iter().find(is_gone) {
            self.violate(format!("{job}: the checkpoint of step {step}, which is kept, is gone"));
        }
    }

    /// Which checkpoints stay where one is known to stand.
    pub(super) fn retention(&self, pinned: Pinned) -> Retention {
        let pinned = if self.breaks(Mutation::PinsNothing) { Pinned::default() } else { pinned };
        Retention { keep: self.plan.keep, pinned }
    }
}

/// Whether a commit finds the storage full: one in some tens does, and when it is tried again some seconds later mostly not.
fn finds_it_full(job: JobId, step: u64, generation: Generation, now: u64) -> bool {
    let seconds = now / 4_000;
    mix((job.number() << 56) ^ (seconds << 32) ^ (step << 16) ^ u64::from(generation.number()))
        .is_multiple_of(40)
}
