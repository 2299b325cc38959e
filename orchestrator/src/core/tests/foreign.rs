//! Workers that come from an orchestrator with another state.

use super::*;
use contraflow_runtime::topology::Rank;

/// A core of state 7 that has had no job; its nonce is that of no id below.
fn fresh() -> World {
    World::of(Core::new(Jobs::default(), 1, 0, Times::default()).identified(7, 99), 0)
}

fn of_another_state(worker: u64, hosted: Vec<Hosted>) -> Attachment {
    let registration = registration(worker);
    Attachment { registration, hosted, state: 6, incarnation: 5, ..Attachment::default() }
}

/// A worker that hosts a rank of a job of another state, in a formation of two.
fn attach(world: &mut World, rank: u32) -> Vec<Effect> {
    world.join(of_another_state(u64::from(rank) + 1, hosted(3, &[rank])))
}

fn report(world: &mut World, event: RankEvent) -> Vec<Effect> {
    let rank = event.rank();
    let from = RankAddress { formation: of(3), rank };
    world.step(Event::Rank { worker: rank.index() as u64 + 1, from, event: Box::new(event) })
}

fn step_done(rank: Rank, step: u64) -> RankEvent {
    let rank = rank.number();
    RankEvent::StepDone { report: contraflow_proto::StepReport { rank, step, ..Default::default() } }
}

fn released(effects: &[Effect]) -> Vec<u64> {
    let sent = commands(effects).into_iter();
    sent.filter(
        |(_, command)| matches!(command, WorkerCommand::Release { formation, .. } if *formation == of(3)),
    )
    .map(|(to, _)| to)
    .collect()
}

/// Both ranks have attached and said again that they train.
fn both() -> World {
    let mut world = fresh();
    assert!(released(&attach(&mut world, 0)).is_empty());
    assert!(released(&attach(&mut world, 1)).is_empty());
    drop(report(&mut world, RankEvent::Ready { rank: Rank::new(0) }));
    let effects = report(&mut world, RankEvent::Ready { rank: Rank::new(1) });
    let stopped = |to: &(u64, &WorkerCommand)| {
        matches!(to.1, WorkerCommand::Rank { command: RankCommand::Stop { .. }, .. })
    };
    assert_eq!(commands(&effects).iter().filter(|to| stopped(to)).count(), 2, "{effects:?}");
    let begun = |to: &(u64, &WorkerCommand)| {
        matches!(to.1, WorkerCommand::Rank { command: RankCommand::BeginStep { .. }, .. })
    };
    assert!(!commands(&effects).iter().any(begun), "where they would begin is unknown here");
    Rank::all(2).for_each(|rank| drop(report(&mut world, step_done(rank, 11))));
    world
}

#[test]
fn a_worker_that_saw_a_higher_incarnation_of_another_state_is_admitted() {
    let mut world = fresh();
    let effects = attach(&mut world, 0);
    assert_eq!(commands(&effects)[0], (1, &WorkerCommand::Welcome));
    assert_eq!(world.core.used(1), 1, "its slot is not free");
}

#[test]
fn ranks_of_another_state_are_released_once_their_step_is_saved() {
    let mut world = both();
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: Position { step: 12, ..Position::default() },
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    for rank in Rank::all(2) {
        drop(report(&mut world, step_done(rank, 12)));
        drop(report(&mut world, RankEvent::Stopped { rank, step: 12, in_memory: false }));
    }
    drop(report(&mut world, saved(Rank::new(0))));
    let effects = report(&mut world, saved(Rank::new(1)));
    assert!(
        matches!(commands(&effects)[..], [(1, WorkerCommand::CommitCheckpoint { formation, .. })] if *formation == of(3))
    );
    drop(world.pass(120_000, &[1, 2]));
    assert!(released(&world.step(Event::Tick)).is_empty(), "the commit takes its time");
    // A job of this state waits for the slots.
    drop(world.step(Event::Submit(spec(2, 0))));
    let own = JobId::new(1, 99);
    assert!(world.core.jobs().all[&own].running().is_none());
    let (formation, result) = (of(3), Ok(()));
    let effects = world.step(Event::Committed { worker: 1, formation, position: Some(position(12)), result });
    assert_eq!(released(&effects), [1, 2]);
    assert!(world.core.jobs().all[&own].running().is_some());
    // Nothing of it has become a fact but that the slots were used.
    assert!(!world.facts.iter().any(|fact| fact.job() == Some(JOB)), "{:?}", world.facts);
}

