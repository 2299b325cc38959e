//! What one device computes: tensors and the operations a DeepSeek-V3-class model is made of.
//!
//! One operation per file, backward beside forward, no autograd: the layer code in the workers crate calls both in
//! the order it wants. Nothing here knows ranks, parameters' names, micro-batches or the network.
//!
//! **The door.** Operations take and give [`tensor::Tensor`] and nothing else that holds numbers; ids, routing and
//! offsets are tensors too. In what format and where its bytes lie is a matter of the tensor and of the operations alone.
//! Arithmetic is f32 on the CPU, but for products of narrow formats.
//!
//! **Threads.** An operation uses the rayon pool it is called from ([`par::Threads::run`]) and runs serially outside
//! of one. Work is cut by sizes and number of threads only, so a run repeats bit for bit.
//!
//! **Errors.** A wrong shape is a bug of the caller: operations panic and name what was expected. Non-finite values
//! are passed on, never hidden.
//!
//! Shape letters, used throughout: T tokens (rows of a micro-batch), D hidden, K top-k, E experts, R routed rows,
//! F expert hidden, H heads, C latent, V vocabulary.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod adamw;
pub mod attention;
mod cast;
mod copy;
pub mod cross_entropy;
pub mod dispatch;
pub mod elementwise;
pub mod embedding;
mod format;
pub mod gate;
mod gemm;
mod gemv;
pub mod grouped;
pub mod host;
pub mod isa;
pub mod latent;
pub mod linear;
pub mod math;
pub mod norm;
pub mod par;
pub mod permute;
pub mod pool;
pub mod rope;
pub mod sampling;
mod softmax;
pub mod swiglu;
pub mod tensor;
#[cfg(test)]
mod tests;
mod view;
