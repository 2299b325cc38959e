//! What the cluster decides: the life of a job, and what its ranks report. Knows events and commands, no tensors.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod core;
pub mod job;
pub mod job_actor;
pub mod metrics;
pub mod placement;
pub mod queue;
pub mod recovery;
pub mod rollback;
pub mod server;
pub mod simulation;
pub mod store;
pub mod webhook;
