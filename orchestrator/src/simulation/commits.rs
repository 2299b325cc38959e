//! The last change in the storage of a checkpoint or of weights, made by one worker for all. What the storage then holds is
//! in [`super::storage`].

use contraflow_runtime::checkpoint::Position;

use super::World;
use super::mutation::Mutation;
use super::network::Up;
use super::random::mix;
use super::storage::Stays;

impl World {
    /// The checkpoint's or the weights' last change in the storage.
    pub(super) fn commit(
        &mut self,
        id: u64,
        (job, generation): (u64, u32),
        (position, kept): (Option<Position>, u64),
        world: Option<usize>,
    ) {
        let step = position.map(|position| position.step);
        let world = world.or_else(|| self.checks.world(job, generation)).unwrap_or(0);
        let stays = self.stays(kept);
        let folder = self.storage.entry(job).or_default();
        let result = match step {
            _ if self.mutation == Some(Mutation::CommitsInWords) => Ok(()),
            Some(step) if self.plan.fills_up && is_full(job, step, generation) => {
                self.checks.excused.insert(job);
                Err("the storage is full".into())
            }
            Some(step) => match folder.commit((step, generation), world, stays) {
                Err(Err(defect)) => return self.violate(format!("job {job}: {defect}")),
                Err(Ok(words)) => Err(words),
                Ok(_) => Ok(()),
            },
            None => folder.place(generation, world),
        };
        self.note([16, job, step.unwrap_or(0)], || {
            format!("worker {id} commits {step:?} of job {job}, generation {generation}: {result:?}")
        });
        let committed = Up::Committed { job, generation, position, result };
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if let Some(hosted) = worker.hosted.get_mut(&job).filter(|hosted| hosted.generation == generation) {
            hosted.committed = Some(committed.clone());
        }
        if let Some((link, true)) = worker.link {
            self.send_up(link, committed);
        }
    }

    /// Which checkpoints stay where one is known to stand.
    pub(super) fn stays(&self, kept: u64) -> Stays {
        let pinned = if self.breaks(Mutation::PinsNothing) { 0 } else { kept };
        Stays { keep: self.plan.keep, pinned }
    }

    /// The commit of what was written down from memory, under the number of the next formation.
    pub(super) fn commit_written(
        &mut self,
        id: u64,
        (job, generation): (u64, u32),
        (position, kept): (Position, u64),
    ) {
        let step = position.step;
        let world = self.checks.world(job, generation).unwrap_or(0);
        let stays = self.stays(kept);
        let folder = self.storage.entry(job).or_default();
        let result = match folder.commit((step, generation + 1), world, stays) {
            Err(Err(defect)) => return self.violate(format!("job {job}: {defect}")),
            Err(Ok(words)) => Err(words),
            Ok(_) => Ok(()),
        };
        self.note([17, job, step], || {
            format!(
                "worker {id} commits {step}, written down, of job {job}, generation {generation}: {result:?}"
            )
        });
        self.send_of_left(id, Up::Committed { job, generation, position: Some(position), result });
    }
}

/// Whether a commit finds the storage full: one in some hundreds does.
fn is_full(job: u64, step: u64, generation: u32) -> bool {
    mix((job << 40) ^ (step << 16) ^ u64::from(generation)).is_multiple_of(300)
}
