//! What a job goes on from when a rank is lost: the memory of its workers, or the newest checkpoint.

use contraflow_runtime::topology::{Generation, Rank};
use contraflow_runtime::watch::{Action, Divergence};

use super::*;
use crate::recovery::InMemory;

/// Rank 0's part on workers 1 and 2, rank 1's on 2 and 1; the step after is not acknowledged yet.
fn keep_everywhere(world: &mut World, generation: u32, step: u64) {
    let generation = Generation::new(generation);
    let shard = |step, rank| KeptShard { generation, step, rank: Rank::new(rank) };
    world.kept.insert(1, vec![shard(step, 0), shard(step, 1), shard(step + 1, 0)]);
    world.kept.insert(2, vec![shard(step, 1), shard(step, 0), shard(step + 1, 1)]);
}

fn formed(world: &World) -> facts::Formed {
    world.core.jobs().all[&JOB].formed.clone().unwrap()
}

#[test]
fn a_lost_rank_costs_no_step_that_its_buddy_has() {
    let mut world = training();
    assert_eq!(formed(&world).buddies, [1, 0].map(Rank::new));
    keep_everywhere(&mut world, 1, 6);
    let effects = world.pass(LEASE_MS + TICK_MS, &[1, 3]);
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.places, again.resume_step), (2, vec![1, 3], 6));
    assert_eq!(
        again.memory,
        Some(InMemory { generation: Generation::FIRST, step: 6, holders: [0, 0].map(Rank::new).into() })
    );
    let said = |effect: &Effect| matches!(effect, Effect::Log { line, .. } if line.contains("from memory after step 6"));
    assert!(effects.iter().any(said), "{effects:?}");
}

#[test]
fn a_formation_that_breaks_before_it_has_made_a_step_goes_back_to_the_same_memory() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    drop(world.attach(4, Vec::new()));
    // Nor is it formed again at once.
    drop(world.pass(LEASE_MS + 1_000 + TICK_MS, &[1, 4]));
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.places, again.resume_step), (3, vec![1, 4], 6));
    // What generation 1 made beyond that step is of no history any more.
    let shard = |step, rank| KeptShard { generation: Generation::FIRST, step, rank: Rank::new(rank) };
    world.kept.insert(1, vec![shard(7, 0), shard(7, 1)]);
    drop(world.attach(5, Vec::new()));
    drop(world.pass(LEASE_MS + 2_000 + TICK_MS, &[1, 5]));
    assert_eq!((formed(&world).generation.number(), formed(&world).resume_step), (4, 0));
}

#[test]
fn owner_and_buddy_lost_is_said_aloud_and_the_checkpoint_taken() {
    let mut world = training();
    checkpoint(&mut world, 4);
    keep_everywhere(&mut world, 1, 6);
    world.kept.insert(1, vec![KeptShard { generation: Generation::FIRST, step: 6, rank: Rank::new(0) }]);
    let effects = world.pass(LEASE_MS + TICK_MS, &[1, 3]);
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.resume_step, again.memory), (2, 4, None));
    let said = effects.iter().find_map(|effect| match effect {
        Effect::Log { line, .. } if line.contains("checkpoint of step 4") => Some(line),
        _ => None,
    });
    assert!(said.is_some_and(|line| line.contains("state of rank 1")), "{effects:?}");
}

#[test]
fn a_checkpoint_that_is_newer_than_what_is_kept_is_taken() {
    let mut world = training();
    checkpoint(&mut world, 8);
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).resume_step, formed(&world).memory), (8, None));
}

#[test]
fn who_does_not_say_what_it_keeps_is_not_waited_for_for_ever() {
    let mut world = training();
    // Worker 1 beats, and leaves the question open.
    for _ in 0..=LEASE_MS / TICK_MS {
        world.now += TICK_MS;
        (1..=3).filter(|worker| *worker != 2).for_each(|worker| {
            drop(world.step(Event::Beat { worker, progress: Vec::new() }));
        });
        drop(world.step(Event::Tick));
    }
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    drop(world.pass(LEFT_MS, &[1, 3]));
    assert_eq!(formed(&world).generation.number(), 2);
}

#[test]
fn an_orchestrator_that_starts_while_a_job_is_broken_hears_what_is_kept() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    for _ in 0..=LEASE_MS / TICK_MS {
        world.now += TICK_MS;
        drop(world.step(Event::Beat { worker: 1, progress: Vec::new() }));
        drop(world.step(Event::Tick));
    }
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 0), 0);
    drop(again.attach(3, Vec::new()));
    assert_eq!(again.core.jobs().all[&JOB].phase, Phase::Broken);
    let who = Introduction { worker: 1, slots: 1, node: "n1".into(), ..Introduction::default() };
    let left = vec![Left { formation: of(1), kept: world.kept[&1].clone() }];
    let storage_mark = "mark".into();
    drop(again.step(Event::Attached {
        who: Box::new(who),
        hosted: Vec::new(),
        left,
        state: 0,
        incarnation: 0,
        storage_mark,
    }));
    assert_eq!((formed(&again).generation.number(), formed(&again).resume_step), (2, 6));
}