#[test]
fn a_step_that_cannot_be_saved_is_released_in_time() {
    // A rank of two, whose peer does not come.
    let mut world = fresh();
    drop(attach(&mut world, 0));
    let effects = world.pass(ADOPTION_MS + TICK_MS, &[1]);
    assert_eq!(released(&effects), [1]);
    // Two that have made no step.
    let mut world = fresh();
    (0..2).for_each(|rank| drop(attach(&mut world, rank)));
    Rank::all(2).for_each(|rank| drop(report(&mut world, RankEvent::Ready { rank })));
    let effects = world.pass(FOREIGN_MS + TICK_MS, &[1, 2]);
    assert_eq!(released(&effects), [1, 2]);
    // One of two that train is lost.
    let mut world = both();
    drop(world.step(Event::Detached { worker: 2 }));
    assert_eq!(released(&world.pass(RETURN_MS + 2 * TICK_MS, &[1])), [1, 2]);
    // One cannot continue.
    let mut world = both();
    let (action, cause) = ("F0.0".to_owned(), "a defect".to_owned());
    drop(report(
        &mut world,
        RankEvent::Failed { rank: Rank::new(0), action, cause, kind: ErrorKind::Bug, peer: None },
    ));
    let effects = report(&mut world, RankEvent::Aborted { rank: Rank::new(1) });
    assert_eq!(released(&effects), [1, 2]);
}

#[test]
fn a_formation_with_impossible_ranks_is_released_at_once() {
    for (world_size, rank) in [(0, 0), (2, 2), (usize::MAX, 0)] {
        let mut world = fresh();
        let hosted = vec![Hosted {
            formation: of(3),
            ranks: vec![Rank::new(rank)],
            world: world_size,
            steps: 9,
            durable: 0,
        }];
        let effects = world.join(of_another_state(1, hosted));
        assert_eq!(released(&effects), [1]);
    }
}

#[test]
fn a_job_that_moved_on_after_this_copy_of_the_state_is_saved_and_ends() {
    // A copy of the state in which generation 1 runs is put back while generation 3 does.
    let mut world = training();
    for rank in 0..2 {
        drop(world.attach(u64::from(rank) + 1, hosted(3, &[rank])));
        drop(report(&mut world, RankEvent::Ready { rank: Rank::new(rank) }));
    }
    for rank in Rank::all(2) {
        drop(report(&mut world, step_done(rank, 9)));
    }
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: Position { step: 9, ..Position::default() },
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    Rank::all(2).for_each(|rank| drop(report(&mut world, saved(rank))));
    let (formation, result) = (of(3), Ok(()));
    let effects = world.step(Event::Committed { worker: 1, formation, position: Some(position(9)), result });
    assert_eq!(released(&effects), [1, 2]);
    let record = &world.core.jobs().all[&JOB];
    assert_eq!(record.phase, Phase::Ended(End::Failed));
    let words = "job-1 has moved on to generation 3, which this state does not know: it is older than the storage; \
                 step 9 is saved in its folder";
    assert_eq!(record.why, words);
}

#[test]
fn events_of_another_states_ranks_count_for_no_job_of_the_same_number() {
    let mut world = fresh();
    (5..=6).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    let own = JobId::new(1, 99);
    assert_eq!(world.core.jobs().of_number(1), Ok(own));
    drop(attach(&mut world, 0));
    for rank in Rank::all(2) {
        drop(report(&mut world, RankEvent::Ready { rank }));
    }
    assert!(!world.core.is_training(own));
    assert_eq!(world.core.waiting_for(own), "starting, waiting for rank 0, 1");
}

#[test]
fn a_formation_whose_slot_has_been_reassigned_is_released_at_once() {
    let mut world = fresh();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(spec(1, 0))));
    // The commands that released it and assigned the next one were lost with the orchestrator.
    let mut again =
        World::of(Core::new(world.core.jobs().clone(), 2, 0, Times::default()).identified(7, 100), 0);
    let effects = attach(&mut again, 0);
    assert_eq!(released(&effects), [1]);
    let own = JobId::new(1, 99);
    let place = |wanted: &dyn Fn(&WorkerCommand) -> bool| {
        commands(&effects).iter().position(|(_, command)| wanted(command))
    };
    let released = place(&|command| matches!(command, WorkerCommand::Release { .. }));
    let assigned =
        place(&|command| matches!(command, WorkerCommand::Assign { formation, .. } if formation.job == own));
    assert!(released.is_some() && released < assigned, "the slot is free before it is used: {effects:?}");
}
