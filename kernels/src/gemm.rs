//! Matrix multiplication over strided views: the one door to the GEMM microkernels.
//!
//! Every operation with weights comes through here; one row by a matrix is passed to `gemv`. It knows views and strides, no
//! tensors and no formats.

#![allow(unsafe_code)]

pub(crate) mod narrow;

use gemm_common::Parallelism;

use crate::{
    gemv::gemv,
    par,
    view::{Mat, MatMut, Output},
};

/// Rows of the output that a thread takes at least: it packs the other factor for itself.
const MIN_ROWS: usize = 64;
/// Multiplications that are worth a second thread.
const MIN_SHARED: usize = 1 << 19;

/// `out = alpha * a * b`, or `out += alpha * a * b`, on all threads of the pool it is called from.
///
/// **Shapes**: `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`; any of them may be transposed or part of a wider matrix.
/// **Errors**: panics if the shapes do not fit.
pub(crate) fn gemm(mut out: MatMut, output: Output, alpha: f32, a: Mat, b: Mat) {
    if let Some((out, x, w)) = one_row(&mut out, a, b) {
        return gemv(out, output, alpha, x, w, false);
    }
    let num_threads = par::num_threads();
    if num_threads == 1 || out.num_rows() * out.num_cols() * a.num_cols() < MIN_SHARED {
        return multiply(out, output, alpha, (a, b), Parallelism::None);
    }
    // Threads that each have rows of their own meet once. The kernels' own threads share what is packed and meet three times,
    // and one packs the weights while the others wait: better only where there are few rows.
    let rows = par::partition(out.num_rows(), MIN_ROWS);
    if rows.len() < num_threads || out.strides().1 != 1 {
        return multiply(out, output, alpha, (a, b), Parallelism::Rayon(num_threads));
    }
    let parts = out.split_rows(&rows).into_iter().zip(rows).collect();
    par::for_each(parts, |(out, rows)| {
        multiply(out, output, alpha, (a.rows_range(rows), b), Parallelism::None);
    });
}

/// [`gemm`] on the calling thread alone: for a task that is itself one of many.
pub(crate) fn gemm_serial(mut out: MatMut, output: Output, alpha: f32, a: Mat, b: Mat) {
    if let Some((out, x, w)) = one_row(&mut out, a, b) {
        return gemv(out, output, alpha, x, w, true);
    }
    multiply(out, output, alpha, (a, b), Parallelism::None);
}

/// Outputs of one row up to which the general kernels take values where they lie too.
const FEW_OUTPUTS: usize = 256;

/// Output, row and matrix where the product is one row by a transposed matrix, and all of them lie together.
fn one_row<'a, 'b>(
    out: &'a mut MatMut,
    a: Mat<'b>,
    b: Mat<'b>,
) -> Option<(&'a mut [f32], &'b [f32], Mat<'b>)> {
    let fits = a.num_rows() == 1 && b.num_rows() == a.num_cols() && b.num_cols() == out.num_cols();
    let lie_together = out.strides().1 == 1 && a.strides().1 == 1 && b.strides().0 == 1;
    let is_one = out.num_rows() == 1 && out.num_cols() > FEW_OUTPUTS;
    (is_one && fits && lie_together).then(|| (out.row_mut(0), a.row(0), b.t()))
}

fn multiply(mut out: MatMut, output: Output, alpha: f32, (a, b): (Mat, Mat), parallelism: Parallelism) {
    let (m, n, k) = (out.num_rows(), out.num_cols(), a.num_cols());
    assert!(
        a.num_rows() == m && b.num_rows() == k && b.num_cols() == n,
        "expected factors of a [{m}, {n}] matrix, got [{}, {k}] and [{}, {}]",
        a.num_rows(),
        b.num_rows(),
        b.num_cols()
    );
    let [out_steps, a_steps, b_steps] = [out.strides(), a.strides(), b.strides()].map(|(row, col)| {
        [row, col].map(|stride| isize::try_from(stride).expect("a stride between values of one slice fits"))
    });
    // The kernels store whole columns of the output at a time. Ours has whole rows, so they compute its transpose,
    // b^T a^T.
    // SAFETY: the views' constructors checked that all their values lie in their slices; `out` is borrowed exclusively
    // and its rows do not overlap.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            m,
            k,
            out.as_mut_ptr(),
            out_steps[0],
            out_steps[1],
            output == Output::Accumulate,
            b.as_ptr(),
            b_steps[0],
            b_steps[1],
            a.as_ptr(),
            a_steps[0],
            a_steps[1],
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests;
