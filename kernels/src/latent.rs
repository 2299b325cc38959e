//! Around attention's core: keys and values from MLA's latent and rotary parts, and the absorbed form of decoding.
//!
//! Called by the attention component (join, split) and by generation (decode). It knows neither how a latent is made
//! nor where a cache lives.
//!
//! Shape letters: T tokens, H heads, C latent, L cached positions, n new positions.

use std::ops::Range;

use crate::{
    gemm::{Into, Mat, MatMut, gemm},
    math::MIN_PARALLEL,
    par, softmax,
    tensor::Tensor,
};

/// The head sizes of MLA. A head's query or key is its content part, then its rotary part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentHeads {
    /// H.
    pub num_heads: usize,
    /// Columns of the content part.
    pub nope_dim: usize,
    /// Columns of the rotary part, one for all heads on the key side.
    pub rope_dim: usize,
    /// Columns of a head's values.
    pub v_dim: usize,
}

impl LatentHeads {
    /// Columns of a head's whole query or key.
    pub fn qk_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }
}

/// Keys and values for the direct form: per head the content key with the shared rotary key behind it.
///
/// **Shapes**: `kv` `[T, H * (nope + v)]`, per head key then value, `k_rope` `[T, rope]`; result
/// `([T, H * (nope + rope)], [T, H * v])`.
pub fn join_keys(kv: &Tensor, k_rope: Mat, heads: &LatentHeads) -> (Tensor, Tensor) {
    let LatentHeads { num_heads, nope_dim, rope_dim, v_dim } = *heads;
    assert_eq!(
        kv.cols(),
        num_heads * (nope_dim + v_dim),
        "expected key and value of every head side by side"
    );
    assert_eq!(k_rope.num_rows(), kv.rows(), "expected one rotary key per row");
    assert_eq!(k_rope.num_cols(), rope_dim, "expected one rotary key for all heads");
    let mut k = Tensor::for_overwrite(&[kv.rows(), num_heads * heads.qk_dim()]);
    let mut v = Tensor::for_overwrite(&[kv.rows(), num_heads * v_dim]);
    let widths = (num_heads * heads.qk_dim(), num_heads * v_dim);
    for_each_row(k.f32_mut(), v.f32_mut(), widths, |row, k, v| {
        let parts = kv.row(row).chunks_exact(nope_dim + v_dim);
        let targets = k.chunks_exact_mut(heads.qk_dim()).zip(v.chunks_exact_mut(v_dim));
        for (part, (k, v)) in parts.zip(targets) {
            k[..nope_dim].copy_from_slice(&part[..nope_dim]);
            k[nope_dim..].copy_from_slice(k_rope.row(row));
            v.copy_from_slice(&part[nope_dim..]);
        }
    });
    (k, v)
}

/// Gradients of [`join_keys`]'s inputs; that of the shared rotary key is summed over heads, in their order.
///
/// **Shapes**: `dk` `[T, H * (nope + rope)]`, `dv` `[T, H * v]`; result `([T, H * (nope + v)], [T, rope])`.
pub fn split_key_gradients(dk: &Tensor, dv: &Tensor, heads: &LatentHeads) -> (Tensor, Tensor) {
    let LatentHeads { num_heads, nope_dim, rope_dim, v_dim } = *heads;
    assert_eq!(dk.cols(), num_heads * heads.qk_dim(), "expected key gradients of every head side by side");
    assert_eq!(
        dv.shape(),
        [dk.rows(), num_heads * v_dim],
        "expected value gradients beside those of the keys"
    );
    let mut d_kv = Tensor::for_overwrite(&[dk.rows(), num_heads * (nope_dim + v_dim)]);
    let mut d_k_rope = Tensor::zeros(&[dk.rows(), rope_dim]);
    let widths = (num_heads * (nope_dim + v_dim), rope_dim);
    for_each_row(d_kv.f32_mut(), d_k_rope.f32_mut(), widths, |row, d_kv, d_rope| {
        let sources = dk.row(row).chunks_exact(heads.qk_dim()).zip(dv.row(row).chunks_exact(v_dim));
        for (part, (dk, dv)) in d_kv.chunks_exact_mut(nope_dim + v_dim).zip(sources) {
            part[..nope_dim].copy_from_slice(&dk[..nope_dim]);
            part[nope_dim..].copy_from_slice(dv);
            for (sum, gradient) in d_rope.iter_mut().zip(&dk[nope_dim..]) {
                *sum += gradient;
            }
        }
    });
    (d_kv, d_k_rope)
}

