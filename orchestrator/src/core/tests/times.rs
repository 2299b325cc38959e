//! Times of silence: the defaults, and those that the operator has set.

use super::*;

/// What follows from the defaults.
pub(super) const RETURN_MS: u64 = 700;
pub(super) const VERDICT_MS: u64 = 2_500;
pub(super) const LEFT_MS: u64 = 3_000;

#[test]
fn the_operator_says_how_long_a_worker_may_be_silent_or_away() {
    let times = Times::new(1_000, Some(4_000)).unwrap();
    let formed = |world: &mut World| {
        (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
        drop(world.step(Event::Submit(spec(2, 0))));
        assert_eq!(world.places(), [1, 2]);
    };
    let mut world = World::of(Core::new(Jobs::default(), 1, 0, times), 0);
    formed(&mut world);
    drop(world.pass(4_000, &[1, 3]));
    assert_eq!(world.places(), [1, 2]);
    drop(world.pass(2 * TICK_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 3]);
    let mut world = World::of(Core::new(Jobs::default(), 1, 0, times), 0);
    formed(&mut world);
    drop(world.step(Event::Detached { worker: 2 }));
    drop(world.pass(1_200, &[1, 3]));
    assert_eq!(world.places(), [1, 2]);
    drop(world.pass(2 * TICK_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 3]);
    // What an earlier orchestrator placed may be that much later, too.
    let jobs = world.core.jobs().clone();
    let mut again = World::of(Core::new(jobs, 2, 0, Times::new(5_000, Some(15_000)).unwrap()), 0);
    drop(again.pass(30_000, &[]));
    assert_eq!(again.core.members().count(), 2);
    drop(again.pass(2 * TICK_MS, &[]));
    assert_eq!(again.core.members().count(), 0);
}

#[test]
fn a_broken_stream_is_no_loss_if_the_worker_is_back_in_time() {
    let mut world = training();
    drop(world.step(Event::Detached { worker: 2 }));
    drop(world.pass(RETURN_MS - TICK_MS, &[1, 3]));
    let effects = world.attach(2, hosted(1, &[1]));
    assert!(!commands(&effects).iter().any(|(_, command)| matches!(command, WorkerCommand::Assign { .. })));
    drop(world.pass(2 * LEASE_MS, &[1, 2, 3]));
    assert_eq!((world.places(), world.core.jobs().all[&JOB].generation().number()), (vec![1, 2], 1));
}
