//! The binary across interruptions: what was committed survives every end of a process, and the run continues as if nothing
//! had happened.
#![allow(clippy::unwrap_used, missing_docs)]

mod crashes;
#[path = "../common/deadline.rs"]
mod deadline;
mod interrupts;
mod refusals;
mod rollback;
mod workplace;
