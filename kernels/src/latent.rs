//! Around attention's core: keys and values from MLA's latent and rotary parts, and the absorbed form of decoding.
//!
//! Called by the attention component (join, split) and by generation (cache, decode). It knows not how a latent is made.
//!
//! Shape letters: T tokens, H heads, C latent, L cached positions, n new positions.

use std::ops::Range;

use crate::{
    gemm::gemm,
    linear,
    par::{self, MIN_PARALLEL},
    softmax,
    tensor::{Tensor, View},
    view::{Mat, MatMut, Output},
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
pub fn join_keys(kv: &Tensor, k_rope: &Tensor, heads: &LatentHeads) -> (Tensor, Tensor) {
    let (format, kv, k_rope) = (kv.format(), kv.widened(), k_rope.widened());
    let (k, v) = join(&kv, k_rope.mat(), heads);
    (k.to(format), v.to(format))
}

fn join(kv: &Tensor, k_rope: Mat, heads: &LatentHeads) -> (Tensor, Tensor) {
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
    let (format, dk, dv) = (dk.format(), dk.widened(), dv.widened());
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
    (d_kv.to(format), d_k_rope.to(format))
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

/// The positions of one sequence that one layer has seen, in F32, with room for more.
pub struct LatentCache {
    /// Normalised latents; rows from `len` on are free.
    ///
    /// **Shapes**: `[capacity, C]`.
    latents: Tensor,
    /// Rotated shared keys; rows from `len` on are free.
    ///
    /// **Shapes**: `[capacity, rope]`.
    rope_keys: Tensor,
    len: usize,
}

impl LatentCache {
    /// No positions yet, for latents of C columns.
    pub fn new(latent_dim: usize, heads: &LatentHeads) -> LatentCache {
        let empty = |width| Tensor::for_overwrite(&[0, width]);
        LatentCache { latents: empty(latent_dim), rope_keys: empty(heads.rope_dim), len: 0 }
    }

    /// Adds positions.
    ///
    /// **Shapes**: `latents` `[n, C]`, `rope_keys` `[n, rope]`.
    /// **Errors**: panics if there are not as many of one as of the other, or one has another width.
    pub fn append(&mut self, latents: &Tensor, rope_keys: &Tensor) {
        assert_eq!(latents.rows(), rope_keys.rows(), "expected as many rotary keys as latents");
        append_rows(&mut self.latents, self.len, &latents.widened());
        append_rows(&mut self.rope_keys, self.len, &rope_keys.widened());
        self.len += latents.rows();
    }

    /// L, the positions in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no position yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The normalised latents of all positions.
    ///
    /// **Shapes**: `[L * C]`.
    pub fn latents(&self) -> View<'_> {
        self.latents.view(0..self.len * self.latents.cols())
    }

    /// The rotated shared keys of all positions.
    ///
    /// **Shapes**: `[L * rope]`.
    pub fn rope_keys(&self) -> View<'_> {
        self.rope_keys.view(0..self.len * self.rope_keys.cols())
    }

    /// Keys and values of all positions for the direct form, as [`join_keys`] gives them.
    ///
    /// **Shapes**: `kv_b` `[H * (nope + v), C]`; result `([L, H * (nope + rope)], [L, H * v])`.
    pub fn keys_and_values(&self, kv_b: &Tensor, heads: &LatentHeads) -> (Tensor, Tensor) {
        let mut kv = Tensor::for_overwrite(&[self.len, kv_b.rows()]);
        let latents = self.latents.slice_rows(0..self.len);
        linear::add_product(kv.mat_mut(), Output::Overwrite, &latents, kv_b, 0..kv_b.rows());
        join(&kv, self.rope_keys.mat().rows_range(0..self.len), heads)
    }
}

/// Writes `rows` behind the first `len` of `target`, in twice the room if there is none left.
fn append_rows(target: &mut Tensor, len: usize, rows: &Tensor) {
    let (capacity, needed, width) = (target.rows(), len + rows.rows(), target.cols());
    assert_eq!(rows.cols(), width, "expected rows of the cache's width");
    if needed > capacity {
        let mut larger = Tensor::for_overwrite(&[needed.max(2 * capacity), width]);
        larger.view_mut(0..len * width).copy_from(target.view(0..len * width));
        *target = larger;
    }
    target.view_mut(len * width..needed * width).copy_from(rows.view(0..rows.len()));
}

/// Attention of the last few positions in the absorbed form: queries go down to the latents, not latents up to keys.
///
/// Each new position sees the cache up to itself. Meant for one or a handful of positions: the cache is read once for
/// each, and a long prompt is cheaper in the direct form.
///
/// **Shapes**: `q` `[n, H * (nope + rope)]`, rotary parts rotated; `kv_b` `[H * (nope + v), C]` in F32; result `[n, H * v]` in F32.
pub fn decode(q: &Tensor, kv_b: &Tensor, cache: &LatentCache, heads: &LatentHeads, scale: f32) -> Tensor {
    let LatentHeads { num_heads, nope_dim, rope_dim, v_dim } = *heads;
    let q = q.widened();
    let (num_new, latent_dim) = (q.rows(), kv_b.cols());
    let len = cache.len();
    assert_eq!(q.cols(), num_heads * heads.qk_dim(), "expected queries of every head side by side");
    assert_eq!(kv_b.rows(), num_heads * (nope_dim + v_dim), "expected key and value rows of every head");
    assert_eq!(cache.latents.cols(), latent_dim, "expected latents of the width that the weights take");
    assert_eq!(cache.rope_keys.cols(), rope_dim, "expected rotary keys of the heads' width");
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
        gemm(target, Output::Overwrite, 1.0, q.mat().columns(first..first + nope_dim), head_weights(head).0);
    }

    let mut context = Tensor::for_overwrite(&[num_new, num_heads * latent_dim]);
    let mut scores = Tensor::for_overwrite(&[num_heads, len]);
    for position in 0..num_new {
        let seen = len - num_new + position + 1;
        let (latents, rope_keys) =
            (cache.latents.mat().rows_range(0..seen), cache.rope_keys.mat().rows_range(0..seen));
        let content = Mat::new(absorbed.row(position), num_heads, latent_dim);
        let rotary = Mat::new(q.row(position), num_heads, heads.qk_dim()).columns(nope_dim..heads.qk_dim());
        gemm(scores.mat_mut().columns(0..seen), Output::Overwrite, scale, content, latents.t());
        gemm(scores.mat_mut().columns(0..seen), Output::Accumulate, scale, rotary, rope_keys.t());
        normalise_rows(scores.mat_mut().columns(0..seen));
        let width = num_heads * latent_dim;
        let target = &mut context.f32_mut()[position * width..(position + 1) * width];
        gemm(
            MatMut::new(target, num_heads, latent_dim),
            Output::Overwrite,
            1.0,
            scores.mat().columns(0..seen),
            latents,
        );
    }

    let mut out = Tensor::for_overwrite(&[num_new, num_heads * v_dim]);
    for head in 0..num_heads {
        let source = context.mat().columns(head * latent_dim..(head + 1) * latent_dim);
        let target = out.mat_mut().columns(head * v_dim..(head + 1) * v_dim);
        gemm(target, Output::Overwrite, 1.0, source, head_weights(head).1.t());
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
