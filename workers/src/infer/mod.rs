//! A model on its own, without ranks: text continued, sequences measured.
//!
//! Knows the layers and a directory of weights; nothing of training.

pub mod evaluate;
pub mod generate;
