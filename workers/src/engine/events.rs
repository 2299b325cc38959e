//! Which operations of a program have completed, and the waiting for them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use contraflow_runtime::schedule::OpId;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// One event per operation of a program.
pub(super) struct Events {
    state: Mutex<EventState>,
    changed: Condvar,
}

struct EventState {
    done: Vec<bool>,
    /// When the latest operation completed.
    latest: Instant,
    /// Operations under way that exchange frames with other ranks.
    exchanges: BTreeSet<OpId>,
    aborted: Option<String>,
}

/// Why a wait has ended without its event.
pub(super) enum WaitError {
    /// All waits were aborted, with this reason.
    Aborted(String),
    /// Nothing of the program has completed for that long.
    Late { op: OpId, waited: Duration },
}

impl Events {
    /// Of a program with that many operations.
    pub fn new(num_ops: usize) -> Self {
        let state = EventState {
            done: vec![false; num_ops],
            latest: Instant::now(),
            exchanges: BTreeSet::new(),
            aborted: None,
        };
        Events { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.state.lock()
    }

    /// An operation begins that exchanges frames with other ranks: it completes, or aborts the waits when its own deadline is over.
    pub fn begin_exchange(&self, op: OpId) {
        self.lock().exchanges.insert(op);
    }

    /// An operation has completed.
    pub fn complete(&self, op: OpId) {
        let mut state = self.lock();
        (state.done[op], state.latest) = (true, Instant::now());
        state.exchanges.remove(&op);
        drop(state);
        self.changed.notify_all();
    }

    /// Ends every present and future wait.
    pub fn abort(&self, reason: &str) {
        self.lock().aborted.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Waits until all of `ops` have completed, as long as anything completes within `timeout`: a lane may stand at an operation
    /// that is due at the end of a long step. While an exchange is under way it is left to that to give up: it knows which frame
    /// is missing and whose it is, and this wait would only say who suffers from it.
    pub fn wait(&self, ops: &[OpId], timeout: Duration) -> Result<(), WaitError> {
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.aborted {
                return Err(WaitError::Aborted(reason.clone()));
            }
            let Some(&missing) = ops.iter().find(|&&op| !state.done[op]) else { return Ok(()) };
            if !state.exchanges.is_empty() {
                self.changed.wait(&mut state);
                continue;
            }
            let left = timeout.saturating_sub(state.latest.elapsed());
            if left.is_zero() {
                return Err(WaitError::Late { op: missing, waited: timeout });
            }
            self.changed.wait_for(&mut state, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(1);

    #[test]
    fn a_wait_lasts_as_long_as_something_completes_and_then_names_what_is_missing() {
        let events = Events::new(8);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| events.wait(&[7], TIMEOUT));
            for op in 0..5 {
                std::thread::sleep(TIMEOUT / 4);
                events.complete(op);
            }
            let late = waiting.join().unwrap();
            assert!(matches!(late, Err(WaitError::Late { op: 7, waited: TIMEOUT })));
        });
        let since = events.lock().latest.elapsed();
        assert!(since >= TIMEOUT, "given up {since:?} after the last operation");
        events.complete(7);
        assert!(events.wait(&[7], TIMEOUT).is_ok());
    }

    #[test]
    fn what_waits_for_a_frame_is_the_first_to_give_up() {
        let events = Events::new(2);
        events.begin_exchange(0);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| events.wait(&[1], TIMEOUT / 8));
            std::thread::sleep(TIMEOUT);
            assert!(!waiting.is_finished(), "given up before the exchange");
            events.abort("the frame of rank 3 never came");
            let error = waiting.join().unwrap();
            assert!(matches!(error, Err(WaitError::Aborted(reason)) if reason.contains("rank 3")));
        });
    }
}
