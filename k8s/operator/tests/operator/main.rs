//! The operator against an API server and an orchestrator in this process, on a clock that runs as fast as nothing happens.
#![allow(clippy::unwrap_used, missing_docs)]

mod api;
mod clusters;
mod definitions;
mod jobs;
mod kills;
mod orchestrator;
mod real;
mod rights;
mod stage;
