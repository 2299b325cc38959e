//! What is said of losses and of waiting: every rank, the time that passed, and no line twice.

use super::*;

/// Two ranks that train, on workers 1 and 2, and two spare ones.
fn training_with_two_spares() -> World {
    let mut world = training();
    drop(world.attach(4, Vec::new()));
    world
}

/// Reason and ranks of the latest break.
fn broken(world: &World) -> (Vec<Rank>, String) {
    let broken = world.facts.iter().rev().find_map(|fact| match fact {
        Fact::Broken { lost, why, .. } => Some((lost.clone(), why.clone())),
        _ => None,
    });
    broken.unwrap()
}

#[test]
fn every_rank_that_is_lost_is_named_with_its_worker_and_how_long_it_was_silent() {
    let mut world = training_with_two_spares();
    drop(world.pass(1_000, &[1, 2, 3, 4]));
    let effects = world.pass(LEASE_MS + TICK_MS, &[3, 4]);
    let (lost, why) = broken(&world);
    assert_eq!(lost, [Rank::new(0), Rank::new(1)]);
    let silent = LEASE_MS + TICK_MS;
    for (rank, worker) in [(0, 1), (1, 2)] {
        let words = format!("rank {rank} lost: worker  on node n{worker} is silent for {silent} ms");
        assert!(why.contains(&words), "{why}");
    }
    assert_eq!(logged(&effects).iter().filter(|line| line.contains(" lost: ")).count(), 1, "{effects:?}");
    drop(world.pass(LEFT_MS, &[3, 4]));
    let record = &world.core.jobs().all[&JOB];
    assert_eq!((world.places(), record.generation().number(), record.losses), (vec![3, 4], 2, 1));
}

#[test]
fn both_ranks_of_a_worker_and_one_that_ended_are_named() {
    let mut world = World::new();
    let two_slots = |worker| Registration { slots: 2, ..registration(worker) };
    for worker in 1..=4 {
        drop(world.join(Attachment { registration: two_slots(worker), ..Attachment::default() }));
    }
    drop(world.step(Event::Submit(spec(4, 0))));
    assert_eq!(world.places(), [1, 1, 2, 2]);
    drop(world.step(Event::Detached { worker: 2 }));
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3, 4]));
    let (lost, why) = broken(&world);
    assert_eq!(lost, [Rank::new(2), Rank::new(3)]);
    let words =
        format!("rank 2, 3 lost: worker  on node n2 has left, last seen {} ms ago", RETURN_MS + TICK_MS);
    assert!(why.contains(&words), "{why}");
}

#[test]
fn a_job_that_forms_for_minutes_has_a_line_when_it_begins_and_one_when_it_is_given_up() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    let submitted = world.step(Event::Submit(spec(2, 0)));
    let layout = "layout: 2 ranks as pipeline 1, expert 1, data 2: as its recipe says";
    assert_eq!(logged(&submitted), ["generation 1: 2 ranks formed", layout]);
    let effects = world.pass(FORMING_MS - TICK_MS, &[1, 2, 3]);
    assert_eq!(logged(&effects), [""; 0]);
    let effects = world.pass(2 * TICK_MS, &[1, 2, 3]);
    let words = "starting, waiting for rank 0, 1 for 600 s";
    assert_eq!(logged(&effects).iter().filter(|line| line.contains(words)).count(), 1, "{effects:?}");
}
