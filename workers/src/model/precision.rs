//! In which formats a rank computes: the recipe's words as formats of tensors (report section 3.3).
//!
//! Norms, gates and routing stay in F32, as do gradients of weights and what the optimizer works on. Knows no layer.

use contraflow_kernels::tensor::{Format, ScaleRule, Study, Tile};
use contraflow_runtime::recipe::{Accumulation, GradientScales, NumberFormat, PrecisionSection};

/// Formats of what is computed and sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Weights of linear layers; that of their inputs follows.
    pub linear: Format,
    /// Embedding and head, and so the residual stream and all that is computed from it.
    pub activations: Format,
    /// Rows on their way to the experts, and their gradients.
    pub dispatch: Format,
    /// Sums on their way back, and their gradients.
    pub combine: Format,
    /// What is kept of attention's output.
    pub attention_output: Format,
    /// What is kept of SwiGLU's input.
    pub swiglu_input: Format,
}

impl Precision {
    /// All in single precision.
    pub const F32: Precision = Precision {
        linear: Format::F32,
        activations: Format::F32,
        dispatch: Format::F32,
        combine: Format::F32,
        attention_output: Format::F32,
        swiglu_input: Format::F32,
    };

    /// That of a recipe. What travels in FP8 has powers of two for scales, so that it is tiled anew without loss.
    pub fn of(section: &PrecisionSection) -> Self {
        let study = Study {
            tensor_core_sums: section.accumulate == Accumulation::TensorCore,
            gradient_blocks: section.gradient_scales == GradientScales::Block,
        };
        let of = |number, tile, power_of_two| {
            // Weights say it, so that what travels needs not to.
            let study = if tile == Tile::Block { study } else { Study::NONE };
            match number {
                NumberFormat::F32 => Format::F32,
                NumberFormat::Bf16 => Format::BF16,
                NumberFormat::Fp8 => Format::E4M3(tile, ScaleRule { floor: false, power_of_two, study }),
                NumberFormat::E5m6 => Format::E5M6,
            }
        };
        Precision {
            linear: of(section.linear, Tile::Block, false),
            activations: of(section.activations, Tile::Row, false),
            dispatch: of(section.dispatch, Tile::Row, true),
            combine: of(section.combine, Tile::Row, false),
            attention_output: of(section.attention_output, Tile::Row, false),
            swiglu_input: of(section.swiglu_input, Tile::Row, false),
        }
    }
}
