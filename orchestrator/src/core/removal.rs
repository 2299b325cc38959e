//! What becomes of the files of jobs that have ended: what was not finished goes at once, everything when somebody asks for it. Workers
//! remove them, since they alone have the storage.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::size;
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::events::{Space, WorkerCommand};
use super::facts::{Fact, JobSpec, Origin};
use super::{Core, Severity};

impl Core {
    /// The worker that can remove the files of a job.
    ///
    /// **Errors**: it has not ended, another job is to read them, or no worker is there.
    pub fn may_be_removed(&self, job: JobId) -> Result<u64, String> {
        let record = self.jobs.all.get(&job).ok_or_else(|| format!("job: {job} is no longer retained"))?;
        if !record.has_ended() {
            return Err(format!(
                "job: expected one that has ended, got {job}; contraflow cancel {job} ends it"
            ));
        }
        let open = self.jobs.all.iter().filter(|(_, record)| !record.has_ended());
        if let Some((reader, _)) = open.into_iter().find(|(_, record)| reads_from(&record.spec, job)) {
            return Err(format!("job: {reader}, which has not ended, reads from the folder of {job}"));
        }
        let words = || format!("the files of {job}: expected a worker that can remove them, got none");
        self.members
            .iter()
            .find(|(_, member)| member.is_attached)
            .map(|(&worker, _)| worker)
            .ok_or_else(words)
    }

    /// Has the folder of a job removed. The job is forgotten once that is done: until then it can be asked for again.
    pub(super) fn remove(&mut self, job: JobId) {
        if let Ok(worker) = self.may_be_removed(job) {
            let last = self.jobs.all[&job].generation();
            self.send(worker, WorkerCommand::Discard { job, last, everything: true });
        }
    }

    /// A worker has removed the folder of a job, or could not.
    pub(super) fn removed(&mut self, job: JobId, result: Result<(), String>) {
        // It may have been taken up again meanwhile, by a state that is an older copy.
        if self.jobs.all.get(&job).is_none_or(|record| !record.has_ended()) {
            return;
        }
        match result {
            Ok(()) => self.persist(Fact::Forgotten { job }),
            Err(why) => self.log_as(Severity::Warn, job, format!("its files could not be removed: {why}")),
        }
    }

    /// Has the unfinished checkpoints of a job that ends removed: by each worker that had ranks of it, once these are told that it is
    /// over, since they may write until then; or else where somebody is.
    pub(super) fn discard_unfinished(&mut self, job: JobId) {
        let Some(formed) = self.jobs.all.get(&job).and_then(|record| record.formed.as_ref()) else { return };
        let last = formed.generation;
        let is_there = |worker: &u64| self.members.get(*worker).is_some_and(|member| member.is_attached);
        let mut asked: BTreeSet<u64> = formed.places.iter().copied().filter(is_there).collect();
        if asked.is_empty() {
            asked.extend(self.members.iter().map(|(&worker, _)| worker).find(is_there));
        }
        for worker in asked {
            self.send(worker, WorkerCommand::Discard { job, last, everything: false });
        }
    }

    /// A worker says what room the storage has.
    pub(super) fn space(&mut self, worker: u64, of: FormationId, space: Space) {
        if self.formed(of).and_then(|formed| formed.place_of(Rank::ZERO)) != Some(worker) {
            return;
        }
        let Some(formation) = self.formations.get_mut(&of.job) else { return };
        let before = formation.space.replace(space).and_then(low);
        match (before, low(space)) {
            (None, Some(words)) => self.log_as(Severity::Warn, of.job, words),
            (Some(_), None) => self.log_as(Severity::Info, of.job, "the storage has room again".into()),
            _ => {}
        }
    }

    /// What an operator should look at, though the job goes on; empty if nothing.
    pub fn warning(&self, job: JobId) -> String {
        let formation = self.formations.get(&job);
        let warning = formation.and_then(|formation| formation.warning(self.clock.now()));
        warning.or_else(|| self.finding(job)).unwrap_or_default()
    }
}

/// Says that there is little room: less than the next two checkpoints need, which are written before older ones go.
pub(super) fn low(Space { free, checkpoint }: Space) -> Option<String> {
    (free < 2 * checkpoint).then(|| {
        format!("the storage has room for {} more, and a checkpoint takes {}", size(free), size(checkpoint))
    })
}

/// Whether a job resumes from another one, or names something in its folder.
fn reads_from(spec: &JobSpec, job: JobId) -> bool {
    let resumes = |origin: &Origin| origin.job == Some(job) || is_in_folder(&origin.folder, job);
    spec.origin.as_ref().is_some_and(resumes) || names_folder(&spec.recipe, job)
}

fn names_folder(Recipe { data, model, tokenizer, .. }: &Recipe, job: JobId) -> bool {
    let texts = [&model.init, &model.config, &tokenizer.path].into_iter();
    texts.chain(&data.paths).chain(&data.validation).any(|path| is_in_folder(path, job))
}

/// Whether a path leads through a folder with one of the names that the job's may have.
fn is_in_folder(path: &str, job: JobId) -> bool {
    let folder = job.to_string();
    Path::new(path).components().any(|part| {
        let Component::Normal(name) = part else { return false };
        let rest = name.to_str().and_then(|name| name.strip_prefix(&folder));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_low_when_the_next_two_checkpoints_do_not_fit() {
        let low = |free, checkpoint| low(Space { free, checkpoint });
        assert_eq!((low(200, 100), low(u64::MAX, 0)), (None, None));
        let words = low(3 << 20, 2 << 20).unwrap();
        assert_eq!(
            words,
            format!(
                "the storage has room for {} more, and a checkpoint takes {}",
                size(3 << 20),
                size(2 << 20)
            )
        );
    }

    #[test]
    fn a_recipe_reads_from_the_folder_it_names() {
        let recipe = |init: &str| {
            let source = contraflow_runtime::recipe::RecipeSource::Builtin("tiny".into());
            let mut recipe = Recipe::load(&source, &[]).unwrap();
            recipe.model.init = init.into();
            recipe
        };
        let job = JobId::new(7, 1);
        for (init, expected) in [
            ("/shared/jobs/job-7/model", true),
            ("jobs/job-7-00000000000000ab-000005/checkpoints/step-00000008", true),
            ("/shared/jobs/job-77/model", false),
            ("/shared/jobs/old-job-7/model", false),
            ("", false),
        ] {
            assert_eq!(names_folder(&recipe(init), job), expected, "{init}");
        }
    }
}
