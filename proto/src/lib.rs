//! The wire, and nothing but the wire: messages and services generated from the `.proto` files beside this crate.
//!
//! Knows no actor and no transport. Comments of the messages are those of the protocol files.

/// Version 1 of the protocol.
pub mod v1 {
    #![allow(missing_docs, reason = "the generated code carries the comments of the protocol files")]
    #![allow(clippy::all, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/contraflow.v1.rs"));
}

pub use v1::{GradientNorms, LayerLoad, StepReport};

/// The protocol files, compiled and with their comments: a serialized `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
