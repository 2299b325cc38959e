//! Jobs whose formations fail, and who is to blame.

use super::*;
use crate::core::attempts::{MAX_IDLE, MAX_STUCK};
use crate::core::storage::GIVE_UP_MS;
use contraflow_runtime::topology::Rank;

fn step_done(step: u64) -> RankEvent {
    step_done_by(0, step)
}

fn step_done_by(rank: u32, step: u64) -> RankEvent {
    RankEvent::StepDone { report: contraflow_proto::StepReport { rank, step, ..Default::default() } }
}

fn generation(world: &World, job: JobId) -> u32 {
    world.core.jobs().all[&job].generation().number()
}

/// The worker of a rank is lost, and another one comes to its node.
fn lose(world: &mut World, job: JobId, rank: usize) {
    let places = world.core.jobs().all[&job].running().unwrap().places.clone();
    let newest = world.core.members().map(|member| member.registration.worker).max().unwrap();
    drop(world.step(Event::Detached { worker: places[rank] }));
    let left: Vec<u64> = world.core.members().map(|member| member.registration.worker).collect();
    let left: Vec<u64> = left.into_iter().filter(|worker| *worker != places[rank]).collect();
    drop(world.pass(RETURN_MS + 2 * TICK_MS, &left));
    drop(world.attach(newest + 1, Vec::new()));
}

/// Passes until the job runs or has ended.
fn until_formed(world: &mut World, job: JobId) {
    for _ in 0..1_000 {
        let record = &world.core.jobs().all[&job];
        if record.running().is_some() || record.has_ended() {
            return;
        }
        let all: Vec<u64> = world.core.members().map(|member| member.registration.worker).collect();
        drop(world.pass(TICK_MS, &all));
    }
    panic!("{}", world.core.waiting_for(job));
}

fn outcome(world: &World, job: JobId) -> String {
    let record = &world.core.jobs().all[&job];
    assert_eq!(record.phase, Phase::Ended(End::Failed), "{record:?}");
    record.why.clone()
}

#[test]
fn a_job_that_loses_every_formation_before_its_first_step_ends_and_names_what_happened() {
    let mut world = training();
    let began = world.now;
    for idle in 1..=MAX_IDLE {
        assert_eq!(generation(&world, JOB), idle);
        lose(&mut world, JOB, 1);
        if idle == 3 {
            let waits = world.core.waiting_for(JOB);
            assert!(
                waits.starts_with("formed 3 times in a row without completing a step, again in 2 s; rank 1"),
                "{waits}"
            );
        }
        until_formed(&mut world, JOB);
    }
    let why = outcome(&world, JOB);
    assert!(
        why.starts_with(
            "formed 6 times in a row without completing a step: generation 1: rank 1 lost: worker"
        ),
        "{why}"
    );
    assert!(why.contains("generation 6: rank ") && why.contains("on node n3"), "{why}");
    assert!(world.now - began < 60_000, "{}", world.now - began);
}

#[test]
fn a_job_that_completes_a_step_between_losses_is_never_ended() {
    let mut world = training();
    for step in 1..=4 * u64::from(MAX_IDLE) {
        // All but one of the losses that are allowed.
        for _ in 1..MAX_IDLE {
            lose(&mut world, JOB, 1);
            until_formed(&mut world, JOB);
        }
        drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
        drop(world.event(RankEvent::Ready { rank: Rank::new(1) }));
        drop(world.event(step_done(step)));
        let attempts = &world.core.jobs().all[&JOB].attempts;
        assert_eq!((attempts.furthest, attempts.idle), (step, 0));
        checkpoint_of(&mut world, step);
    }
}

/// The running formation commits a checkpoint.
fn checkpoint_of(world: &mut World, step: u64) {
    drop(save(world, step));
    let formed = world.core.jobs().all[&JOB].running().unwrap().clone();
    let (formation, result) = (formed.id(JOB), Ok(()));
    let worker = formed.places[0];
    drop(world.step(Event::Committed { worker, formation, position: Some(position(step)), result }));
    assert_eq!(world.core.jobs().all[&JOB].last_checkpoint, step);
}

#[test]
fn a_step_that_a_restarted_orchestrator_missed_counts_too() {
    let mut world = training();
    drop(world.event(step_done(1)));
    let facts: Vec<Fact> =
        world.facts.iter().filter(|fact| matches!(fact, Fact::Stepped { .. })).cloned().collect();
    assert!(matches!(facts[..], [Fact::Stepped { job: JOB, step: 1, .. }]), "{facts:?}");
    drop(world.event(step_done_by(1, 1)));
    drop(world.event(step_done(2)));
    assert_eq!(world.facts.iter().filter(|fact| matches!(fact, Fact::Stepped { .. })).count(), 1);
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 0, Times::default()), 0);
    drop(again.attach(1, hosted(1, &[0])));
    drop(again.pass(ADOPTION_MS + 2 * TICK_MS, &[1]));
    let record = &again.core.jobs().all[&JOB];
    assert_eq!((record.losses, record.attempts.idle), (1, 0));
}

