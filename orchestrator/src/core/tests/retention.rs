//! Retention: a limited number of ended jobs stays known.

use super::*;

fn cancel(world: &mut World, job: JobId) {
    drop(world.step(Event::Cancel { job, reason: String::new() }));
}

fn forgotten(facts: &[Fact]) -> Vec<JobId> {
    facts
        .iter()
        .filter_map(|fact| match fact {
            Fact::Forgotten { job } => Some(*job),
            _ => None,
        })
        .collect()
}

#[test]
fn the_latest_finished_jobs_are_retained() {
    let mut world = training();
    world.core =
        std::mem::replace(&mut world.core, Core::new(Jobs::default(), 1, 0, Times::default())).retaining(2);
    for number in 2..=5 {
        let key = format!("key {number}");
        drop(world.step(Event::Submit(Box::new(JobSpec { key, ..*spec(9, 0) }))));
    }
    [4, 2].into_iter().for_each(|number| cancel(&mut world, id(number)));
    assert!(forgotten(&world.facts).is_empty());
    [5, 3].into_iter().for_each(|number| cancel(&mut world, id(number)));
    assert_eq!(forgotten(&world.facts), [4, 2].map(id), "as they ended, not as they came");
    let known: Vec<JobId> = world.core.jobs().all.keys().copied().collect();
    assert_eq!(known, [1, 3, 5].map(id), "the first one runs");
    // The key of a removed job creates a new one, with a new number; that of a retained one does not.
    for (key, newest) in [("key 5", 5), ("key 4", 6)] {
        drop(world.step(Event::Submit(Box::new(JobSpec { key: key.into(), ..*spec(9, 0) }))));
        assert_eq!(world.core.jobs().newest, id(newest));
    }
    assert_eq!(world.core.jobs().by_key.get("key 4"), Some(&id(6)));
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
}

#[test]
fn a_restart_with_a_lower_limit_removes_the_others() {
    let mut world = World::new();
    (0..4).for_each(|_| drop(world.step(Event::Submit(spec(9, 0)))));
    [3, 1, 2].into_iter().for_each(|number| cancel(&mut world, id(number)));
    let core = Core::new(world.core.jobs().clone(), 2, 0, Times::default()).retaining(1);
    let mut again = World::of(core, 0);
    drop(again.step(Event::Tick));
    assert_eq!(forgotten(&again.facts), [3, 1].map(id));
    assert_eq!(again.core.jobs().all.keys().copied().collect::<Vec<_>>(), [2, 4].map(id));
    assert_eq!(again.core.jobs().newest, id(4));
}

#[test]
fn the_recipes_of_retained_jobs_take_no_more_than_a_bound() {
    let mut world = World::new();
    let mut large = *spec(9, 0);
    Arc::make_mut(&mut large.recipe).data.paths = vec!["p".repeat(64 << 20)];
    let fit = RETAINED_BYTES / large.bytes();
    for number in 1..=fit {
        drop(world.step(Event::Submit(Box::new(large.clone()))));
        cancel(&mut world, id(number));
    }
    assert!(forgotten(&world.facts).is_empty());
    drop(world.step(Event::Submit(Box::new(large.clone()))));
    assert_eq!(forgotten(&world.facts), [id(1)]);
    // Counted anew at a start.
    let core = Core::new(world.core.jobs().clone(), 2, 0, Times::default());
    let mut again = World::of(core, 0);
    drop(again.step(Event::Submit(Box::new(large))));
    assert_eq!(forgotten(&again.facts), [id(2)]);
}

#[test]
fn a_job_that_is_taken_up_again_goes_on_from_its_checkpoint_and_is_forgotten_only_after_it_has_ended_again() {
    let mut world = training();
    checkpoint(&mut world, 4);
    drop(world.step(Event::Retry { job: JOB }));
    assert!(world.core.is_training(JOB), "one that has not ended stays as it is");
    drop(world.step(Event::Cancel { job: JOB, reason: String::new() }));
    assert_eq!(world.core.jobs().ended, [JOB]);
    let effects = world.step(Event::Retry { job: JOB });
    assert_eq!(logged(&effects)[0], "taken up again, from the checkpoint of step 4");
    let record = &world.core.jobs().all[&JOB];
    let formed = record.running().unwrap();
    assert_eq!((formed.generation.number(), formed.resume_step, record.ended_ms), (2, 4, 0));
    assert!(world.core.jobs().ended.is_empty());
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
}
