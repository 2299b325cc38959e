//! Runs of values and strided matrices.

use super::*;

#[test]
fn a_run_is_copied_into_another_of_its_format() {
    let (source, mut target) = ([1.0_f32, 2.0, 3.0], [0.0_f32; 3]);
    let bytes = |range: Range<usize>| &bytemuck::cast_slice(&source)[4 * range.start..4 * range.end];
    let mut run = ViewMut::new(Format::F32, &mut bytemuck::cast_slice_mut(&mut target)[4..]);
    run.copy_from(View::new(Format::F32, bytes(0..2)));
    assert_eq!(target, [0.0, 1.0, 2.0]);
    assert_eq!(View::new(Format::F32, bytes(1..3)).typed::<f32>(), [2.0, 3.0]);
}

#[test]
#[should_panic(expected = "expected values in U32, got F32")]
fn values_of_another_format_are_not_copied() {
    ViewMut::new(Format::U32, &mut [0; 4]).copy_from(View::new(Format::F32, &[0; 4]));
}

#[test]
fn views_give_rows_and_parts() {
    let values: Vec<f32> = (0..20).map(|i| i as f32).collect();
    let view = Mat::strided(&values, 4, 3, 5);
    assert_eq!(view.row(3), [15.0, 16.0, 17.0]);
    assert_eq!(view.rows_range(1..3).columns(1..3).row(1), [11.0, 12.0]);
    assert_eq!(view.rows_range(4..4).num_rows(), 0);
    assert_eq!((view.t().num_rows(), view.t().num_cols()), (3, 4));

    let mut target = vec![0.0; 18];
    let mut part = MatMut::strided(&mut target, 4, 3, 5).rows_range(1..4).columns(1..3);
    (0..part.num_rows()).for_each(|row| part.row_mut(row).fill(1.0 + row as f32));
    assert_eq!(target, [0., 0., 0., 0., 0., 0., 1., 1., 0., 0., 0., 2., 2., 0., 0., 0., 3., 3.]);
}

#[test]
#[should_panic(expected = "expected values for 4 rows of 3, 5 apart, got 17")]
fn a_view_beyond_its_values_is_refused() {
    Mat::strided(&[0.0; 17], 4, 3, 5);
}

#[test]
#[should_panic(expected = "expected values for")]
fn a_view_whose_extent_overflows_is_refused() {
    Mat::strided(&[0.0; 17], usize::MAX, 3, 5);
}

#[test]
#[should_panic(expected = "expected rows at least 3 values apart, got a row stride of 2")]
fn overlapping_rows_are_refused() {
    MatMut::strided(&mut [0.0; 17], 4, 3, 2);
}
