//! Whether a job had a reason to end as it did, by what its ranks have really done, and which steps could be known.

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::topology::{FormationId, Generation, JobId};

use super::World;
use super::checks::Checks;
use super::storage::Folder;
use crate::core::attempts::{MAX_IDLE, MAX_STUCK};
use crate::core::facts::End;

impl Checks {
    /// A new orchestrator knows of nothing so far.
    pub(super) fn forget_delivered(&mut self) {
        self.heard.clear();
        self.apart.clear();
    }

    /// Whether an observer that counts formations knows that one has completed a step.
    pub(super) fn has_stepped(&self, of: FormationId) -> bool {
        self.stepped.contains(&of) || self.heard.contains(&of)
    }
}

impl World {
    pub(super) fn check_ended(&mut self, job: JobId, end: End, outcome: &str) {
        let record = &self.store.jobs.all[&job];
        let (steps, world) = (record.spec.steps(), record.running().map_or(0, |formed| formed.places.len()));
        let line = self.running(job).and_then(|of| self.checks.lines.get(&of));
        let is_right = match end {
            End::Done => line.is_some_and(|line| {
                let saves_model = record.spec.recipe.checkpoint.save_model;
                let exported = if saves_model { world } else { 0 };
                let is_placed = self.storage.of(job).is_some_and(|folder| folder.placed.is_some());
                line.history.len() as u64 == steps
                    && line.validated.len() == world
                    && line.exported.len() >= exported
                    && record.last_checkpoint == steps
                    && (is_placed || !saves_model)
            }),
            End::Failed if outcome.starts_with("formed ") => self.came_to_nothing(job),
            End::Failed if outcome.contains("is damaged") => {
                let is_damaged = |folder: &Folder| folder.damaged(record.last_checkpoint).is_some();
                record.earlier_checkpoint.is_none() && self.storage.of(job).is_some_and(is_damaged)
            }
            End::Failed => {
                let is_bad = self.job_plan(job).is_some_and(|planned| !planned.bad.is_empty());
                self.checks.excused.contains(&job) || is_bad && outcome.contains("spike")
            }
            End::Cancelled => self.checks.cancelled.contains(&job),
        };
        if !is_right {
            return self.violate(format!("{job} has ended without cause: {end:?}, {outcome}"));
        }
        self.checks.end(job);
        let were_submitted = (0..self.plan.jobs.len()).all(|planned| self.checks.is_submitted(planned));
        let mut all = self.store.jobs.all.iter();
        self.checks.is_over =
            were_submitted && all.all(|(&other, record)| record.has_ended() || other == job);
    }

    /// Whether the latest formations of a job have made no step that an orchestrator could know of, or got no further than one
    /// before, for long enough.
    fn came_to_nothing(&self, job: JobId) -> bool {
        let all = [0, u32::MAX].map(|number| FormationId::new(job, Generation::new(number)));
        let of_job = || self.checks.lines.range(all[0]..=all[1]).rev();
        let idle = of_job().take_while(|(of, _)| !self.checks.has_stepped(**of)).count();
        let furthest = of_job().map(|(_, line)| line.history.len()).max();
        // The first to get so far is not stuck; all after it are.
        let reached = of_job().enumerate().filter(|(_, (_, line))| Some(line.history.len()) == furthest);
        let stuck = reached.last().map_or(0, |(since, _)| since);
        idle >= MAX_IDLE as usize || stuck >= MAX_STUCK as usize
    }

    /// An orchestrator learns of a step that a formation has completed.
    pub(super) fn note_stepped(&mut self, server: usize, of: FormationId, event: &RankEvent) {
        let running = self.servers[server].core.jobs().all.get(&of.job).and_then(|record| record.running());
        if running.is_none_or(|formed| formed.generation != of.generation) {
            return;
        }
        let resumed = self.checks.lines.get(&of).map_or(0, |line| line.resumed as u64);
        let has_stepped = matches!(event, RankEvent::StepDone { report } if report.step > resumed);
        if has_stepped && server == self.newest_server() {
            // Its workers reach one another by now.
            self.checks.apart.retain(|(job, ..), _| *job != of.job);
            self.checks.heard.insert(of);
        }
    }

    /// An orchestrator keeps that a formation has made a step.
    pub(super) fn check_stepped(&mut self, job: JobId, step: u64) {
        let line = self.running(job).and_then(|of| self.checks.lines.get(&of));
        let made = line.map_or(0..0, |line| line.resumed as u64..line.history.len() as u64);
        if let Some(of) = self.running(job) {
            self.checks.stepped.insert(of);
        }
        if !made.contains(&(step - 1)) {
            self.violate(format!("{job} is said to have made step {step}; its formation has made {made:?}"));
        }
    }
}
