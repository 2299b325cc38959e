//! Ranks that make no progress although every worker is alive.

use super::*;
use contraflow_runtime::topology::Rank;

/// Meanwhile every worker sends heartbeats with the progress of its rank: operations, and whether it is at work.
fn beat(world: &mut World, ms: u64, ranks: [(u64, bool); 2]) -> Vec<Effect> {
    let mut effects = Vec::new();
    for _ in 0..ms / BEAT_MS {
        world.now += BEAT_MS;
        for (rank, (operations, is_at_work)) in ranks.into_iter().enumerate() {
            let address = RankAddress { formation: of(1), rank: Rank::at(rank) };
            let progress =
                vec![Progress { rank: address, step: 3, operations, is_at_work, uses_storage: false }];
            effects.extend(world.step(Event::Beat { worker: rank as u64 + 1, progress }));
        }
        effects.extend(world.step(Event::Beat { worker: 3, progress: Vec::new() }));
        effects.extend(world.step(Event::Tick));
    }
    effects
}

/// Rank 1 hangs in what it is about; rank 0 continues until it needs it.
fn hanging() -> World {
    let mut world = training();
    drop(beat(&mut world, 1_000, [(10, false), (10, true)]));
    drop(beat(&mut world, BEAT_MS, [(14, false), (10, true)]));
    world
}

#[test]
fn the_rank_that_works_while_the_others_wait_is_named() {
    let mut world = hanging();
    drop(beat(&mut world, STALL_WARN_MS - BEAT_MS, [(14, false), (10, true)]));
    assert_eq!(world.core.waiting_for(JOB), "");
    drop(beat(&mut world, BEAT_MS, [(14, false), (10, true)]));
    let waits = world.core.waiting_for(JOB);
    assert_eq!(waits, "rank 1 has made no progress for 11 s, in step 3 after 10 operations");
}

#[test]
fn a_worker_with_a_stalled_rank_must_exit_and_the_rank_moves() {
    let mut world = hanging();
    let effects = beat(&mut world, STALL_MS - BEAT_MS, [(14, false), (10, true)]);
    assert_eq!((commands(&effects), world.places()), (Vec::new(), vec![1, 2]));
    let effects = beat(&mut world, BEAT_MS, [(14, false), (10, true)]);
    let refused = commands(&effects).into_iter().find_map(|(worker, command)| match command {
        WorkerCommand::Reject { why } => Some((worker, why.as_str())),
        _ => None,
    });
    let (worker, why) = refused.unwrap();
    assert_eq!(worker, 2);
    assert!(why.contains("rank 1 has made no progress for 61 s") && why.ends_with("start it again"), "{why}");
    assert!(world.core.member(2).is_none());
    drop(world.pass(LEFT_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 3]);
    assert_eq!(world.core.jobs().all[&JOB].losses, 1);
}

#[test]
fn ranks_that_all_wait_for_each_other_re_form_with_the_same_workers() {
    let mut world = training();
    let effects = beat(&mut world, STALL_MS + BEAT_MS, [(14, false), (10, false)]);
    assert!(!commands(&effects).iter().any(|(_, command)| matches!(command, WorkerCommand::Reject { .. })));
    drop(world.pass(LEFT_MS, &[1, 2, 3]));
    assert_eq!((world.places(), world.core.jobs().all[&JOB].generation().number()), (vec![1, 2], 2));
}

#[test]
fn ranks_that_have_been_slow_before_are_given_ten_times_as_long() {
    let mut world = training();
    drop(beat(&mut world, 1_000, [(10, false), (10, true)]));
    drop(beat(&mut world, 20_000, [(14, false), (10, true)]));
    drop(beat(&mut world, 1_000, [(14, false), (11, true)]));
    let slow = [(14, false), (11, true)];
    drop(beat(&mut world, STALL_FACTOR * 20_000 - 1_000, slow));
    assert_eq!(world.core.jobs().all[&JOB].generation().number(), 1);
    drop(beat(&mut world, 2_000, slow));
    assert_eq!(world.core.jobs().all[&JOB].losses, 1);
}

#[test]
fn no_stall_is_reported_outside_of_training() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    drop(beat(&mut world, 2 * STALL_MS, [(0, false), (0, true)]));
    assert_eq!(world.core.jobs().all[&JOB].generation().number(), 1);
    assert!(world.core.member(2).is_some());
}

#[test]
fn progress_of_an_earlier_formation_is_ignored() {
    let mut world = hanging();
    for _ in 0..STALL_MS / BEAT_MS {
        drop(beat(&mut world, BEAT_MS, [(14, false), (10, true)]));
        let address = RankAddress { formation: of(0), rank: Rank::new(1) };
        let progress = vec![Progress {
            rank: address,
            step: 9,
            operations: world.now,
            is_at_work: true,
            uses_storage: false,
        }];
        drop(world.step(Event::Beat { worker: 2, progress }));
    }
    assert_eq!(world.core.jobs().all[&JOB].losses, 1);
}

#[test]
fn a_repeated_answer_to_an_earlier_commit_does_not_keep_a_failed_one_from_being_tried_again() {
    let mut world = training();
    checkpoint(&mut world, 2);
    drop(save(&mut world, 4));
    let (formation, result) = (FormationId::new(JOB, Generation::FIRST), Err("full".to_owned()));
    drop(world.step(Event::Committed { worker: 1, formation, position: Some(position(4)), result }));
    committed(&mut world, 2);
    let effects = world.pass(1_000 + TICK_MS, &[1, 2, 3]);
    let again = |(_, command): &(u64, &WorkerCommand)| matches!(command, WorkerCommand::CommitCheckpoint { position, .. } if position.step == 4);
    assert_eq!(commands(&effects).into_iter().filter(again).count(), 1);
}

#[test]
fn a_rank_that_writes_for_long_is_named_though_the_job_goes_on() {
    let mut world = training();
    let beat = |world: &mut World, ms: u64, step: u64, uses_storage: bool| {
        for _ in 0..ms / BEAT_MS {
            world.now += BEAT_MS;
            for (worker, rank) in (1..).zip(Rank::all(2)) {
                let (rank, uses_storage) =
                    (RankAddress { formation: of(1), rank }, uses_storage && worker == 2);
                let operations = world.now;
                let progress = Progress { rank, step, operations, is_at_work: false, uses_storage };
                drop(world.step(Event::Beat { worker, progress: vec![progress] }));
            }
            drop(world.step(Event::Beat { worker: 3, progress: Vec::new() }));
        }
        world.core.warning(JOB)
    };
    assert_eq!(beat(&mut world, SLOW_STORAGE_MS, 3, true), "");
    let warning = beat(&mut world, 10_000, 9, true);
    let words =
        "the storage: rank 1 reads or writes for 39 s; checkpoints that become due meanwhile are skipped";
    assert_eq!((warning.as_str(), world.core.waiting_for(JOB).as_str()), (words, ""));
    // What is written is written: the next one has its own time.
    drop(save(&mut world, 9));
    assert_eq!(beat(&mut world, SLOW_STORAGE_MS, 11, true), "");
    assert_eq!(beat(&mut world, BEAT_MS, 12, false), "");
    assert_eq!(world.places(), [1, 2]);
}
