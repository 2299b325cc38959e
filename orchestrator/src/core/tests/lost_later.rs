//! Ranks that are lost when their job has lost its formation already: their slots are gone for the account, for the line, and for whoever
//! reads the flight recorders.

use super::goodput::{made, parts, ready, stepping};
use super::*;
use crate::core::schedule::refill_lost;
use crate::placement::{Slots, Supply};

const TICK_S: f64 = TICK_MS as f64 / 1e3;

/// The job of two ranks has lost the one on worker 2, `ms` later that on worker 1, and there is no place for either: worker 3 takes none.
/// Returns what was done from the first loss on.
fn both_lost(mut world: World, ms: u64) -> (World, Vec<Effect>) {
    drop(world.step(Event::Drain { node: "n3".into() }));
    drop(world.pass(ms, &[1, 3]));
    drop(world.pass(LEASE_MS + TICK_MS - ms, &[3]));
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    let effects = world.pass(ms, &[3]);
    (world, effects)
}

fn lost_later(world: &World) -> Vec<(u32, Vec<Rank>)> {
    let of = |fact: &Fact| match fact {
        Fact::RanksLost { generation, lost, .. } => Some((generation.number(), lost.clone())),
        _ => None,
    };
    world.facts.iter().filter_map(of).collect()
}

#[test]
fn the_account_counts_a_slot_until_its_worker_is_lost_and_no_longer() {
    let (mut world, effects) = both_lost(stepping(), 1_000);
    assert_eq!(lost_later(&world), [(1, vec![Rank::new(0)])]);
    assert!(logged(&effects)[0].starts_with("rank 0 lost: worker "), "{effects:?}");
    let record = world.core.jobs().all[&JOB].clone();
    assert_eq!((record.losses, record.why.matches("lost: worker").count()), (1, 2), "{}", record.why);
    // From the loss of worker 2 to that of worker 1 one slot, and none from then on.
    let before = world.core.account(JOB);
    assert_eq!((parts(before).0[3], parts(before).1), (1.0, 0.0));
    drop(world.pass(5_000, &[3]));
    let later = world.core.account(JOB);
    assert_eq!(parts(later), parts(before), "nobody holds a slot");
    // Nor is any of them taken for idle: the one slot that is there is.
    let idle = world.core.cluster_account().idle;
    drop(world.pass(1_000, &[3]));
    assert_eq!(world.core.cluster_account().idle - idle, 1_000);
    // Two slots from the next formation on.
    drop(world.step(Event::Undrain { node: "n3".into() }));
    drop(world.attach(4, Vec::new()));
    assert_eq!(world.places(), [3, 4]);
    drop(world.pass(700, &[3, 4]));
    ready(&mut world);
    for step in 2..=3 {
        drop(world.pass(1_000, &[3, 4]));
        made(&mut world, step, 1.0);
    }
    let recovery = parts(world.core.account(JOB)).0[3];
    assert!((recovery - (1.0 + 2.0 * 0.7)).abs() < TICK_S / 2.0, "{recovery}");
}

#[test]
fn whoever_reads_the_flight_recorders_is_told_of_all_that_are_lost() {
    let (_, effects) = both_lost(training(), 2 * TICK_MS);
    let mut world = both_lost(training(), 2 * TICK_MS).0;
    let later = world.pass(5 * TICK_MS, &[3]);
    let commands = commands(&effects).into_iter().chain(commands(&later));
    let asked = commands.filter_map(|(worker, command)| match command {
        WorkerCommand::ReadFlight { formation, lost } => Some((worker, *formation, lost.clone())),
        _ => None,
    });
    assert_eq!(asked.collect::<Vec<_>>(), [(3, of(1), vec![Rank::new(0), Rank::new(1)])]);
}

#[test]
fn a_worker_that_is_back_has_its_ranks_again_while_its_slot_is_free() {
    let (mut world, _) = both_lost(stepping(), 1_000);
    drop(world.attach(4, Vec::new()));
    drop(world.attach(1, Vec::new()));
    assert_eq!(world.places(), [1, 4]);
    // A slot that somebody else has taken meanwhile is not taken twice.
    let (world, _) = both_lost(stepping(), 1_000);
    let record = &world.core.jobs().all[&JOB];
    let slots = |worker, free| Slots { worker, node: format!("n{worker}"), block: String::new(), free };
    let refilled = |free| {
        let supply = Supply { slots: vec![slots(1, free), slots(4, 1), slots(5, 1)], ..Supply::default() };
        let mut places = refill_lost(&supply, record, record.formed.as_ref().unwrap()).unwrap();
        places.sort_unstable();
        places
    };
    assert_eq!((refilled(0), refilled(1)[0]), (vec![4, 5], 1));
}

#[test]
fn what_is_lost_while_the_orchestrator_is_away_is_lost_when_nobody_comes_back() {
    let mut world = stepping();
    drop(world.step(Event::Drain { node: "n3".into() }));
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((world.core.jobs().all[&JOB].phase.clone(), world.facts.len() > 3), (Phase::Broken, true));
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
    let mut again = World::of(Core::new(jobs, 2, world.now, Times::default()), world.now);
    drop(again.attach(3, Vec::new()));
    drop(again.pass(ADOPTION_MS + 2 * TICK_MS, &[3]));
    assert_eq!(lost_later(&again), [(1, vec![Rank::new(0)])]);
    let account = again.core.account(JOB);
    drop(again.pass(5_000, &[3]));
    assert_eq!(again.core.account(JOB), account);
}
