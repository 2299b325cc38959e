//! An orchestrator that hears nobody, and workers that do not hear one another: what is concluded from silence, and what is not.

use super::*;
use crate::core::storage::{BAD_PLACE_MS, GIVE_UP_MS};
use contraflow_proto::StepReport;
use contraflow_runtime::topology::Rank;

/// Nobody is heard, or everybody's streams end on top of it.
fn silence(world: &mut World, ms: u64) -> Vec<Effect> {
    world.pass(ms, &[])
}

fn generation(world: &World) -> u32 {
    world.core.jobs().all[&JOB].generation().number()
}

#[test]
fn an_orchestrator_that_hears_nobody_draws_no_conclusions() {
    let mut world = training();
    let effects = silence(&mut world, 600_000);
    assert_eq!((commands(&effects), generation(&world)), (Vec::new(), 1));
    assert!(world.core.waiting_for(JOB).contains("hears no worker"));
    // Streams that keep-alive ends meanwhile say nothing either.
    (1..=3).for_each(|worker| drop(world.step(Event::Detached { worker })));
    drop(silence(&mut world, 60_000));
    // One is back, the others take their time.
    drop(world.attach(1, hosted(1, &[0])));
    drop(world.pass(ADOPTION_MS - TICK_MS, &[1]));
    let effects = world.attach(2, hosted(1, &[1]));
    assert!(!commands(&effects).iter().any(|(_, command)| matches!(command, WorkerCommand::Release { .. })));
    drop(world.pass(2 * LEASE_MS, &[1, 2]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 1));
}

#[test]
fn who_falls_silent_a_moment_before_all_others_is_not_lost() {
    let mut world = training();
    drop(world.pass(1_000, &[1, 2, 3]));
    // The last beats of one are on a slow way.
    drop(world.pass(LEASE_MS - BEAT_MS / 2, &[1, 3]));
    let effects = silence(&mut world, 20_000);
    assert_eq!(commands(&effects), []);
    drop(world.pass(2 * LEASE_MS, &[1, 2, 3]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 1));
}

#[test]
fn who_does_not_come_back_after_a_silence_is_lost() {
    let mut world = training();
    drop(silence(&mut world, 60_000));
    drop(world.pass(ADOPTION_MS + TICK_MS, &[1, 3]));
    drop(world.pass(LEFT_MS, &[1, 3]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 3], 2));
}

#[test]
fn a_paused_orchestrator_blames_nobody() {
    let mut world = training();
    drop(world.pass(1_000, &[1, 2, 3]));
    for pause in [3_000, 30_000, 600_000] {
        world.now += pause;
        // What was sent meanwhile comes in any order, after streams have been given up.
        drop(world.step(Event::Detached { worker: 2 }));
        drop(world.step(Event::Tick));
        drop(world.pass(2_000, &[1, 3]));
        drop(world.attach(2, hosted(1, &[1])));
        drop(world.pass(2 * LEASE_MS, &[1, 2, 3]));
        assert_eq!((world.places(), generation(&world)), (vec![1, 2], 1), "{pause} ms");
    }
}

#[test]
fn the_last_worker_that_ends_is_noticed() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(spec(1, 0))));
    drop(world.pass(1_000, &[1]));
    drop(world.step(Event::Detached { worker: 1 }));
    drop(silence(&mut world, RETURN_MS + 2 * TICK_MS));
    assert!(world.core.member(1).is_none() && world.places().is_empty());
}

/// Why the latest formation broke.
fn last_break(world: &World) -> String {
    let why = world.facts.iter().rev().find_map(|fact| match fact {
        Fact::Broken { why, .. } => Some(why.clone()),
        _ => None,
    });
    why.unwrap()
}

/// Two ranks train on workers 1 and 2 after a step; workers 3 and 4 are spare.
fn training_beside_two() -> World {
    let mut world = World::new();
    (1..=4).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
    let report = StepReport { rank: 0, step: 1, ..StepReport::default() };
    drop(world.event(RankEvent::StepDone { report }));
    world
}

