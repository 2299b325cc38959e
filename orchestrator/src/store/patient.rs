//! A file that waits where its disk fails: a call that the system refuses is made again until it succeeds, so that the database
//! above never sees an error that passes. Knows bytes and places, not what they mean.
//!
//! The database is of no use after its first error, and whether its last transaction is on the disk would be open. So it gets
//! none: full disks, errors of devices and file systems that are read-only for a while only make its calls take long. What may be
//! said of a process that is killed meanwhile is what holds of any moment.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use redb::{BackendError, StorageBackend};

/// Between the first error and the second try; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// The longest time between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a disk refuses, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// When the first of the calls failed that still wait.
    since: Instant,
    /// What cannot be done.
    what: &'static str,
    /// What the system says.
    error: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} for {} s: {}", self.what, self.since.elapsed().as_secs(), self.error)
    }
}

/// Whether, and with what, the calls of a file wait. Shared by the file and who wants to know.
#[derive(Debug)]
pub(super) struct Patience {
    /// Named in the log.
    file: Arc<Path>,
    waiting: Mutex<Waiting>,
    given_up: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Whether errors are waited out. Before and after they are passed on.
    is_patient: bool,
    /// How many calls wait.
    calls: usize,
    trouble: Option<Trouble>,
}

impl Patience {
    /// Of a file that is being opened: errors are passed on.
    pub(super) fn of(file: Arc<Path>) -> Self {
        Patience { file, waiting: Mutex::default(), given_up: Condvar::new() }
    }

    /// From now on errors are waited out.
    pub(super) fn begin(&self) {
        self.waiting.lock().is_patient = true;
    }

    /// From now on errors are passed on, those that are waited out now too.
    pub(super) fn give_up(&self) {
        self.waiting.lock().is_patient = false;
        self.given_up.notify_all();
    }

    /// What is waited for just now.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.waiting.lock().trouble.clone()
    }

    /// Makes a call until it succeeds, or fails in a way that no wait changes: the file is shorter than it was, or names a place
    /// that no file has.
    ///
    /// **Errors**: such a one, or any after [`Patience::give_up`].
    fn insist<T>(&self, what: &'static str, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let (mut pause, mut waits) = (FIRST_PAUSE, false);
        let result = loop {
            match call() {
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
                    ) =>
                {
                    if !self.wait(what, error.to_string(), pause, &mut waits) {
                        break Err(error);
                    }
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
                result => break result,
            }
        };
        if waits {
            self.ended(result.is_ok());
        }
        result
    }

    /// Lets time pass after an error; false if it is to be passed on.
    fn wait(&self, what: &'static str, error: String, pause: Duration, waits: &mut bool) -> bool {
        let mut waiting = self.waiting.lock();
        if !waiting.is_patient {
            return false;
        }
        waiting.calls += usize::from(!std::mem::replace(waits, true));
        let known = waiting.trouble.take();
        if known.as_ref().is_none_or(|known| (known.what, &known.error) != (what, &error)) {
            tracing::error!("{} {what}, tried again until it succeeds: {error}", self.file.display());
        }
        let since = known.map_or_else(Instant::now, |known| known.since);
        waiting.trouble = Some(Trouble { since, what, error });
        self.given_up.wait_for(&mut waiting, pause);
        waiting.is_patient
    }

    /// A call that has waited does not any more.
    fn ended(&self, is_well: bool) {
        let mut waiting = self.waiting.lock();
        waiting.calls -= 1;
        if waiting.calls > 0 {
            return;
        }
        if let Some(trouble) = waiting.trouble.take().filter(|_| is_well) {
            let seconds = trouble.since.elapsed().as_secs_f64();
            tracing::info!("{}: its disk works again, after {seconds:.1} s", self.file.display());
        }
    }
}

/// A change of the file that may not have reached the disk.
#[derive(Debug)]
enum Change {
    /// The length.
    Length(u64),
    /// Where, and the bytes.
    Bytes(u64, Vec<u8>),
}

/// The file.
#[derive(Debug)]
pub(super) struct Patient<File> {
    file: File,
    patience: Arc<Patience>,
    /// Changes since the last sync, in order. A system that could not write what it holds for the disk may drop it, and say
    /// that all is well the next time: so all of it is written again.
    unsynced: Mutex<Vec<Change>>,
}

impl<File: StorageBackend> Patient<File> {
    pub(super) fn new(file: File, patience: Arc<Patience>) -> Self {
        Patient { file, patience, unsynced: Mutex::default() }
    }

    fn make(&self, change: &Change) -> io::Result<()> {
        match change {
            Change::Length(length) => self.file.set_len(*length),
            Change::Bytes(place, bytes) => self.file.write(*place, bytes),
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut unsynced = self.unsynced.lock();
        self.patience.insist("cannot be written", || self.make(&change))?;
        unsynced.push(change);
        Ok(())
    }
}

impl<File: StorageBackend> StorageBackend for Patient<File> {
    fn len(&self) -> io::Result<u64> {
        self.patience.insist("cannot be read", || self.file.len())
    }

    fn read(&self, place: u64, out: &mut [u8]) -> io::Result<()> {
        self.patience.insist("cannot be read", || self.file.read(place, out))
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length))
    }

    fn write(&self, place: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(Change::Bytes(place, bytes.to_vec()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut unsynced = self.unsynced.lock();
        let mut is_first = true;
        self.patience.insist("cannot be written", || {
            if !std::mem::replace(&mut is_first, false) {
                unsynced.iter().try_for_each(|change| self.make(change))?;
            }
            self.file.sync_data()
        })?;
        unsynced.clear();
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    // Locks are no business of the disk.

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
