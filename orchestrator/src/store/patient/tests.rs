//! A store on a disk that fails now and then: every batch is there whole or not at all, whatever fails and whenever the process
//! ends; and what was waited for is as if nothing had failed.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::store::disk::Disk;
use crate::store::{Batch, Numbered, Removals, Replay, Store};

/// A batch with something for every table; every third one takes away what an earlier one has kept.
fn batch(number: u64) -> Batch {
    let bytes = |kind: u64| vec![(number * 7 + kind) as u8; 1 + (number * 631 + kind * 97) as usize % 5000];
    let gone = match number % 3 {
        0 => Removals { jobs: vec![number % 2], steps_after: vec![(2, number.saturating_sub(2))] },
        _ => Removals::default(),
    };
    Batch {
        records: (0..1 + number % 3).map(bytes).collect(),
        steps: (0..3).map(|job| (job, vec![(number, bytes(10 + job))])).collect(),
        lines: [(number % 3, vec![bytes(20), bytes(21)])].into(),
        gone,
    }
}

/// What a store holds, in plain collections.
#[derive(Debug, Default, PartialEq)]
struct Held {
    records: Vec<Vec<u8>>,
    steps: BTreeMap<u64, Vec<Numbered>>,
    lines: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Held {
    fn after(batches: u64) -> Held {
        let mut held = Held::default();
        for Batch { records, steps, lines, gone } in (1..=batches).map(batch) {
            held.records.extend(records);
            steps.into_iter().for_each(|(job, steps)| held.steps.entry(job).or_default().extend(steps));
            lines.into_iter().for_each(|(job, lines)| held.lines.entry(job).or_default().extend(lines));
            for job in gone.jobs {
                held.steps.remove(&job);
                held.lines.remove(&job);
            }
            for (job, to) in gone.steps_after {
                held.steps.entry(job).or_default().retain(|(step, _)| *step <= to);
            }
        }
        held.steps.retain(|_, steps| !steps.is_empty());
        held
    }

    fn of(store: &Store, replay: &Replay) -> Held {
        let mut held = Held {
            records: replay.records.iter().map(|(_, bytes)| bytes.clone()).collect(),
            ..Held::default()
        };
        for job in 0..3 {
            let steps: Vec<Numbered> = store.steps(job, 0).unwrap().map(Result::unwrap).collect();
            let lines: Vec<_> = store.lines(job, 0).unwrap().map(|line| line.unwrap().1).collect();
            held.steps.extend((!steps.is_empty()).then_some((job, steps)));
            held.lines.extend((!lines.is_empty()).then_some((job, lines)));
        }
        held
    }
}

/// A disk, and a store on it with batches.
fn with_batches(batches: u64) -> (Disk, Store) {
    let disk = Disk::default();
    let (store, _) = disk.open().unwrap();
    for number in 1..=batches {
        store.keep(&batch(number)).unwrap();
    }
    (disk, store)
}

#[test]
fn a_process_that_ends_while_the_disk_refuses_a_call_has_kept_a_batch_whole_or_not_at_all() {
    const BATCHES: u64 = 9;
    let (disk, store) = with_batches(BATCHES - 1);
    let before = disk.state().calls;
    store.keep(&batch(BATCHES)).unwrap();
    let calls = disk.state().calls - before;
    assert!(calls > 5, "{calls}");
    let mut kept = [0, 0];
    for call in 0..calls {
        let (disk, store) = with_batches(BATCHES - 1);
        disk.refuse(call, u64::MAX);
        let left = std::thread::scope(|scope| {
            let write = scope.spawn(|| store.keep(&batch(BATCHES)));
            disk.until_refused(1);
            // Killed while it waits, or told to end: it does not wait any more, and what follows fails too.
            let left = [disk.after_kill(), disk.after_power_loss(|| false)];
            store.give_up();
            write.join().unwrap().unwrap_err();
            left
        });
        assert!(store.keep(&batch(BATCHES)).is_err());
        for left in left {
            let (store, replay) = left.open().unwrap();
            let held = Held::of(&store, &replay);
            let is_kept = held == Held::after(BATCHES);
            assert!(is_kept || held == Held::after(BATCHES - 1), "call {call}");
            kept[usize::from(is_kept)] += 1;
            // It goes on from there.
            store.keep(&batch(BATCHES + u64::from(is_kept))).unwrap();
        }
    }
    assert!(kept[0] > 0 && kept[1] > 0, "{kept:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_waits_for_the_disk_is_kept_as_if_nothing_had_failed(faults in prop::collection::vec((1_u64..12, 0_u64..40, 1_u64..4), 1..4), is_forgetful: bool) {
        let (disk, store) = with_batches(0);
        disk.state().is_forgetful = is_forgetful;
        for number in 1..12 {
            if let Some(&(_, after, calls)) = faults.iter().find(|(at, ..)| *at == number) {
                disk.refuse(after, calls);
            }
            store.keep(&batch(number)).unwrap();
            prop_assert_eq!(store.trouble(), None);
            // Whatever happens now, it is there.
            for left in [disk.after_kill(), disk.after_power_loss(|| false)] {
                let (store, replay) = left.open().unwrap();
                prop_assert!(Held::of(&store, &replay) == Held::after(number), "batch {}", number);
            }
        }
    }
}

#[test]
fn what_is_waited_for_can_be_asked() {
    let (disk, store) = with_batches(1);
    assert_eq!(store.trouble(), None);
    disk.state().room = Some(0);
    let (words, kept) = std::thread::scope(|scope| {
        let write = scope.spawn(|| store.keep(&batch(2)));
        // The second time what the first one left is there to see.
        disk.until_refused(2);
        let words = store.trouble().map(|trouble| trouble.to_string());
        disk.state().room = None;
        (words.unwrap_or_default(), write.join().unwrap().unwrap())
    });
    let full = io::Error::from(io::ErrorKind::StorageFull).to_string();
    assert!(words.starts_with("cannot be written for 0 s: ") && words.ends_with(&full), "{words}");
    assert_eq!(kept, 5);
    assert_eq!(store.trouble(), None);
}

#[test]
fn a_file_that_is_cut_is_no_disk_to_wait_for() {
    let patience = Patience::of(Path::new("state/events.redb").into());
    patience.begin();
    let mut calls = 0;
    let cut = || {
        calls += 1;
        Err::<(), _>(io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    patience.insist("cannot be read", cut).unwrap_err();
    assert_eq!((calls, patience.trouble()), (1, None));
}
