//! The life of a job as a pure state machine: an event in, effects out. Knows no clock, no mailbox and no file.

mod effects;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem::Discriminant;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::Rank;

pub use self::effects::{JobEffect, JobSetup, Outcome};

#[derive(Debug, PartialEq)]
enum State {
    Starting {
        ready: BTreeSet<Rank>,
    },
    /// `done` are the ranks that have made their last step: the recipe's, or the one they have agreed to stop after.
    Training {
        done: BTreeSet<Rank>,
        /// By rank, what the watch has stopped the step with: on every rank the same.
        diverged: BTreeMap<Rank, Outcome>,
    },
    Validating {
        losses: BTreeMap<Rank, f64>,
    },
    Exporting {
        validation: Option<(f64, u64)>,
        files: BTreeMap<Rank, ExportedFile>,
    },
    /// The weights are on disk and are being given their name.
    Placing {
        validation: Option<(f64, u64)>,
        files: Vec<ExportedFile>,
    },
    /// A rank has failed, or the job was cancelled; the ranks have been told to stop.
    Aborting {
        waiting: BTreeSet<Rank>,
        outcome: Outcome,
    },
    Over,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    setup: JobSetup,
    state: State,
    /// The latest step that all ranks have made.
    step: u64,
    /// The run has been asked to stop between two steps, and whether its state is to stay in memory then.
    stopping: Option<bool>,
    /// The ranks have stopped, and say that their state is in memory.
    is_in_memory: bool,
    /// What its ranks have may be in memory alone: none stops before it has made a step.
    begins_in_memory: bool,
    /// Checkpoints of which some ranks have written their part.
    shards: BTreeMap<u64, BTreeMap<Rank, ShardFile>>,
    /// Checkpoints that are whole, in order; the first is being committed. One at a time: a commit also drops old ones.
    whole: VecDeque<(Position, StabilityWatch, Vec<ShardFile>)>,
    /// The newest committed checkpoint of this run.
    committed: u64,
    /// Events of ranks that are ahead of the machine, which was rebuilt while they continued. At most a few a rank.
    early: Vec<RankEvent>,
}

impl Job {
    /// A job whose ranks have been assigned and not yet answered.
    pub fn new(setup: JobSetup) -> Self {
        let step = setup.steps_before;
        Job {
            setup,
            state: State::Starting { ready: BTreeSet::new() },
            step,
            stopping: None,
            is_in_memory: false,
            begins_in_memory: false,
            shards: BTreeMap::new(),
            whole: VecDeque::new(),
            committed: step,
            early: Vec::new(),
        }
    }

    /// The same job, of which a checkpoint of this step is committed: the machine is rebuilt while the ranks continue.
    pub fn with_committed(mut self, step: u64) -> Self {
        self.committed = self.committed.max(step);
        self
    }

    /// The same job, of which a state may be in memory that is not in the storage.
    pub fn beginning_in_memory(self, is_so: bool) -> Self {
        Job { begins_in_memory: is_so, ..self }
    }

    /// What the job is doing, and which ranks it waits for.
    pub fn describe(&self) -> String {
        let list = |ranks: Vec<Rank>| ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ");
        let missing = |present: &BTreeSet<Rank>| {
            list(Rank::all(self.setup.world).filter(|rank| !present.contains(rank)).collect())
        };
        match &self.state {
            State::Starting { ready } => format!("starting, waiting for rank {}", missing(ready)),
            State::Training { done, diverged, .. } if done.len().max(diverged.len()) == self.setup.world => {
                "waiting for a checkpoint".into()
            }
            State::Training { done, .. } => format!("training, waiting for rank {}", missing(done)),
            State::Validating { losses } => {
                format!("validating, waiting for rank {}", missing(&losses.keys().copied().collect()))
            }
            State::Exporting { files, .. } => {
                format!("writing the weights, waiting for rank {}", missing(&files.keys().copied().collect()))
            }
            State::Placing { .. } => "publishing the weights".into(),
            State::Aborting { waiting, .. } => {
                format!("stopping, waiting for rank {}", list(waiting.iter().copied().collect()))
            }
            State::Over => "over".into(),
        }
    }