/// Works on each row of two matrices of as many rows, on the pool if there is one.
fn for_each_row(
    left: &mut [f32],
    right: &mut [f32],
    (left_width, right_width): (usize, usize),
    work: impl Fn(usize, &mut [f32], &mut [f32]) + Send + Sync,
) {
    let ranges = par::partition(left.len() / left_width, MIN_PARALLEL / left_width);
    let parts =
        par::split(left, left_width, &ranges).into_iter().zip(par::split(right, right_width, &ranges));
    let tasks = ranges.iter().cloned().zip(parts).collect();
    par::for_each(tasks, |(rows, (left, right)): (Range<usize>, (&mut [f32], &mut [f32]))| {
        let pairs = left.chunks_exact_mut(left_width).zip(right.chunks_exact_mut(right_width));
        for (row, (left, right)) in rows.zip(pairs) {
            work(row, left, right);
        }
    });
}

/// The cached positions of one sequence in one layer, the new ones included.
#[derive(Clone, Copy)]
pub struct LatentCache<'a> {
    /// Normalised latents.
    ///
    /// **Shapes**: `[L * C]`.
    pub latents: &'a [f32],
    /// Rotated shared keys.
    ///
    /// **Shapes**: `[L * rope]`.
    pub rope_keys: &'a [f32],
}

/// Attention of the last few positions in the absorbed form: queries go down to the latents, not latents up to keys.
///
/// Each new position sees the cache up to itself. Meant for one or a handful of positions: the cache is read once for
/// each, and a long prompt is cheaper in the direct form.
///
/// **Shapes**: `q` `[n, H * (nope + rope)]`, rotary parts rotated; `kv_b` `[H * (nope + v), C]`; result `[n, H * v]`.
pub fn decode(q: &Tensor, kv_b: &Tensor, cache: LatentCache, heads: &LatentHeads, scale: f32) -> Tensor {
    let LatentHeads { num_heads, nope_dim, rope_dim, v_dim } = *heads;
    let (num_new, latent_dim) = (q.rows(), kv_b.cols());
    let len = cache.latents.len() / latent_dim;
    assert_eq!(q.cols(), num_heads * heads.qk_dim(), "expected queries of every head side by side");
    assert_eq!(kv_b.rows(), num_heads * (nope_dim + v_dim), "expected key and value rows of every head");
    assert_eq!(cache.rope_keys.len(), len * rope_dim, "expected as many rotary keys as latents");
    assert!(num_new <= len, "expected the {num_new} new positions in the cache, got {len} positions");
    let head_weights = |head: usize| {
        let first = head * (nope_dim + v_dim);
        let rows = kv_b.mat().rows_range(first..first + nope_dim + v_dim);
        (rows.rows_range(0..nope_dim), rows.rows_range(nope_dim..nope_dim + v_dim))
    };

    let mut absorbed = Tensor::for_overwrite(&[num_new, num_heads * latent_dim]);
    for head in 0..num_heads {
        let first = head * heads.qk_dim();
        let target = absorbed.mat_mut().columns(head * latent_dim..(head + 1) * latent_dim);
        gemm(target, Into::Overwrite, 1.0, q.mat().columns(first..first + nope_dim), head_weights(head).0);
    }

    let mut context = Tensor::for_overwrite(&[num_new, num_heads * latent_dim]);
    let mut scores = Tensor::for_overwrite(&[num_heads, len]);
    for position in 0..num_new {
        let seen = len - num_new + position + 1;
        let latents = Mat::new(cache.latents, len, latent_dim).rows_range(0..seen);
        let rope_keys = Mat::new(cache.rope_keys, len, rope_dim).rows_range(0..seen);
        let content = Mat::new(absorbed.row(position), num_heads, latent_dim);
        let rotary = Mat::new(q.row(position), num_heads, heads.qk_dim()).columns(nope_dim..heads.qk_dim());
        gemm(scores.mat_mut().columns(0..seen), Into::Overwrite, scale, content, latents.t());
        gemm(scores.mat_mut().columns(0..seen), Into::Accumulate, scale, rotary, rope_keys.t());
        normalise_rows(scores.mat_mut().columns(0..seen));
        let width = num_heads * latent_dim;
        let target = &mut context.f32_mut()[position * width..(position + 1) * width];
        gemm(
            MatMut::new(target, num_heads, latent_dim),
            Into::Overwrite,
            1.0,
            scores.mat().columns(0..seen),
            latents,
        );
    }

    let mut out = Tensor::for_overwrite(&[num_new, num_heads * v_dim]);
    for head in 0..num_heads {
        let source = context.mat().columns(head * latent_dim..(head + 1) * latent_dim);
        let target = out.mat_mut().columns(head * v_dim..(head + 1) * v_dim);
        gemm(target, Into::Overwrite, 1.0, source, head_weights(head).1.t());
    }
    out
}

fn normalise_rows(mut scores: MatMut) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for row in 0..scores.num_rows() {
                let row = scores.row_mut(row);
                let max = softmax::max(row);
                let inverse = 1.0 / softmax::exp_and_sum(row, max);
                for value in row {
                    *value *= inverse;
                }
            }
        },
    );
}

#[cfg(test)]
mod tests;
