//! How a rank's saves go: under way, slow, failed and to be tried again. Shared by the rank, which begins and ends them, and the
//! update, whose totals make all ranks agree whether the state after a step is saved. Knows no file.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A save that takes longer than this is slow: those that become due meanwhile are skipped, and the training continues.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The first wait before a failed save is tried again; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// The longest wait before a failed save is tried again.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The saves of one rank.
#[derive(Debug, Default)]
pub struct Saves(Mutex<SavesState>);

#[derive(Debug, Default)]
struct SavesState {
    /// When the one under way began.
    began: Option<Instant>,
    /// How many in a row have failed.
    failures: u32,
    /// When one is to be tried again.
    retry_at: Option<Instant>,
}

/// What a rank wants of the next save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveWish {
    /// None that becomes due: the one before is still being written, for longer than [`PATIENCE`].
    pub skips: bool,
    /// One after the present step, due or not: the one before has failed, and its wait is over.
    pub retries: bool,
}

impl Saves {
    /// A save begins.
    pub fn begin(&self) {
        self.0.lock().began = Some(Instant::now());
    }

    /// It has ended well.
    pub fn succeed(&self) {
        *self.0.lock() = SavesState::default();
    }

    /// It has failed; returns how long until it is tried again.
    pub fn fail(&self) -> Duration {
        let mut state = self.0.lock();
        let wait = backoff(state.failures);
        state.failures += 1;
        (state.began, state.retry_at) = (None, Some(Instant::now() + wait));
        wait
    }

    /// Whether one is under way.
    pub fn is_under_way(&self) -> bool {
        self.0.lock().began.is_some()
    }

    /// What the rank puts into the totals of a step.
    pub fn wish(&self) -> SaveWish {
        let state = self.0.lock();
        SaveWish {
            skips: state.began.is_some_and(|began| began.elapsed() > PATIENCE),
            retries: state.began.is_none() && state.retry_at.is_some_and(|at| at <= Instant::now()),
        }
    }
}

/// How long to wait after that many failures in a row before one more.
pub fn backoff(failures: u32) -> Duration {
    FIRST_WAIT.saturating_mul(1 << failures.min(16)).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_save_is_wished_for_again_after_a_wait_that_doubles() {
        let saves = Saves::default();
        let waits: Vec<u64> = (0..8).map(|failures| backoff(failures).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        saves.begin();
        assert_eq!((saves.is_under_way(), saves.wish()), (true, SaveWish::default()));
        assert_eq!(saves.fail(), FIRST_WAIT);
        assert_eq!((saves.is_under_way(), saves.wish()), (false, SaveWish::default()));
        saves.0.lock().retry_at = Some(Instant::now());
        assert_eq!(saves.wish(), SaveWish { skips: false, retries: true });
        saves.begin();
        assert_eq!(saves.wish(), SaveWish::default());
        assert_eq!(saves.fail(), 2 * FIRST_WAIT);
        saves.begin();
        saves.succeed();
        assert_eq!(saves.fail(), FIRST_WAIT);
    }

    #[test]
    fn a_save_that_takes_long_lets_others_be_skipped() {
        let saves = Saves::default();
        saves.begin();
        saves.0.lock().began = Instant::now().checked_sub(PATIENCE + Duration::from_millis(1));
        assert_eq!(saves.wish(), SaveWish { skips: true, retries: false });
        saves.succeed();
        assert_eq!(saves.wish(), SaveWish::default());
    }
}
