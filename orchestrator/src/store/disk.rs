//! A simulated disk for tests: it knows what has reached the platter, may be full, and refuses what it is told to refuse.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};
use redb::StorageBackend;

use super::{Replay, Store, StoreError};

/// The disk, with the one file on it. Its copies are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk(Arc<Device>);

#[derive(Debug, Default)]
struct Device {
    state: Mutex<State>,
    has_refused: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// What a reader sees.
    pub(crate) now: Vec<u8>,
    /// What a power loss leaves for sure.
    synced: Vec<u8>,
    /// Writes (place, bytes) and lengths (length, nothing) since.
    pending: Vec<(usize, Option<Vec<u8>>)>,
    /// Bytes that fit.
    pub(crate) room: Option<usize>,
    /// Calls so far.
    pub(crate) calls: u64,
    /// Those that are refused: from this one to before that one.
    pub(crate) bad: (u64, u64),
    /// Calls that were refused.
    refused: u64,
    /// Only syncs are refused, and each takes along what it should have written, as with a system that drops it.
    pub(crate) is_forgetful: bool,
}

impl State {
    fn apply(bytes: &mut Vec<u8>, (place, data): &(usize, Option<Vec<u8>>)) {
        match data {
            None => bytes.resize(*place, 0),
            Some(data) => {
                bytes.resize(bytes.len().max(place + data.len()), 0);
                bytes[*place..place + data.len()].copy_from_slice(data);
            }
        }
    }

    fn change(&mut self, place: usize, data: Option<Vec<u8>>) -> io::Result<()> {
        let end = place + data.as_ref().map_or(0, Vec::len);
        if self.room.is_some_and(|room| end > room) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let change = (place, data);
        State::apply(&mut self.now, &change);
        self.pending.push(change);
        Ok(())
    }
}

impl Disk {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    pub(crate) fn with(bytes: Vec<u8>) -> Disk {
        let state = State { synced: bytes.clone(), now: bytes, ..State::default() };
        Disk(Arc::new(Device { state: Mutex::new(state), ..Device::default() }))
    }

    /// The disk after the power went: of what was not synced, the writes that `kept` names arrived.
    pub(crate) fn after_power_loss(&self, mut kept: impl FnMut() -> bool) -> Disk {
        let state = self.state();
        let mut bytes = state.synced.clone();
        state.pending.iter().filter(|_| kept()).for_each(|change| State::apply(&mut bytes, change));
        Disk::with(bytes)
    }

    /// The disk as the next process finds it, however the one before goes on.
    pub(crate) fn after_kill(&self) -> Disk {
        Disk::with(self.state().now.clone())
    }

    /// Of the calls from now on, `after` are made and then so many refused.
    pub(crate) fn refuse(&self, after: u64, calls: u64) {
        let mut state = self.state();
        let from = state.calls + after;
        state.bad = (from, from.saturating_add(calls));
    }

    /// Waits until so many calls have been refused.
    pub(crate) fn until_refused(&self, calls: u64) {
        let mut state = self.state();
        while state.refused < calls {
            self.0.has_refused.wait(&mut state);
        }
    }

    pub(crate) fn open(&self) -> Result<(Store, Replay), StoreError> {
        Store::on(self.clone(), Path::new("state/events.redb"))
    }

    /// Makes a call, unless this one is refused.
    fn call<T>(&self, is_sync: bool, call: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state();
        let number = state.calls;
        state.calls += 1;
        let is_bad = (state.bad.0..state.bad.1).contains(&number) && (is_sync || !state.is_forgetful);
        if is_bad && state.is_forgetful {
            state.now = state.synced.clone();
            state.pending.clear();
        }
        let result = if is_bad { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { call(&mut state) };
        if result.is_err() {
            state.refused += 1;
            self.0.has_refused.notify_all();
        }
        result
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.call(false, |state| Ok(state.now.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        self.call(false, |state| {
            let bytes = state.now.get(offset..offset + out.len());
            out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(false, |state| state.change(len as usize, None))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call(true, |state| {
            state.synced = state.now.clone();
            state.pending.clear();
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.call(false, |state| state.change(offset as usize, Some(data.to_vec())))
    }
}
