//! Where ranks fit, by the memory of workers.

use super::*;

const GIB: u64 = 1 << 30;

fn attach(world: &mut World, worker: u64, (slots, memory_bytes): (usize, u64)) {
    let registration = Registration {
        name: format!("w{worker}"),
        slots,
        memory_bytes,
        memory_limit: "RLIMIT_AS".into(),
        ..registration(worker)
    };
    drop(world.join(Attachment { registration, ..Attachment::default() }));
}

fn submit(world: &mut World, ranks: usize, rank_bytes: u64) {
    drop(world.step(Event::Submit(Box::new(JobSpec { rank_bytes, ..*spec(ranks, 0) }))));
}

fn places(world: &World, job: JobId) -> Vec<u64> {
    world.core.jobs().all[&job].running().map_or_else(Vec::new, |formed| formed.places.clone())
}

#[test]
fn a_rank_goes_only_where_it_fits_and_what_fits_nowhere_waits_with_the_numbers() {
    let mut world = World::new();
    attach(&mut world, 1, (2, 2 * GIB));
    attach(&mut world, 2, (1, 8 * GIB));
    submit(&mut world, 1, 3 * GIB);
    assert_eq!(places(&world, JOB), [2]);
    submit(&mut world, 2, 3 * GIB);
    assert_eq!(places(&world, SECOND), [0_u64; 0]);
    let waits = world.core.waiting_for(SECOND);
    let words = "needs 2 ranks, room for 1, 2 with too little memory: a rank needs at least 3.0 GiB, \
                 worker w1 on node n1 has 2.0 GiB (RLIMIT_AS)";
    assert_eq!(waits, words);
    // It blocks no job behind it.
    submit(&mut world, 2, GIB);
    assert_eq!(places(&world, id(3)), [1, 1]);
    attach(&mut world, 3, (2, 6 * GIB));
    assert_eq!(places(&world, SECOND), [3, 3]);
}

#[test]
fn ranks_of_several_jobs_share_a_workers_memory_and_an_unknown_one_has_no_limit() {
    let mut world = World::new();
    attach(&mut world, 1, (4, 5 * GIB));
    submit(&mut world, 1, 3 * GIB);
    submit(&mut world, 1, 3 * GIB);
    assert_eq!((places(&world, JOB), places(&world, SECOND)), (vec![1], vec![]));
    let waits = world.core.waiting_for(SECOND);
    assert!(
        waits.starts_with("needs 1 rank, 4 healthy (1 of them taken), 3 with too little memory"),
        "{waits}"
    );
    attach(&mut world, 2, (1, 0));
    assert_eq!(places(&world, SECOND), [2]);
}

#[test]
fn a_lost_rank_goes_only_where_it_fits() {
    let mut world = World::new();
    (1..=2).for_each(|worker| attach(&mut world, worker, (1, 4 * GIB)));
    attach(&mut world, 3, (1, 2 * GIB));
    submit(&mut world, 2, 3 * GIB);
    assert_eq!(places(&world, JOB), [1, 2]);
    drop(world.step(Event::Detached { worker: 2 }));
    drop(world.pass(RETURN_MS + 2 * TICK_MS, &[1, 3]));
    assert_eq!(places(&world, JOB), [0_u64; 0]);
    let waits = world.core.waiting_for(JOB);
    assert!(waits.contains("1 with too little memory: a rank needs at least 3.0 GiB, worker w3"), "{waits}");
    attach(&mut world, 4, (1, 4 * GIB));
    assert_eq!(places(&world, JOB), [1, 4]);
}

#[test]
fn a_node_that_is_drained_no_more_takes_ranks_again() {
    let mut world = World::new();
    attach(&mut world, 1, (1, 0));
    drop(world.step(Event::Drain { node: "n1".into() }));
    drop(world.step(Event::Submit(spec(1, 0))));
    let waits = world.core.waiting_for(JOB);
    assert!(waits.ends_with("; drained: n1, to be undone by contraflow drain --undo NODE"), "{waits}");
    drop(world.step(Event::Undrain { node: "n1".into() }));
    assert_eq!(world.places(), [1]);
    assert!(world.core.jobs().drained.is_empty() && !world.core.waiting_for(JOB).contains("drained"));
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
}

#[test]
fn a_worker_whose_data_port_does_not_answer_is_the_last_to_get_ranks() {
    let mut world = World::new();
    for worker in 1..=3 {
        let registration = Registration { is_unreachable: worker == 1, ..registration(worker) };
        drop(world.join(Attachment { registration, ..Attachment::default() }));
    }
    submit(&mut world, 2, 0);
    assert_eq!(places(&world, JOB), [2, 3]);
    // Where there is no other place it is one.
    submit(&mut world, 1, 0);
    assert_eq!(places(&world, SECOND), [1]);
}

#[test]
fn a_leaving_worker_is_drained_after_the_running_step() {
    let mut world = training();
    let effects = world.step(Event::LeaveRequested { worker: 2 });
    assert_eq!(commands(&effects).len(), 2);
    // It may say so again, after a break of its stream for instance.
    assert_eq!(commands(&world.step(Event::LeaveRequested { worker: 2 })), []);
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Stopped { rank, step: 5, in_memory: false })));
    checkpoint(&mut world, 5);
    let mut places = world.places();
    places.sort_unstable();
    assert_eq!(places, [1, 3]);
    assert_eq!(world.core.jobs().all[&JOB].losses, 0);
    drop(world.step(Event::Detached { worker: 2 }));
    assert_eq!(world.core.jobs().all[&JOB].generation().number(), 2);
}

#[test]
fn a_drained_node_is_left_after_the_running_step() {
    let mut world = training();
    let effects = world.step(Event::Drain { node: "n2".into() });
    assert_eq!(commands(&effects).len(), 2);
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Stopped { rank, step: 5, in_memory: false })));
    checkpoint(&mut world, 5);
    let mut places = world.places();
    places.sort_unstable();
    assert_eq!(places, [1, 3]);
}
