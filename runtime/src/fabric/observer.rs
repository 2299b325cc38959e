//! Who takes note of what passes at a rank's end of the fabric, while it passes. Knows nothing of what is made of it.

use std::fmt;

use super::Tag;

/// What passes.
#[derive(Clone, Copy, Debug)]
pub enum Traffic<'a> {
    /// A frame is handed over.
    Sent {
        /// Rank it goes to.
        to: usize,
        /// Its address.
        tag: &'a Tag,
    },
    /// The calling thread waits for a frame.
    Awaited(&'a Tag),
    /// It has come. A wait that ends without a frame is not told: nothing has come.
    Received(&'a Tag),
    /// Something is read from storage or written to it.
    StorageBegan,
    /// That is done, perhaps on another thread.
    StorageEnded,
}

/// Takes note. It is called in the middle of what it observes: it has to be quick, and must not wait.
pub trait Observer: fmt::Debug + Send + Sync {
    /// Something passes on the calling thread.
    fn observe(&self, traffic: Traffic<'_>);
}
