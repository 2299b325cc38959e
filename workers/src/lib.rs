//! What a rank does: its actors, its model, and how the two meet the fabric.
//!
//! Rooms, each importing only those below it: `host`; `rank`; `infer`; `engine`; `optimizer`, `kept`, `hf`; `comm`, `checkpoint`;
//! `model`; `data`; `error`, `hashed_file`, `background`. The path of a micro-batch: `data/batches` -> `engine/pipeline` (the program's
//! cursor) -> `engine/lanes` -> `engine/operations` -> `engine/compute` (with `model/`) and `comm/all_to_all` ->
//! `engine/update` (with `optimizer/` and `comm/collectives`). This is the one crate that knows both ranks and tensors.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod background;
pub mod checkpoint;
pub mod comm;
pub mod data;
pub mod engine;
pub mod error;
pub mod hashed_file;
pub mod hf;
pub mod host;
pub mod infer;
pub mod model;
pub mod optimizer;
pub mod rank;
pub mod replica;
