//! Where the slot time of a job goes: into steps, or on the way to them. Pure: it is told what happens when, and adds up; knows no
//! fact, no worker and no clock.
//!
//! Times are milliseconds since 1970; 0 is one that is not known, as in records of earlier versions: nothing is counted from
//! there to the next one that is.

use serde::{Deserialize, Serialize};

/// Slot time by what it went into. **Units**: milliseconds of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotTime {
    /// Steps that were made for the first time, with what stands between them: checkpoints, validation, the weights at the end.
    pub committed: u64,
    /// Steps that had been made before, and those that were cut off.
    pub recomputed: u64,
    /// From slots to the first step.
    pub forming: u64,
    /// From a loss, or a roll-back, to the next step.
    pub recovery: u64,
}

impl SlotTime {
    /// All of it.
    pub fn total(self) -> u64 {
        self.committed + self.recomputed + self.forming + self.recovery
    }

    /// Both together.
    pub fn and(self, other: SlotTime) -> SlotTime {
        self.with(other, u64::saturating_add)
    }

    /// What has come since `before`.
    pub fn since(self, before: SlotTime) -> SlotTime {
        self.with(before, u64::saturating_sub)
    }

    fn with(self, other: SlotTime, what: fn(u64, u64) -> u64) -> SlotTime {
        SlotTime {
            committed: what(self.committed, other.committed),
            recomputed: what(self.recomputed, other.recomputed),
            forming: what(self.forming, other.forming),
            recovery: what(self.recovery, other.recovery),
        }
    }
}

/// What is known of a job, or of all of them, at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Slot time of which it is known what it went into.
    pub spent: SlotTime,
    /// Slot time since then: the next step, or a loss, will say. **Units**: milliseconds of one slot.
    pub undecided: u64,
    /// Slot time of no job. **Units**: milliseconds of one slot.
    pub idle: u64,
    /// Time in the queue, where a job has no slots. **Units**: milliseconds.
    pub queued_ms: u64,
}

impl Account {
    /// Both together.
    pub fn and(self, other: Account) -> Account {
        Account {
            spent: self.spent.and(other.spent),
            undecided: self.undecided + other.undecided,
            idle: self.idle + other.idle,
            queued_ms: self.queued_ms + other.queued_ms,
        }
    }
}

/// Where a formation stood when it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// When it ended.
    pub at_ms: u64,
    /// The furthest step that it made, or resumed from.
    pub step: u64,
    /// When that step was made; 0: the formation made none that is known of.
    pub step_ms: u64,
}

/// What a job is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Doing {
    /// It has ended, or nothing is known.
    #[default]
    Nothing,
    Queued,
    Forming,
    Recovering,
    /// Makes steps again.
    Repeating,
    Stepping,
}

/// The account of one job, as it is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    spent: SlotTime,
    queued_ms: u64,
    doing: Doing,
    /// Slots that it holds.
    slots: u64,
    /// Until when it is counted.
    since_ms: u64,
    /// The furthest step of all formations that have ended.
    furthest: u64,
}

impl Ledger {
    /// It is in the queue.
    pub fn queued(&mut self, at_ms: u64) {
        self.begin(Doing::Queued, 0, at_ms);
    }

    /// It has so many slots.
    pub fn formed(&mut self, slots: usize, at_ms: u64) {
        let is_back = self.doing == Doing::Recovering;
        self.begin(if is_back { Doing::Recovering } else { Doing::Forming }, slots as u64, at_ms);
    }

    /// Whether [`Ledger::stepped`] has to hear of a step.
    pub fn is_due(&self, step: u64) -> bool {
        match self.doing {
            Doing::Forming | Doing::Recovering => true,
            Doing::Repeating => step >= self.furthest,
            Doing::Nothing | Doing::Queued | Doing::Stepping => false,
        }
    }

