//! The binary across interruptions: what was committed survives every end of a process, and the run goes on as if nothing
//! had happened.
#![allow(clippy::unwrap_used, missing_docs)]

mod crashes;
mod interrupts;
mod refusals;
mod rollback;
mod workplace;
