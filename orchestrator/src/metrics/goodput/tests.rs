//! Sequences of events whose sums are known.

use proptest::prelude::*;

use super::*;

const S: u64 = 1_000;

/// An hour of the day that means nothing. **Units**: seconds.
const T: u64 = 1_000_000;

fn at(seconds: u64) -> u64 {
    (T + seconds) * S
}

fn stop(at_s: u64, step: u64, step_s: u64) -> Stop {
    Stop { at_ms: at(at_s), step, step_ms: at(step_s) }
}

/// In slot-seconds: committed, recomputed, forming, recovery.
fn parts(account: Account) -> [u64; 4] {
    let SlotTime { committed, recomputed, forming, recovery } = account.spent;
    [committed, recomputed, forming, recovery].map(|part| part / S)
}

/// Waits 30 s for 4 slots, forms for 10 s, makes steps of 5 s: the first from 40 to 45.
fn training() -> Ledger {
    let mut ledger = Ledger::default();
    ledger.queued(at(0));
    ledger.formed(4, at(30));
    assert!(ledger.is_due(1));
    ledger.stepped(1, at(40), at(45));
    assert!(!ledger.is_due(2));
    ledger
}

#[test]
fn a_job_without_losses_is_queue_forming_and_steps_to_its_end() {
    let mut ledger = training();
    ledger.ended(true, stop(100, 10, 90));
    let account = ledger.account(at(500), 0);
    assert_eq!(parts(account), [4 * 60, 0, 4 * 10, 0]);
    assert_eq!((account.queued_ms, account.undecided, ledger.slots()), (30 * S, 0, 0));
    assert_eq!(account.spent.total(), 4 * 70 * S, "four slots from 30 to 100");
}

#[test]
fn a_loss_costs_the_step_it_cuts_off_the_way_back_and_the_steps_made_again() {
    let mut ledger = training();
    // Steps 1 to 10 until 90; the eleventh is cut off at 93, one of four ranks is gone.
    ledger.lost(3, stop(93, 10, 90));
    // Three slots wait for 7 s, four form for 20 s, and go on after step 8.
    ledger.formed(4, at(100));
    ledger.stepped(9, at(120), at(125));
    assert!(!ledger.is_due(9) && ledger.is_due(10));
    ledger.stepped(10, at(125), at(130));
    assert!(!ledger.is_due(11));
    ledger.ended(true, stop(150, 14, 150));
    let account = ledger.account(at(150), 0);
    let committed = 4 * (50 + 20);
    let recomputed = 4 * (3 + 10);
    let recovery = 3 * 7 + 4 * 20;
    assert_eq!(parts(account), [committed, recomputed, 4 * 10, recovery]);
    assert_eq!(account.spent.total(), (4 * (93 - 30) + 3 * 7 + 4 * 50) * S);
}

#[test]
fn a_formation_that_goes_on_where_the_last_one_was_makes_nothing_again() {
    let mut ledger = training();
    ledger.lost(4, stop(90, 10, 90));
    ledger.formed(4, at(91));
    ledger.stepped(11, at(95), at(100));
    assert!(!ledger.is_due(12));
    ledger.ended(false, stop(102, 11, 100));
    let account = ledger.account(at(102), 0);
    assert_eq!(parts(account), [4 * 55, 4 * 2, 4 * 10, 4 * 5]);
}

#[test]
fn a_single_step_that_is_made_again_is_not_taken_for_a_new_one() {
    let mut ledger = training();
    ledger.lost(4, stop(45, 1, 45));
    ledger.formed(4, at(50));
    ledger.stepped(1, at(60), at(65));
    ledger.ended(true, stop(70, 2, 70));
    assert_eq!(parts(ledger.account(at(70), 0)), [4 * (5 + 5), 4 * 5, 4 * 10, 4 * 15]);
}

#[test]
fn a_job_that_gives_way_waits_in_the_queue_and_has_lost_no_step() {
    let mut ledger = training();
    ledger.gave_way(stop(92, 10, 90));
    assert_eq!(ledger.slots(), 0);
    assert_eq!(ledger.account(at(100), at(90)).queued_ms, 38 * S, "it counts while it waits");
    ledger.formed(2, at(112));
    ledger.stepped(11, at(115), at(120));
    ledger.ended(true, stop(120, 11, 120));
    let account = ledger.account(at(120), 0);
    assert_eq!(parts(account), [4 * 52 + 2 * 5, 0, 4 * 10 + 2 * 3, 0]);
    assert_eq!(account.queued_ms, 50 * S);
}

#[test]
fn formations_that_come_to_nothing_are_recovery_and_so_is_a_cancelled_one() {
    let mut ledger = training();
    ledger.lost(4, stop(45, 1, 45));
    ledger.formed(4, at(50));
    ledger.lost(4, stop(60, 1, 0));
    ledger.formed(4, at(61));
    ledger.ended(false, stop(70, 1, 0));
    assert_eq!(parts(ledger.account(at(70), 0)), [4 * 5, 0, 4 * 10, 4 * 25]);
}

