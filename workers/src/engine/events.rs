//! Which operations of a program have completed, and the waiting for them.

use std::time::{Duration, Instant};

use contraflow_runtime::schedule::OpId;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// One event per operation of a program.
#[derive(Default)]
pub(super) struct Events {
    state: Mutex<EventState>,
    changed: Condvar,
}

#[derive(Default)]
struct EventState {
    done: Vec<bool>,
    aborted: Option<String>,
}

/// Why a wait has ended without its event.
pub(super) enum WaitError {
    /// All waits were aborted, with this reason.
    Aborted(String),
    /// The deadline has passed.
    Late { op: OpId, waited: Duration },
}

impl Events {
    /// Of a program with that many operations.
    pub fn new(num_ops: usize) -> Self {
        let state = EventState { done: vec![false; num_ops], aborted: None };
        Events { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.state.lock()
    }

    /// An operation has completed.
    pub fn complete(&self, op: OpId) {
        self.lock().done[op] = true;
        self.changed.notify_all();
    }

    /// Ends every present and future wait.
    pub fn abort(&self, reason: &str) {
        self.lock().aborted.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Waits until all of `ops` have completed.
    pub fn wait(&self, ops: &[OpId], timeout: Duration) -> Result<(), WaitError> {
        let started = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.aborted {
                return Err(WaitError::Aborted(reason.clone()));
            }
            let Some(&missing) = ops.iter().find(|&&op| !state.done[op]) else { return Ok(()) };
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(WaitError::Late { op: missing, waited: timeout });
            }
            self.changed.wait_for(&mut state, left);
        }
    }
}
