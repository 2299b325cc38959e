//! The update of a rank: gradients reduced, the global norm, AdamW on the rank's shard, weights gathered.
//!
//! Knows parameters and replica groups, no layers and no files.

pub mod actor;
pub mod buckets;
pub mod inspect;
mod state;
pub mod update;
