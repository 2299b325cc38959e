//! Jobs that start with what there is, grow into what nobody else has a use for, and give it up again.

use contraflow_proto::StepReport;

use super::*;
use crate::queue::Size;

/// A job of two ranks that may have one to four.
fn elastic(priority: i32) -> Box<JobSpec> {
    Box::new(JobSpec { min_ranks: 1, max_ranks: 4, ..*spec(2, priority) })
}

/// Its ranks are ready and have made a step.
fn trains(world: &mut World, step: u64) {
    let ranks = world.places().len();
    Rank::all(ranks).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
    for rank in 0..ranks as u32 {
        let report = StepReport { rank, step, generation: world.generation(), ..StepReport::default() };
        drop(world.event(RankEvent::StepDone { report }));
    }
}

/// The job has as many ranks as there are workers, for nobody else waits, and has made a step.
fn training_on(workers: usize) -> World {
    let mut world = World::new();
    (1..=workers as u64).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(elastic(0))));
    assert_eq!(world.places().len(), workers);
    trains(&mut world, 1);
    world
}

/// Its ranks stop after a step, which is saved.
fn stops(world: &mut World, step: u64) {
    let ranks = world.places().len();
    Rank::all(ranks).for_each(|rank| drop(world.event(RankEvent::Stopped { rank, step })));
    for rank in Rank::all(ranks) {
        let (position, watch, shard) = (position(step), Default::default(), ShardFile::default());
        drop(world.event(RankEvent::ShardSaved { rank, position, watch, shard }));
    }
    committed(world, step);
}

impl World {
    fn generation(&self) -> u32 {
        self.core.jobs().all[&JOB].generation().number()
    }
}

fn stop_commands(effects: &[Effect]) -> usize {
    let is_stop = |(_, command): &(u64, &WorkerCommand)| {
        matches!(command, WorkerCommand::Rank { command: RankCommand::Stop, .. })
    };
    commands(effects).iter().filter(|sent| is_stop(sent)).count()
}

#[test]
fn a_job_starts_with_what_there_is_and_grows_once_the_room_has_lasted() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(elastic(0))));
    assert_eq!(world.places(), [1]);
    assert_eq!(world.core.size(JOB), Size { least: 1, asked: 2, most: 4 });
    trains(&mut world, 1);
    drop(world.attach(2, Vec::new()));
    assert_eq!(stop_commands(&world.pass(GROW_MS - TICK_MS, &[1, 2])), 0);
    // Another one comes: the room is another one from now on.
    drop(world.attach(3, Vec::new()));
    assert_eq!(stop_commands(&world.pass(GROW_MS - TICK_MS, &[1, 2, 3])), 0);
    assert_eq!(stop_commands(&world.pass(2 * TICK_MS, &[1, 2, 3])), 1);
    stops(&mut world, 1);
    assert_eq!(world.places(), [1, 2, 3]);
    let formed = world.core.jobs().all[&JOB].formed.clone().unwrap();
    assert_eq!((formed.topology.data, formed.resume_step, formed.generation.number()), (3, 1, 2));
    // No more than it may have, and no layout has five.
    (4..=6).for_each(|worker| drop(world.attach(worker, Vec::new())));
    trains(&mut world, 2);
    drop(world.pass(GROW_MS + 2 * TICK_MS, &[1, 2, 3, 4, 5, 6]));
    stops(&mut world, 2);
    assert_eq!(world.places().len(), 4);
    trains(&mut world, 3);
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2, 3, 4, 5, 6])), 0);
}

#[test]
fn a_formation_that_has_made_no_step_does_not_grow() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(elastic(0))));
    drop(world.attach(2, Vec::new()));
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2])), 0);
    trains(&mut world, 1);
    assert_eq!(stop_commands(&world.pass(TICK_MS, &[1, 2])), 1);
}

