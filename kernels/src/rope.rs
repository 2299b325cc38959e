//! Rotary position embedding on interleaved pairs, with YaRN's frequencies for longer contexts.
//!
//! Attention turns queries and the shared key by it, and their gradients back. It knows positions, not sequences.
//! Everything transcendental is computed in f64 by our own functions, so that tables have the same bits everywhere.
//!
//! Shape letters: T tokens, H heads.

use std::f64::consts::PI;

use crate::{
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor},
};

/// What the rotation of a model is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Rotated columns per head, two per frequency.
    pub dim: usize,
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Stretching to longer contexts, if any.
    pub yarn: Option<Yarn>,
}

/// YaRN: low frequencies are divided by `factor`, high ones kept, with a ramp between.
///
/// **Source**: Peng et al. 2023, section 3; DeepSeek-V3 report, section 4.3. Names as in published configurations.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context becomes.
    pub factor: f64,
    /// Turns within the original context from which on a frequency is kept.
    pub beta_fast: f64,
    /// Turns up to which a frequency is divided in full.
    pub beta_slow: f64,
    /// Weight of the logarithmic correction on cosines and sines.
    pub mscale: Option<f64>,
    /// The same on the softmax scale, divided out of the former.
    pub mscale_all_dim: Option<f64>,
    /// The context before stretching.
    ///
    /// **Units**: tokens.
    pub original_max_position_embeddings: usize,
}

impl Yarn {
    fn correction(&self, weight: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * libm::log(self.factor) + 1.0 }
    }

    /// How much of each frequency is divided: 0 for the highest, 1 for the lowest.
    fn ramp(&self, dim: usize, theta: f64) -> impl Fn(usize) -> f64 {
        let context = self.original_max_position_embeddings as f64;
        let pair =
            |turns: f64| dim as f64 * libm::log(context / (turns * 2.0 * PI)) / (2.0 * libm::log(theta));
        let low = pair(self.beta_fast).floor().max(0.0);
        let high = pair(self.beta_slow).ceil().min(dim as f64 - 1.0);
        // A ramp of no length is a step.
        let length = if high == low { 0.001 } else { high - low };
        move |pair| ((pair as f64 - low) / length).clamp(0.0, 1.0)
    }
}

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Angle per position of each pair.
    ///
    /// **Shapes**: `[dim / 2]`. **Units**: radians per position.
    pub inv_freq: Tensor,
    /// Factor on every cosine and sine.
    pub cos_sin_scale: f32,
}

impl Rope {
    /// The frequencies that a configuration asks for.
    pub fn new(spec: &RopeSpec) -> Rope {
        let RopeSpec { dim, theta, ref yarn } = *spec;
        assert!(dim.is_multiple_of(2), "expected an even number of rotated columns, got {dim}");
        let ramp = yarn.as_ref().map(|yarn| (yarn.ramp(dim, theta), yarn.factor));
        let frequency = |pair: usize| {
            let plain = libm::exp(-(2.0 * pair as f64 / dim as f64) * libm::log(theta));
            let frequency = match &ramp {
                Some((ramp, factor)) => plain * (1.0 - ramp(pair)) + plain / factor * ramp(pair),
                None => plain,
            };
            frequency as f32
        };
        let cos_sin_scale = yarn.as_ref().map_or(1.0, |yarn| match (yarn.mscale, yarn.mscale_all_dim) {
            (Some(mscale), Some(all_dim)) if mscale != 0.0 && all_dim != 0.0 => {
                yarn.correction(mscale) / yarn.correction(all_dim)
            }
            _ => yarn.correction(1.0),
        });
        let inv_freq = Tensor::from_vec(&[dim / 2], (0..dim / 2).map(frequency).collect());
        Rope { inv_freq, cos_sin_scale: cos_sin_scale as f32 }
    }

    /// Cosine and sine of every pair at every position.
    ///
    /// **Shapes**: `positions` `[T]` in U32.
    pub fn table(&self, positions: &Tensor) -> RopeTable {
        let (inv_freq, scale) = (self.inv_freq.f32(), f64::from(self.cos_sin_scale));
        let mut turns = Tensor::for_overwrite(&[positions.len(), inv_freq.len(), 2]);
        let (pairs, _) = turns.f32_mut().as_chunks_mut::<2>();
        let angles = positions
            .u32()
            .iter()
            .flat_map(|&position| inv_freq.iter().map(move |&f| f64::from(f) * f64::from(position)));
        for (pair, angle) in pairs.iter_mut().zip(angles) {
            let (sin, cos) = libm::sincos(angle);
            *pair = [(cos * scale) as f32, (sin * scale) as f32];
        }
        RopeTable { turns }
    }
}

/// Cosines and sines of some positions, made once per micro-batch.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Cosine and sine. **Shapes**: `[T, dim / 2, 2]`.
    turns: Tensor,
}

/// The factor on attention logits: qk_dim^-1/2, with YaRN's correction squared.
pub fn softmax_scale(qk_dim: usize, yarn: Option<&Yarn>) -> f32 {
    let plain = 1.0 / (qk_dim as f64).sqrt();
    let all_dim = yarn.and_then(|yarn| Some((yarn, yarn.mscale_all_dim.filter(|&weight| weight != 0.0)?)));
    let correction = all_dim.map_or(1.0, |(yarn, weight)| yarn.correction(weight));
    (plain * correction * correction) as f32
}

/// Turns each head's pairs (0, 1), (2, 3), .. in place, by the row's angles; backwards if `inverse`, which is the
/// transpose and so takes gradients back.
///
/// The columns of a row are H heads of equal width side by side; of each head those from `offset` on are turned.
///
/// **Shapes**: `x` `[T, H * width]`, `table` of T rows.
/// **Errors**: panics if the table has other rows, or the turned columns go beyond the head.
pub fn rotate(table: &RopeTable, x: &mut Tensor, num_heads: usize, offset: usize, inverse: bool) {
    let &[num_rows, num_pairs, _] = table.turns.shape() else { unreachable!("a table has three dims") };
    let (num_cols, turned) = (x.cols(), 2 * num_pairs);
    assert_eq!(x.rows(), num_rows, "expected one row per position of the table");
    assert!(
        num_cols.is_multiple_of(num_heads),
        "expected {num_heads} heads of one width, got {num_cols} columns"
    );
    let width = num_cols / num_heads;
    assert!(offset + turned <= width, "expected {turned} columns from {offset} on within heads of {width}");
    let format = x.format();
    if format != Format::F32 {
        let mut wide = x.widened();
        rotate(table, &mut wide, num_heads, offset, inverse);
        *x = wide.to(format);
        return;
    }
    let sign = if inverse { -1.0 } else { 1.0 };
    let (turns, _) = table.turns.f32().as_chunks::<2>();
    par::for_each_chunk(x.f32_mut(), num_cols, MIN_PARALLEL / num_cols, |rows, part| {
        for (row, values) in rows.zip(part.chunks_exact_mut(num_cols)) {
            let turns = &turns[row * num_pairs..][..num_pairs];
            for head in values.chunks_exact_mut(width) {
                turn(&mut head[offset..offset + turned], turns, sign);
            }
        }
    });
}

fn turn(values: &mut [f32], turns: &[[f32; 2]], sign: f32) {
    let (pairs, _) = values.as_chunks_mut::<2>();
    for (pair, &[cos, sin]) in pairs.iter_mut().zip(turns) {
        let ([a, b], sin) = (*pair, sign * sin);
        *pair = [a * cos - b * sin, a * sin + b * cos];
    }
}
