//! Matrix multiplication over strided views: the one door to the GEMM microkernels.
//!
//! Every operation with weights comes through here; one row by a matrix goes on to `gemv`. It knows views and strides, no tensors and no formats.

#![allow(unsafe_code)]

use std::ops::Range;

use gemm_common::Parallelism;

use crate::{gemv::gemv, par};

/// A matrix of borrowed f32 values.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    layout: Layout,
}

impl<'a> Mat<'a> {
    /// A row-major matrix without gaps.
    ///
    /// **Errors**: panics if `data` is too short.
    pub fn new(data: &'a [f32], num_rows: usize, num_cols: usize) -> Mat<'a> {
        Mat::strided(data, num_rows, num_cols, num_cols)
    }

    /// A row-major matrix whose rows start `row_stride` values apart.
    ///
    /// **Errors**: panics if `data` is too short or rows would overlap.
    pub fn strided(data: &'a [f32], num_rows: usize, num_cols: usize, row_stride: usize) -> Mat<'a> {
        Mat { data, layout: Layout::new(data.len(), num_rows, num_cols, row_stride) }
    }

    /// The transpose.
    pub fn t(self) -> Mat<'a> {
        Mat { data: self.data, layout: self.layout.t() }
    }

    /// Some of the rows.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub fn rows_range(self, rows: Range<usize>) -> Mat<'a> {
        let (layout, skip) = self.layout.rows(&rows);
        Mat { data: &self.data[skip..], layout }
    }

    /// Some of the columns.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub fn columns(self, columns: Range<usize>) -> Mat<'a> {
        self.t().rows_range(columns).t()
    }

    /// The values of one row.
    ///
    /// **Errors**: panics if there is no such row or the view is a transposed one.
    pub fn row(self, row: usize) -> &'a [f32] {
        &self.data[self.layout.row(row)]
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.layout.num_rows
    }

    /// Number of columns.
    pub fn num_cols(&self) -> usize {
        self.layout.num_cols
    }

    /// Values from the start of one row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.layout.row_stride
    }
}

/// A matrix of f32 values borrowed for writing.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    layout: Layout,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix without gaps.
    ///
    /// **Errors**: panics if `data` is too short.
    pub fn new(data: &'a mut [f32], num_rows: usize, num_cols: usize) -> MatMut<'a> {
        MatMut::strided(data, num_rows, num_cols, num_cols)
    }

    /// A row-major matrix whose rows start `row_stride` values apart.
    ///
    /// **Errors**: panics if `data` is too short or rows would overlap.
    pub fn strided(data: &'a mut [f32], num_rows: usize, num_cols: usize, row_stride: usize) -> MatMut<'a> {
        let layout = Layout::new(data.len(), num_rows, num_cols, row_stride);
        MatMut { data, layout }
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { data: self.data, layout: self.layout }
    }

    /// The transpose.
    pub fn t(self) -> MatMut<'a> {
        MatMut { data: self.data, layout: self.layout.t() }
    }

    /// Some of the rows.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub fn rows_range(self, rows: Range<usize>) -> MatMut<'a> {
        let (layout, skip) = self.layout.rows(&rows);
        MatMut { data: &mut self.data[skip..], layout }
    }

    /// The parts that adjoining ranges of rows, from row 0 on, stand for.
    ///
    /// **Errors**: panics if the ranges go beyond the matrix or the view is a transposed one.
    pub fn split_rows(self, ranges: &[Range<usize>]) -> Vec<MatMut<'a>> {
        let MatMut { mut data, layout } = self;
        assert_eq!(layout.col_stride, 1, "expected a view whose rows lie together");
        let part = |rows: &Range<usize>| {
            let (layout, _) = layout.rows(rows);
            // The last row may end with its own columns, short of a whole stride.
            let len = data.len().min(rows.len() * layout.row_stride);
            let data = data.split_off_mut(..len).expect("no longer than what is left");
            MatMut { data, layout }
        };
        ranges.iter().map(part).collect()
    }

    /// Some of the columns.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub fn columns(self, columns: Range<usize>) -> MatMut<'a> {
        self.t().rows_range(columns).t()
    }

    /// The values of one row.
    ///
    /// **Errors**: panics if there is no such row or the view is a transposed one.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[self.layout.row(row)]
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.layout.num_rows
    }

    /// Number of columns.
    pub fn num_cols(&self) -> usize {
        self.layout.num_cols
    }

    /// Values from the start of one row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.layout.row_stride
    }
}

