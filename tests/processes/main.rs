//! The cluster as it is run: an orchestrator, workers and clients as processes of the one binary. Every wait has a deadline
//! and says what it waited for.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/archive.rs"]
mod archive;
mod chaos;
mod cluster;
mod collector;
mod crash_loop;
mod cut_off;
#[path = "../common/deadline.rs"]
mod deadline;
mod elastic;
mod flight;
mod following;
mod hostile;
mod http2;
mod hung;
mod models;
mod network;
mod operators;
mod places;
mod python;
mod record;
mod refusals;
mod removal;
mod renewal;
mod retention;
mod security;
#[path = "../objects/server.rs"]
#[allow(dead_code)]
mod server;
mod service_manager;
mod silence;
mod soak;
mod sources;
mod state_disk;
mod states;
mod storage;
mod storm;
mod telemetry;
mod tokenizer;
mod webhook;
mod withdrawn;
