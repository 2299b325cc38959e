//! Files of jobs that have ended: what is removed, by whom, and when the job is forgotten.

use super::*;

fn discards(effects: &[Effect]) -> Vec<(u64, bool)> {
    let discard = |(worker, command): (u64, &WorkerCommand)| match command {
        WorkerCommand::Discard { everything, .. } => Some((worker, *everything)),
        _ => None,
    };
    commands(effects).into_iter().filter_map(discard).collect()
}

fn cancel(world: &mut World) -> Vec<Effect> {
    world.step(Event::Cancel { job: JOB, reason: String::new() })
}

#[test]
fn what_a_job_has_not_finished_goes_when_it_ends_and_the_rest_when_it_is_removed() {
    let mut world = training();
    assert!(world.core.may_be_removed(JOB).unwrap_err().contains("expected one that has ended"));
    assert_eq!(discards(&world.step(Event::Remove { job: JOB })), []);
    let ended = cancel(&mut world);
    // Each worker that had ranks of it, once they have been told.
    assert_eq!(discards(&ended), [(1, false), (2, false)]);
    let told: Vec<bool> = commands(&ended)
        .into_iter()
        .filter(|(worker, _)| *worker == 2)
        .map(|(_, command)| matches!(command, WorkerCommand::Release { .. }))
        .collect();
    assert_eq!(told, [true, false]);
    let asked = discards(&world.step(Event::Remove { job: JOB }));
    assert!(matches!(asked[..], [(_, true)]), "{asked:?}");
    let worker = asked[0].0;
    // It stays known until its files are gone, and can be asked for again.
    drop(world.step(Event::Removed { worker, job: JOB, result: Err("busy".into()) }));
    assert!(world.core.jobs().all.contains_key(&JOB));
    assert_eq!(discards(&world.step(Event::Remove { job: JOB })), asked);
    drop(world.step(Event::Removed { worker, job: JOB, result: Ok(()) }));
    assert!(!world.core.jobs().all.contains_key(&JOB));
    assert_eq!(world.facts.last(), Some(&Fact::Forgotten { job: JOB }));
}

#[test]
fn a_job_that_was_taken_up_again_meanwhile_is_not_forgotten() {
    let mut world = training();
    drop(cancel(&mut world));
    let (worker, _) = discards(&world.step(Event::Remove { job: JOB }))[0];
    drop(world.step(Event::Retry { job: JOB }));
    drop(world.step(Event::Removed { worker, job: JOB, result: Ok(()) }));
    assert!(world.core.jobs().all.contains_key(&JOB));
}

#[test]
fn a_job_whose_files_another_one_reads_and_one_without_a_worker_stay() {
    let mut world = training();
    drop(cancel(&mut world));
    let mut reader = spec(9, 0);
    let mut recipe = (*reader.recipe).clone();
    recipe.model.init = format!("/shared/jobs/{JOB}/model");
    reader.recipe = Arc::new(recipe);
    drop(world.step(Event::Submit(reader)));
    let refused = world.core.may_be_removed(JOB).unwrap_err();
    assert!(refused.contains("which has not ended, reads from the folder of job-1"), "{refused}");
    drop(world.step(Event::Cancel { job: id(2), reason: String::new() }));
    let checkpoint = crate::rollback::Checkpoint { step: 4, cursor: 16 };
    let origin = Some(facts::Origin { job: Some(JOB), folder: String::new(), checkpoint, cursor: 0 });
    drop(world.step(Event::Submit(Box::new(JobSpec { origin, ..*spec(9, 0) }))));
    let refused = world.core.may_be_removed(JOB).unwrap_err();
    assert!(refused.starts_with("job: job-3, which has not ended"), "{refused}");
    drop(world.step(Event::Cancel { job: id(3), reason: String::new() }));
    world.core.may_be_removed(JOB).unwrap();
    let workers: Vec<u64> = world.core.members().map(|member| member.registration.worker).collect();
    workers.into_iter().for_each(|worker| drop(world.step(Event::Detached { worker })));
    assert!(world.core.may_be_removed(JOB).unwrap_err().contains("expected a worker that can remove them"));
}

#[test]
fn little_room_is_said_once_and_so_is_more() {
    let mut world = training();
    let formed = world.core.jobs().all[&JOB].running().unwrap().clone();
    let (formation, worker) = (formed.id(JOB), formed.places[0]);
    let mut space = |worker, free| {
        let space = Space { free, checkpoint: 100 << 20 };
        let effects = world.step(Event::Space { worker, formation, space });
        let logged =
            |effect: &Effect| matches!(effect, Effect::Log { severity, .. } if *severity == Severity::Warn);
        let any = |effect: &Effect| matches!(effect, Effect::Log { .. });
        let lines = (effects.iter().filter(|e| any(e)).count(), effects.iter().filter(|e| logged(e)).count());
        (lines, world.core.warning(JOB).is_empty())
    };
    assert_eq!(space(worker, 200 << 20), ((0, 0), true));
    assert_eq!(space(99, 1), ((0, 0), true), "somebody else's word");
    assert_eq!(space(worker, 199 << 20), ((1, 1), false));
    assert_eq!(space(worker, 150 << 20), ((0, 0), false));
    assert_eq!(space(worker, 500 << 20), ((1, 0), true));
}
