//! What the flight recorders of a lost formation tell: who is asked, and what becomes of the answer.

use super::*;

const SAID: &str = "rank 1 had been in forward of Experts when it was lost; rank 0 waits for it";
const LINE: &str =
    "the ranks of generation 1: rank 1 had been in forward of Experts when it was lost; rank 0 waits for it";

/// Whom these effects ask, about which formation and which lost ranks.
fn asked(effects: &[Effect]) -> Vec<(u64, FormationId, Vec<Rank>)> {
    let of = |(worker, command): (u64, &WorkerCommand)| match command {
        WorkerCommand::ReadFlight { formation, lost } => Some((worker, *formation, lost.clone())),
        _ => None,
    };
    commands(effects).into_iter().filter_map(of).collect()
}

fn read(world: &mut World, worker: u64, formation: FormationId) -> Vec<String> {
    let effects = world.step(Event::FlightRead { worker, formation, says: SAID.into() });
    logged(&effects).into_iter().map(str::to_owned).collect()
}

/// Worker 2, with rank 1, has fallen silent, and a moment has passed.
fn lost() -> (World, Vec<Effect>) {
    let mut world = training();
    let effects = world.pass(LEASE_MS + 5 * TICK_MS, &[1, 3]);
    assert_eq!(world.places(), [1, 3]);
    (world, effects)
}

#[test]
fn one_worker_that_is_left_is_asked_and_its_answer_is_in_the_log_and_the_status_until_the_job_goes_on() {
    let (mut world, effects) = lost();
    assert_eq!(asked(&effects), [(1, of(1), vec![Rank::new(1)])]);
    // Nobody else is believed, nor about anything else, nor twice.
    assert_eq!(read(&mut world, 3, of(1)), [""; 0]);
    assert_eq!(read(&mut world, 1, of(2)), [""; 0]);
    assert_eq!(world.core.warning(JOB), "");
    assert_eq!(read(&mut world, 1, of(1)), [LINE]);
    assert_eq!(read(&mut world, 1, of(1)), [""; 0]);
    assert_eq!(world.core.warning(JOB), LINE);
    (0..2).for_each(|rank| drop(world.event(RankEvent::Ready { rank: Rank::new(rank) })));
    assert_eq!(world.core.warning(JOB), LINE);
    let report = contraflow_proto::StepReport { rank: 0, step: 1, ..Default::default() };
    drop(world.event(RankEvent::StepDone { report }));
    assert_eq!(world.core.warning(JOB), "");
}

#[test]
fn an_answer_that_comes_when_the_job_has_gone_on_is_a_line_of_the_log_alone() {
    let (mut world, _) = lost();
    (0..2).for_each(|rank| drop(world.event(RankEvent::Ready { rank: Rank::new(rank) })));
    let report = contraflow_proto::StepReport { rank: 0, step: 1, ..Default::default() };
    drop(world.event(RankEvent::StepDone { report }));
    assert_eq!(read(&mut world, 1, of(1)), [LINE]);
    assert_eq!(world.core.warning(JOB), "");
}

#[test]
fn others_are_asked_where_one_does_not_answer_and_that_has_an_end() {
    let (mut world, _) = lost();
    drop(world.attach(4, Vec::new()));
    drop(world.attach(5, Vec::new()));
    let later = asked(&world.pass(120_000, &[1, 3, 4, 5]));
    assert_eq!(later.iter().map(|(worker, ..)| *worker).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(read(&mut world, 4, of(1)), [""; 0]);
}

#[test]
fn where_no_worker_is_left_the_next_one_that_comes_is_asked() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(spec(1, 0))));
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    drop(world.step(Event::Detached { worker: 1 }));
    assert_eq!(asked(&world.pass(RETURN_MS + 5_000, &[])), []);
    drop(world.attach(2, Vec::new()));
    assert_eq!(asked(&world.pass(5 * TICK_MS, &[2])), [(2, of(1), vec![Rank::new(0)])]);
}

#[test]
fn a_job_that_fails_or_hangs_is_asked_about_and_one_that_is_done_or_cancelled_is_not() {
    let failed = RankEvent::Failed {
        rank: Rank::new(0),
        action: "F1.0".into(),
        cause: "a panic".into(),
        kind: ErrorKind::Bug,
        peer: None,
    };
    let mut world = training();
    drop(world.event(failed));
    let effects = world.pass(ABORT_MS + 10 * TICK_MS, &[1, 2, 3]);
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Ended(End::Failed));
    assert_eq!(asked(&effects), [(1, of(1), vec![])]);
    assert_eq!(read(&mut world, 1, of(1)), [LINE]);
    assert_eq!(world.core.warning(JOB), LINE, "there is no later formation");
    let mut world = training();
    drop(world.step(Event::Cancel { job: JOB, reason: String::new() }));
    assert_eq!(asked(&world.pass(10 * TICK_MS, &[1, 2, 3])), []);
}
