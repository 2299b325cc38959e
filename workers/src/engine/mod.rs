//! Runs programs: the cursor that issues operations, the lanes that execute them, and what passes between two of them.
//!
//! Knows operations and tensors; nothing of steps in a row, of files or of the orchestrator.

pub mod compute;
pub mod lanes;
pub mod pipeline;
pub mod plans;
pub mod probe;
pub mod transit;
