//! Rotary position embedding on interleaved pairs, with YaRN's frequencies for longer contexts.
//!
//! Attention turns queries and the shared key by it, and their gradients back. It knows positions, not sequences.
//! Everything transcendental is computed in f64 by our own functions, so that tables have the same bits everywhere.
//!
//! Shape letters: T tokens, H heads.

use std::{f64::consts::PI, ops::Range};

use crate::{
    gemm::MatMut,
    math::{self, MIN_PARALLEL},
    par,
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
        if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * math::ln_f64(self.factor) + 1.0 }
    }

    /// How much of each frequency is divided: 0 for the highest, 1 for the lowest.
    fn ramp(&self, dim: usize, theta: f64) -> impl Fn(usize) -> f64 {
        let context = self.original_max_position_embeddings as f64;
        let pair = |turns: f64| {
            dim as f64 * math::ln_f64(context / (turns * 2.0 * PI)) / (2.0 * math::ln_f64(theta))
        };
        let low = pair(self.beta_fast).floor().max(0.0);
        let high = pair(self.beta_slow).ceil().min(dim as f64 - 1.0);
        // A ramp of no length is a step.
        let length = if high == low { 0.001 } else { high - low };
        move |pair| ((pair as f64 - low) / length).clamp(0.0, 1.0)
    }
}

/// The frequencies of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair.
    ///
    /// **Shapes**: `[dim / 2]`. **Units**: radians per position.
    pub inv_freq: Vec<f32>,
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
            let plain = math::exp_f64(-(2.0 * pair as f64 / dim as f64) * math::ln_f64(theta));
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
        Rope { inv_freq: (0..dim / 2).map(frequency).collect(), cos_sin_scale: cos_sin_scale as f32 }
    }

    /// Cosine and sine of every pair at every position.
    pub fn table(&self, positions: &[u32]) -> RopeTable {
        let scale = f64::from(self.cos_sin_scale);
        let angles = positions
            .iter()
            .flat_map(|&position| self.inv_freq.iter().map(move |&f| f64::from(f) * f64::from(position)));
        let turns = angles.map(|angle| {
            let (sin, cos) = math::sin_cos(angle);
            [(cos * scale) as f32, (sin * scale) as f32]
        });
        RopeTable { num_rows: positions.len(), num_pairs: self.inv_freq.len(), turns: turns.collect() }
    }
}

/// Cosines and sines of some positions, made once per micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    num_rows: usize,
    num_pairs: usize,
    /// Cosine and sine, per row and pair.
    turns: Vec<[f32; 2]>,
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
/// Of each row, head `h` owns `stride` columns from `h * stride` on, of which those from `offset` on are turned.
///
/// **Shapes**: `x` `[T, H * stride]`, `table` of T rows.
/// **Errors**: panics if the table has other rows, or the turned columns go beyond the head.
pub fn rotate(table: &RopeTable, x: MatMut, num_heads: usize, stride: usize, offset: usize, inverse: bool) {
    let width = 2 * table.num_pairs;
    assert_eq!(x.num_rows(), table.num_rows, "expected one row per position of the table");
    assert_eq!(x.num_cols(), num_heads * stride, "expected {num_heads} heads of {stride} columns");
    assert!(offset + width <= stride, "expected {width} columns from {offset} on within heads of {stride}");
    let sign = if inverse { -1.0 } else { 1.0 };
    let ranges = par::partition(table.num_rows, MIN_PARALLEL / (num_heads * stride));
    let tasks = ranges.iter().cloned().zip(x.split_rows(&ranges)).collect();
    par::for_each(tasks, |(rows, mut part): (Range<usize>, MatMut)| {
        for (index, row) in rows.enumerate() {
            let turns = &table.turns[row * table.num_pairs..][..table.num_pairs];
            for head in part.row_mut(index).chunks_exact_mut(stride) {
                turn(&mut head[offset..offset + width], turns, sign);
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
