//! The job machine, event by event.

use contraflow_proto::StepReport;
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_runtime::topology::Rank;

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

fn commands(effects: &[JobEffect]) -> Vec<(u32, &RankCommand)> {
    let mut commands = Vec::new();
    for effect in effects {
        if let JobEffect::Command { rank, command } = effect {
            commands.push((rank.number(), command));
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
    assert_eq!(job.step(RankEvent::Ready { rank: Rank::new(1) }), []);
    assert_eq!(job.describe(), "starting, waiting for rank 0");
    let begin = RankCommand::BeginStep { step: 1 };
    assert_eq!(commands(&job.step(RankEvent::Ready { rank: Rank::new(0) })), [(0, &begin), (1, &begin)]);
    for (rank, step) in [(0, 1), (1, 1), (0, 2)] {
        assert!(matches!(job.step(step_done(rank, step))[..], [JobEffect::Record(_)]));
    }
    let effects = job.step(step_done(1, 2));
    assert_eq!(commands(&effects), [(0, &RankCommand::Validate), (1, &RankCommand::Validate)]);
    assert_eq!(job.step(RankEvent::Validated { rank: Rank::new(0), loss: 0.25, tokens: 8 }), []);
    let effects = job.step(RankEvent::Validated { rank: Rank::new(1), loss: 0.5, tokens: 8 });
    assert_eq!(commands(&effects)[1], (1, &RankCommand::Export { dir: "model".into() }));
    assert_eq!(job.step(RankEvent::Exported { rank: Rank::new(1), file: file(1) }), []);
    let effects = job.step(RankEvent::Exported { rank: Rank::new(0), file: file(0) });
    assert_eq!(effects, [JobEffect::PublishWeights { dir: "model".into(), files: vec![file(0), file(1)] }]);
    let effects = job.weights_published(Ok(()));
    assert_eq!(effects.last().unwrap(), &JobEffect::End(Outcome::Done { validation: Some((0.75, 8)) }));
}

#[test]
fn the_first_failure_stops_all_ranks_and_is_the_one_reported() {
    let mut job = job(3);
    Rank::all(3).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
    let failed = |rank, cause: &str| RankEvent::Failed {
        rank: Rank::new(rank),
        action: "action B1.0".into(),
        cause: cause.to_owned(),
        kind: ErrorKind::Bug,
        peer: None,
    };
    let effects = job.step(failed(1, "out of luck"));
    let ranks: Vec<u32> = commands(&effects).into_iter().map(|(rank, _)| rank).collect();
    assert_eq!(ranks, [0, 2]);
    assert_eq!(job.step(failed(2, "a consequence")), []);
    let effects = job.step(RankEvent::Aborted { rank: Rank::new(0) });
    let message = "rank 1, action B1.0: out of luck".into();
    let reported = Outcome::Failed { message, kind: ErrorKind::Bug };
    assert_eq!(effects.last().unwrap(), &JobEffect::End(reported));
    assert_eq!(job.step(step_done(0, 1)), []);
}

#[test]
fn a_rank_that_does_not_answer_an_abort_does_not_hold_up_the_end() {
    let mut job = job(2);
    drop(job.cancel("cancelled"));
    let effects = job.give_up_waiting();
    let reported = Outcome::Failed { message: "cancelled".into(), kind: ErrorKind::Lost };
    assert_eq!(effects.last().unwrap(), &JobEffect::End(reported));
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

fn saved(rank: u32, step: u64) -> RankEvent {
    let shard = ShardFile { file: rank.to_string(), ..ShardFile::default() };
    let position = Position { step, ..Position::default() };
    let rank = Rank::new(rank);
    RankEvent::ShardSaved { rank, position, watch: StabilityWatch::default(), shard }
}

#[test]
fn a_resumed_job_continues_with_the_next_step_and_leaves_training_once_the_last_is_saved() {
    let mut job = with_checkpoints(2);
    drop(job.step(RankEvent::Ready { rank: Rank::new(0) }));
    let begin = RankCommand::BeginStep { step: 11 };
    assert_eq!(commands(&job.step(RankEvent::Ready { rank: Rank::new(1) })), [(0, &begin), (1, &begin)]);
    assert_eq!(job.step(saved(0, 15)), []);
    assert_eq!(job.step(saved(0, 20)), [], "the fast rank is a checkpoint ahead");
    let effects = job.step(saved(1, 15));
    assert!(matches!(&effects[..], [JobEffect::CommitCheckpoint { position, shards, .. }]
        if position.step == 15 && shards.len() == 2 && shards[0].file == "0"));
    assert_eq!(job.committed(15, Ok(())), []);
    (0..2).for_each(|rank| drop(job.step(step_done(rank, 20))));
    assert_eq!(job.describe(), "waiting for a checkpoint");
    assert!(matches!(job.step(saved(1, 20))[..], [JobEffect::CommitCheckpoint { .. }]));
    let effects = job.committed(20, Ok(()));
    assert_eq!(commands(&effects), [(0, &RankCommand::Validate), (1, &RankCommand::Validate)]);
}

#[test]
fn a_job_that_diverges_ends_once_its_checkpoints_are_committed() {
    let mut job = with_checkpoints(2);
    Rank::all(2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
    let divergence =
        Divergence { step: 13, action: StepAction::RollBack, why: "a spike".into(), evidence: None };
    let diverged = |rank| RankEvent::Diverged {
        rank: Rank::new(rank),
        divergence: Box::new(divergence.clone()),
        cursor: 7,
    };
    drop(job.step(saved(0, 12)));
    assert_eq!(job.step(diverged(0)), []);
    drop(job.step(saved(1, 12)));
    assert_eq!(job.step(diverged(1)), []);
    assert_eq!(job.describe(), "waiting for a checkpoint");
    let effects = job.committed(12, Ok(()));
    let outcome = Outcome::Diverged { divergence: Box::new(divergence), cursor: 7 };
    assert_eq!(effects.last().unwrap(), &JobEffect::End(outcome));
}

#[test]
fn a_job_that_diverges_waits_for_no_checkpoint_of_which_a_rank_could_not_write_its_part() {
    let mut job = with_checkpoints(2);
    Rank::all(2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
    drop(job.step(saved(0, 12)));
    let cause = "no space left".to_owned();
    drop(job.step(RankEvent::SaveFailed { rank: Rank::new(1), step: 12, cause }));
    let divergence = Box::new(Divergence {
        step: 13,
        action: StepAction::RollBack,
        why: "a spike".into(),
        evidence: None,
    });
    let diverged =
        |rank| RankEvent::Diverged { rank: Rank::new(rank), divergence: divergence.clone(), cursor: 7 };
    assert_eq!(job.step(diverged(0)), [], "the other one may still write its part");
    let effects = job.step(diverged(1));
    let outcome = Outcome::Diverged { divergence: divergence.clone(), cursor: 7 };
    assert_eq!(effects.last(), Some(&JobEffect::End(outcome)));
}

#[test]
fn checkpoints_are_committed_one_at_a_time_and_in_order() {
    let mut job = with_checkpoints(1);
    drop(job.step(RankEvent::Ready { rank: Rank::new(0) }));
    assert_eq!(job.step(saved(0, 12)).len(), 1);
    assert_eq!(job.step(saved(0, 14)), [], "the one before is still under way");
    assert_eq!(job.step(saved(0, 16)), []);
    for (done, next) in [(12, 14), (14, 16)] {
        let effects = job.committed(done, Ok(()));
        assert!(
            matches!(&effects[..], [JobEffect::CommitCheckpoint { position, .. }] if position.step == next)
        );
    }
    assert_eq!(job.committed(16, Ok(())), []);
}

#[test]
fn a_stop_ends_the_job_after_the_step_the_ranks_agree_on_is_saved() {
    let mut job = with_checkpoints(2);
    Rank::all(2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
    assert_eq!(
        commands(&job.stop(false)),
        [(0, &RankCommand::Stop { in_memory: false }), (1, &RankCommand::Stop { in_memory: false })]
    );
    assert_eq!(job.stop(false), [], "once is enough");
    for rank in 0..2 {
        drop(job.step(step_done(rank, 13)));
        assert_eq!(job.step(RankEvent::Stopped { rank: Rank::new(rank), step: 13, in_memory: false }), []);
        drop(job.step(saved(rank, 13)));
    }
    let effects = job.committed(13, Ok(()));
    assert_eq!(effects.last().unwrap(), &JobEffect::End(Outcome::Stopped { step: 13, in_memory: false }));
}

#[test]
fn a_stop_at_the_very_last_step_still_stops_before_the_validation() {
    let mut job = with_checkpoints(1);
    drop(job.step(RankEvent::Ready { rank: Rank::new(0) }));
    drop(job.stop(false));
    drop(job.step(step_done(0, 20)));
    drop(job.step(saved(0, 20)));
    let effects = job.committed(20, Ok(()));
    assert_eq!(effects.last().unwrap(), &JobEffect::End(Outcome::Stopped { step: 20, in_memory: false }));
}

#[test]
fn a_finished_run_is_only_validated_and_written_again() {
    let mut job = with_checkpoints(1);
    job.step = 20;
    assert_eq!(commands(&job.step(RankEvent::Ready { rank: Rank::new(0) })), [(0, &RankCommand::Validate)]);
}

#[test]
fn a_checkpoint_that_cannot_be_committed_ends_the_job_with_the_file() {
    let mut job = with_checkpoints(1);
    drop(job.step(RankEvent::Ready { rank: Rank::new(0) }));
    drop(job.step(saved(0, 13)));
    // The training depends on the last one alone.
    assert_eq!(job.committed(13, Err("manifest.json: no space".into())), []);
    drop(job.step(step_done(0, 20)));
    drop(job.step(saved(0, 20)));
    let full = Err("manifest.json: no space".into());
    assert!(matches!(commands(&job.committed(20, full))[..], [(0, RankCommand::Abort { .. })]));
    let effects = job.step(RankEvent::Aborted { rank: Rank::new(0) });
    let message = "committing the checkpoint of step 20: manifest.json: no space".into();
    let reported = Outcome::Failed { message, kind: ErrorKind::Node };
    assert_eq!(effects.last().unwrap(), &JobEffect::End(reported));
}

#[test]
fn a_rebuilt_machine_catches_up_with_its_ranks() {
    let mut job = job(2);
    let validated = |rank| RankEvent::Validated { rank: Rank::new(rank), loss: 0.5, tokens: 8 };
    // All events of rank 0 arrive before the first of rank 1, whose export is still under way.
    assert_eq!(job.step(RankEvent::Ready { rank: Rank::new(0) }), []);
    assert!(matches!(job.step(step_done(0, 2))[..], [JobEffect::Record(_)]));
    assert_eq!(job.step(validated(0)), []);
    assert_eq!(job.step(RankEvent::Exported { rank: Rank::new(0), file: file(0) }), []);
    assert_eq!(commands(&job.step(RankEvent::Ready { rank: Rank::new(1) })).len(), 2);
    assert_eq!(job.describe(), "training, waiting for rank 1");
    drop(job.step(step_done(1, 2)));
    assert_eq!(job.describe(), "validating, waiting for rank 1");
    drop(job.step(validated(1)));
    assert_eq!(job.describe(), "writing the weights, waiting for rank 1");
    let effects = job.step(RankEvent::Exported { rank: Rank::new(1), file: file(1) });
    assert!(matches!(effects[..], [JobEffect::PublishWeights { .. }]));
}

#[test]
fn commands_can_be_repeated() {
    let mut job = with_checkpoints(2);
    Rank::all(2).for_each(|rank| drop(job.step(RankEvent::Ready { rank })));
    drop(job.step(saved(0, 11)));
    drop(job.step(saved(1, 11)));
    let repeated = job.repeat(&[0, 1].map(Rank::new));
    assert_eq!(commands(&repeated).len(), 2);
    assert!(
        matches!(repeated.last(), Some(JobEffect::CommitCheckpoint { position, .. }) if position.step == 11)
    );
    assert_eq!(job.step(saved(1, 11)), []);
    assert_eq!(job.committed(9, Ok(())), []);
    drop(job.committed(11, Ok(())));
    assert_eq!(commands(&job.repeat(&[0, 1].map(Rank::new))).len(), 2);
    assert_eq!(job.repeat(&[0, 1].map(Rank::new)).len(), 2);
}