/// Rows, columns and the steps between neighbours in each direction.
#[derive(Clone, Copy)]
struct Layout {
    num_rows: usize,
    num_cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Layout {
    fn new(len: usize, num_rows: usize, num_cols: usize, row_stride: usize) -> Layout {
        let apart = num_rows < 2 || num_cols <= row_stride;
        assert!(apart, "expected rows at least {num_cols} values apart, got a row stride of {row_stride}");
        let layout = Layout { num_rows, num_cols, row_stride, col_stride: 1 };
        let span = layout.span().filter(|&span| span <= len);
        assert!(
            span.is_some(),
            "expected values for {num_rows} rows of {num_cols}, {row_stride} apart, got {len}"
        );
        layout
    }

    /// Values from the first to the last, both included; none if that overflows.
    fn span(&self) -> Option<usize> {
        if self.num_rows == 0 || self.num_cols == 0 {
            return Some(0);
        }
        let last_row = (self.num_rows - 1).checked_mul(self.row_stride)?;
        let last_col = (self.num_cols - 1).checked_mul(self.col_stride)?;
        last_row.checked_add(last_col)?.checked_add(1)
    }

    fn t(self) -> Layout {
        Layout {
            num_rows: self.num_cols,
            num_cols: self.num_rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// The layout of a range of rows, and how many values lie before it.
    fn rows(self, rows: &Range<usize>) -> (Layout, usize) {
        let inside = rows.start <= rows.end && rows.end <= self.num_rows;
        assert!(inside, "expected a range within {} rows or columns, got {rows:?}", self.num_rows);
        // A part without values may start beyond the last one, where there is nothing to point at.
        let skip = if rows.is_empty() || self.num_cols == 0 { 0 } else { rows.start * self.row_stride };
        (Layout { num_rows: rows.len(), ..self }, skip)
    }

    /// Where one row lies.
    fn row(&self, row: usize) -> Range<usize> {
        assert!(row < self.num_rows, "expected a row below {}, got {row}", self.num_rows);
        assert_eq!(self.col_stride, 1, "expected a view whose rows lie together");
        let start = if self.num_cols == 0 { 0 } else { row * self.row_stride };
        start..start + self.num_cols
    }
}

/// What happens to the values an output already holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// They are ignored, even where they are not finite.
    Overwrite,
    /// The product is added to them.
    Accumulate,
}

/// `out = alpha * a * b`, or `out += alpha * a * b`, on all threads of the pool it is called from.
///
/// **Shapes**: `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`; any of them may be transposed or part of a wider matrix.
/// **Errors**: panics if the shapes do not fit.
pub fn gemm(mut out: MatMut, into: Into, alpha: f32, a: Mat, b: Mat) {
    if let Some((out, x, w)) = one_row(&mut out, a, b) {
        return gemv(out, into, alpha, x, w, false);
    }
    let parallelism = match par::num_threads() {
        1 => Parallelism::None,
        num_threads => Parallelism::Rayon(num_threads),
    };
    multiply(out, into, alpha, (a, b), parallelism);
}

/// [`gemm`] on the calling thread alone: for a task that is itself one of many.
pub fn gemm_serial(mut out: MatMut, into: Into, alpha: f32, a: Mat, b: Mat) {
    if let Some((out, x, w)) = one_row(&mut out, a, b) {
        return gemv(out, into, alpha, x, w, true);
    }
    multiply(out, into, alpha, (a, b), Parallelism::None);
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
    let lie_together = out.layout.col_stride == 1 && a.layout.col_stride == 1 && b.layout.row_stride == 1;
    let is_one = out.num_rows() == 1 && out.num_cols() > FEW_OUTPUTS;
    (is_one && fits && lie_together).then(|| (out.row_mut(0), a.row(0), b.t()))
}

fn multiply(out: MatMut, into: Into, alpha: f32, (a, b): (Mat, Mat), parallelism: Parallelism) {
    let (m, n, k) = (out.num_rows(), out.num_cols(), a.num_cols());
    assert!(
        a.num_rows() == m && b.num_rows() == k && b.num_cols() == n,
        "expected factors of a [{m}, {n}] matrix, got [{}, {k}] and [{}, {}]",
        a.num_rows(),
        b.num_rows(),
        b.num_cols()
    );
    let step = |stride: usize| isize::try_from(stride).expect("a stride between values of one slice fits");
    // The kernels store whole columns of the output at a time. Ours has whole rows, so they compute its transpose,
    // b^T a^T.
    // SAFETY: the views' constructors checked that all their values lie in their slices; `out` is borrowed exclusively
    // and its rows do not overlap.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            m,
            k,
            out.data.as_mut_ptr(),
            step(out.layout.row_stride),
            step(out.layout.col_stride),
            into == Into::Accumulate,
            b.data.as_ptr(),
            step(b.layout.row_stride),
            step(b.layout.col_stride),
            a.data.as_ptr(),
            step(a.layout.row_stride),
            step(a.layout.col_stride),
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
