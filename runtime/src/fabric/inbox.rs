//! Where frames wait for their receiver. One inbox per rank; every wait has a deadline and ends at once on an abort, or when
//! the peer that it waits for is lost.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::incoming::Receipt;
use super::{FabricError, Region, Tag};
use crate::topology::Generation;
use crate::trace::TraceContext;
use parking_lot::{Condvar, Mutex, MutexGuard};

#[derive(Default)]
struct InboxState {
    /// Frames without a receiver yet.
    frames: HashMap<Tag, Arrival>,
    /// Frames of an earlier generation are dropped on arrival.
    generation: Generation,
    /// Set once the rank gives up; every present and future wait ends with this reason.
    aborted: Option<String>,
    /// Ranks from which nothing more will come, and why.
    lost: HashMap<usize, String>,
    /// A tag that arrived twice: the receiver could not know which frame it gets.
    duplicate: Option<Tag>,
}

/// A frame that has come.
pub struct Arrival {
    /// What it holds.
    pub parts: Vec<Region>,
    /// The span that sent it.
    pub trace: TraceContext,
    /// Given back when the frame is taken or dropped; frames of this process need none.
    pub receipt: Option<Receipt>,
    /// Before when it is not taken, if it is held back.
    pub due: Option<Instant>,
}

/// The frames that have arrived at one rank.
#[derive(Default)]
pub struct Inbox {
    state: Mutex<InboxState>,
    arrived: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock()
    }

    /// Puts a frame in. The one place where a message from before the last re-formation is dropped.
    ///
    /// **Errors**: [`FabricError::Duplicate`] if a frame with this tag is still waiting.
    pub fn deliver(&self, tag: Tag, arrival: Arrival) -> Result<(), FabricError> {
        let mut state = self.lock();
        if tag.formation.generation < state.generation {
            // The receipt writes to a socket: not under the lock.
            drop(state);
            return Ok(());
        }
        let before = state.frames.insert(tag, arrival);
        if before.is_some() {
            state.duplicate.get_or_insert(tag);
        }
        drop(state);
        self.arrived.notify_all();
        before.map_or(Ok(()), |_| Err(FabricError::Duplicate { tag }))
    }

    /// Takes the frame with this tag, waiting for it for at most `timeout`; returned with the span that sent it.
    ///
    /// **Errors**: [`FabricError::Timeout`] names the tag; [`FabricError::Aborted`] and [`FabricError::Lost`] the reason;
    /// [`FabricError::Duplicate`] names the tag under which two frames have come, whatever is waited for.
    pub fn receive(&self, tag: Tag, timeout: Duration) -> Result<(Vec<Region>, TraceContext), FabricError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.aborted {
                return Err(FabricError::Aborted { reason: reason.clone() });
            }
            if let Some(tag) = state.duplicate {
                return Err(FabricError::Duplicate { tag });
            }
            let now = Instant::now();
            let due = state.frames.get(&tag).map(|arrival| arrival.due.unwrap_or(now));
            if due.is_some_and(|due| due <= now)
                && let Some(Arrival { parts, trace, receipt, .. }) = state.frames.remove(&tag)
            {
                drop(state);
                drop(receipt);
                return Ok((parts, trace));
            }
            let rank = tag.source as usize;
            if let Some(reason) = state.lost.get(&rank).filter(|_| due.is_none()) {
                return Err(FabricError::Lost { rank, reason: reason.clone() });
            }
            if deadline <= now {
                return Err(FabricError::Timeout { tag, waited_s: timeout.as_secs_f64() });
            }
            let until = due.map_or(deadline, |due| due.min(deadline));
            self.arrived.wait_until(&mut state, until);
        }
    }

    /// Ends every present and future wait.
    pub fn abort(&self, reason: &str) {
        self.lock().aborted.get_or_insert_with(|| reason.to_owned());
        self.arrived.notify_all();
    }

    /// Whether the rank has given up.
    pub fn is_aborted(&self) -> bool {
        self.lock().aborted.is_some()
    }

    /// Ends every present and future wait for one rank, once what has come from it is taken.
    pub fn lose(&self, rank: usize, reason: &str) {
        self.lock().lost.entry(rank).or_insert_with(|| reason.to_owned());
        self.arrived.notify_all();
    }

    /// Starts a new generation: frames of earlier ones are dropped, waits work again.
    pub fn enter_generation(&self, generation: Generation) {
        let mut state = self.lock();
        state.generation = generation;
        (state.aborted, state.duplicate) = (None, None);
        let old = state.frames.extract_if(|tag, _| tag.formation.generation < generation).collect::<Vec<_>>();
        drop(state);
        drop(old);
    }

    /// Number of frames that were not received yet.
    pub fn len(&self) -> usize {
        self.lock().frames.len()
    }
}