    /// Repeats the commands that these ranks have not answered yet: they may have missed them. What is to be
    /// put in place goes with rank 0.
    pub fn repeat(&self, ranks: &[Rank]) -> Vec<JobEffect> {
        let to_all = |command: RankCommand| self.repeat_to(ranks, |_| true, &command);
        let dir = || self.setup.export_dir.clone().unwrap_or_default();
        let mut effects = match &self.state {
            State::Starting { .. } | State::Over => Vec::new(),
            State::Training { done, .. } => {
                let begin = RankCommand::BeginStep { step: self.setup.steps_before + 1 };
                let mut effects = self.repeat_to(ranks, |rank| !done.contains(rank), &begin);
                let stop = self.stopping.map(|in_memory| to_all(RankCommand::Stop { in_memory }));
                effects.extend(stop.into_iter().flatten());
                effects
            }
            State::Validating { losses } => {
                self.repeat_to(ranks, |rank| !losses.contains_key(rank), &RankCommand::Validate)
            }
            State::Exporting { files, .. } => {
                self.repeat_to(ranks, |rank| !files.contains_key(rank), &RankCommand::Export { dir: dir() })
            }
            State::Placing { files, .. } if ranks.contains(&Rank::ZERO) => {
                vec![JobEffect::PublishWeights { dir: dir(), files: files.clone() }]
            }
            State::Placing { .. } => Vec::new(),
            State::Aborting { waiting, outcome } => {
                self.repeat_to(ranks, |rank| waiting.contains(rank), &abort_command(outcome))
            }
        };
        if ranks.contains(&Rank::ZERO) {
            effects.extend(self.commit_next());
        }
        effects
    }

    fn repeat_to(
        &self,
        ranks: &[Rank],
        is_due: impl Fn(&Rank) -> bool,
        command: &RankCommand,
    ) -> Vec<JobEffect> {
        let due = ranks.iter().filter(|rank| is_due(rank));
        due.map(|&rank| JobEffect::Command { rank, command: command.clone() }).collect()
    }

    /// Whether an abort is under way and not all ranks have answered.
    pub fn is_aborting(&self) -> bool {
        matches!(self.state, State::Aborting { .. })
    }

    /// Whether some rank is not ready yet.
    pub fn is_starting(&self) -> bool {
        matches!(self.state, State::Starting { .. })
    }

    /// Whether the checkpoint of this step is the one that is being committed.
    pub fn commits(&self, step: u64) -> bool {
        self.whole.front().is_some_and(|(position, ..)| position.step == step)
    }

    /// Whether a checkpoint is whole and not yet committed.
    pub fn is_committing(&self) -> bool {
        !self.whole.is_empty()
    }

    /// Whether the ranks train: a rank that waits for nothing is to be on its way.
    pub fn is_training(&self) -> bool {
        matches!(self.state, State::Training { .. })
    }

    /// Takes an event and says what is to be done.
    pub fn step(&mut self, event: RankEvent) -> Vec<JobEffect> {
        let before = std::mem::discriminant(&self.state);
        let effects = self.take(event);
        self.take_early(before, effects)
    }

    /// After a change of state, takes what came too early for the one before.
    fn take_early(&mut self, before: Discriminant<State>, mut effects: Vec<JobEffect>) -> Vec<JobEffect> {
        if std::mem::discriminant(&self.state) != before {
            for event in std::mem::take(&mut self.early) {
                effects.extend(self.step(event));
            }
        }
        effects
    }