#[test]
fn after_a_roll_back_what_is_kept_is_let_go() {
    let mut world = training();
    checkpoint(&mut world, 4);
    keep_everywhere(&mut world, 1, 6);
    let diverged = |rank| RankEvent::Diverged {
        rank,
        divergence: Box::new(Divergence {
            step: 7,
            action: Action::RollBack,
            why: "loss is not finite".into(),
            evidence: None,
        }),
        cursor: 56,
    };
    drop(world.event(diverged(Rank::new(0))));
    let effects = world.event(diverged(Rank::new(1)));
    let told = words(&effects);
    let lets_go = |(_, word): &(u64, &Word)| matches!(word, Word::Release { formation, keep: false, .. } if *formation == of(1));
    assert_eq!(told.iter().filter(|told| lets_go(told)).count(), 2);
    assert_eq!((formed(&world).resume_step, formed(&world).cursor, formed(&world).memory), (4, 56, None));
    // Somebody who has missed it is told when it says what it keeps.
    let shard = KeptShard { generation: Generation::FIRST, step: 6, rank: Rank::new(1) };
    let left = Left { formation: of(1), kept: vec![shard] };
    let effects = world.step(Event::Left { worker: 3, left });
    assert!(words(&effects).iter().any(lets_go));
}

#[test]
fn a_worker_that_is_late_to_hear_where_the_job_goes_on_keeps_what_it_is_to_bring() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    // Its stream breaks before it has heard of the new formation, and it tells once more what it keeps.
    drop(world.step(Event::Detached { worker: 1 }));
    let who = Introduction { worker: 1, slots: 1, node: "n1".into(), ..Introduction::default() };
    let left = vec![Left { formation: of(1), kept: world.kept[&1].clone() }];
    let storage_mark = "mark".into();
    let effects = world.step(Event::Attached {
        who: Box::new(who),
        hosted: Vec::new(),
        left,
        state: 0,
        incarnation: 0,
        storage_mark,
    });
    let told = words(&effects);
    assert!(told.iter().any(|(worker, word)| *worker == 1
        && matches!(word, Word::Assign { formation, .. } if *formation == of(2))));
    assert!(!told.iter().any(|(_, word)| matches!(word, Word::Release { .. })), "{told:?}");
}

#[test]
fn a_job_that_keeps_nothing_in_memory_waits_for_no_word_of_it() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec_with(2, 0, &["checkpoint.in_memory=false"]))));
    assert!(formed(&world).buddies.is_empty());
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).generation.number(), formed(&world).memory), (2, None));
}

#[test]
fn for_another_layout_the_state_in_memory_is_written_down_first() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    keep_everywhere(&mut world, 1, 6);
    let effects = world.pass(LEASE_MS + SHRINK_MS + 2 * TICK_MS, &[1]);
    let expected =
        Word::WriteDown { formation: of(1), of: (Generation::FIRST, 6), ranks: Rank::all(2).collect() };
    let orders: Vec<_> =
        words(&effects).into_iter().filter(|(_, word)| matches!(word, Word::WriteDown { .. })).collect();
    assert_eq!(orders, [(1, &expected)]);
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    let say = |world: &mut World, event: RankEvent| {
        let from = RankAddress { formation: of(1), rank: event.rank() };
        world.step(Event::Rank { worker: 1, from, event: Box::new(event) })
    };
    let report = contraflow_proto::StepReport { rank: 1, step: 6, generation: 1, ..Default::default() };
    let effects = say(&mut world, RankEvent::StepDone { report });
    assert!(matches!(effects[..], [Effect::Record { job: JOB, .. }]), "{effects:?}");
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: Position { step: 6, ..Position::default() },
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    assert_eq!(say(&mut world, saved(Rank::new(0))), []);
    let effects = say(&mut world, saved(Rank::new(1)));
    assert!(
        matches!(words(&effects)[..], [(1, Word::CommitCheckpoint { formation, .. })] if *formation == of(1)),
        "{effects:?}"
    );
    committed(&mut world, 6);
    let again = formed(&world);
    assert_eq!((again.places, again.resume_step, again.memory), (vec![1], 6, None));
}

#[test]
fn what_cannot_be_written_down_is_said_and_the_checkpoint_taken() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + SHRINK_MS + 2 * TICK_MS, &[1]));
    let from = RankAddress { formation: of(1), rank: Rank::new(1) };
    let (action, cause) = ("writing".to_owned(), "no space left on device".to_owned());
    let event = Box::new(RankEvent::Failed { rank: Rank::new(1), action, cause, kind: ErrorKind::Config });
    let effects = world.step(Event::Rank { worker: 1, from, event });
    let said = |effect: &Effect| matches!(effect, Effect::Log { line, .. } if line.contains("no space left"));
    assert!(effects.iter().any(said), "{effects:?}");
    assert_eq!((formed(&world).places, formed(&world).resume_step), (vec![1], 0));
}
