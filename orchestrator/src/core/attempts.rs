//! What a job's formations have come to: how far, how many in a row to nothing, and what happened to those. Pure.
//!
//! A job that gets further is never given up for what it loses on the way. One that does not is, before it has worn out the
//! cluster: what ends its formations ends those of others too.

use serde::{Deserialize, Serialize};

/// Formations in a row that end without a step, after which a job is given up; a large job has more.
pub const MAX_IDLE: u32 = 6;

/// So many workers may well lose one before the first step of a formation, without the job being to blame.
const WORKERS_PER_CHANCE: usize = 32;

/// Formations in a row that make steps and get no further than one before, after which a job is given up; a job on N times
/// as many workers loses N times as many on the way to the same step.
pub const MAX_STUCK: u32 = 50;

/// Formations in a row that end without a step because their storage cannot be read, after which a job is given up: some ten minutes.
pub const MAX_UNREADABLE: u32 = 16;

/// The longest pause before another formation tries to read a storage that could not be read. **Units**: ms.
const MAX_PAUSE_MS: u64 = 60_000;

/// The second formation in a row that ended without a step waits this long until the next, and each one after it twice as
/// long: what was in its way may pass. **Units**: ms.
const PAUSE_MS: u64 = 1_000;

/// What the end of a formation says of its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// It came to nothing, and no external cause is known.
    Job,
    /// It came to nothing because its storage could not be read.
    Storage,
    /// A worker stood still or was cut off: a job does not do that to a worker.
    Pause,
    /// It has made a step, or something else ended it.
    Nobody,
}

/// How a job's formations have ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attempts {
    /// The furthest step that any of them has made.
    pub furthest: u64,
    /// Whether the latest has made a step.
    pub has_stepped: bool,
    /// Whether the latest has got further than all before it.
    has_advanced: bool,
    /// How many in a row, including the latest, have ended without a step.
    pub idle: u32,
    /// How many in a row, including the latest, have ended without a step because the storage could not be read.
    #[serde(default)]
    pub unreadable: u32,
    /// How many in a row, including the latest, have ended without getting further than an earlier one.
    pub stuck: u32,
    /// What ended the latest that got no further.
    losses: Vec<String>,
}

impl Attempts {
    /// Another formation begins.
    pub fn formed(&mut self) {
        (self.has_stepped, self.has_advanced) = (false, false);
    }

    /// The formation has made a step, the first of its own.
    pub fn stepped(&mut self, step: u64) {
        self.has_stepped = true;
        (self.idle, self.unreadable) = (0, 0);
        self.advanced(step);
    }

    /// The job has got to a step.
    pub fn advanced(&mut self, step: u64) {
        if step > self.furthest {
            (self.furthest, self.has_advanced, self.stuck) = (step, true, 0);
            self.losses.clear();
        }
    }

    /// The formation has ended after this step.
    pub fn ended(&mut self, reached: u64, blame: Blame, why: &str) {
        self.advanced(reached);
        let is_external = matches!(blame, Blame::Storage | Blame::Pause);
        self.stuck += u32::from(!self.has_advanced && !is_external);
        self.idle += u32::from(blame == Blame::Job);
        self.unreadable += u32::from(blame == Blame::Storage);
        if self.losses.len() == MAX_IDLE as usize {
            self.losses.remove(0);
        }
        self.losses.push(why.to_owned());
    }

    /// Why the job is not to be formed again, if it is not; its latest formation had `workers`.
    pub fn given_up(&self, workers: usize) -> Option<String> {
        if self.idle >= MAX_IDLE + by_chance(workers) {
            let losses = self.losses.join("; ");
            return Some(format!("formed {} times in a row without completing a step: {losses}", self.idle));
        }
        let last = self.losses.last().map_or("", String::as_str);
        if self.unreadable >= MAX_UNREADABLE {
            let last = self.losses.last().map_or("", String::as_str);
            return Some(format!(
                "formed {} times in a row while the storage could not be read: {last}",
                self.unreadable
            ));
        }
        let (stuck, furthest) = (self.stuck, self.furthest);
        let words = || format!("formed {stuck} times in a row without getting past step {furthest}: {last}");
        (stuck >= MAX_STUCK.saturating_mul(1 + by_chance(workers))).then(words)
    }

    /// How long the next formation waits, after one of `workers`. **Units**: ms.
    pub fn pause_ms(&self, workers: usize) -> u64 {
        let of_job = match self.idle.saturating_sub(by_chance(workers)) {
            0 | 1 => 0,
            idle => PAUSE_MS << (idle - 2).min(MAX_IDLE),
        };
        let of_storage = match self.unreadable {
            0 => 0,
            times => (PAUSE_MS << (times - 1).min(MAX_UNREADABLE)).min(MAX_PAUSE_MS),
        };
        of_job.max(of_storage)
    }
}

