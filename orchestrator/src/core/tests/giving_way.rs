//! Jobs that have lost ranks give up their slots: for jobs before them in line, and for others that have lost ranks.

use super::*;

fn phase(world: &World, job: JobId) -> Phase {
    world.core.jobs().all[&job].phase.clone()
}

#[test]
fn of_two_jobs_that_wait_for_each_others_slots_the_less_important_one_gives_way() {
    for (first, second) in [(0, 0), (0, 1)] {
        let mut world = World::new();
        (1..=6).for_each(|worker| drop(world.attach(worker, Vec::new())));
        drop(world.step(Event::Submit(spec(3, first))));
        drop(world.step(Event::Submit(spec(3, second))));
        assert_eq!(world.places(), [1, 2, 3]);
        // Each loses a rank for good, and keeps two of the four slots that are left.
        let left = [1, 2, 4, 5];
        drop(world.pass(LEASE_MS + TICK_MS, &left));
        assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Broken]);
        drop(world.pass(ADOPTION_MS - TICK_MS, &left));
        assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Broken]);
        let effects = world.pass(2 * TICK_MS, &left);
        let (goes_on, gives_way) = if second > first { (SECOND, JOB) } else { (JOB, SECOND) };
        assert_eq!((phase(&world, goes_on), phase(&world, gives_way)), (Phase::Formed, Phase::Queued));
        let words = format!("gives way to {goes_on}, which has lost ranks too; back in the queue");
        assert!(logged(&effects).iter().any(|line| line.starts_with(&words)), "{effects:?}");
        // It is formed again as soon as there is room.
        (7..=8).for_each(|worker| drop(world.attach(worker, Vec::new())));
        assert_eq!(phase(&world, gives_way), Phase::Formed);
    }
}

#[test]
fn no_more_jobs_give_way_than_it_takes_and_the_least_important_ones() {
    let mut world = World::new();
    (1..=8).for_each(|worker| drop(world.attach(worker, Vec::new())));
    (0..4).for_each(|_| drop(world.step(Event::Submit(spec(2, 0)))));
    // The first job has lost both ranks, the others one each.
    drop(world.pass(LEASE_MS + ADOPTION_MS + 2 * TICK_MS, &[3, 5, 7]));
    let phases = (1..=4).map(|number| phase(&world, id(number)));
    assert_eq!(phases.collect::<Vec<_>>(), [Phase::Formed, Phase::Broken, Phase::Queued, Phase::Queued]);
    assert_eq!(world.places(), [5, 7]);
}

#[test]
fn a_job_keeps_slots_that_are_not_enough_for_the_one_before_it() {
    let mut world = World::new();
    (1..=6).for_each(|worker| drop(world.attach(worker, Vec::new())));
    [3, 2, 1].into_iter().for_each(|ranks| drop(world.step(Event::Submit(spec(ranks, 0)))));
    // The third job trains on.
    drop(world.pass(LEASE_MS + 2 * ADOPTION_MS, &[1, 4, 6]));
    assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Broken]);
    // One more is the second job's.
    drop(world.attach(7, Vec::new()));
    drop(world.pass(TICK_MS, &[1, 4, 6, 7]));
    assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Formed]);
}

#[test]
fn a_job_that_the_whole_cluster_has_no_room_for_gives_way_to_less_important_ones_that_it_has_room_for() {
    let mut world = World::new();
    (1..=5).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(3, 1))));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.pass(LEASE_MS + ADOPTION_MS - TICK_MS, &[1, 4]));
    assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Broken]);
    drop(world.pass(3 * TICK_MS, &[1, 4]));
    assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Queued, Phase::Formed]);
}

