//! One row times a transposed matrix, an inner product per output: what a linear layer is while tokens come one at a time.
//!
//! Bounded by reading the matrix once, so nothing is packed and values are taken where they lie. Reached through `gemm`
//! alone; knows no tensors.

use pulp::{Simd, WithSimd};

use crate::{
    par::{self, MIN_PARALLEL},
    view::{Mat, Output},
};

/// Outputs computed together: this many sums in flight hide the latency of an addition, and each vector of the row is
/// loaded once for all of them.
const OUTPUTS: usize = 8;

/// `out = alpha * w x`, or `out += alpha * w x`, on the pool it is called from unless `serial`.
///
/// Each output is summed in an order that its length and the instruction set alone decide.
///
/// **Shapes**: `w` `[n, k]`, rows lying together, `x` `[k]`, `out` `[n]`.
pub(crate) fn gemv(out: &mut [f32], output: Output, alpha: f32, x: &[f32], w: Mat, serial: bool) {
    let work = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        pulp::Arch::new().dispatch(Outputs { out, output, alpha, x, w: w.rows_range(rows) });
    };
    if serial {
        work(0..out.len(), out);
    } else {
        par::for_each_chunk(out, 1, MIN_PARALLEL.div_ceil(x.len().max(1)), work);
    }
}

/// A run of outputs, one per row of `w`.
struct Outputs<'a> {
    out: &'a mut [f32],
    output: Output,
    alpha: f32,
    x: &'a [f32],
    w: Mat<'a>,
}

impl WithSimd for Outputs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Outputs { out, output, alpha, x, w } = self;
        let mut first = 0;
        while first < out.len() {
            // The last few are done one by one.
            let num = if first + OUTPUTS <= out.len() { OUTPUTS } else { 1 };
            let mut products = [0.0; OUTPUTS];
            if num == OUTPUTS {
                products = inner_products::<S, OUTPUTS>(simd, w, first, x);
            } else {
                products[..1].copy_from_slice(&inner_products::<S, 1>(simd, w, first, x));
            }
            for (out, product) in out[first..first + num].iter_mut().zip(products) {
                *out = alpha * product + if output == Output::Accumulate { *out } else { 0.0 };
            }
            first += num;
        }
    }
}

/// Inner products of N rows of `w` with `x`. Loops, not closures: those would not be compiled for the instruction set.
#[inline(always)]
fn inner_products<S: Simd, const N: usize>(simd: S, w: Mat, first: usize, x: &[f32]) -> [f32; N] {
    let (x_body, x_tail) = S::as_simd_f32s(x);
    let mut bodies: [&[S::f32s]; N] = [&[]; N];
    let mut tails: [&[f32]; N] = [&[]; N];
    for row in 0..N {
        let (body, tail) = S::as_simd_f32s(w.row(first + row));
        (bodies[row], tails[row]) = (&body[..x_body.len()], &tail[..x_tail.len()]);
    }
    let mut sums = [simd.splat_f32s(0.0); N];
    for (index, &x) in x_body.iter().enumerate() {
        for row in 0..N {
            sums[row] = simd.mul_add_e_f32s(bodies[row][index], x, sums[row]);
        }
    }
    let mut products = [0.0; N];
    for row in 0..N {
        products[row] = simd.reduce_sum_f32s(sums[row]);
        for (w, x) in tails[row].iter().zip(x_tail) {
            products[row] += w * x;
        }
    }
    products
}
