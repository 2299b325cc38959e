//! The life of a job as a pure state machine: an event in, effects out. Knows no clock, no mailbox and no file.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::{CheckpointError, Position, ShardFile};
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::recipe::ErrorKind;
use contraflow_runtime::watch::{Divergence, Watch};

/// What a job is made with.
#[derive(Clone, Debug)]
pub struct JobSetup {
    /// Number of ranks.
    pub world: usize,
    /// Optimizer updates that were made before, by an earlier run of the job.
    pub steps_before: u64,
    /// Optimizer updates to make, those before included.
    pub steps: u64,
    /// Whether the ranks keep checkpoints: after the last step at least.
    pub keeps_checkpoints: bool,
    /// Where the weights go at the end, if anywhere; the folder exists.
    pub export_dir: Option<PathBuf>,
}

/// What is to be done about an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Tell a rank.
    Command {
        /// Whom.
        rank: usize,
        /// What.
        command: RankCommand,
    },
    /// Pass a report on.
    Record(StepReport),
    /// Every rank's part of a checkpoint is on disk: commit it, and tell [`Job::committed`].
    CommitCheckpoint {
        /// Where the run stood.
        position: Position,
        /// What the watch remembers.
        watch: Watch,
        /// By rank.
        shards: Vec<ShardFile>,
    },
    /// All weights are on disk: put the index beside them and give the folder its name.
    Commit {
        /// The folder.
        dir: PathBuf,
        /// By rank.
        files: Vec<ExportedFile>,
    },
    /// The job is over.
    End(Outcome),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything was done.
    Done {
        /// Mean validation loss in nats per token, and over how many tokens; `None` if there were no validation sequences.
        validation: Option<(f64, u64)>,
    },
    /// The run was stopped between two steps.
    Stopped {
        /// The last step that was made.
        step: u64,
    },
    /// The watch has ended the training, on all ranks before an update.
    Diverged {
        /// Which step, and why.
        divergence: Box<Divergence>,
        /// Sequences used, the batch of that step included.
        cursor: u64,
    },
    /// Somebody could not go on.
    Failed {
        /// Rank, action, cause.
        message: String,
        /// Who has to act.
        kind: ErrorKind,
    },
}

#[derive(Debug, PartialEq)]
enum State {
    Starting {
        ready: BTreeSet<usize>,
    },
    /// `done` are the ranks that have made their last step: the recipe's, or the one they have agreed to stop after.
    Training {
        done: BTreeSet<usize>,
        /// By rank, what the watch has stopped the step with: on every rank the same.
        diverged: BTreeMap<usize, Outcome>,
    },
    Validating {
        losses: BTreeMap<usize, f64>,
    },
    Exporting {
        validation: Option<(f64, u64)>,
        files: BTreeMap<usize, ExportedFile>,
    },
    /// A rank has failed, or somebody has cancelled; the ranks have been told to stop.
    Aborting {
        waiting: BTreeSet<usize>,
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
    /// Somebody wants the run to stop between two steps.
    is_stopping: bool,
    /// Checkpoints of which some ranks have written their part.
    shards: BTreeMap<u64, BTreeMap<usize, ShardFile>>,
    /// Checkpoints that are whole, in order; the first is being committed. One at a time: a commit also drops old ones.
    whole: VecDeque<(Position, Watch, Vec<ShardFile>)>,
    /// The newest committed checkpoint of this run.
    committed: u64,
}

impl Job {
    /// A job whose ranks have been assigned and not yet answered.
    pub fn new(setup: JobSetup) -> Self {
        let step = setup.steps_before;
        Job {
            setup,
            state: State::Starting { ready: BTreeSet::new() },
            step,
            is_stopping: false,
            shards: BTreeMap::new(),
            whole: VecDeque::new(),
            committed: step,
        }
    }

    /// What the job is about, and whom it waits for, in words.
    pub fn describe(&self) -> String {
        let missing = |present: &BTreeSet<usize>| {
            let missing: Vec<String> = (0..self.setup.world)
                .filter(|rank| !present.contains(rank))
                .map(|rank| rank.to_string())
                .collect();
            missing.join(", ")
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
            State::Aborting { waiting, .. } => format!("stopping, waiting for rank {waiting:?}"),
            State::Over => "over".into(),
        }
    }

