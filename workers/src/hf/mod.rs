//! Directories of weights under the published names: read, checked as a whole, written.
//!
//! Knows names, shapes and files, no layers and no ranks.

pub mod check;
pub mod export;
mod fp8;
pub mod header;
pub mod shard;
pub mod unfinished;
pub mod weights;
