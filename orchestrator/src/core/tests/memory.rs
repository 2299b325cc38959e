//! What a job resumes from when a rank is lost: the memory of its workers, or the newest checkpoint.

use contraflow_proto::StepReport;
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_runtime::topology::{Generation, Rank};

use super::*;
use crate::recovery::InMemory;

/// Rank 0's part on workers 1 and 2, rank 1's on 2 and 1; the step after is not acknowledged yet.
fn keep_everywhere(world: &mut World, generation: u32, step: u64) {
    let generation = Generation::new(generation);
    let shard = |step, rank| ReplicaShard { generation, step, rank: Rank::new(rank) };
    world.replicas.insert(1, vec![shard(step, 0), shard(step, 1), shard(step + 1, 0)]);
    world.replicas.insert(2, vec![shard(step, 1), shard(step, 0), shard(step + 1, 1)]);
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
        Some(InMemory {
            generation: Generation::FIRST,
            step: 6,
            holders: [0, 0].map(Rank::new).into(),
            axes: None,
            bringers: Vec::new(),
        })
    );
    let logged_line = |effect: &Effect| matches!(effect, Effect::Log { line, .. } if line.contains("from memory after step 6"));
    assert!(effects.iter().any(logged_line), "{effects:?}");
}

#[test]
fn a_formation_that_breaks_before_its_first_step_resumes_from_the_same_replicas() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    drop(world.attach(4, Vec::new()));
    // Nor is it formed again at once.
    drop(world.pass(LEASE_MS + 1_000 + TICK_MS, &[1, 4]));
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.places, again.resume_step), (3, vec![1, 4], 6));
    // What generation 1 made beyond that step is of no history any more.
    let shard = |step, rank| ReplicaShard { generation: Generation::FIRST, step, rank: Rank::new(rank) };
    world.replicas.insert(1, vec![shard(7, 0), shard(7, 1)]);
    drop(world.attach(5, Vec::new()));
    drop(world.pass(LEASE_MS + ADOPTION_MS + TICK_MS, &[1, 5]));
    assert_eq!((formed(&world).generation.number(), formed(&world).resume_step), (4, 0));
}

#[test]
fn losing_owner_and_buddy_is_logged_and_the_checkpoint_used() {
    let mut world = training();
    checkpoint(&mut world, 4);
    keep_everywhere(&mut world, 1, 6);
    world
        .replicas
        .insert(1, vec![ReplicaShard { generation: Generation::FIRST, step: 6, rank: Rank::new(0) }]);
    drop(
        world.event(RankEvent::StepDone { report: StepReport { rank: 0, step: 5, ..StepReport::default() } }),
    );
    let mut effects = world.pass(LEASE_MS + ADOPTION_MS, &[1, 3]);
    assert!(world.places().is_empty(), "the worker of its buddy is silent: it may come back");
    effects.extend(world.pass(TICK_MS, &[1, 3]));
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.resume_step, again.memory), (2, 4, None));
    let logged_line = effects.iter().find_map(|effect| match effect {
        Effect::Log { line, .. } if line.contains("checkpoint of step 4") => Some(line),
        _ => None,
    });
    assert!(logged_line.is_some_and(|line| line.contains("state of rank 1")), "{effects:?}");
}

#[test]
fn a_checkpoint_newer_than_the_replicas_is_used() {
    let mut world = training();
    checkpoint(&mut world, 8);
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).resume_step, formed(&world).memory), (8, None));
}

#[test]
fn the_wait_for_inventories_has_a_deadline() {
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
fn an_orchestrator_restarted_while_a_job_is_broken_learns_of_its_replicas() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    for _ in 0..=LEASE_MS / TICK_MS {
        world.now += TICK_MS;
        drop(world.step(Event::Beat { worker: 1, progress: Vec::new() }));
        drop(world.step(Event::Tick));
    }
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 0, Times::default()), 0);
    drop(again.attach(3, Vec::new()));
    assert_eq!(again.core.jobs().all[&JOB].phase, Phase::Broken);
    let left = vec![Left { formation: of(1), replicas: world.replicas[&1].clone() }];
    again.replicas.clone_from(&world.replicas);
    let effects = again.join(Attachment { registration: registration(1), left, ..Attachment::default() });
    // Before it is believed what it keeps, it repeats what its ranks had reported.
    assert_eq!(again.core.jobs().all[&JOB].phase, Phase::Broken);
    for answer in again.answers(&effects, &[1]) {
        drop(again.step(answer));
    }
    assert_eq!((formed(&again).generation.number(), formed(&again).resume_step), (2, 6));
}