    fn take(&mut self, event: RankEvent) -> Vec<JobEffect> {
        let world = self.setup.world;
        match (&mut self.state, event) {
            (State::Over, _) => Vec::new(),
            (State::Aborting { waiting, outcome }, event) => {
                let is_answer = matches!(event, RankEvent::Aborted { .. } | RankEvent::Failed { .. });
                if is_answer && waiting.remove(&event.rank()) && waiting.is_empty() {
                    let outcome = outcome.clone();
                    return self.end(outcome);
                }
                Vec::new()
            }
            (_, RankEvent::Failed { rank, action, cause, kind, .. }) => {
                let message = format!("rank {rank}, {action}: {cause}");
                let others = Rank::all(world).filter(|&other| other != rank).collect();
                self.abort(others, Outcome::Failed { message, kind })
            }
            (_, RankEvent::ShardSaved { rank, position, watch, shard }) => {
                self.shard_saved(rank, (position, watch), shard)
            }
            (State::Starting { ready }, RankEvent::Ready { rank }) => {
                ready.insert(rank);
                if ready.len() < world {
                    return Vec::new();
                }
                if self.step >= self.setup.steps {
                    return self.validate();
                }
                self.state = State::Training { done: BTreeSet::new(), diverged: BTreeMap::new() };
                let mut effects = self.everyone(&RankCommand::BeginStep { step: self.step + 1 });
                let stop = self.stopping.map(|in_memory| self.everyone(&RankCommand::Stop { in_memory }));
                effects.extend(stop.into_iter().flatten());
                effects
            }
            (State::Training { diverged, .. }, RankEvent::Diverged { rank, divergence, cursor }) => {
                diverged.insert(rank, Outcome::Diverged { divergence, cursor });
                self.leave_training()
            }
            (_, RankEvent::StepDone { report }) => {
                let (rank, step) = (Rank::new(report.rank), report.step);
                if report.ends_early {
                    // On all ranks alike: to the job it is as if the recipe had asked for so many.
                    self.setup.steps = step;
                }
                let mut effects = vec![JobEffect::Record(report)];
                if step == self.setup.steps {
                    // As if the ranks had agreed to stop after it.
                    effects.extend(self.take(RankEvent::Stopped { rank, step, in_memory: false }));
                }
                effects
            }
            (State::Training { .. }, RankEvent::Stopped { rank, step, in_memory }) => {
                self.is_in_memory |= in_memory;
                self.last_step_made(rank, step)
            }
            (State::Validating { losses }, RankEvent::Validated { rank, loss, tokens }) => {
                losses.insert(rank, loss);
                if losses.len() < world {
                    return Vec::new();
                }
                let loss = losses.values().sum();
                let validation = (tokens > 0).then_some((loss, tokens));
                self.export(validation)
            }
            (State::Exporting { files, validation }, RankEvent::Exported { rank, file }) => {
                files.insert(rank, file);
                if files.len() < world {
                    return Vec::new();
                }
                let (files, validation) = (std::mem::take(files), *validation);
                let Some(dir) = self.setup.export_dir.clone() else {
                    return self.end(Outcome::Done { validation });
                };
                let files: Vec<ExportedFile> =
                    files.into_values().filter(|file| !file.file.is_empty()).collect();
                self.state = State::Placing { validation, files: files.clone() };
                vec![JobEffect::PublishWeights { dir, files }]
            }
            (_, RankEvent::Aborted { rank }) => {
                // Requested by an earlier orchestrator, which died before recording the outcome.
                let message = format!("rank {rank} has given up");
                let others = Rank::all(world).filter(|&other| other != rank).collect();
                self.abort(others, Outcome::Failed { message, kind: ErrorKind::Lost })
            }
            // It is tried again.
            (_, RankEvent::Ready { .. } | RankEvent::SaveFailed { .. } | RankEvent::StateMoved { .. }) => {
                Vec::new()
            }
            (_, event) => {
                self.early.push(event);
                Vec::new()
            }
        }
    }

    fn last_step_made(&mut self, rank: Rank, step: u64) -> Vec<JobEffect> {
        if let State::Training { done, .. } = &mut self.state {
            done.insert(rank);
        }
        self.step = step;
        self.leave_training()
    }

    /// Once all ranks have made their last step and it is kept: on to the validation, or to the end if the run was stopped. One
    /// that has diverged waits for checkpoints that are whole: a rank that says so writes none any more, so that others stay as
    /// they are.
    fn leave_training(&mut self) -> Vec<JobEffect> {
        let State::Training { done, diverged } = &self.state else { return Vec::new() };
        if diverged.len() == self.setup.world && self.whole.is_empty() {
            let outcome = diverged.first_key_value().map(|(_, outcome)| outcome.clone());
            return outcome.map_or_else(Vec::new, |outcome| self.end(outcome));
        }
        // Ranks that keep it in memory have written by then what they were writing.
        let is_in_memory = self.is_in_memory && self.whole.is_empty();
        let is_kept = !self.setup.keeps_checkpoints || self.committed == self.step || is_in_memory;
        if done.len() < self.setup.world || !is_kept {
            return Vec::new();
        }
        if self.stopping.is_some() || self.step < self.setup.steps {
            let in_memory = self.is_in_memory;
            return self.end(Outcome::Stopped { step: self.step, in_memory });
        }
        self.validate()
    }

    fn shard_saved(
        &mut self,
        rank: Rank,
        (position, watch): (Position, StabilityWatch),
        shard: ShardFile,
    ) -> Vec<JobEffect> {
        let is_known = self.whole.iter().any(|(whole, ..)| whole.step == position.step);
        if position.step <= self.committed || is_known {
            // Repeated after a break of the link.
            return Vec::new();
        }
        let shards = self.shards.entry(position.step).or_default();
        shards.insert(rank, shard);
        if shards.len() < self.setup.world {
            return Vec::new();
        }
        let shards = self.shards.remove(&position.step).unwrap_or_default();
        // An older one that is not whole by now never will be: its events were lost with a link.
        self.shards = self.shards.split_off(&position.step);
        self.whole.push_back((position, watch, shards.into_values().collect()));
        if self.whole.len() == 1 { self.commit_next() } else { Vec::new() }
    }

    /// The commit that is due, if one is.
    pub fn commit_next(&self) -> Vec<JobEffect> {
        let next = self.whole.front().cloned();
        let effect = |(position, watch, shards)| JobEffect::CommitCheckpoint { position, watch, shards };
        next.map(effect).into_iter().collect()
    }

