//! Rings made by hand, and what is said of them.

use super::super::record::Record;
use super::super::ring::Header;
use super::*;
use crate::fabric::FrameKind;
use crate::schedule::{Chunk, Component, Pass};

const SECOND: u64 = 1_000_000_000;

/// When all rings of these tests begin.
const BEGAN: u64 = 1_000 * SECOND;

fn ring(
    rank: u32,
    world: u32,
    alive: u64,
    events: &[(u64, u16, Event)],
) -> (usize, Result<Ring, Unreadable>) {
    let program = String::new();
    let header = Header { rank, world, job: 1, generation: 1, process: 7, began: BEGAN, program };
    let record = |(number, &(at, lane, event))| Record { number, at, lane, event };
    let records = (1..).zip(events).map(record).collect();
    (rank as usize, Ok(Ring { header, alive, records, unreadable: 0 }))
}

fn forward(stage: usize, micro_batch: usize) -> Work {
    let (pass, chunk) = (Pass::Forward, Chunk { stage, micro_batch });
    Work::Component { pass, chunk, layer: 3, component: Component::Attention }
}

fn frame(peer: u32, kind: FrameKind) -> Frame {
    let phase = Phase::Train;
    Frame { peer, kind, phase, step: 7, stage: 1, micro_batch: 3, layer: 0, hop: 0 }
}

/// A receive that has begun and waits.
fn waiting(peer: u32, at: u64, lane: u16) -> [(u64, u16, Event); 2] {
    let (kind, chunk) = (crate::schedule::TransferKind::Activation, Chunk { stage: 1, micro_batch: 3 });
    let receive = Event::Began(Work::Receive { kind, chunk }, 7);
    [(at, lane, receive), (at, lane, Event::Awaited(frame(peer, FrameKind::Activation)))]
}

/// One operation of step 7 that has ended after a second.
fn done() -> [(u64, u16, Event); 2] {
    [(0, 0, Event::Began(forward(0, 0), 7)), (SECOND, 0, Event::Ended(forward(0, 0), 7))]
}

fn events(parts: &[&[(u64, u16, Event)]]) -> Vec<(u64, u16, Event)> {
    parts.concat()
}

#[test]
fn a_hang_in_an_operation_names_the_rank_the_operation_and_who_waits_for_it() {
    let alive = 14 * SECOND + SECOND * 3 / 10;
    let stuck = (2 * SECOND, 0, Event::Began(forward(1, 3), 7));
    let rings = [
        // Through rank 1.
        ring(0, 4, alive, &events(&[&done(), &waiting(1, 3 * SECOND, 5)])),
        ring(1, 4, alive, &events(&[&done(), &waiting(2, 3 * SECOND, 5)])),
        // It also waits, on a lane of its own, for the one that waits for it: that is not what holds it up.
        ring(2, 4, alive, &events(&[&done(), &[stuck], &waiting(1, 2 * SECOND, 5)])),
        ring(3, 4, alive, &events(&[&done(), &waiting(2, 4 * SECOND, 5)])),
    ];
    let analysis = Analysis::of(&rings, None);
    assert_eq!(
        analysis.to_string(),
        "rank 2 has been in forward of Attention, layer 3, stage 1, micro-batch 3, of step 7 for 12.3 s; ranks 0, 1, 3 wait for it"
    );
    assert!(analysis.is_stuck());
    assert_eq!(analysis.ranks[3].last, Some((forward(0, 0), 7)));
    let words = analysis.ranks[3].to_string();
    assert!(
        words.contains("waiting for Activation of stage 1, micro-batch 3, layer 0 from rank 2 for 10.3 s"),
        "{words}"
    );
    // As long as the longest operation allows it is no hang.
    let slow = [(0, 0, Event::Began(forward(0, 0), 6)), (2 * SECOND, 0, Event::Ended(forward(0, 0), 6))];
    let rings = [ring(0, 1, alive, &events(&[&slow, &[stuck]]))];
    assert!(!Analysis::of(&rings, None).is_stuck());
}

#[test]
fn a_process_that_is_alive_is_judged_by_the_clock() {
    let rings = [ring(0, 1, 0, &[(0, 0, Event::Began(Work::Totals, 2))])];
    assert!(!Analysis::of(&rings, None).is_stuck());
    let now = Analysis::of(&rings, Some(BEGAN + 4 * SECOND));
    assert!(now.to_string().contains("all-reduce of the step's totals, of step 2 for 4.0 s"), "{now}");
}

