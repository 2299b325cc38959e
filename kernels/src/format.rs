//! Formats: how the values of a tensor lie in bytes. The one list of them.
//!
//! A format says how many bytes a number of values takes, the scales of a narrow one included. It knows no shapes and no
//! memory.

use bytemuck::Pod;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE single precision: activations, weights, gradients.
    F32,
    /// Unsigned integers: ids of tokens and experts, numbers of rows.
    U32,
}

impl Format {
    /// **Units**: bytes that `len` values take.
    pub fn num_bytes(self, len: usize) -> usize {
        match self {
            Format::F32 | Format::U32 => 4 * len,
        }
    }
}

/// A number on the host, and the format whose values it is.
pub trait Element: Pod + Send + Sync {
    /// The format.
    const FORMAT: Format;
}

impl Element for f32 {
    const FORMAT: Format = Format::F32;
}

impl Element for u32 {
    const FORMAT: Format = Format::U32;
}
