//! Contraflow: trains DeepSeek-V3-class mixture-of-experts language models.
//!
//! This package composes orchestrator and workers into the one binary; it has no logic of its own.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cluster;