#[test]
fn a_dead_rank_is_named_before_those_at_work() {
    let (dead, alive) = (2 * SECOND, 30 * SECOND);
    let busy = (3 * SECOND, 0, Event::Began(forward(0, 1), 7));
    let rings = [
        ring(0, 3, alive, &events(&[&done(), &waiting(1, 3 * SECOND, 5)])),
        ring(1, 3, dead, &events(&[&done(), &[(2 * SECOND, 0, Event::Began(forward(1, 3), 7))]])),
        ring(2, 3, alive, &events(&[&done(), &[busy]])),
    ];
    let analysis = Analysis::of(&rings, None);
    assert_eq!(
        analysis.to_string(),
        "rank 1 has given no sign of life for 28.0 s, after forward of Attention, layer 3, stage 0, micro-batch 0, of step 7; \
         rank 0 waits for it"
    );
    assert!(analysis.is_stuck());
}

#[test]
fn ranks_that_wait_for_each_other_are_named_as_a_circle() {
    let rings = [
        // The one that leads into the circle is no part of it.
        ring(0, 3, 20 * SECOND, &waiting(1, SECOND, 5)),
        ring(1, 3, 20 * SECOND, &waiting(2, SECOND, 5)),
        ring(2, 3, 20 * SECOND, &waiting(1, SECOND, 5)),
    ];
    let analysis = Analysis::of(&rings, None);
    let words = analysis.to_string();
    assert!(words.starts_with("ranks 1, 2 wait for each other: rank 1 for Activation of stage 1"), "{words}");
    assert!(
        words.contains("from rank 2; rank 2 for Activation") && words.ends_with("from rank 1"),
        "{words}"
    );
    assert!(analysis.is_stuck());
}

#[test]
fn a_rank_is_not_waited_for_that_has_sent_what_the_other_one_awaits() {
    let sent = |to, frame| (2 * SECOND, 6, Event::Sent(Frame { peer: to, ..frame }));
    let activation = frame(0, FrameKind::Activation);
    let rings = |sent: &[(u64, u16, Event)]| {
        let first = ring(0, 2, 20 * SECOND, &events(&[&done(), sent, &waiting(1, 3 * SECOND, 5)]));
        [first, ring(1, 2, 20 * SECOND, &events(&[&done(), &waiting(0, SECOND, 5)]))]
    };
    let analysis = Analysis::of(&rings(&[sent(1, activation)]), None);
    assert_eq!(
        analysis.to_string(),
        "rank 1 has been waiting for Activation of stage 1, micro-batch 3, layer 0 from rank 0, which has sent it, for 19.0 s, \
         after forward of Attention, layer 3, stage 0, micro-batch 0, of step 7; rank 0 waits for it"
    );
    assert!(analysis.is_stuck());
    // Another frame, or the same one to another rank, is not what it waits for.
    for other in [sent(1, Frame { micro_batch: 2, ..activation }), sent(0, activation)] {
        let analysis = Analysis::of(&rings(&[other]), None);
        assert!(matches!(analysis.verdict, Verdict::Circle(_)), "{analysis}");
    }
}

#[test]
fn ranks_that_have_all_finished_hold_nobody_up() {
    let end = [(2 * SECOND, 9, Event::Finished)];
    let rings: Vec<_> = (0..2).map(|rank| ring(rank, 2, 0, &events(&[&done(), &end]))).collect();
    let analysis = Analysis::of(&rings, None);
    assert_eq!(analysis.verdict, Verdict::Finished);
    assert!(!analysis.is_stuck());
    let rings = [ring(0, 2, 0, &waiting(1, SECOND, 5)), ring(1, 2, 0, &events(&[&done(), &end]))];
    let words = Analysis::of(&rings, None).to_string();
    assert_eq!(words, "rank 1 has done all that it was asked; rank 0 waits for it");
}