    /// It has made a step: the first of a formation, or the last of those that it had made before.
    pub fn stepped(&mut self, step: u64, began_ms: u64, at_ms: u64) {
        if matches!(self.doing, Doing::Forming | Doing::Recovering) {
            let is_new = step > self.furthest;
            let doing = if is_new { Doing::Stepping } else { Doing::Repeating };
            // A time that cannot be is a worker's word, and must not end the account.
            self.begin(doing, self.slots, began_ms.max(self.since_ms).min(at_ms));
        }
        if self.doing == Doing::Repeating && step >= self.furthest {
            self.begin(Doing::Stepping, self.slots, at_ms);
        }
    }

    /// It has lost its formation, in the middle of a step, and keeps so many slots.
    pub fn lost(&mut self, slots: usize, stop: Stop) {
        self.cut_off(stop);
        self.begin(Doing::Recovering, slots as u64, stop.at_ms);
    }

    /// Of the slots that it kept when it lost its formation, it has so many left.
    pub fn left_with(&mut self, slots: usize, at_ms: u64) {
        if self.doing == Doing::Recovering {
            self.begin(Doing::Recovering, slots as u64, at_ms);
        }
    }

    /// It is in the queue again, after a step.
    pub fn gave_way(&mut self, stop: Stop) {
        self.furthest = self.furthest.max(stop.step);
        self.begin(Doing::Queued, 0, stop.at_ms);
    }

    /// It goes on in another formation, after a step, and keeps its slots.
    pub fn rearranged(&mut self, stop: Stop) {
        self.furthest = self.furthest.max(stop.step);
        self.begin(Doing::Forming, self.slots, stop.at_ms);
    }

    /// It has ended; `is_done`: after all of its steps.
    pub fn ended(&mut self, is_done: bool, stop: Stop) {
        if !is_done {
            self.cut_off(stop);
        }
        self.furthest = self.furthest.max(stop.step);
        self.begin(Doing::Nothing, 0, stop.at_ms);
    }

    /// What follows the latest step of a formation came to nothing.
    fn cut_off(&mut self, stop: Stop) {
        self.furthest = self.furthest.max(stop.step);
        if self.is_training() && stop.step_ms > 0 {
            self.begin(Doing::Repeating, self.slots, stop.step_ms.min(stop.at_ms));
        }
    }

    /// Counts the time until then, and goes on with something else.
    fn begin(&mut self, doing: Doing, slots: u64, at_ms: u64) {
        let is_known = at_ms > 0;
        if is_known {
            (self.spent, self.queued_ms) = self.counted(at_ms);
            self.since_ms = self.since_ms.max(at_ms);
        }
        (self.doing, self.slots) = if is_known { (doing, slots) } else { (Doing::Nothing, 0) };
    }

    /// What is counted if it goes on as it does until then.
    fn counted(&self, until_ms: u64) -> (SlotTime, u64) {
        let (mut spent, mut queued_ms) = (self.spent, self.queued_ms);
        let ms = until_ms.saturating_sub(self.since_ms);
        let of_slots = ms.saturating_mul(self.slots);
        match self.doing {
            Doing::Nothing => {}
            Doing::Queued => queued_ms += ms,
            Doing::Forming => spent.forming += of_slots,
            Doing::Recovering => spent.recovery += of_slots,
            Doing::Repeating => spent.recomputed += of_slots,
            Doing::Stepping => spent.committed += of_slots,
        }
        (spent, queued_ms)
    }

    fn is_training(&self) -> bool {
        matches!(self.doing, Doing::Repeating | Doing::Stepping)
    }

    /// Slots that it holds.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// What is known at a time; `step_ms`: when the latest step was made. No part but the undecided one ever gets smaller.
    pub fn account(&self, now_ms: u64, step_ms: u64) -> Account {
        let until_ms =
            if self.is_training() { step_ms.min(now_ms).max(self.since_ms) } else { self.since_ms };
        let undecided = now_ms.saturating_sub(until_ms).saturating_mul(self.slots);
        let ((spent, _), (_, queued_ms)) = (self.counted(until_ms), self.counted(now_ms));
        Account { spent, undecided, idle: 0, queued_ms }
    }
}

#[cfg(test)]
mod tests;
