//! The wire, and nothing but the wire: messages and services generated from the `.proto` files beside this crate.
//!
//! Knows no actor and no transport. Comments of the messages are those of the protocol files.

/// Version 1 of the protocol.
pub mod v1 {
    #![allow(missing_docs, reason = "the generated code carries the comments of the protocol files")]
    #![allow(clippy::all, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/contraflow.v1.rs"));
}

/// Encodes and decodes messages.
pub use prost::Message;
pub use v1::{GradientNorms, LayerLoad, StepRecord, StepReport};

/// Numbers of a step as JSON has them: what is not finite is written as null, and null is read as NaN.
mod or_nan {
    use serde::{Deserialize, Deserializer};

    pub(crate) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
    }

    pub(crate) fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
        let numbers: Vec<Option<f64>> = Vec::deserialize(from)?;
        Ok(numbers.into_iter().map(|number| number.unwrap_or(f64::NAN)).collect())
    }
}

/// The protocol files, compiled and with their comments: a serialized `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
