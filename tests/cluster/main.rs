//! Whole clusters in one process: every layout trains the same model, the same run gives the same bits, and whatever
//! goes wrong ends the run with one message.
#![allow(clippy::unwrap_used, missing_docs)]

mod average;
mod determinism;
mod failures;
mod frames;
mod job_actor;
mod lab;
mod loading;
mod margins;
mod memory;
mod overlap;
mod precision;
mod recording;
mod resume;
mod topology;
mod updates;
mod watch;
mod wires;