#[test]
fn a_ring_that_is_missing_or_damaged_is_named_where_somebody_waits_for_it() {
    let waits = |peer| ring(0, 2, 20 * SECOND, &waiting(peer, SECOND, 5));
    let words = |rings: &[_]| Analysis::of(rings, None).to_string();
    let expected = "rank 1 has left no record that can be read (its file is missing); rank 0 waits for it";
    assert_eq!(words(&[waits(1)]), expected);
    let damaged = (1, Err(Unreadable("its header is damaged".into())));
    assert!(words(&[waits(1), damaged.clone()]).contains("(its header is damaged); rank 0 waits for it"));
    let (_, stranger) = ring(0, 2, SECOND, &done());
    assert!(words(&[waits(1), (1, stranger)]).contains("its file is of rank 0"));
    // Nobody waits for it: what the others are about counts.
    let busy = ring(0, 2, SECOND, &[(0, 0, Event::Began(forward(1, 3), 7))]);
    assert!(words(&[busy, damaged.clone()]).contains("rank 0 has been in forward"));
    assert_eq!(Analysis::of(&[damaged], None).verdict, Verdict::NoRecord);
    assert_eq!(Analysis::of(&[], None).verdict, Verdict::NoRecord);
}

#[test]
fn the_first_to_fail_is_named_whoever_gives_up_then() {
    let failed = |at| [(at, 0, Event::Began(forward(1, 3), 7)), (at + 1, 0, Event::Failed(forward(1, 3), 7))];
    let rings = [
        ring(0, 3, SECOND, &waiting(2, 0, 5)),
        ring(1, 3, SECOND, &events(&[&done(), &failed(3 * SECOND)])),
        ring(2, 3, SECOND, &events(&[&done(), &failed(2 * SECOND)])),
    ];
    let words = Analysis::of(&rings, None).to_string();
    assert_eq!(
        words,
        "rank 2 was the first to fail, in forward of Attention, layer 3, stage 1, micro-batch 3, of step 7"
    );
}

#[test]
fn what_a_replicator_waits_for_is_no_wait_of_its_rank_unless_a_step_waits_for_that() {
    let replicate = Frame { phase: Phase::Replicate, ..frame(1, FrameKind::State) };
    let replicator = (0, 6, Event::Awaited(replicate));
    let other =
        ring(1, 2, 20 * SECOND, &events(&[&done(), &[(2 * SECOND, 0, Event::Began(forward(1, 3), 7))]]));
    let idle = [ring(0, 2, 20 * SECOND, &events(&[&done(), &[replicator]])), other.clone()];
    assert_eq!(Analysis::of(&idle, None).ranks[0].doing, Doing::Idle);
    let awaits = (2 * SECOND, 0, Event::Began(Work::AwaitReplica, 7));
    let held = [ring(0, 2, 20 * SECOND, &events(&[&done(), &[replicator, awaits]])), other];
    let words = Analysis::of(&held, None).to_string();
    assert!(
        words.starts_with("rank 1 has been in forward") && words.ends_with("rank 0 waits for it"),
        "{words}"
    );
}

#[test]
fn storage_that_one_thread_begins_and_another_ends_is_known_until_then() {
    let begins = [(SECOND, 1, Event::StorageBegan), (2 * SECOND, 2, Event::StorageBegan)];
    let of = |events: &[_]| Analysis::of(&[ring(0, 1, 9 * SECOND, events)], None).ranks[0].clone();
    let state = of(&begins);
    assert_eq!((state.doing, state.lasted), (Doing::Storage, 8 * SECOND));
    let ends = [(3 * SECOND, 3, Event::StorageEnded), (4 * SECOND, 3, Event::StorageEnded)];
    assert_eq!(of(&events(&[&begins, &ends])).doing, Doing::Idle);
}

#[test]
fn a_rank_that_is_known_to_be_lost_is_named_with_what_it_was_in_and_what_is_awaited_of_it() {
    let alive = 4 * SECOND;
    let stuck = (2 * SECOND, 0, Event::Began(forward(1, 3), 7));
    let rings = |last: &[(u64, u16, Event)]| {
        [
            // Through rank 1.
            ring(0, 3, alive, &events(&[&done(), &waiting(1, 3 * SECOND, 5)])),
            ring(1, 3, alive, &events(&[&done(), &waiting(2, 3 * SECOND, 5)])),
            ring(2, 3, 3 * SECOND, &events(&[&done(), last])),
        ]
    };
    let lost = BTreeSet::from([2]);
    let of = |last: &[_]| Analysis::after_loss(&rings(last), &lost);
    let killed = of(&[stuck]);
    assert_eq!(
        killed.incident().unwrap(),
        "rank 2 had been in forward of Attention, layer 3, stage 1, micro-batch 3, of step 7 for 2.0 s when it was lost; \
         ranks 0, 1 wait for it: rank 1 for Activation of stage 1, micro-batch 3, layer 0 from rank 2"
    );
    assert!(killed.is_stuck());
    // It waited itself when it was lost: nobody is in a circle with the dead.
    let words = of(&waiting(0, 2 * SECOND, 5)).incident().unwrap();
    let expected = "rank 2 had been waiting for Activation of stage 1, micro-batch 3, layer 0 from rank 0 for 2.0 s when it was lost, \
                    after forward of Attention, layer 3, stage 0, micro-batch 0, of step 7; ranks 0, 1 wait for it: rank 1 for ";
    assert!(words.starts_with(expected), "{words}");
    // Nobody waits for it yet.
    let busy = [ring(0, 2, alive, &done()), ring(1, 2, alive, &events(&[&done(), &[stuck]]))];
    let words = Analysis::after_loss(&busy, &BTreeSet::from([1])).incident().unwrap();
    assert!(
        words.starts_with("rank 1 had been in forward") && words.ends_with(" when it was lost"),
        "{words}"
    );
}