/// Formations in a row that a job on so many workers may lose before a first step by chance.
fn by_chance(workers: usize) -> u32 {
    u32::try_from(workers / WORKERS_PER_CHANCE).unwrap_or(u32::MAX - MAX_IDLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A formation that resumes from one step, makes those up to another, and is lost.
    fn lose(attempts: &mut Attempts, from: u64, to: u64) {
        attempts.formed();
        if to > from {
            attempts.stepped(from + 1);
        }
        attempts.ended(to, if to == from { Blame::Job } else { Blame::Nobody }, "lost");
    }

    #[test]
    fn a_storage_that_cannot_be_read_is_tried_for_long_and_is_not_held_against_the_job() {
        let mut attempts = Attempts::default();
        let mut waited = 0;
        while attempts.given_up(4).is_none() {
            attempts.formed();
            attempts.ended(4, Blame::Storage, "manifest.json: Input/output error");
            waited += attempts.pause_ms(4);
        }
        assert!((600_000..900_000).contains(&waited), "{waited} ms");
        let words = attempts.given_up(4).unwrap();
        assert!(
            words.ends_with("while the storage could not be read: manifest.json: Input/output error"),
            "{words}"
        );
        assert_eq!((attempts.idle, attempts.unreadable, attempts.stuck), (0, MAX_UNREADABLE, 0));
        attempts.formed();
        attempts.stepped(5);
        assert_eq!((attempts.given_up(4), attempts.pause_ms(4)), (None, 0));
    }

    #[test]
    fn workers_that_stand_still_are_never_held_against_the_job() {
        let mut attempts = Attempts::default();
        for _ in 0..2 * MAX_STUCK {
            attempts.formed();
            attempts.ended(4, Blame::Pause, "rank 1 lost: worker w on node n is silent for 1600 ms");
        }
        assert_eq!((attempts.given_up(4), attempts.pause_ms(4)), (None, 0));
    }

    #[test]
    fn formations_without_a_step_are_counted_and_wait_longer_and_longer() {
        let mut attempts = Attempts::default();
        let mut pauses = Vec::new();
        while attempts.given_up(4).is_none() {
            lose(&mut attempts, 4, 4);
            pauses.push(attempts.pause_ms(4));
        }
        assert_eq!(pauses[..5], [0, 1_000, 2_000, 4_000, 8_000]);
        assert_eq!(attempts.idle, MAX_IDLE);
        let words = attempts.given_up(4).unwrap();
        assert!(
            words.starts_with("formed 6 times in a row without completing a step: lost; lost"),
            "{words}"
        );
    }

    #[test]
    fn a_job_with_progress_is_never_ended() {
        let mut attempts = Attempts::default();
        for step in 0..10 * u64::from(MAX_STUCK) {
            (1..MAX_IDLE).for_each(|_| lose(&mut attempts, step, step));
            lose(&mut attempts, step, step + 1);
            assert_eq!((attempts.given_up(4), attempts.pause_ms(4)), (None, 0));
        }
    }

    #[test]
    fn a_large_job_loses_more_formations_by_chance() {
        let workers = 1_250;
        let mut attempts = Attempts::default();
        for _ in 0..workers / WORKERS_PER_CHANCE {
            lose(&mut attempts, 4, 4);
            assert_eq!((attempts.given_up(workers), attempts.pause_ms(workers)), (None, 0));
        }
        assert!(attempts.given_up(4).is_some());
        (1..MAX_IDLE).for_each(|_| lose(&mut attempts, 4, 4));
        assert_eq!(attempts.given_up(workers), None);
        lose(&mut attempts, 4, 4);
        assert!(attempts.given_up(workers).is_some());
    }

    #[test]
    fn a_job_that_repeats_the_same_steps_is_ended() {
        let mut attempts = Attempts::default();
        lose(&mut attempts, 0, 40);
        for _ in 1..MAX_STUCK {
            lose(&mut attempts, 0, 40);
            assert_eq!(attempts.given_up(4), None);
        }
        lose(&mut attempts, 0, 39);
        let words = "formed 50 times in a row without getting past step 40: lost";
        assert_eq!(attempts.given_up(4).as_deref(), Some(words));
        assert_eq!(attempts.given_up(2 * WORKERS_PER_CHANCE), None, "a large job may lose as many by chance");
        (0..2 * MAX_STUCK).for_each(|_| lose(&mut attempts, 0, 39));
        assert!(attempts.given_up(2 * WORKERS_PER_CHANCE).is_some());
    }
}