#[test]
fn a_worker_that_stands_still_again_and_again_is_not_held_against_the_job() {
    let mut world = training();
    for _ in 0..MAX_STUCK + 1 {
        let frozen = world.places()[1];
        let others: Vec<u64> = (1..=3).filter(|worker| *worker != frozen).collect();
        drop(world.pass(LEASE_MS + 2 * TICK_MS, &others));
        until_formed(&mut world, JOB);
        // It wakes up as a member that hosts what was long formed anew.
        drop(world.attach(frozen, hosted(1, &[1])));
    }
    let attempts = &world.core.jobs().all[&JOB].attempts;
    assert_eq!((attempts.idle, attempts.stuck), (0, 0));
    assert!(world.core.avoided.get(&JOB).is_none_or(|avoided| avoided.nodes.is_empty()));
    assert!(generation(&world, JOB) > MAX_STUCK);
}

#[test]
fn a_stream_that_ends_after_a_long_silence_is_no_process_that_has_ended() {
    let mut world = training();
    drop(world.pass(60_000, &[]));
    // Given up by keep-alive; one worker is back at once, the other later than is waited for.
    (1..=3).for_each(|worker| drop(world.step(Event::Detached { worker })));
    drop(world.attach(1, hosted(1, &[0])));
    drop(world.attach(3, Vec::new()));
    drop(world.pass(ADOPTION_MS + LEFT_MS + 2 * TICK_MS, &[1, 3]));
    let record = &world.core.jobs().all[&JOB];
    assert_eq!((world.places(), record.attempts.idle, record.attempts.stuck), (vec![1, 3], 0, 0));
    assert!(world.core.avoided.get(&JOB).is_none_or(|avoided| avoided.nodes.is_empty()));
}

#[test]
fn steps_repeated_again_and_again_end_a_job() {
    let mut world = training();
    for generation in 1..=MAX_STUCK + 1 {
        assert_eq!(self::generation(&world, JOB), generation);
        Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
        drop(world.event(step_done(1)));
        lose(&mut world, JOB, 1);
        until_formed(&mut world, JOB);
    }
    let why = outcome(&world, JOB);
    let words = "formed 50 times in a row without getting past step 1: generation 51: rank 1 lost";
    assert!(why.starts_with(words), "{why}");
}

#[test]
fn a_job_whose_ranks_cannot_reach_each_other_ends() {
    let mut world = training();
    for _ in 0..MAX_IDLE {
        let (action, cause) = ("building the model".to_owned(), "cannot be reached: refused".to_owned());
        drop(world.event(RankEvent::Failed {
            rank: Rank::new(0),
            action,
            cause,
            kind: ErrorKind::Lost,
            peer: None,
        }));
        drop(world.pass(VERDICT_MS + TICK_MS, &[1, 2, 3]));
        until_formed(&mut world, JOB);
    }
    let why = outcome(&world, JOB);
    assert!(why.contains("generation 6: rank 0, building the model: cannot be reached"), "{why}");
}

#[test]
fn of_jobs_on_one_worker_the_one_with_the_largest_ranks_is_suspected_and_a_training_one_never() {
    let mut world = World::new();
    let attach = |world: &mut World, worker: u64| {
        let registration = Registration {
            name: format!("w{worker}"),
            slots: 3,
            memory_bytes: 4 << 30,
            memory_limit: "its cgroup".into(),
            ..registration(worker)
        };
        drop(world.join(Attachment { registration, ..Attachment::default() }));
    };
    attach(&mut world, 1);
    // One that trains, one that is small, and one that takes them down.
    for gibibytes in [3_u64, 0, 1] {
        let rank_bytes = gibibytes << 29;
        drop(world.step(Event::Submit(Box::new(JobSpec { rank_bytes, ..*spec(1, 0) }))));
    }
    let train = |world: &mut World| {
        drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
        drop(world.event(step_done(1)));
    };
    train(&mut world);
    drop(world.step(Event::Detached { worker: 1 }));
    drop(world.pass(RETURN_MS + 2 * TICK_MS, &[]));
    let idle = |number| world.core.jobs().all[&id(number)].attempts.idle;
    assert_eq!([1, 2, 3].map(idle), [0, 0, 1]);
    attach(&mut world, 2);
    for worker in 2.. {
        until_formed(&mut world, id(3));
        if world.core.jobs().all[&id(3)].has_ended() {
            break;
        }
        train(&mut world);
        drop(world.step(Event::Detached { worker }));
        drop(world.pass(RETURN_MS + 2 * TICK_MS, &[]));
        attach(&mut world, worker + 1);
        assert!(worker < 20);
    }
    assert!([JOB, SECOND].iter().all(|job| !world.core.jobs().all[job].has_ended()));
}