#[test]
fn a_job_waits_for_silent_workers_that_alone_keep_its_state() {
    let mut world = training_beside_two();
    let replicas = |step| {
        let part = |rank| ReplicaShard { generation: Generation::FIRST, step, rank: Rank::new(rank) };
        vec![part(0), part(1)]
    };
    world.replicas = BTreeMap::from([(1, replicas(6)), (2, replicas(6))]);
    // Both workers of the job fall silent, two spare ones do not.
    drop(world.pass(LEASE_MS + LEFT_MS + 2 * TICK_MS, &[3, 4]));
    assert!(world.places().is_empty(), "{:?}", world.places());
    for worker in [1, 2] {
        let effects = world.attach(worker, hosted(1, &[worker as u32 - 1]));
        for answer in world.answers(&effects, &[1, 2]) {
            drop(world.step(answer));
        }
        drop(world.pass(TICK_MS, &[1, 2, 3, 4]));
    }
    drop(world.pass(LEFT_MS + TICK_MS, &[1, 2, 3, 4]));
    let formed = world.core.jobs().all[&JOB].running().unwrap().clone();
    assert_eq!((formed.generation.number(), formed.resume_step), (2, 6));
}

#[test]
fn workers_that_never_come_back_are_not_waited_for_for_ever() {
    let mut world = training_beside_two();
    drop(world.pass(LEASE_MS + ADOPTION_MS + LEFT_MS + 2 * TICK_MS, &[3, 4]));
    let formed = world.core.jobs().all[&JOB].running().unwrap().clone();
    assert_eq!((formed.places, formed.resume_step), (vec![3, 4], 0));
}

fn apart(world: &mut World) {
    for (rank, peer) in [(0, 1), (1, 0)] {
        drop(world.event(RankEvent::Failed {
            rank: Rank::new(rank),
            action: "F1.0".into(),
            cause: "cannot be reached: timed out".into(),
            kind: ErrorKind::Lost,
            peer: Some(Rank::new(peer)),
        }));
    }
    drop(world.pass(VERDICT_MS + LEFT_MS + TICK_MS, &[1, 2, 3]));
}

#[test]
fn a_worker_that_others_do_not_reach_is_avoided_after_two_tries() {
    let mut world = training();
    apart(&mut world);
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 2));
    apart(&mut world);
    assert_eq!((world.places(), generation(&world)), (vec![1, 3], 3));
    let why = last_break(&world);
    assert!(why.contains("cannot be reached") && why.contains("node n2 is avoided"), "{why}");
}

#[test]
fn a_worker_that_has_ended_with_the_orchestrator_is_missed_as_soon_as_one_that_has_ended_alone() {
    let (before, began) = (training().core.jobs().clone(), 1_000_000);
    let lost_peer = |world: &mut World| {
        drop(world.event(RankEvent::Failed {
            rank: Rank::new(0),
            action: "F1.0".into(),
            cause: "the connection has ended".into(),
            kind: ErrorKind::Lost,
            peer: Some(Rank::new(1)),
        }));
    };
    // The worker of rank 2 is gone: its peer says so when it comes back.
    let mut world = World::of(Core::new(before.clone(), 2, began, Times::default()), began);
    drop(world.attach(1, hosted(1, &[0])));
    drop(world.attach(3, Vec::new()));
    lost_peer(&mut world);
    drop(world.pass(RETURN_MS - TICK_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 2], "it may be on its way");
    drop(world.pass(2 * TICK_MS, &[1, 3]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 3], 2));
    assert!(last_break(&world).contains("has not come back since the orchestrator started"));
    // One that comes back in time is lost for nobody, nor one that no peer misses.
    let mut world = World::of(Core::new(before, 2, began, Times::default()), began);
    drop(world.attach(1, hosted(1, &[0])));
    drop(world.pass(RETURN_MS + TICK_MS, &[1]));
    lost_peer(&mut world);
    drop(world.attach(2, hosted(1, &[1])));
    drop(world.pass(VERDICT_MS - TICK_MS, &[1, 2]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 1));
}

