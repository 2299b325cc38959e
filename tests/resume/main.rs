//! Runs from their first step to what is left of them: what was committed survives every end of a process, and the run continues
//! as if nothing had happened; they are validated, listed, drawn and compared.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/archive.rs"]
mod archive;
mod crashes;
#[path = "../common/deadline.rs"]
mod deadline;
mod doctor;
mod interrupts;
mod readers;
mod refusals;
mod rollback;
mod runs;
mod tied;
mod unbiased;
mod validation;
mod workplace;