#[test]
fn a_loss_that_memory_may_explain_says_what_a_rank_needs_and_what_the_worker_had() {
    for (gibibytes, is_said) in [(3, true), (1, false)] {
        let mut world = World::new();
        for worker in 1..=2 {
            let registration = Registration {
                name: "host-7".into(),
                memory_bytes: 4 << 30,
                memory_limit: "RLIMIT_AS".into(),
                ..registration(worker)
            };
            drop(world.join(Attachment { registration, ..Attachment::default() }));
        }
        drop(world.step(Event::Submit(Box::new(JobSpec { rank_bytes: gibibytes << 30, ..*spec(1, 0) }))));
        assert_eq!(world.places(), [1]);
        drop(world.step(Event::Detached { worker: 1 }));
        drop(world.pass(RETURN_MS + 2 * TICK_MS, &[2]));
        let why = world.facts.iter().find_map(|fact| match fact {
            Fact::Broken { why, .. } => Some(why.clone()),
            _ => None,
        });
        let words = "a rank needs at least 3.0 GiB, worker host-7 on node n1 has 4.0 GiB (RLIMIT_AS)";
        assert_eq!(why.unwrap().contains(words), is_said);
    }
}

#[test]
fn a_rank_whose_node_fails_goes_elsewhere_and_comes_back_where_there_is_nowhere_else() {
    let mut world = training();
    let fail = |world: &mut World, rank: u32| {
        let rank = Rank::new(rank);
        let (action, cause) = ("saving step 4".to_owned(), "disk: Input/output error".to_owned());
        drop(world.event(RankEvent::Failed { rank, action, cause, kind: ErrorKind::Node, peer: None }));
        drop(world.pass(LEFT_MS + TICK_MS, &[1, 2, 3]));
    };
    fail(&mut world, 1);
    assert_eq!((world.places(), generation(&world, JOB)), (vec![1, 3], 2));
    let why = world.facts.iter().find_map(|fact| match fact {
        Fact::Broken { why, lost, .. } => Some((why.clone(), lost.clone())),
        _ => None,
    });
    let words = "rank 1, saving step 4: disk: Input/output error; on worker , node n2";
    assert_eq!(why, Some((words.to_owned(), vec![Rank::new(1)])));
    // The next node fails too: that of the first is as good.
    fail(&mut world, 1);
    until_formed(&mut world, JOB);
    assert_eq!((world.places(), generation(&world, JOB)), (vec![1, 2], 3));
}

#[test]
fn a_commit_that_fails_for_long_is_its_workers_fault_and_a_job_without_progress_ends() {
    let mut world = training();
    let commit = |world: &mut World, step| {
        drop(save(world, step));
        let formed = world.core.jobs().all[&JOB].running().unwrap().clone();
        let result = Err("No space left on device".to_owned());
        let worker = formed.places[0];
        drop(world.step(Event::Committed {
            worker,
            formation: formed.id(JOB),
            position: Some(position(step)),
            result,
        }));
        drop(world.pass(GIVE_UP_MS + LEFT_MS + TICK_MS, &[1, 2, 3]));
    };
    commit(&mut world, 4);
    assert_eq!((world.places(), generation(&world, JOB)), (vec![3, 2], 2));
    for _ in 1..MAX_IDLE {
        until_formed(&mut world, JOB);
        Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
        commit(&mut world, 4);
    }
    let why = outcome(&world, JOB);
    assert!(why.contains("committing the checkpoint of step 4: No space left on device; on worker"), "{why}");
}

#[test]
fn a_defect_ends_a_job_at_once() {
    let mut world = training();
    let (action, cause) = ("F0.1".to_owned(), "expected rows, got ids".to_owned());
    drop(world.event(RankEvent::Failed {
        rank: Rank::new(1),
        action,
        cause,
        kind: ErrorKind::Bug,
        peer: None,
    }));
    drop(world.event(RankEvent::Aborted { rank: Rank::new(0) }));
    assert_eq!(outcome(&world, JOB), "rank 1, F0.1: expected rows, got ids");
    assert_eq!(generation(&world, JOB), 1);
}
