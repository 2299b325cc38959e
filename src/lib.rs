//! Contraflow: trains DeepSeek-V3-class mixture-of-experts language models.
//!
//! This package composes orchestrator and workers into the one binary; it has no logic of its own.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod access;
pub mod bench;
pub mod certs;
pub mod checkpoint;
pub mod client;
pub mod dashboard;
pub mod data;
pub mod eval;
pub mod export;
pub mod failure;
pub mod generate;
pub mod import;
pub mod interrupt;
pub mod local;
pub mod machine;
pub mod orchestrator;
pub mod otlp;
pub mod output;
pub mod plan;
pub mod progress;
pub mod recipes;
pub mod resume;
pub mod run;
pub mod run_dir;
pub mod runs;
pub mod summary;
pub mod systemd;
pub mod telemetry;
pub mod train;
pub mod worker;
