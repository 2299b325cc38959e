//! Runs of the binary against an object store on loopback: data, weights, exports and checkpoints; what is wrong is said, and bits are those of
//! local files.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]

mod checkpoints;
mod data;
#[path = "../common/deadline.rs"]
mod deadline;
mod exports;
mod server;
#[path = "../resume/workplace.rs"]
mod workplace;
