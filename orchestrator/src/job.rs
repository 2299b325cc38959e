//! The life of a job as a pure state machine: an event in, effects out. Knows no clock, no mailbox and no file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use contraflow_proto::StepReport;
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::watch::{Action, Divergence};

/// What a job is made with.
#[derive(Clone, Debug)]
pub struct JobSetup {
    /// Number of ranks.
    pub world: usize,
    /// Optimizer updates to make.
    pub steps: u64,
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
    /// Somebody could not go on, in words: rank, action, cause.
    Failed(String),
    /// The watch has ended the training, on all ranks before an update.
    Diverged(Box<Divergence>),
}

#[derive(Debug, PartialEq)]
enum State {
    Starting {
        ready: BTreeSet<usize>,
    },
    Training {
        done: BTreeSet<usize>,
        /// Who has told that the watch stopped the step. Every rank will.
        diverged: BTreeSet<usize>,
    },
    Validating {
        losses: BTreeMap<usize, f64>,
    },
    Exporting {
        validation: Option<(f64, u64)>,
        files: BTreeMap<usize, ExportedFile>,
    },
    /// A rank has failed; the others have been told to stop.
    Aborting {
        waiting: BTreeSet<usize>,
        message: String,
    },
    Over,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    setup: JobSetup,
    state: State,
}

impl Job {
    /// A job whose ranks have been assigned and not yet answered.
    pub fn new(setup: JobSetup) -> Self {
        Job { setup, state: State::Starting { ready: BTreeSet::new() } }
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
            (State::Aborting { waiting, message }, event) => {
                let is_answer = matches!(event, RankEvent::Aborted { .. } | RankEvent::Failed { .. });
                if is_answer && waiting.remove(&event.rank()) && waiting.is_empty() {
                    let message = std::mem::take(message);
                    return self.end(Outcome::Failed(message));
                }
                Vec::new()
            }
            (_, RankEvent::Failed { rank, action, cause }) => {
                self.abort(rank, format!("rank {rank}, {action}: {cause}"))
            }
            (State::Starting { ready }, RankEvent::Ready { rank }) => {
                ready.insert(rank);
                if ready.len() < world {
                    return Vec::new();
                }
                if self.setup.steps == 0 {
                    return self.validate();
                }
                self.state = State::Training { done: BTreeSet::new(), diverged: BTreeSet::new() };
                self.everyone(&RankCommand::BeginStep { step: 1 })
            }
            (State::Training { diverged, .. }, RankEvent::Diverged { rank, divergence }) => {
                diverged.insert(rank);
                if diverged.len() < world { Vec::new() } else { self.diverge(divergence) }
            }
            (State::Training { done, .. }, RankEvent::StepDone { report }) => {
                let (rank, step) = (report.rank as usize, report.step);
                let mut effects = vec![Effect::Record(report)];
                if step == self.setup.steps {
                    done.insert(rank);
                    if done.len() == world {
                        effects.extend(self.validate());
                    }
                }
                effects
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

    /// Ends the job if a rank that was told to stop has not answered in time.
    pub fn give_up_waiting(&mut self) -> Vec<Effect> {
        match &mut self.state {
            State::Aborting { message, .. } => {
                let message = std::mem::take(message);
                self.end(Outcome::Failed(message))
            }
            _ => Vec::new(),
        }
    }

    /// Stops the job on somebody's word.
    pub fn cancel(&mut self, reason: &str) -> Vec<Effect> {
        match self.state {
            State::Over | State::Aborting { .. } => Vec::new(),
            _ => self.stop((0..self.setup.world).collect(), reason.to_owned()),
        }
    }

    /// All ranks wait, their weights as they were before the step.
    fn diverge(&mut self, mut divergence: Box<Divergence>) -> Vec<Effect> {
        if divergence.action == Action::RollBack {
            divergence.why += "; there is no checkpoint to go back to";
        }
        self.end(Outcome::Diverged(divergence))
    }

    fn abort(&mut self, failed: usize, message: String) -> Vec<Effect> {
        self.stop((0..self.setup.world).filter(|&rank| rank != failed).collect(), message)
    }

    fn stop(&mut self, waiting: BTreeSet<usize>, message: String) -> Vec<Effect> {
        if waiting.is_empty() {
            return self.end(Outcome::Failed(message));
        }
        let command =
            |&rank| Effect::Command { rank, command: RankCommand::Abort { reason: message.clone() } };
        let effects = waiting.iter().map(command).collect();
        self.state = State::Aborting { waiting, message };
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
    use super::*;

    fn job(world: usize) -> Job {
        Job::new(JobSetup { world, steps: 2, export_dir: Some("model".into()) })
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
        };
        let effects = job.step(failed(1, "out of luck"));
        let ranks: Vec<usize> = commands(&effects).into_iter().map(|(rank, _)| rank).collect();
        assert_eq!(ranks, [0, 2]);
        assert_eq!(job.step(failed(2, "a consequence")), []);
        let effects = job.step(RankEvent::Aborted { rank: 0 });
        let told = Outcome::Failed("rank 1, action B1.0: out of luck".into());
        assert_eq!(effects.last().unwrap(), &Effect::End(told));
        assert_eq!(job.step(step_done(0, 1)), []);
    }

    #[test]
    fn a_rank_that_does_not_answer_an_abort_does_not_hold_up_the_end() {
        let mut job = job(2);
        drop(job.cancel("cancelled"));
        let effects = job.give_up_waiting();
        assert_eq!(effects.last().unwrap(), &Effect::End(Outcome::Failed("cancelled".into())));
        assert_eq!(job.give_up_waiting(), []);
    }

    #[test]
    fn a_step_that_the_watch_stopped_ends_the_job_once_every_rank_waits() {
        for (action, added) in
            [(Action::Stop, ""), (Action::RollBack, "; there is no checkpoint to go back to")]
        {
            let mut job = job(2);
            (0..2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
            let divergence =
                |why: &str| Box::new(Divergence { step: 2, action, why: why.to_owned(), evidence: None });
            let diverged = |rank| RankEvent::Diverged { rank, divergence: divergence("step 2: a spike") };
            assert_eq!(job.step(diverged(1)), []);
            assert!(matches!(job.step(step_done(0, 1))[..], [Effect::Record(_)]));
            let effects = job.step(diverged(0));
            assert_eq!(commands(&effects), [(0, &RankCommand::Shutdown), (1, &RankCommand::Shutdown)]);
            let told = Outcome::Diverged(divergence(&format!("step 2: a spike{added}")));
            assert_eq!(effects.last().unwrap(), &Effect::End(told));
        }
    }
}
