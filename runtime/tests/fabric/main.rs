//! The fabric between processes, as its users see it: frames arrive as they were sent whatever carries them, a lost peer ends
//! the waits for it, and who does not belong to a formation is refused.
#![allow(clippy::unwrap_used, missing_docs)]

mod doors;
mod faults;
mod frames;
mod lab;
mod processes;
