//! What a rank does: its actors, its model, and how the two meet the fabric.
//!
//! The path of a micro-batch: `loader` -> `pipeline` (the program's cursor) -> `lanes` -> `compute` (with `model/`) ->
//! `exchange` -> `update`. This is the one crate that knows both ranks and tensors.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod buckets;
pub mod checkpoint;
pub mod checkpointer;
pub mod collectives;
pub mod compute;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod exchange;
pub mod expert_shard;
pub mod generate;
pub mod hashed_file;
pub mod hf_check;
pub mod hf_export;
pub mod host;
pub mod inspect;
pub mod kept;
pub mod lanes;
pub mod loader;
pub mod membership;
pub mod model;
pub mod optimizer;
pub mod packets;
pub mod params;
pub mod pipeline;
pub mod plans;
pub mod probe;
pub mod provenance;
pub mod rank;
pub mod step;
pub mod update;
pub mod weights;
pub mod worker;