#[test]
fn what_ranks_say_of_a_worker_that_stood_still_a_moment_ago_is_no_try() {
    let mut world = training();
    for _ in 0..3 {
        drop(silence(&mut world, 30_000));
        (1..=3).for_each(|worker| drop(world.step(Event::Beat { worker, progress: Vec::new() })));
        apart(&mut world);
        assert!(last_break(&world).ends_with("was silent a moment before: re-forming"));
    }
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 4));
    let attempts = &world.core.jobs().all[&JOB].attempts;
    assert_eq!((attempts.idle, attempts.stuck), (0, 0));
    // Without a silence before, it counts.
    drop(world.pass(ADOPTION_MS, &[1, 2, 3]));
    (0..2).for_each(|_| apart(&mut world));
    assert_eq!(world.places(), [1, 3]);
}

#[test]
fn a_formation_whose_ranks_never_become_ready_is_given_up() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.pass(FORMING_MS / 2, &[1, 2]));
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    drop(world.pass(FORMING_MS - TICK_MS, &[1, 2]));
    assert_eq!(generation(&world), 1);
    drop(world.pass(LEFT_MS + 2 * TICK_MS, &[1, 2]));
    assert_eq!(generation(&world), 2);
    assert_eq!(last_break(&world), "starting, waiting for rank 1 for 600 s");
}

/// All ranks wait, rank 1 for its disk.
fn wait_for_storage(world: &mut World, ms: u64) -> Vec<Effect> {
    let mut effects = Vec::new();
    for _ in 0..ms / BEAT_MS {
        world.now += BEAT_MS;
        for rank in 0..2 {
            let address = RankAddress { formation: of(generation(world)), rank: Rank::at(rank) };
            let progress = vec![Progress {
                rank: address,
                step: 9,
                operations: 7,
                is_at_work: false,
                uses_storage: rank == 1,
            }];
            effects.extend(world.step(Event::Beat { worker: rank as u64 + 1, progress }));
        }
        effects.extend(world.step(Event::Beat { worker: 3, progress: Vec::new() }));
        effects.extend(world.step(Event::Tick));
    }
    effects
}

#[test]
fn slow_storage_is_no_stall_and_status_says_so() {
    let mut world = training();
    let effects = wait_for_storage(&mut world, 20 * STALL_MS);
    assert_eq!((commands(&effects), generation(&world)), (Vec::new(), 1));
    let words = world.core.waiting_for(JOB);
    assert!(words.starts_with("the storage: rank 1 reads or writes for"), "{words}");
}

fn save_failed(world: &mut World, rank: u32, step: u64) {
    let cause = "step-20/rank-1: No space left on device".to_owned();
    drop(world.event(RankEvent::SaveFailed { rank: Rank::new(rank), step, cause }));
}

#[test]
fn storage_that_is_full_for_everybody_ends_nothing() {
    let mut world = training();
    for step in 0..20 {
        (0..2).for_each(|rank| save_failed(&mut world, rank, 20 + step));
        drop(world.pass(BAD_PLACE_MS / 2, &[1, 2, 3]));
    }
    assert_eq!((world.places(), generation(&world)), (vec![1, 2], 1));
    let words = world.core.waiting_for(JOB);
    assert!(words.contains("part of the checkpoint of step 39 fails for 600 s: step-20"), "{words}");
    drop(save(&mut world, 60));
    assert_eq!(world.core.waiting_for(JOB), "");
}

