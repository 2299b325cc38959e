//! The optimizer of a rank: its shard of the moments, and what the operations of an update do to gradients and weights.
//!
//! Knows parameters and replica groups, no layers and no lanes.

mod average;
mod averaging;
pub mod buckets;
pub mod inspect;
pub mod owned;
pub mod squares;
mod state;
pub mod totals;
pub mod update;
