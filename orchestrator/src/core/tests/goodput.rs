//! Where the slot time of a job and of a cluster goes, second by second.

use contraflow_proto::StepReport;

use super::*;
use crate::metrics::goodput::{Account, SlotTime};

/// A time that is one. **Units**: milliseconds since 1970.
const BEGAN: u64 = 1_000_000;

/// The ranks of the running formation have their models.
pub(super) fn ready(world: &mut World) {
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
}

/// Both ranks have made a step, which took this long.
pub(super) fn made(world: &mut World, step: u64, seconds: f64) {
    for rank in 0..2 {
        let report = StepReport { rank, step, seconds, ..StepReport::default() };
        drop(world.event(RankEvent::StepDone { report }));
    }
}

/// In slot-seconds: committed, recomputed, forming, recovery; undecided.
pub(super) fn parts(account: Account) -> ([f64; 4], f64) {
    let SlotTime { committed, recomputed, forming, recovery } = account.spent;
    let seconds = |ms: u64| ms as f64 / 1e3;
    ([committed, recomputed, forming, recovery].map(seconds), seconds(account.undecided))
}

/// Two ranks on workers 1 and 2 have formed from the second to the third second, and made steps of a second until the sixth one, when
/// the storage holds step 1; worker 3 is spare.
pub(super) fn stepping() -> World {
    let mut world = World::of(Core::new(Jobs::default(), 1, BEGAN, Times::default()), BEGAN);
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.pass(2_000, &[1, 2, 3]));
    // Nobody is asked for what the lost one had in memory.
    drop(world.step(Event::Submit(spec_with(2, 0, &["checkpoint.in_memory=false"]))));
    drop(world.pass(500, &[1, 2, 3]));
    ready(&mut world);
    for step in 1..=3 {
        drop(world.pass(if step == 1 { 1_500 } else { 1_000 }, &[1, 2, 3]));
        made(&mut world, step, 1.0);
        if step == 1 {
            checkpoint(&mut world, 1);
        }
    }
    world
}

/// What all three slots had to give since the beginning, in slot-seconds.
fn whole(world: &World) -> f64 {
    3.0 * (world.now - BEGAN) as f64 / 1e3
}

/// All that is accounted for, in slot-seconds.
fn sum(world: &World) -> f64 {
    let account = world.core.cluster_account();
    (account.spent.total() + account.undecided + account.idle) as f64 / 1e3
}

#[test]
fn the_parts_of_a_job_and_of_its_cluster_add_up_through_a_loss() {
    let mut world = stepping();
    assert_eq!(parts(world.core.account(JOB)), ([6.0, 0.0, 2.0, 0.0], 0.0));
    let cluster = world.core.cluster_account();
    assert_eq!((parts(cluster), cluster.idle), (([6.0, 0.0, 2.0, 0.0], 0.0), 3 * 2_000 + 4_000));
    assert_eq!(sum(&world), whole(&world));
    // Worker 2 is not heard any more: for its lease the fourth step goes on, then the other one has lost it.
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 3]);
    let lost_s = (LEASE_MS + TICK_MS) as f64 / 1e3;
    assert_eq!(parts(world.core.account(JOB)), ([6.0, 2.0 * lost_s, 2.0, 0.0], 0.0));
    // It resumes from step 1: steps 2 and 3 are made again, then the fourth one.
    drop(world.pass(700, &[1, 3]));
    ready(&mut world);
    for step in 2..=4 {
        drop(world.pass(1_000, &[1, 3]));
        made(&mut world, step, 1.0);
    }
    assert_eq!(parts(world.core.account(JOB)), ([8.0, 2.0 * lost_s + 4.0, 2.0, 1.4], 0.0));
    drop(world.pass(300, &[1, 3]));
    assert_eq!(parts(world.core.account(JOB)).1, 0.6);
    // One slot is gone with its worker, at the end of its lease.
    let gone = 3.0 + 0.7 + 0.3;
    assert!((sum(&world) - (whole(&world) - gone)).abs() <= 2.0 * TICK_MS as f64 / 1e3, "{}", sum(&world));
}

#[test]
fn an_account_outlives_the_orchestrator_and_idle_slots_are_counted_anew() {
    let mut world = stepping();
    drop(world.pass(400, &[1, 2, 3]));
    let facts: Vec<String> = world.facts.iter().map(|fact| serde_json::to_string(fact).unwrap()).collect();
    let mut jobs = Jobs::default();
    facts.iter().for_each(|fact| jobs.apply(&serde_json::from_str(fact).unwrap()));
    assert_eq!(&jobs, world.core.jobs());
    let mut again = World::of(Core::new(jobs, 2, world.now, Times::default()), world.now);
    // What was running when it ended is taken for a step.
    assert_eq!(parts(again.core.account(JOB)), ([6.8, 0.0, 2.0, 0.0], 0.0));
    assert_eq!(again.core.cluster_account(), Account::default());
    (1..=2).for_each(|worker| drop(again.attach(worker, hosted(1, &[worker as u32 - 1]))));
    drop(again.attach(3, Vec::new()));
    drop(again.pass(600, &[1, 2, 3]));
    made(&mut again, 4, 1.0);
    assert_eq!(parts(again.core.account(JOB)), ([8.0, 0.0, 2.0, 0.0], 0.0));
    let cluster = again.core.cluster_account();
    assert_eq!((parts(cluster).0, cluster.idle), ([1.2, 0.0, 0.0, 0.0], 600));
    // A job that is forgotten takes nothing back.
    drop(again.step(Event::Cancel { job: JOB, reason: String::new() }));
    let before = again.core.cluster_account();
    again.core = again.core.retaining(0);
    drop(again.step(Event::Tick));
    assert_eq!((again.core.jobs().all.len(), again.core.cluster_account()), (0, before));
}