#[test]
fn what_is_not_decided_yet_is_shown_as_such_and_nothing_else_ever_gets_smaller() {
    let ledger = training();
    let account = ledger.account(at(62), at(60));
    assert_eq!((parts(account), account.undecided), ([4 * 20, 0, 4 * 10, 0], 4 * 2 * S));
    assert_eq!(account.spent.total() + account.undecided, 4 * 32 * S);
    // No step is known since a restart of whoever counts.
    let account = ledger.account(at(62), 0);
    assert_eq!((parts(account), account.undecided), ([0, 0, 4 * 10, 0], 4 * 22 * S));
    let mut lost = ledger;
    lost.lost(4, stop(70, 4, 60));
    let account = lost.account(at(71), 0);
    assert_eq!((parts(account), account.undecided), ([4 * 20, 4 * 10, 4 * 10, 0], 4 * S));
}

#[test]
fn times_that_are_not_known_or_go_back_count_nothing() {
    let mut ledger = training();
    ledger.lost(4, Stop::default());
    assert_eq!((ledger.slots(), parts(ledger.account(at(99), 0))), (0, [0, 0, 40, 0]));
    ledger.formed(4, at(100));
    ledger.stepped(5, at(90), at(90));
    ledger.ended(true, stop(110, 6, 110));
    assert_eq!(parts(ledger.account(at(110), 0)), [4 * 10, 0, 4 * 10, 0]);
}

#[test]
fn a_step_that_is_said_to_have_taken_a_lifetime_does_not_end_the_account() {
    let mut ledger = Ledger::default();
    ledger.queued(at(0));
    ledger.formed(4, at(30));
    ledger.stepped(1, 0, at(45));
    ledger.ended(true, stop(100, 10, 90));
    assert_eq!(parts(ledger.account(at(200), 0)), [4 * 70, 0, 0, 0]);
}

#[test]
fn accounts_add_up_and_what_has_come_since_is_told_from_what_was_before() {
    let before = training().account(at(60), at(60));
    let after = training().account(at(80), at(80));
    assert_eq!(after.spent.since(before.spent), SlotTime { committed: 4 * 20 * S, ..SlotTime::default() });
    let both = before.and(after);
    assert_eq!(both.spent.total(), before.spent.total() + after.spent.total());
    assert_eq!(both.queued_ms, 60 * S);
}

proptest! {
    /// Whatever happens to a job, every moment of each of its slots is in one part, and every other one until its end is in the queue.
    #[test]
    fn the_parts_are_the_whole(happens in prop::collection::vec((0u8..8, 0u64..100_000, 1usize..9, 0u64..20), 1..60)) {
        let (mut ledger, mut now) = (Ledger::default(), at(0));
        let (mut slots, mut step, mut step_ms, mut whole, mut queued) = (0, 0, 0, 0, 0);
        let (mut is_queued, mut is_lost) = (true, false);
        ledger.queued(now);
        for (what, ms, count, steps) in happens {
            now += ms;
            whole += ms * slots;
            queued += if is_queued { ms } else { 0 };
            let stop = Stop { at_ms: now, step, step_ms };
            let was_lost = std::mem::replace(&mut is_lost, what == 3 && slots > 0);
            match (what, slots, is_queued) {
                (0..=2, 1.., _) if ledger.slots() == slots => {
                    // As far as it was, or back by some steps.
                    step = if step_ms == 0 { u64::saturating_sub(step, steps) } else { step } + 1;
                    step_ms = now;
                    if ledger.is_due(step) {
                        ledger.stepped(step, now - ms / 2, now);
                    }
                }
                (3, 1.., _) => {
                    (slots, step_ms) = (count as u64, 0);
                    ledger.lost(count, stop);
                }
                (7, 1.., _) if was_lost => {
                    (slots, is_lost) = (slots.min(count as u64), true);
                    ledger.left_with(slots as usize, now);
                }
                (4, 1.., _) => {
                    (slots, step_ms, is_queued) = (0, 0, true);
                    ledger.gave_way(stop);
                }
                (5, 1.., _) => {
                    (slots, step_ms, is_queued) = (0, 0, true);
                    ledger.ended(count % 2 == 0, stop);
                    ledger.queued(now);
                }
                _ => {
                    (slots, step_ms, is_queued) = (count as u64, 0, false);
                    ledger.formed(count, now);
                }
            }
            let account = ledger.account(now, step_ms);
            prop_assert_eq!(account.spent.total() + account.undecided, whole);
            prop_assert_eq!(account.queued_ms, queued);
            prop_assert_eq!(ledger.slots(), slots);
        }
    }
}