#[test]
fn after_a_rollback_replicas_are_dropped() {
    let mut world = training();
    checkpoint(&mut world, 4);
    keep_everywhere(&mut world, 1, 6);
    let diverged = |rank| RankEvent::Diverged {
        rank,
        divergence: Box::new(Divergence {
            step: 7,
            action: StepAction::RollBack,
            why: "loss is not finite".into(),
            evidence: None,
        }),
        cursor: 56,
    };
    drop(world.event(diverged(Rank::new(0))));
    let effects = world.event(diverged(Rank::new(1)));
    let sent = commands(&effects);
    let drops_replicas = |(_, command): &(u64, &WorkerCommand)| matches!(command, WorkerCommand::Release { formation, keep: false, .. } if *formation == of(1));
    assert_eq!(sent.iter().filter(|sent| drops_replicas(sent)).count(), 2);
    assert_eq!((formed(&world).resume_step, formed(&world).cursor, formed(&world).memory), (4, 56, None));
    // A worker that missed it is told when it reports its replicas.
    let shard = ReplicaShard { generation: Generation::FIRST, step: 6, rank: Rank::new(1) };
    let left = Left { formation: of(1), replicas: vec![shard] };
    let effects = world.step(Event::Left { worker: 3, left });
    assert!(commands(&effects).iter().any(drops_replicas));
}

#[test]
fn a_worker_that_learns_late_of_the_new_formation_keeps_the_replicas_it_has_to_send() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    // Its stream breaks before it learns of the new formation, and it reports its replicas again.
    drop(world.step(Event::Detached { worker: 1 }));
    let left = vec![Left { formation: of(1), replicas: world.replicas[&1].clone() }];
    let effects = world.join(Attachment { registration: registration(1), left, ..Attachment::default() });
    let sent = commands(&effects);
    assert!(sent.iter().any(|(worker, command)| *worker == 1
        && matches!(command, WorkerCommand::Assign { formation, .. } if *formation == of(2))));
    assert!(!sent.iter().any(|(_, command)| matches!(command, WorkerCommand::Release { .. })), "{sent:?}");
}

#[test]
fn a_job_without_replicas_does_not_wait_for_inventories() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec_with(2, 0, &["checkpoint.in_memory=false"]))));
    assert!(formed(&world).buddies.is_empty());
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).generation.number(), formed(&world).memory), (2, None));
}

#[test]
fn fewer_ranks_adopt_the_parts_of_those_that_are_lost_from_memory() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + SHRINK_MS, &[1]));
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    // What a rank that was lost had reported its buddy says, until the job is formed again.
    let report = |generation| {
        let report = StepReport { rank: 1, step: 6, generation, ..StepReport::default() };
        let (from, event) =
            (RankAddress { formation: of(1), rank: Rank::new(1) }, RankEvent::StepDone { report });
        Event::Rank { worker: 1, from, event: Box::new(event) }
    };
    let effects = world.step(report(1));
    assert!(matches!(effects[..], [Effect::Record { job: JOB, .. }]), "{effects:?}");
    let effects = world.pass(2 * TICK_MS, &[1]);
    let again = formed(&world);
    let memory = again.memory.unwrap();
    assert_eq!((again.places, again.resume_step, again.topology.data), (vec![1], 6, 1));
    assert_eq!((memory.generation, memory.step), (Generation::FIRST, 6));
    assert_eq!((memory.axes.map(|axes| axes.data), memory.bringers), (Some(2), Vec::new()));
    assert_eq!(memory.holders, [0, 0].map(Rank::new));
    let writes =
        |(_, command): &(u64, &WorkerCommand)| matches!(command, WorkerCommand::CommitCheckpoint { .. });
    assert!(!commands(&effects).iter().any(writes), "{effects:?}");
    assert_eq!(world.step(report(1)), []);
}

#[test]
fn a_formation_of_another_layout_that_breaks_at_once_begins_with_the_same_state() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(3, 0) }))));
    let part = |rank: u32| ReplicaShard { generation: Generation::FIRST, step: 6, rank: Rank::new(rank) };
    world.replicas.insert(1, [0, 2].map(part).into());
    world.replicas.insert(2, [1, 0].map(part).into());
    drop(world.pass(LEASE_MS + SHRINK_MS + 2 * TICK_MS, &[1, 2]));
    let again = formed(&world);
    assert_eq!((again.generation.number(), again.topology.data, again.resume_step), (2, 2, 6));
    // No rank of the second one has made a step: its workers have the parts of the first one, in the first one's layout.
    let (action, cause) = ("building".to_owned(), "a defect".to_owned());
    let failed = RankEvent::Failed { rank: Rank::ZERO, action, cause, kind: ErrorKind::Node, peer: None };
    let effects = world.event(failed);
    for answer in world.answers(&effects, &[1, 2]) {
        drop(world.step(answer));
    }
    drop(world.pass(LEASE_MS + ADOPTION_MS + SHRINK_MS + 2_000, &[1, 2]));
    let again = formed(&world);
    let memory = again.memory.unwrap();
    assert!(again.generation.number() >= 3);
    assert_eq!(
        (memory.generation, memory.step, memory.axes.map(|axes| axes.data)),
        (Generation::FIRST, 6, Some(3))
    );
}