    /// A checkpoint has been committed, or not.
    pub fn committed(&mut self, step: u64, result: Result<(), String>) -> Vec<JobEffect> {
        if self.whole.front().is_none_or(|(position, ..)| position.step != step) {
            return Vec::new();
        }
        self.whole.pop_front();
        match result {
            Ok(()) => {
                self.committed = step;
                let before = std::mem::discriminant(&self.state);
                let mut effects = self.commit_next();
                effects.extend(self.leave_training());
                self.take_early(before, effects)
            }
            Err(_) if matches!(self.state, State::Over | State::Aborting { .. }) => Vec::new(),
            // The training does not depend on it: the next one may stand.
            Err(_) if !self.is_last(step) => self.commit_next(),
            Err(error) => {
                let message = format!("committing the checkpoint of step {step}: {error}");
                self.abort_all(Outcome::Failed { message, kind: ErrorKind::Node })
            }
        }
    }

    /// Whether a checkpoint is that of the last step of this run, which has to be kept.
    fn is_last(&self, step: u64) -> bool {
        let State::Training { done, .. } = &self.state else { return true };
        step == self.step && done.len() == self.setup.world
    }

    /// The weights have been given their name, or not: the last that a job waits for.
    pub fn weights_published(&mut self, result: Result<(), String>) -> Vec<JobEffect> {
        let State::Placing { validation, .. } = &self.state else { return Vec::new() };
        let outcome = match result {
            Ok(()) => Outcome::Done { validation: *validation },
            Err(message) => Outcome::Failed { message, kind: ErrorKind::Node },
        };
        self.end(outcome)
    }

    /// Ends the job if a rank that was told to stop has not answered in time.
    pub fn give_up_waiting(&mut self) -> Vec<JobEffect> {
        match &self.state {
            State::Aborting { outcome, .. } => {
                let outcome = outcome.clone();
                self.end(outcome)
            }
            _ => Vec::new(),
        }
    }

    /// Stops the run between two steps on request: the ranks finish the running step, and its state is saved, or stays in memory.
    pub fn stop(&mut self, in_memory: bool) -> Vec<JobEffect> {
        let is_first = self.stopping.is_none();
        let in_memory = *self.stopping.get_or_insert(in_memory);
        match &self.state {
            State::Over | State::Aborting { .. } => Vec::new(),
            State::Training { .. } if is_first => self.everyone(&RankCommand::Stop { in_memory }),
            State::Training { .. } => Vec::new(),
            // It ends after its first step.
            State::Starting { .. } if self.begins_in_memory && self.step < self.setup.steps => Vec::new(),
            // Nothing to keep that is not kept already.
            _ => self.abort_all(Outcome::Stopped { step: self.step, in_memory }),
        }
    }

    /// Stops the job at once on request.
    pub fn cancel(&mut self, reason: &str) -> Vec<JobEffect> {
        match self.state {
            State::Over | State::Aborting { .. } => Vec::new(),
            _ => self.abort_all(Outcome::Failed { message: reason.to_owned(), kind: ErrorKind::Lost }),
        }
    }

    fn abort_all(&mut self, outcome: Outcome) -> Vec<JobEffect> {
        self.abort(Rank::all(self.setup.world).collect(), outcome)
    }

    fn abort(&mut self, waiting: BTreeSet<Rank>, outcome: Outcome) -> Vec<JobEffect> {
        if waiting.is_empty() {
            return self.end(outcome);
        }
        let command = abort_command(&outcome);
        let effects =
            waiting.iter().map(|&rank| JobEffect::Command { rank, command: command.clone() }).collect();
        self.state = State::Aborting { waiting, outcome };
        effects
    }

    fn validate(&mut self) -> Vec<JobEffect> {
        self.state = State::Validating { losses: BTreeMap::new() };
        self.everyone(&RankCommand::Validate)
    }

    fn export(&mut self, validation: Option<(f64, u64)>) -> Vec<JobEffect> {
        match self.setup.export_dir.clone() {
            Some(dir) => {
                self.state = State::Exporting { validation, files: BTreeMap::new() };
                self.everyone(&RankCommand::Export { dir })
            }
            None => self.end(Outcome::Done { validation }),
        }
    }

    fn end(&mut self, outcome: Outcome) -> Vec<JobEffect> {
        self.state = State::Over;
        let mut effects = self.everyone(&RankCommand::Shutdown);
        effects.push(JobEffect::End(outcome));
        effects
    }

    fn everyone(&self, command: &RankCommand) -> Vec<JobEffect> {
        Rank::all(self.setup.world)
            .map(|rank| JobEffect::Command { rank, command: command.clone() })
            .collect()
    }
}

fn abort_command(outcome: &Outcome) -> RankCommand {
    let reason = match outcome {
        Outcome::Failed { message, .. } => message.clone(),
        _ => "the run was asked to stop".into(),
    };
    RankCommand::Abort { reason }
}

#[cfg(test)]
mod tests;
