//! Views: borrowed parts of a tensor. Runs of its values for all crates, strided matrices of f32 for the kernels.
//!
//! They know formats and strides, no tensor and no arithmetic.

use std::ops::Range;

use crate::format::{Element, Format};

/// A run of the values of a tensor, row-major.
#[derive(Clone, Copy)]
pub struct View<'a> {
    format: Format,
    bytes: &'a [u8],
}

impl<'a> View<'a> {
    pub(crate) fn new(format: Format, bytes: &'a [u8]) -> View<'a> {
        View { format, bytes }
    }

    /// How the values are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.format.value_bytes(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn typed<T: Element>(&self) -> &'a [T] {
        expect(T::FORMAT, self.format);
        bytemuck::cast_slice(self.bytes)
    }
}

/// A run of the values of a tensor, to be written.
pub struct ViewMut<'a> {
    format: Format,
    bytes: &'a mut [u8],
}

impl<'a> ViewMut<'a> {
    pub(crate) fn new(format: Format, bytes: &'a mut [u8]) -> ViewMut<'a> {
        ViewMut { format, bytes }
    }

    /// How the values are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Copies another run of the same format and length into this one.
    ///
    /// **Errors**: panics if format or length differ.
    pub fn copy_from(&mut self, source: View) {
        expect(self.format, source.format);
        let len = self.bytes.len() / self.format.value_bytes(1);
        assert_eq!(source.len(), len, "expected as many values as the target holds");
        self.bytes.copy_from_slice(source.bytes);
    }

    /// Writes the numbers that `next` gives, one after another.
    ///
    /// **Errors**: panics if the format is not F32.
    pub fn fill_with(&mut self, next: impl FnMut() -> f32) {
        self.typed_mut().fill_with(next);
    }

    pub(crate) fn typed_mut<T: Element>(&mut self) -> &mut [T] {
        expect(T::FORMAT, self.format);
        bytemuck::cast_slice_mut(self.bytes)
    }
}

fn expect(format: Format, found: Format) {
    assert!(found == format, "expected values in {format:?}, got {found:?}");
}

/// A matrix of borrowed f32 values.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    layout: Layout,
}

impl<'a> Mat<'a> {
    /// A row-major matrix without gaps.
    ///
    /// **Errors**: panics if `data` is too short.
    pub(crate) fn new(data: &'a [f32], num_rows: usize, num_cols: usize) -> Mat<'a> {
        Mat::strided(data, num_rows, num_cols, num_cols)
    }

    /// A row-major matrix whose rows start `row_stride` values apart.
    ///
    /// **Errors**: panics if `data` is too short or rows would overlap.
    pub(crate) fn strided(data: &'a [f32], num_rows: usize, num_cols: usize, row_stride: usize) -> Mat<'a> {
        Mat { data, layout: Layout::new(data.len(), num_rows, num_cols, row_stride) }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Mat<'a> {
        Mat { data: self.data, layout: self.layout.t() }
    }

    /// Some of the rows.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub(crate) fn rows_range(self, rows: Range<usize>) -> Mat<'a> {
        let (layout, skip) = self.layout.rows(&rows);
        Mat { data: &self.data[skip..], layout }
    }

    /// Some of the columns.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub(crate) fn columns(self, columns: Range<usize>) -> Mat<'a> {
        self.t().rows_range(columns).t()
    }

    /// The values of one row.
    ///
    /// **Errors**: panics if there is no such row or the view is a transposed one.
    pub(crate) fn row(self, row: usize) -> &'a [f32] {
        &self.data[self.layout.row(row)]
    }

    /// Number of rows.
    pub(crate) fn num_rows(&self) -> usize {
        self.layout.num_rows
    }

    /// Number of columns.
    pub(crate) fn num_cols(&self) -> usize {
        self.layout.num_cols
    }

    /// Values from one row to the next, and from one column to the next.
    pub(crate) fn strides(&self) -> (usize, usize) {
        (self.layout.row_stride, self.layout.col_stride)
    }

    /// Where the first value lies; the others lie [strides](Self::strides) apart, all in one slice.
    pub(crate) fn as_ptr(&self) -> *const f32 {
        self.data.as_ptr()
    }
}

/// A matrix of f32 values borrowed for writing.
pub(crate) struct MatMut<'a> {
    data: &'a mut [f32],
    layout: Layout,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix without gaps.
    ///
    /// **Errors**: panics if `data` is too short.
    pub(crate) fn new(data: &'a mut [f32], num_rows: usize, num_cols: usize) -> MatMut<'a> {
        MatMut::strided(data, num_rows, num_cols, num_cols)
    }

    /// A row-major matrix whose rows start `row_stride` values apart.
    ///
    /// **Errors**: panics if `data` is too short or rows would overlap.
    pub(crate) fn strided(
        data: &'a mut [f32],
        num_rows: usize,
        num_cols: usize,
        row_stride: usize,
    ) -> MatMut<'a> {
        let layout = Layout::new(data.len(), num_rows, num_cols, row_stride);
        MatMut { data, layout }
    }

    /// The transpose.
    pub(crate) fn t(self) -> MatMut<'a> {
        MatMut { data: self.data, layout: self.layout.t() }
    }

    /// Some of the rows.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub(crate) fn rows_range(self, rows: Range<usize>) -> MatMut<'a> {
        let (layout, skip) = self.layout.rows(&rows);
        MatMut { data: &mut self.data[skip..], layout }
    }

    /// Some of the columns.
    ///
    /// **Errors**: panics if the range does not lie in the matrix.
    pub(crate) fn columns(self, columns: Range<usize>) -> MatMut<'a> {
        self.t().rows_range(columns).t()
    }

    /// The matrix cut into the parts that adjoining ranges of rows, from row 0 on, stand for.
    ///
    /// **Errors**: panics if the ranges go beyond the matrix.
    pub(crate) fn split_rows(self, ranges: &[Range<usize>]) -> Vec<MatMut<'a>> {
        let MatMut { mut data, layout } = self;
        let mut part = |rows: &Range<usize>| {
            let (part, _) = layout.rows(rows);
            let len = (rows.len() * layout.row_stride).min(data.len());
            MatMut { data: data.split_off_mut(..len).expect("at most what is left"), layout: part }
        };
        ranges.iter().map(&mut part).collect()
    }

    /// The values of one row.
    ///
    /// **Errors**: panics if there is no such row or the view is a transposed one.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[self.layout.row(row)]
    }

    /// Number of rows.
    pub(crate) fn num_rows(&self) -> usize {
        self.layout.num_rows
    }

    /// Number of columns.
    pub(crate) fn num_cols(&self) -> usize {
        self.layout.num_cols
    }

    /// Values from one row to the next, and from one column to the next.
    pub(crate) fn strides(&self) -> (usize, usize) {
        (self.layout.row_stride, self.layout.col_stride)
    }

    /// Where the first value lies; the others lie [strides](Self::strides) apart, all in one slice.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.data.as_mut_ptr()
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
pub(crate) enum Output {
    /// They are ignored, even where they are not finite.
    Overwrite,
    /// The product is added to them.
    Accumulate,
}

#[cfg(test)]
mod tests;