#[test]
fn a_job_that_has_lost_ranks_gives_way_to_one_of_higher_priority() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(3, 0))));
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 2]));
    drop(world.step(Event::Submit(spec(2, 1))));
    assert_eq!((phase(&world, JOB), phase(&world, SECOND)), (Phase::Broken, Phase::Queued));
    assert_eq!(world.core.waiting_for(SECOND), "job-1 to yield");
    // Its workers have some time to come back with its state.
    drop(world.pass(ADOPTION_MS - TICK_MS, &[1, 2]));
    assert_eq!(phase(&world, JOB), Phase::Broken);
    drop(world.pass(2 * TICK_MS, &[1, 2]));
    assert_eq!((phase(&world, JOB), phase(&world, SECOND)), (Phase::Queued, Phase::Formed));
}

#[test]
fn a_job_that_the_whole_cluster_has_no_room_for_gives_its_slots_up_once_others_wait() {
    let mut world = World::new();
    (1..=4).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(4, 1))));
    drop(world.pass(LEASE_MS + 3 * ADOPTION_MS, &[1, 2, 3]));
    assert_eq!(phase(&world, JOB), Phase::Broken, "nobody else waits: it keeps its state");
    // One that could not start with all of it either.
    drop(world.step(Event::Submit(spec(4, 0))));
    drop(world.pass(TICK_MS, &[1, 2, 3]));
    assert_eq!(phase(&world, JOB), Phase::Broken);
    drop(world.step(Event::Submit(spec(3, 0))));
    let effects = world.pass(2 * TICK_MS, &[1, 2, 3]);
    assert_eq!((phase(&world, JOB), phase(&world, id(3))), (Phase::Queued, Phase::Formed), "{effects:?}");
    assert_eq!(world.core.waiting_for(JOB), "needs 4 ranks, 3 healthy");
    // It is first again as soon as there is room for it.
    drop(world.attach(5, Vec::new()));
    assert!(world.core.waiting_for(JOB).contains("job-3 to yield"), "{}", world.core.waiting_for(JOB));
}

#[test]
fn a_job_that_may_go_on_with_fewer_ranks_than_the_cluster_has_keeps_its_slots() {
    let mut world = World::new();
    (1..=4).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 2, ..*spec(3, 0) }))));
    drop(world.step(Event::Submit(spec(1, 0))));
    drop(world.step(Event::Submit(spec(1, 0))));
    // Two ranks are lost and one is left; the other slot is another job's.
    drop(world.pass(LEASE_MS + 2 * ADOPTION_MS, &[1, 4]));
    assert_eq!([JOB, SECOND].map(|job| phase(&world, job)), [Phase::Broken, Phase::Formed]);
    drop(world.attach(5, Vec::new()));
    drop(world.pass(2 * TICK_MS, &[1, 4, 5]));
    assert_eq!(phase(&world, JOB), Phase::Formed);
    assert_eq!(world.places().len(), 2);
}

#[test]
fn workers_whose_streams_have_just_ended_still_count_as_room() {
    let mut world = World::new();
    (1..=5).for_each(|worker| drop(world.attach(worker, Vec::new())));
    [3, 2, 2].into_iter().for_each(|ranks| drop(world.step(Event::Submit(spec(ranks, 0)))));
    drop(world.pass(LEASE_MS + ADOPTION_MS + 2 * TICK_MS, &[1, 2, 4, 5]));
    let phases = |world: &World| [JOB, SECOND, id(3)].map(|job| phase(world, job));
    assert_eq!(
        phases(&world),
        [Phase::Broken, Phase::Formed, Phase::Queued],
        "there is room for all but not now"
    );
    // The orchestrator has closed them, as it does when its disk fails.
    [4, 5].into_iter().for_each(|worker| drop(world.step(Event::Detached { worker })));
    drop(world.pass(TICK_MS, &[1, 2]));
    assert_eq!(phases(&world), [Phase::Broken, Phase::Formed, Phase::Queued]);
    drop(world.pass(LEASE_MS + 2 * TICK_MS, &[1, 2]));
    // They are lost: the first job has no room any more, and the second goes on with its slots.
    assert_eq!(phases(&world), [Phase::Queued, Phase::Formed, Phase::Queued]);
}