#[test]
fn a_rank_that_alone_cannot_write_moves_to_another_node() {
    let mut world = training();
    save_failed(&mut world, 1, 20);
    drop(world.pass(BAD_PLACE_MS / 2, &[1, 2, 3]));
    save_failed(&mut world, 1, 40);
    let shard = ShardFile::default();
    let (rank, watch) = (Rank::new(0), Default::default());
    drop(world.event(RankEvent::ShardSaved { rank, position: position(40), watch, shard }));
    drop(world.pass(BAD_PLACE_MS / 2 + LEFT_MS + TICK_MS, &[1, 2, 3]));
    assert_eq!((world.places(), generation(&world)), (vec![1, 3], 2));
}

#[test]
fn a_commit_that_fails_is_tried_again_and_then_made_elsewhere() {
    let mut world = training();
    drop(save(&mut world, 4));
    let fails = |world: &mut World| {
        let result = Err("manifest.json: No space left on device".to_owned());
        let (formation, position) = (of(generation(world)), Some(position(4)));
        world.step(Event::Committed { worker: 1, formation, position, result })
    };
    let effects = fails(&mut world);
    assert!(
        logged(&effects)[0].contains("could not be committed, tried again: manifest.json"),
        "{effects:?}"
    );
    let again = |effects: &[Effect]| {
        let commits = |command: &&WorkerCommand| matches!(command, WorkerCommand::CommitCheckpoint { .. });
        commands(effects).iter().filter(|(_, command)| commits(command)).count()
    };
    assert_eq!(again(&world.pass(1_000 - TICK_MS, &[1, 2, 3])), 0);
    assert_eq!(again(&world.pass(2 * TICK_MS, &[1, 2, 3])), 1);
    drop(fails(&mut world));
    assert!(world.core.waiting_for(JOB).contains("committing the checkpoint of step 4 fails"));
    drop(world.pass(GIVE_UP_MS + LEFT_MS, &[1, 2, 3]));
    assert_eq!((world.places(), generation(&world)), (vec![3, 2], 2));
}

#[test]
fn a_damaged_checkpoint_is_followed_by_the_one_before_and_then_by_nothing() {
    let mut world = training();
    checkpoint(&mut world, 4);
    checkpoint(&mut world, 8);
    // All workers are gone, and what they kept.
    (1..=3).for_each(|worker| drop(world.step(Event::Detached { worker })));
    (4..=5).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.pass(LEASE_MS + LEFT_MS, &[4, 5]));
    let resumed = |world: &World| world.core.jobs().all[&JOB].formed.as_ref().unwrap().resume_step;
    assert_eq!((generation(&world), resumed(&world)), (2, 8));
    let damaged = |world: &mut World, rank| {
        let (action, cause) = ("joining the formation".to_owned(), "shard-1 is damaged".to_owned());
        let (rank, kind) = (Rank::new(rank), ErrorKind::Damaged);
        drop(world.event(RankEvent::Failed { rank, action, cause, kind, peer: None }));
    };
    damaged(&mut world, 1);
    let why = world.core.jobs().all[&JOB].why.clone();
    assert!(why.ends_with("shard-1 is damaged; going back to the checkpoint of step 4"), "{why}");
    drop(world.pass(LEFT_MS + TICK_MS, &[4, 5]));
    assert_eq!((generation(&world), resumed(&world)), (3, 4));
    damaged(&mut world, 0);
    drop(world.event(RankEvent::Aborted { rank: Rank::new(1) }));
    assert!(world.core.jobs().all[&JOB].has_ended(), "never from the start without a word");
}

#[test]
fn a_clock_that_is_set_back_before_a_restart_holds_up_no_job_that_has_lost_ranks() {
    let mut world = World::of(Core::new(Jobs::default(), 1, 1_000_000, Times::default()), 1_000_000);
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    drop(world.pass(LEASE_MS + TICK_MS, &[1]));
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 500_000, Times::default()), 500_000);
    drop(again.attach(1, Vec::new()));
    drop(again.pass(ADOPTION_MS + SHRINK_MS + TICK_MS, &[1]));
    assert_eq!(again.places(), [1], "{}", again.core.waiting_for(JOB));
}