#[test]
fn what_another_job_waits_for_nobody_grows_into_and_a_job_gives_it_up() {
    let mut world = training_on(4);
    // Of the same priority: it keeps what it asked for.
    let effects = world.step(Event::Submit(spec(2, 0)));
    assert_eq!(stop_commands(&effects), 4);
    assert_eq!(world.core.waiting_for(SECOND), "job-1 to yield");
    stops(&mut world, 1);
    let ranks =
        |world: &World, job| world.core.jobs().all[&job].running().map_or(0, |formed| formed.places.len());
    assert_eq!([JOB, SECOND].map(|job| ranks(&world, job)), [2, 2]);
    trains(&mut world, 2);
    // One of a higher priority: it goes down to the fewest.
    let effects = world.step(Event::Submit(spec(1, 1)));
    assert_eq!(stop_commands(&effects), 2);
    stops(&mut world, 2);
    assert_eq!([JOB, SECOND, id(3)].map(|job| ranks(&world, job)), [1, 2, 1]);
    // It has the room back when the other one has ended.
    trains(&mut world, 3);
    drop(world.step(Event::Cancel { job: id(3), reason: String::new() }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2, 3, 4])), 1);
    stops(&mut world, 3);
    assert_eq!([JOB, SECOND].map(|job| ranks(&world, job)), [2, 2]);
}

#[test]
fn a_job_is_scaled_down_at_once_and_up_when_there_is_room_until_it_is_left_to_itself_again() {
    let mut world = training_on(4);
    let effects = world.step(Event::Scale { job: JOB, ranks: 3 });
    assert_eq!((stop_commands(&effects), logged(&effects)), (4, vec!["scaled to 3 ranks"]));
    stops(&mut world, 1);
    assert_eq!(world.places().len(), 3);
    trains(&mut world, 2);
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2, 3, 4])), 0, "the fourth slot stays free");
    // Again the same is nothing new.
    assert!(world.step(Event::Scale { job: JOB, ranks: 3 }).is_empty());
    drop(world.step(Event::Scale { job: JOB, ranks: 0 }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2, 3, 4])), 3);
    stops(&mut world, 2);
    assert_eq!(world.places().len(), 4);
    // It is kept.
    drop(world.step(Event::Scale { job: JOB, ranks: 1 }));
    let kept = Fact::Scaled { job: JOB, ranks: 1 };
    assert!(world.facts.contains(&kept));
    assert_eq!(world.core.size(JOB), Size { least: 1, asked: 1, most: 1 });
    assert_eq!(world.core.check_scale(JOB, 5), Ok(()));
    // A number that nobody can mean costs nobody any time.
    let most = world.core.check_scale(JOB, usize::MAX).unwrap_err();
    assert!(most.starts_with("ranks: expected at most 65536, got "), "{most}");
    let unknown = world.core.check_scale(SECOND, 5).unwrap_err();
    assert_eq!(unknown, "job: expected one that has not ended, got job-2");
}

#[test]
fn a_job_that_was_scaled_up_may_still_have_as_few_ranks_as_its_recipe_names() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.step(Event::Scale { job: JOB, ranks: 3 }));
    assert_eq!(world.core.size(JOB), Size { least: 2, asked: 3, most: 3 });
}

#[test]
fn a_job_that_has_lost_ranks_and_was_scaled_meanwhile_holds_nobody_up() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(3, 0))));
    drop(world.step(Event::Scale { job: JOB, ranks: 1 }));
    assert_eq!(world.places(), [1]);
    trains(&mut world, 1);
    // It may go on with one rank until it loses that.
    drop(world.step(Event::Scale { job: JOB, ranks: 0 }));
    drop(world.pass(LEASE_MS + ADOPTION_MS + 2 * TICK_MS, &[2]));
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    drop(world.attach(3, Vec::new()));
    drop(world.step(Event::Submit(spec(1, 0))));
    assert_eq!(world.core.jobs().all[&SECOND].phase, Phase::Formed);
}

#[test]
fn a_job_that_is_drained_goes_on_with_fewer_ranks_and_grows_back() {
    let mut world = training_on(2);
    drop(world.step(Event::Drain { node: "n2".into() }));
    stops(&mut world, 1);
    assert_eq!(world.places(), [1]);
    trains(&mut world, 2);
    drop(world.step(Event::Undrain { node: "n2".into() }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2])), 1);
    stops(&mut world, 2);
    assert_eq!(world.places(), [1, 2]);
}
