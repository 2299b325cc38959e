//! Formats: how the values of a tensor lie in bytes. The one list of them.
//!
//! A format says how many bytes a shape takes, the scales of a narrow one included, and where those lie. It knows no memory
//! and no arithmetic; what a code stands for is in `cast/codes`.

use bytemuck::Pod;

/// Columns of a tile, and rows and columns of a block: report section 3.3.2.
pub(crate) const TILE: usize = 128;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE single precision: master weights, gradients of weights, what must stay exact.
    F32,
    /// Unsigned integers: ids of tokens and experts, numbers of rows.
    U32,
    /// The upper half of an F32: activations, and weights that are computed with.
    BF16,
    /// 4 bits of exponent, 3 of mantissa, no infinities, up to 448; each tile has an F32 scale. What FP8 products are made of.
    E4M3(Tile, ScaleRule),
    /// 5 bits of exponent, 6 of mantissa, two codes in three bytes; each run of 128 columns has a scale that is a power of two.
    /// What is kept of the input of the projection behind attention.
    E5M6,
}

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128 columns of one row: activations and their gradients.
    Row,
    /// 128 rows by 128 columns of one matrix: weights.
    Block,
}

/// How the scale of a tile follows from the largest of its values. A tile of zeros has scale 1, and so has one whose values are
/// so small that the scale would be zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScaleRule {
    /// Take a largest value below 1e-4 for 1e-4, as the published inference code does.
    pub floor: bool,
    /// Round the scale up to a power of two, so that another tiling of the same values loses nothing but their tails.
    pub power_of_two: bool,
    /// What products with a weight of this format do otherwise than the report. Does not travel between ranks.
    pub study: Study,
}

/// One thing done otherwise in products of E4M3, to see what it is for. The format of the weight says it, and its other factors
/// take it over from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Study {
    /// Sums are made as tensor cores make them, without promotion: `gemm/narrow/tensor_core.rs`.
    pub tensor_core_sums: bool,
    /// Gradients share a scale by blocks of 128 x 128, in both products that they are a factor of.
    pub gradient_blocks: bool,
}

impl Study {
    /// As the report has it.
    pub const NONE: Study = Study { tensor_core_sums: false, gradient_blocks: false };
}

impl Format {
    /// What products of this format do otherwise.
    pub(crate) fn study(self) -> Study {
        match self {
            Format::E4M3(_, rule) => rule.study,
            _ => Study::NONE,
        }
    }

    /// **Units**: bytes of all values and scales of a tensor.
    pub(crate) fn num_bytes(self, shape: &[usize]) -> usize {
        let values = self.value_bytes(shape.iter().product());
        match self.num_scales(shape) {
            0 => values,
            scales => values.next_multiple_of(4) + 4 * scales,
        }
    }

    /// **Units**: bytes of a run of values alone.
    pub(crate) fn value_bytes(self, len: usize) -> usize {
        match self {
            Format::F32 | Format::U32 => 4 * len,
            Format::BF16 => 2 * len,
            Format::E4M3(..) => len,
            Format::E5M6 => (3 * len).div_ceil(2),
        }
    }

    /// Number of scales of a tensor.
    pub(crate) fn num_scales(self, shape: &[usize]) -> usize {
        let (rows, cols) = self.scale_grid(shape);
        rows * cols
    }

    /// Rows and columns of a tensor's scales. Each matrix of a stack has its own.
    pub(crate) fn scale_grid(self, shape: &[usize]) -> (usize, usize) {
        let (&cols, outer) = shape.split_last().unwrap_or((&1, &[]));
        let rows = outer.iter().product();
        match self {
            Format::F32 | Format::U32 | Format::BF16 => (0, 0),
            Format::E4M3(Tile::Row, _) | Format::E5M6 => (rows, cols.div_ceil(TILE)),
            Format::E4M3(Tile::Block, _) => {
                let (&height, stack) = outer.split_last().unwrap_or((&1, &[]));
                (stack.iter().product::<usize>() * height.div_ceil(TILE), cols.div_ceil(TILE))
            }
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

/// The bits of BF16 values.
impl Element for u16 {
    const FORMAT: Format = Format::BF16;
}
