//! Every operation against a naive twin in f64, every gradient against central differences of that twin.

#![allow(clippy::unwrap_used, missing_docs)]

mod adamw;
mod linear;
mod math;
mod norm;
mod one_or_many;
mod rope;
mod swiglu;
mod tensor;
mod twin;
