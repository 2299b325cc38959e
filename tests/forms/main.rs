//! Data, models and prompts as they come: what users of other programs have lying about, by the binary. Each test is a command
//! and what must come of it; the numbers are those of Python's own libraries, of pyarrow and of the texts themselves.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/deadline.rs"]
mod deadline;
mod models;
mod place;
mod prompts;
mod rows;
mod splits;
