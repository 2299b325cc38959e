//! Who is believed that something has been committed.

use super::*;

#[test]
fn a_commit_is_reported_by_the_worker_that_makes_it_and_by_nobody_else() {
    let mut world = training();
    drop(save(&mut world, 4));
    let mut says = |worker, generation, result: Result<(), &str>| {
        let (formation, position) = (of(generation), Some(position(4)));
        let result = result.map_err(str::to_owned);
        let effects = world.step(Event::Committed { worker, formation, position, result });
        let is_kept = effects.iter().any(|effect| matches!(effect, Effect::Persist(_)));
        (is_kept, logged(&effects).join("; "))
    };
    let refused =
        "what worker  says of a commit of generation 1 of job-1 is refused: that is another worker's";
    // A stranger, a member that hosts another rank, one that is no member; each is named once.
    for worker in [3, 2, 9] {
        assert_eq!(says(worker, 1, Ok(())), (false, refused.to_owned()), "worker {worker}");
        assert_eq!(says(worker, 1, Err("disk full")), (false, String::new()));
    }
    // What is said of another generation comes late, and counts for nothing.
    assert_eq!(says(1, 2, Ok(())), (false, String::new()));
    assert_eq!(says(1, 0, Ok(())), (false, String::new()));
    assert_eq!(says(1, 1, Ok(())), (true, String::new()));
    assert_eq!(world.core.jobs().all[&JOB].last_checkpoint, 4);
}
