//! What a rank is about, as others may see it: how far it is in its step, and whether any of its threads is at work or all of
//! them wait for other ranks. That distinguishes a stalled rank from those that wait for it. Knows no operation.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::observer::{Observer, Traffic};

/// How far a rank is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The running step.
    pub step: u64,
    /// Its finished pieces of work and waits.
    pub operations: u64,
    /// Whether something is under way that needs no other rank.
    pub is_at_work: bool,
    /// Whether something is read from storage or written to it.
    pub uses_storage: bool,
}

/// The counts of one rank.
#[derive(Debug, Default)]
pub struct Activity {
    step: AtomicU64,
    operations: AtomicU64,
    /// Threads at work, without those among them that wait for a frame.
    at_work: AtomicI64,
    /// Threads that read from storage or write to it.
    at_storage: AtomicI64,
    /// What it is about is given up.
    is_aborted: AtomicBool,
    /// Who takes note of what passes.
    observer: OnceLock<Arc<dyn Observer>>,
}

impl Activity {
    /// From now on somebody takes note of what passes; the first who does stays.
    pub fn observe_with(&self, observer: Arc<dyn Observer>) {
        drop(self.observer.set(observer));
    }

    /// Tells whoever takes note.
    pub(super) fn tell(&self, traffic: Traffic<'_>) {
        if let Some(observer) = self.observer.get() {
            observer.observe(traffic);
        }
    }

    /// A step begins.
    pub fn begin_step(&self, step: u64) {
        self.operations.store(0, Ordering::Relaxed);
        self.step.store(step, Ordering::Relaxed);
    }

    /// What the rank is about is given up, or a new generation begins. Whoever acts on it looks after what was done before.
    pub(super) fn set_aborted(&self, is_aborted: bool) {
        self.is_aborted.store(is_aborted, Ordering::SeqCst);
    }

    /// As it is now.
    pub fn progress(&self) -> Progress {
        Progress {
            step: self.step.load(Ordering::Relaxed),
            operations: self.operations.load(Ordering::Relaxed),
            is_at_work: self.at_work.load(Ordering::Relaxed) > 0,
            uses_storage: self.at_storage.load(Ordering::Relaxed) > 0,
        }
    }

    fn end(&self, change: i64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.at_work.fetch_add(change, Ordering::Relaxed);
    }
}

/// A rank is working while this guard lives. Code that may wait for a frame holds one; its waits are subtracted.
#[derive(Debug)]
pub struct AtWork(Arc<Activity>);

impl AtWork {
    pub(super) fn begin(activity: Arc<Activity>) -> Self {
        activity.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(activity)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.end(-1);
    }
}

/// A rank reads from storage or writes to it while this guard lives: however long that takes, it is no stall.
#[derive(Debug)]
pub struct StorageUse(Arc<Activity>);

impl StorageUse {
    pub(super) fn begin(activity: Arc<Activity>) -> Self {
        activity.at_storage.fetch_add(1, Ordering::Relaxed);
        activity.tell(Traffic::StorageBegan);
        StorageUse(activity)
    }

    /// Whether what the rank is about has been given up: nobody waits for what is written.
    pub fn is_aborted(&self) -> bool {
        self.0.is_aborted.load(Ordering::SeqCst)
    }
}

impl Drop for StorageUse {
    fn drop(&mut self) {
        self.0.operations.fetch_add(1, Ordering::Relaxed);
        self.0.at_storage.fetch_add(-1, Ordering::Relaxed);
        self.0.tell(Traffic::StorageEnded);
    }
}

/// A thread at work waits for a frame for as long as this lives.
pub(super) struct Wait<'a>(&'a Activity);

impl<'a> Wait<'a> {
    pub(super) fn begin(activity: &'a Activity) -> Self {
        activity.at_work.fetch_add(-1, Ordering::Relaxed);
        Wait(activity)
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.end(1);
    }
}
