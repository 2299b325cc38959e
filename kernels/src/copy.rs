//! Parts of tensors copied out, tensors put together: rows, columns, runs.
//!
//! It moves values and computes nothing.

use std::ops::Range;

use crate::tensor::Tensor;

impl Tensor {
    /// A copy of some rows of the `[rows, cols]` view.
    ///
    /// **Shapes**: result `[R, cols]` for R rows in the range.
    /// **Errors**: panics if the range does not lie in the rows.
    pub fn slice_rows(&self, rows: Range<usize>) -> Tensor {
        let cols = self.cols();
        Tensor::from(self.view(rows.start * cols..rows.end * cols)).reshape(&[rows.len(), cols])
    }

    /// A copy of some columns of the `[rows, cols]` view.
    ///
    /// **Shapes**: result `[rows, C]` for C columns in the range.
    /// **Errors**: panics if the format has scales or the range does not lie in the columns.
    pub fn slice_cols(&self, cols: Range<usize>) -> Tensor {
        let mut part = Tensor::for_overwrite_in(self.format(), &[self.rows(), cols.len()]);
        copy_cols(&mut part, 0, self, cols);
        part
    }

    /// Copies `source` over the columns from `first` on of the `[rows, cols]` view.
    ///
    /// **Shapes**: `source` `[rows, C]` with `first + C` at most `cols`.
    /// **Errors**: panics if the formats differ or have scales, or the shapes do not fit.
    pub fn set_cols(&mut self, first: usize, source: &Tensor) {
        copy_cols(self, first, source, 0..source.cols());
    }

    /// The tensors one behind the other along their first dim.
    ///
    /// **Shapes**: each part `[N, ..]`, alike but for N; result `[sum of N, ..]`.
    /// **Errors**: panics if the list is empty or they differ in format or in another dim.
    pub fn concat_rows(parts: &[Tensor]) -> Tensor {
        let first = parts.first().expect("expected at least one tensor to put together");
        let mut shape = first.shape().to_vec();
        shape[0] = parts.iter().map(|part| part.shape()[0]).sum();
        let mut joined = Tensor::for_overwrite_in(first.format(), &shape);
        let (mut codes, mut scales) = joined.codes_and_scales_mut();
        for part in parts {
            let is_alike = part.format() == first.format() && part.shape()[1..] == shape[1..];
            assert!(is_alike, "expected tensors alike but for their first dim");
            codes = append(codes, part.codes());
            scales = append(scales, part.scales());
        }
        joined
    }

    /// Two matrices side by side.
    ///
    /// **Shapes**: `left` `[T, A]`, `right` `[T, B]`, result `[T, A + B]`.
    /// **Errors**: panics if the formats differ or have scales, or the rows differ.
    pub fn concat_cols(left: &Tensor, right: &Tensor) -> Tensor {
        let mut joined = Tensor::for_overwrite_in(left.format(), &[left.rows(), left.cols() + right.cols()]);
        joined.set_cols(0, left);
        joined.set_cols(left.cols(), right);
        joined
    }
}

/// Copies a part to where it belongs, and returns what is behind it.
fn append<'a, T: Copy>(target: &'a mut [T], part: &[T]) -> &'a mut [T] {
    let (own, rest) = target.split_at_mut(part.len());
    own.copy_from_slice(part);
    rest
}

fn copy_cols(target: &mut Tensor, first: usize, source: &Tensor, cols: Range<usize>) {
    assert_eq!(target.rows(), source.rows(), "expected as many rows as the target has");
    let (format, width, source_width) = (target.format(), target.cols(), source.cols());
    assert!(first + cols.len() <= width, "expected at most {width} columns, got {cols:?} at {first}");
    assert!(cols.end <= source_width, "expected at most {source_width} columns, got {cols:?}");
    assert_eq!(format, source.format(), "expected tensors of one format");
    assert_eq!(format.num_scales(&[1, 1]), 0, "expected a format without scales, got {format:?}");
    if width == 0 || source_width == 0 {
        return;
    }
    let bytes = |columns: Range<usize>| format.value_bytes(columns.start)..format.value_bytes(columns.end);
    let sources = source.codes().chunks_exact(format.value_bytes(source_width));
    let (targets, _) = target.codes_and_scales_mut();
    for (target, source) in targets.chunks_exact_mut(format.value_bytes(width)).zip(sources) {
        target[bytes(first..first + cols.len())].copy_from_slice(&source[bytes(cols.clone())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(shape: &[usize]) -> Tensor {
        Tensor::from_vec(shape, (0..shape.iter().product::<usize>()).map(|i| i as f32).collect())
    }

    #[test]
    fn rows_and_columns_are_copied_out() {
        let x = counting(&[2, 3, 2]);
        assert_eq!(x.slice_rows(1..3).f32(), [2.0, 3.0, 4.0, 5.0]);
        assert_eq!(x.slice_cols(1..2).f32(), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert_eq!(Tensor::zeros(&[0, 5]).slice_rows(0..0).shape(), [0, 5]);
        assert_eq!(Tensor::zeros(&[2, 5]).slice_cols(3..3).shape(), [2, 0]);
    }

    #[test]
    fn columns_are_written_and_the_others_left_alone() {
        let mut y = counting(&[2, 3]);
        y.set_cols(1, &Tensor::from_vec(&[2, 1], vec![-1.0, -2.0]));
        assert_eq!(y.f32(), [0.0, -1.0, 2.0, 3.0, -2.0, 5.0]);
    }

    #[test]
    fn joined_tensors_split_again() {
        let (a, b) = (counting(&[2, 3]), counting(&[1, 3]));
        let rows = Tensor::concat_rows(&[a.clone(), Tensor::zeros(&[0, 3]), b.clone()]);
        assert_eq!((rows.shape(), rows.slice_rows(2..3).f32()), (&[3, 3][..], b.f32()));
        let ids = [vec![1, 2], vec![], vec![7_u32]].map(|ids| Tensor::from_vec(&[ids.len()], ids));
        assert_eq!(Tensor::concat_rows(&ids).u32(), [1, 2, 7]);

        let wide = Tensor::concat_cols(&a, &counting(&[2, 1]));
        assert_eq!(wide.f32(), [0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 1.0]);
        assert_eq!(wide.slice_cols(0..3).f32(), a.f32());
    }

    #[test]
    #[should_panic(expected = "expected tensors alike but for their first dim")]
    fn rows_of_another_width_are_refused() {
        Tensor::concat_rows(&[Tensor::zeros(&[1, 3]), Tensor::zeros(&[1, 4])]);
    }

    #[test]
    #[should_panic(expected = "expected at most 3 columns, got 0..2 at 2")]
    fn columns_beyond_the_target_are_refused() {
        Tensor::zeros(&[1, 3]).set_cols(2, &Tensor::zeros(&[1, 2]));
    }
}
