//! Runs the programs of a task: the cursor that issues operations, the lanes that execute them, what an operation does, and
//! what passes between two of them.
//!
//! Knows operations and tensors; nothing of tasks in a row, of files or of the orchestrator.

pub mod compute;
mod events;
pub mod in_flight;
mod issue;
pub mod lanes;
mod operations;
pub mod pipeline;
pub mod plans;
pub mod probe;
pub mod recording;
pub mod running;
pub mod step;
pub mod timelines;
pub mod update;
mod update_ops;
