//! How ranks act together: plans and programs, topology, the fabric, recipes.
//!
//! Knows ranks, stages and bytes; no tensors (that is `kernels`) and no layers' arithmetic (that is `workers`).
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod checkpoint;
pub mod control;
pub mod cost;
pub mod eplb;
pub mod fabric;
pub mod failpoint;
pub mod faults;
pub mod files;
pub mod flight;
pub mod layout;
pub mod model_config;
pub mod publish;
pub mod random;
pub mod recipe;
pub mod schedule;
pub mod simulator;
pub mod stability;
pub mod topology;
pub mod trace;
