//! One row of BF16 by rows of BF16: what a linear layer with narrow weights is while tokens come one at a time.
//!
//! Bounded by reading the weights once, so nothing is packed: both are widened in registers, where each product is exact in F32.
//! Reached through `narrow::product` alone.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::{
    par::{self, MIN_PARALLEL},
    view::Output,
};

/// Outputs computed together, and sums of each: enough in flight to hide the latency of an addition.
const OUTPUTS: usize = 4;
const LANES: usize = 32;

/// `out = w x`, or `out += w x`, on the pool it is called from.
///
/// Each output is summed in an order that its length alone decides.
///
/// **Shapes**: `w` `[n, k]` in bits of BF16, `x` `[k]`, `out` `[n]`.
pub(super) fn product(out: &mut [f32], output: Output, x: &[f32], w: &[u16]) {
    let work = |rows: Range<usize>, out: &mut [f32]| {
        let w = &w[rows.start * x.len()..rows.end * x.len()];
        pulp::Arch::new().dispatch(Outputs { out, output, x, w });
    };
    par::for_each_chunk(out, 1, MIN_PARALLEL.div_ceil(x.len().max(1)), work);
}

/// A run of outputs, one per row of `w`.
struct Outputs<'a> {
    out: &'a mut [f32],
    output: Output,
    x: &'a [f32],
    w: &'a [u16],
}

impl WithSimd for Outputs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Outputs { out, output, x, w } = self;
        let mut first = 0;
        while first < out.len() {
            // The last few are done one by one.
            let num = if first + OUTPUTS <= out.len() { OUTPUTS } else { 1 };
            let rows = &w[first * x.len()..(first + num) * x.len()];
            let mut products = [0.0; OUTPUTS];
            if num == OUTPUTS {
                products = inner_products(rows, x);
            } else {
                products[..1].copy_from_slice(&inner_products::<1>(rows, x));
            }
            for (out, product) in out[first..first + num].iter_mut().zip(products) {
                *out = product + if output == Output::Accumulate { *out } else { 0.0 };
            }
            first += num;
        }
    }
}

/// Inner products of N rows with `x`. Loops, not closures: those would not be compiled for the instruction set.
#[inline(always)]
fn inner_products<const N: usize>(rows: &[u16], x: &[f32]) -> [f32; N] {
    let (x_body, x_tail) = x.as_chunks::<LANES>();
    let mut bodies: [&[[u16; LANES]]; N] = [&[]; N];
    let mut tails: [&[u16]; N] = [&[]; N];
    for row in 0..N {
        let (body, tail) = rows[row * x.len()..(row + 1) * x.len()].as_chunks::<LANES>();
        (bodies[row], tails[row]) = (&body[..x_body.len()], &tail[..x_tail.len()]);
    }
    let mut sums = [[0.0_f32; LANES]; N];
    for (index, x) in x_body.iter().enumerate() {
        for row in 0..N {
            let w = &bodies[row][index];
            for lane in 0..LANES {
                sums[row][lane] += widen(w[lane]) * x[lane];
            }
        }
    }
    let mut products = [0.0; N];
    for row in 0..N {
        products[row] = sums[row].iter().sum();
        for (&w, x) in tails[row].iter().zip(x_tail) {
            products[row] += widen(w) * x;
        }
    }
    products
}

#[inline(always)]
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
