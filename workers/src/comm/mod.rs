//! Communication between ranks in terms of tensors: the all-to-all of the experts, collectives, and their form as frames.
//!
//! The only room, beside the copies in memory, that sends and receives. Knows groups of ranks, no model and no optimizer.

pub mod address;
pub mod all_to_all;
pub mod collectives;
mod hop;
pub mod packets;