#[test]
fn of_a_job_clocks_may_differ_by_what_is_no_silence_yet() {
    let stuck = [(2 * SECOND, 0, Event::Began(forward(1, 3), 7))];
    // The clock of the first is ahead by so much; nobody has ended.
    let rings = |ahead: u64| {
        let (rank, Ok(mut first)) = ring(0, 2, 14 * SECOND, &events(&[&done(), &waiting(1, 3 * SECOND, 5)]))
        else {
            panic!("a ring")
        };
        first.header.began += ahead * SECOND;
        [(rank, Ok(first)), ring(1, 2, 14 * SECOND, &events(&[&done(), &stuck]))]
    };
    let doing = |analysis: Analysis| analysis.ranks[1].doing.clone();
    assert_eq!(doing(Analysis::of_job(&rings(20), None)), Doing::Operation(forward(1, 3), 7));
    // On one machine there is one clock.
    assert_eq!(doing(Analysis::of(&rings(20), None)), Doing::Silent);
    assert_eq!(doing(Analysis::of_job(&rings(60), None)), Doing::Operation(forward(1, 3), 7));
    assert_eq!(doing(Analysis::of_job(&rings(61), None)), Doing::Silent);
}

#[test]
fn where_it_is_known_who_was_lost_no_clock_says_that_somebody_else_is_gone() {
    // The clock of the first is ten minutes ahead.
    let stuck = [(2 * SECOND, 0, Event::Began(forward(1, 3), 7))];
    let (rank, Ok(mut ahead)) = ring(0, 2, 4 * SECOND, &events(&[&done(), &waiting(1, 3 * SECOND, 5)]))
    else {
        panic!("a ring")
    };
    ahead.header.began += 600 * SECOND;
    let rings = [(rank, Ok(ahead)), ring(1, 2, 4 * SECOND, &events(&[&done(), &stuck]))];
    assert_eq!(Analysis::of(&rings, None).ranks[1].doing, Doing::Silent);
    let words = Analysis::after_loss(&rings, &BTreeSet::new()).incident().unwrap();
    assert!(words.starts_with("rank 1 has been in forward"), "{words}");
}

#[test]
fn an_incident_is_told_in_one_bounded_line_and_only_where_there_is_something_to_tell() {
    let incident = |rings: &[_]| Analysis::after_loss(rings, &BTreeSet::new()).incident();
    let noisy = format!("\u{1b}[31m\n{}", "x".repeat(1 << 16));
    let damaged = (1, Err(Unreadable(noisy)));
    let words = incident(&[ring(0, 2, SECOND, &waiting(1, 0, 5)), damaged.clone()]).unwrap();
    assert!(words.len() <= 1_024 && !words.contains(char::is_control), "{words}");
    assert!(words.starts_with("rank 1 has left no record that can be read (\\u{1b}[31m\\n"), "{words}");
    // The longest that there may be without such a text.
    let circle: Vec<_> =
        (0..64).map(|rank| ring(rank, 64, SECOND, &waiting((rank + 1) % 64, 0, 5))).collect();
    let words = incident(&circle).unwrap();
    assert!(words.len() <= 1_024 && words.starts_with("ranks 0, 1,") && !words.ends_with("..."), "{words}");
    for nothing in [vec![], vec![damaged], vec![ring(0, 1, SECOND, &done())], vec![ring(0, 1, 0, &[])]] {
        assert_eq!(incident(&nothing), None);
    }
}
