//! The time that leases and deadlines run by: that in which the orchestrator was awake and could hear.
//!
//! A clock that is set, a process that was paused, and a network on which nobody at all is heard are no time: silence then says
//! nothing of the workers. Knows no worker.

use super::Times;

/// The clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// What the system's clock showed last.
    wall_ms: u64,
    /// The time that counts.
    awake_ms: u64,
    /// When somebody was heard last, in time that counts.
    heard_ms: u64,
    /// Time since then that did not count.
    held_ms: u64,
}

impl Clock {
    /// The system's clock shows `wall_ms`. Time does not begin before `known_ms`, the latest that was kept: the system's clock may
    /// have been set back since.
    pub(super) fn new(wall_ms: u64, known_ms: u64) -> Self {
        let awake_ms = wall_ms.max(known_ms);
        Clock { wall_ms, awake_ms, heard_ms: awake_ms, held_ms: 0 }
    }

    /// The time that counts.
    pub(super) fn now(&self) -> u64 {
        self.awake_ms
    }

    /// The system's clock shows `wall_ms`; `listens`: somebody should be heard.
    pub(super) fn advance(&mut self, wall_ms: u64, listens: bool, times: Times) {
        let passed = wall_ms.saturating_sub(self.wall_ms);
        self.wall_ms = wall_ms;
        let limit = if listens { self.heard_ms + times.silence_ms() } else { u64::MAX };
        let counts = passed.min(times.beat_ms()).min(limit.saturating_sub(self.awake_ms));
        self.awake_ms += counts;
        self.held_ms += passed - counts;
    }

    /// A worker is heard; returns how much time since the last one did not count.
    pub(super) fn hear(&mut self) -> u64 {
        self.heard_ms = self.awake_ms;
        std::mem::take(&mut self.held_ms)
    }

    /// When somebody was heard last.
    pub(super) fn heard_ms(&self) -> u64 {
        self.heard_ms
    }

    /// A connection has ended that was heard a moment ago: the network works, and a process has ended.
    pub(super) fn closed(&mut self, times: Times) {
        if !self.is_cut_off(times) {
            self.heard_ms = self.awake_ms;
        }
    }

    /// Whether nobody is heard.
    pub(super) fn is_cut_off(&self, times: Times) -> bool {
        self.awake_ms >= self.heard_ms + times.silence_ms()
    }

    /// How long ago a time that counted was, with what has not counted since somebody was heard.
    pub(super) fn since(&self, awake_ms: u64) -> u64 {
        self.awake_ms.saturating_sub(awake_ms) + self.held_ms
    }

    /// What the system's clock shows.
    pub(super) fn wall_ms(&self) -> u64 {
        self.wall_ms
    }
}

#[cfg(test)]
mod tests {
    use super::super::BEAT_MS;
    use super::*;

    const SILENCE_MS: u64 = 2 * BEAT_MS;

    #[test]
    fn a_silence_of_everybody_and_a_pause_are_no_time() {
        let mut clock = Clock::new(1_000_000, 0);
        for at in 1..=600 {
            clock.advance(1_000_000 + 100 * at, true, Times::default());
        }
        assert_eq!((clock.now(), clock.is_cut_off(Times::default())), (1_000_000 + SILENCE_MS, true));
        assert_eq!(clock.since(1_000_000), 60_000);
        // A connection that ends then says nothing.
        clock.closed(Times::default());
        assert!(clock.is_cut_off(Times::default()));
        assert_eq!(clock.hear(), 60_000 - SILENCE_MS);
        // Stopped for ten minutes.
        clock.advance(1_660_000, true, Times::default());
        assert_eq!((clock.now(), clock.hear()), (1_000_000 + SILENCE_MS + BEAT_MS, 600_000 - BEAT_MS));
        assert_eq!((clock.wall_ms(), clock.since(clock.now() - 7)), (1_660_000, 7));
    }

    #[test]
    fn time_passes_while_somebody_is_heard_or_nobody_could_be() {
        let mut clock = Clock::new(0, 0);
        for at in 1..=100 {
            clock.advance(100 * at, true, Times::default());
            assert_eq!(clock.hear(), 0);
        }
        assert_eq!(clock.now(), 10_000);
        for at in 101..=200 {
            clock.advance(100 * at, false, Times::default());
        }
        assert_eq!(clock.now(), 20_000);
        let mut clock = Clock::new(0, 0);
        clock.advance(BEAT_MS, true, Times::default());
        clock.closed(Times::default());
        (1..=20).for_each(|at| clock.advance(BEAT_MS + 100 * at, true, Times::default()));
        assert_eq!(clock.now(), BEAT_MS + SILENCE_MS);
    }
}
