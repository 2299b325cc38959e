//! Object stores: `s3://`, `gs://`, `az://` and files of web servers, where paths may stand.
//!
//! What is read is fetched into a cache once, whole and under its content's identity, and everything reads it there as local
//! files. Credentials are read from the environment, by the names that the vendors' own tools read. Every call is tried again a
//! bounded number of times and has a deadline. Knows names, bytes and checksums; nothing of what is in them.

mod cache;
mod http;
mod location;
mod publish;
mod sources;
mod store;

use std::fmt;

pub use cache::{Staging, cache_dir, fetch, fetch_all, fetched_name, forget};
pub use http::post;
pub use location::{Location, Scheme};
pub use publish::{publish, target_fault};
pub use sources::Sources;
pub use store::{Created, Listed, Objects};

/// What an object store did not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectError {
    /// What it is about, as text.
    pub location: String,
    /// What was expected and what came.
    pub message: String,
    /// What kind of fault it is.
    pub kind: ObjectFault,
}

/// Kinds of faults of an object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectFault {
    /// The location itself is not one, or cannot be used like this.
    Refused,
    /// Nothing is there.
    Missing,
    /// The credentials do not allow it, or there are none.
    Denied,
    /// It is not what it was a moment before.
    Changed,
    /// The store cannot be reached, fails, or the disk of this node does.
    Failed,
}

impl fmt::Display for ObjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.location.as_str() {
            "" => f.write_str(&self.message),
            location => write!(f, "{location}: {}", self.message),
        }
    }
}

impl std::error::Error for ObjectError {}

impl ObjectError {
    fn new(location: &Location, kind: ObjectFault, message: impl fmt::Display) -> Self {
        ObjectError { location: location.to_string(), message: message.to_string(), kind }
    }
}