    /// Takes an event and says what is to be done.
    pub fn step(&mut self, event: RankEvent) -> Vec<Effect> {
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
            (_, RankEvent::Failed { rank, action, cause, kind }) => {
                let message = format!("rank {rank}, {action}: {cause}");
                let others = (0..world).filter(|&other| other != rank).collect();
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
                self.everyone(&RankCommand::BeginStep { step: self.step + 1 })
            }
            (State::Training { diverged, .. }, RankEvent::Diverged { rank, divergence, cursor }) => {
                diverged.insert(rank, Outcome::Diverged { divergence, cursor });
                self.leave_training()
            }
            (State::Training { .. }, RankEvent::StepDone { report }) => {
                let (rank, step) = (report.rank as usize, report.step);
                let mut effects = vec![Effect::Record(report)];
                if step == self.setup.steps {
                    effects.extend(self.last_step_made(rank, step));
                }
                effects
            }
            (State::Training { .. }, RankEvent::Stopped { rank, step }) => self.last_step_made(rank, step),
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
                let commit = self.setup.export_dir.clone().map(|dir| {
                    let files = files.into_values().filter(|file| !file.file.is_empty()).collect();
                    Effect::Commit { dir, files }
                });
                let mut effects: Vec<Effect> = commit.into_iter().collect();
                effects.extend(self.end(Outcome::Done { validation }));
                effects
            }
            _ => Vec::new(),
        }
    }

    fn last_step_made(&mut self, rank: usize, step: u64) -> Vec<Effect> {
        if let State::Training { done, .. } = &mut self.state {
            done.insert(rank);
        }
        self.step = step;
        self.leave_training()
    }

    /// Once all ranks have made their last step and it is kept: on to the validation, or to the end if the run was stopped.
    fn leave_training(&mut self) -> Vec<Effect> {
        let State::Training { done, diverged } = &self.state else { return Vec::new() };
        if diverged.len() == self.setup.world && self.shards.is_empty() && self.whole.is_empty() {
            let outcome = diverged.first_key_value().map(|(_, outcome)| outcome.clone());
            return outcome.map_or_else(Vec::new, |outcome| self.end(outcome));
        }
        let is_kept = !self.setup.keeps_checkpoints || self.committed == self.step;
        if done.len() < self.setup.world || !is_kept {
            return Vec::new();
        }
        if self.is_stopping || self.step < self.setup.steps {
            return self.end(Outcome::Stopped { step: self.step });
        }
        self.validate()
    }

    fn shard_saved(
        &mut self,
        rank: usize,
        (position, watch): (Position, Watch),
        shard: ShardFile,
    ) -> Vec<Effect> {
        let shards = self.shards.entry(position.step).or_default();
        shards.insert(rank, shard);
        if shards.len() < self.setup.world {
            return Vec::new();
        }
        let shards = self.shards.remove(&position.step).unwrap_or_default();
        self.whole.push_back((position, watch, shards.into_values().collect()));
        if self.whole.len() == 1 { self.commit_next() } else { Vec::new() }
    }

    fn commit_next(&self) -> Vec<Effect> {
        let next = self.whole.front().cloned();
        let effect = |(position, watch, shards)| Effect::CommitCheckpoint { position, watch, shards };
        next.map(effect).into_iter().collect()
    }

    /// A checkpoint has been committed, or not.
    pub fn committed(&mut self, step: u64, result: Result<(), CheckpointError>) -> Vec<Effect> {
        self.whole.pop_front();
        match result {
            Ok(()) => {
                self.committed = step;
                let mut effects = self.commit_next();
                effects.extend(self.leave_training());
                effects
            }
            Err(_) if matches!(self.state, State::Over | State::Aborting { .. }) => Vec::new(),
            Err(error) => {
                let message = format!("committing the checkpoint of step {step}: {error}");
                self.abort_all(Outcome::Failed { message, kind: ErrorKind::Config })
            }
        }
    }

    /// Ends the job if a rank that was told to stop has not answered in time.
    pub fn give_up_waiting(&mut self) -> Vec<Effect> {
        match &self.state {
            State::Aborting { outcome, .. } => {
                let outcome = outcome.clone();
                self.end(outcome)
            }
            _ => Vec::new(),
        }
    }

    /// Stops the run between two steps on somebody's word, and keeps what it has learnt: the ranks finish the running step.
    pub fn stop(&mut self) -> Vec<Effect> {
        let is_first = !std::mem::replace(&mut self.is_stopping, true);
        match &self.state {
            State::Over | State::Aborting { .. } => Vec::new(),
            State::Training { .. } if is_first => self.everyone(&RankCommand::Stop),
            State::Training { .. } => Vec::new(),
            // Nothing to keep that is not kept already.
            _ => self.abort_all(Outcome::Stopped { step: self.step }),
        }
    }

    /// Stops the job at once on somebody's word.
    pub fn cancel(&mut self, reason: &str) -> Vec<Effect> {
        match self.state {
            State::Over | State::Aborting { .. } => Vec::new(),
            _ => self.abort_all(Outcome::Failed { message: reason.to_owned(), kind: ErrorKind::Lost }),
        }
    }

    fn abort_all(&mut self, outcome: Outcome) -> Vec<Effect> {
        self.abort((0..self.setup.world).collect(), outcome)
    }

    fn abort(&mut self, waiting: BTreeSet<usize>, outcome: Outcome) -> Vec<Effect> {
        if waiting.is_empty() {
            return self.end(outcome);
        }
        let reason = match &outcome {
            Outcome::Failed { message, .. } => message.clone(),
            _ => "the run is to stop".into(),
        };
        let command =
            |&rank| Effect::Command { rank, command: RankCommand::Abort { reason: reason.clone() } };
        let effects = waiting.iter().map(command).collect();
        self.state = State::Aborting { waiting, outcome };
        effects
    }

    fn validate(&mut self) -> Vec<Effect> {
        self.state = State::Validating { losses: BTreeMap::new() };
        self.everyone(&RankCommand::Validate)
    }

    fn export(&mut self, validation: Option<(f64, u64)>) -> Vec<Effect> {
        match self.setup.export_dir.clone() {
            Some(dir) => {
                self.state = State::Exporting { validation, files: BTreeMap::new() };
                self.everyone(&RankCommand::Export { dir })
            }
            None => self.end(Outcome::Done { validation }),
        }
    }

    fn end(&mut self, outcome: Outcome) -> Vec<Effect> {
        self.state = State::Over;
        let mut effects = self.everyone(&RankCommand::Shutdown);
        effects.push(Effect::End(outcome));
        effects
    }

    fn everyone(&self, command: &RankCommand) -> Vec<Effect> {
        (0..self.setup.world).map(|rank| Effect::Command { rank, command: command.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::watch::Action;

    use super::*;

    fn job(world: usize) -> Job {
        Job::new(JobSetup {
            world,
            steps_before: 0,
            steps: 2,
            keeps_checkpoints: false,
            export_dir: Some("model".into()),
        })
    }

    fn step_done(rank: u32, step: u64) -> RankEvent {
        RankEvent::StepDone { report: StepReport { rank, step, ..StepReport::default() } }
    }

    fn commands(effects: &[Effect]) -> Vec<(usize, &RankCommand)> {
        let mut commands = Vec::new();
        for effect in effects {
            if let Effect::Command { rank, command } = effect {
                commands.push((*rank, command));
            }
        }
        commands
    }

    fn file(rank: usize) -> ExportedFile {
        ExportedFile { file: format!("{rank}"), tensors: vec![], bytes: 0 }
    }

    #[test]
    fn a_job_trains_validates_writes_and_ends() {
        let mut job = job(2);
        assert_eq!(job.step(RankEvent::Ready { rank: 1 }), []);
        assert_eq!(job.describe(), "starting, waiting for rank 0");
        let begin = RankCommand::BeginStep { step: 1 };
        assert_eq!(commands(&job.step(RankEvent::Ready { rank: 0 })), [(0, &begin), (1, &begin)]);
        for (rank, step) in [(0, 1), (1, 1), (0, 2)] {
            assert!(matches!(job.step(step_done(rank, step))[..], [Effect::Record(_)]));
        }
        let effects = job.step(step_done(1, 2));
        assert_eq!(commands(&effects), [(0, &RankCommand::Validate), (1, &RankCommand::Validate)]);
        assert_eq!(job.step(RankEvent::Validated { rank: 0, loss: 0.25, tokens: 8 }), []);
        let effects = job.step(RankEvent::Validated { rank: 1, loss: 0.5, tokens: 8 });
        assert_eq!(commands(&effects)[1], (1, &RankCommand::Export { dir: "model".into() }));
        assert_eq!(job.step(RankEvent::Exported { rank: 1, file: file(1) }), []);
        let effects = job.step(RankEvent::Exported { rank: 0, file: file(0) });
        assert_eq!(effects[0], Effect::Commit { dir: "model".into(), files: vec![file(0), file(1)] });
        assert_eq!(effects.last().unwrap(), &Effect::End(Outcome::Done { validation: Some((0.75, 8)) }));
    }

    #[test]
    fn the_first_failure_stops_everybody_and_is_the_one_that_is_told() {
        let mut job = job(3);
        (0..3).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
        let failed = |rank, cause: &str| RankEvent::Failed {
            rank,
            action: "action B1.0".into(),
            cause: cause.to_owned(),
            kind: ErrorKind::Bug,
        };
        let effects = job.step(failed(1, "out of luck"));
        let ranks: Vec<usize> = commands(&effects).into_iter().map(|(rank, _)| rank).collect();
        assert_eq!(ranks, [0, 2]);
        assert_eq!(job.step(failed(2, "a consequence")), []);
        let effects = job.step(RankEvent::Aborted { rank: 0 });
        let message = "rank 1, action B1.0: out of luck".into();
        let told = Outcome::Failed { message, kind: ErrorKind::Bug };
        assert_eq!(effects.last().unwrap(), &Effect::End(told));
        assert_eq!(job.step(step_done(0, 1)), []);
    }

    #[test]
    fn a_rank_that_does_not_answer_an_abort_does_not_hold_up_the_end() {
        let mut job = job(2);
        drop(job.cancel("cancelled"));
        let effects = job.give_up_waiting();
        let told = Outcome::Failed { message: "cancelled".into(), kind: ErrorKind::Lost };
        assert_eq!(effects.last().unwrap(), &Effect::End(told));
        assert_eq!(job.give_up_waiting(), []);
    }

    fn with_checkpoints(world: usize) -> Job {
        let setup = JobSetup {
            world,
            steps_before: 10,
            steps: 20,
            keeps_checkpoints: true,
            export_dir: Some("model".into()),
        };
        Job::new(setup)
    }

    fn saved(rank: usize, step: u64) -> RankEvent {
        let shard = ShardFile { file: rank.to_string(), ..ShardFile::default() };
        let position = Position { step, ..Position::default() };
        RankEvent::ShardSaved { rank, position, watch: Watch::default(), shard }
    }

    #[test]
    fn a_resumed_job_goes_on_with_the_next_step_and_leaves_training_once_the_last_is_kept() {
        let mut job = with_checkpoints(2);
        drop(job.step(RankEvent::Ready { rank: 0 }));
        let begin = RankCommand::BeginStep { step: 11 };
        assert_eq!(commands(&job.step(RankEvent::Ready { rank: 1 })), [(0, &begin), (1, &begin)]);
        assert_eq!(job.step(saved(0, 15)), []);
        assert_eq!(job.step(saved(0, 20)), [], "the fast rank is a checkpoint ahead");
        let effects = job.step(saved(1, 15));
        assert!(matches!(&effects[..], [Effect::CommitCheckpoint { position, shards, .. }]
            if position.step == 15 && shards.len() == 2 && shards[0].file == "0"));
        assert_eq!(job.committed(15, Ok(())), []);
        (0..2).for_each(|rank| drop(job.step(step_done(rank, 20))));
        assert_eq!(job.describe(), "waiting for a checkpoint");
        assert!(matches!(job.step(saved(1, 20))[..], [Effect::CommitCheckpoint { .. }]));
        let effects = job.committed(20, Ok(()));
        assert_eq!(commands(&effects), [(0, &RankCommand::Validate), (1, &RankCommand::Validate)]);
    }

    #[test]
    fn a_job_that_diverges_ends_once_its_checkpoints_are_committed() {
        let mut job = with_checkpoints(2);
        (0..2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
        let divergence =
            Divergence { step: 13, action: Action::RollBack, why: "a spike".into(), evidence: None };
        let diverged =
            |rank| RankEvent::Diverged { rank, divergence: Box::new(divergence.clone()), cursor: 7 };
        drop(job.step(saved(0, 12)));
        assert_eq!(job.step(diverged(0)), []);
        drop(job.step(saved(1, 12)));
        assert_eq!(job.step(diverged(1)), []);
        assert_eq!(job.describe(), "waiting for a checkpoint");
        let effects = job.committed(12, Ok(()));
        let outcome = Outcome::Diverged { divergence: Box::new(divergence), cursor: 7 };
        assert_eq!(effects.last().unwrap(), &Effect::End(outcome));
    }

    #[test]
    fn checkpoints_are_committed_one_at_a_time_and_in_order() {
        let mut job = with_checkpoints(1);
        drop(job.step(RankEvent::Ready { rank: 0 }));
        assert_eq!(job.step(saved(0, 12)).len(), 1);
        assert_eq!(job.step(saved(0, 14)), [], "the one before is still under way");
        assert_eq!(job.step(saved(0, 16)), []);
        for (done, next) in [(12, 14), (14, 16)] {
            let effects = job.committed(done, Ok(()));
            assert!(
                matches!(&effects[..], [Effect::CommitCheckpoint { position, .. }] if position.step == next)
            );
        }
        assert_eq!(job.committed(16, Ok(())), []);
    }

    #[test]
    fn a_stop_ends_the_job_after_the_step_the_ranks_agree_on_is_kept() {
        let mut job = with_checkpoints(2);
        (0..2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
        assert_eq!(commands(&job.stop()), [(0, &RankCommand::Stop), (1, &RankCommand::Stop)]);
        assert_eq!(job.stop(), [], "once is enough");
        for rank in 0..2 {
            drop(job.step(step_done(rank as u32, 13)));
            assert_eq!(job.step(RankEvent::Stopped { rank, step: 13 }), []);
            drop(job.step(saved(rank, 13)));
        }
        let effects = job.committed(13, Ok(()));
        assert_eq!(effects.last().unwrap(), &Effect::End(Outcome::Stopped { step: 13 }));
    }

    #[test]
    fn a_stop_at_the_very_last_step_still_stops_before_the_validation() {
        let mut job = with_checkpoints(1);
        drop(job.step(RankEvent::Ready { rank: 0 }));
        drop(job.stop());
        drop(job.step(step_done(0, 20)));
        drop(job.step(saved(0, 20)));
        let effects = job.committed(20, Ok(()));
        assert_eq!(effects.last().unwrap(), &Effect::End(Outcome::Stopped { step: 20 }));
    }

    #[test]
    fn a_finished_run_is_only_validated_and_written_again() {
        let mut job = with_checkpoints(1);
        job.step = 20;
        assert_eq!(commands(&job.step(RankEvent::Ready { rank: 0 })), [(0, &RankCommand::Validate)]);
    }

    #[test]
    fn a_checkpoint_that_cannot_be_committed_ends_the_job_with_the_file() {
        let mut job = with_checkpoints(1);
        drop(job.step(RankEvent::Ready { rank: 0 }));
        drop(job.step(saved(0, 15)));
        let full = CheckpointError { path: "manifest.json".into(), message: "no space".into() };
        assert!(matches!(commands(&job.committed(15, Err(full)))[..], [(0, RankCommand::Abort { .. })]));
        let effects = job.step(RankEvent::Aborted { rank: 0 });
        let message = "committing the checkpoint of step 15: manifest.json: no space".into();
        let told = Outcome::Failed { message, kind: ErrorKind::Config };
        assert_eq!(effects.last().unwrap(), &Effect::End(told));
    }
}
