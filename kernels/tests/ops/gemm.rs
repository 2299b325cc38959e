//! Matrix products in every layout against the triple loop.

use contraflow_kernels::{
    gemm::{Into, Mat, MatMut, gemm},
    par::Threads,
    tensor::Tensor,
};

use crate::twin::Random;

/// A matrix inside a wider buffer, at an offset, possibly stored transposed.
#[derive(Clone, Copy)]
struct Place {
    transposed: bool,
    margin: usize,
}

impl Place {
    fn buffer_len(self, rows: usize, cols: usize) -> usize {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        rows * (cols + 2 * self.margin)
    }

    fn view(self, data: &[f32], rows: usize, cols: usize) -> Mat<'_> {
        let (stored_rows, stored_cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        let whole = Mat::new(data, stored_rows, stored_cols + 2 * self.margin);
        let part = whole.columns(self.margin..self.margin + stored_cols);
        if self.transposed { part.t() } else { part }
    }

    fn view_mut(self, data: &mut [f32], rows: usize, cols: usize) -> MatMut<'_> {
        let (stored_rows, stored_cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        let whole = MatMut::new(data, stored_rows, stored_cols + 2 * self.margin);
        let part = whole.columns(self.margin..self.margin + stored_cols);
        if self.transposed { part.t() } else { part }
    }

    fn index(self, (rows, cols): (usize, usize), row: usize, col: usize) -> usize {
        let (width, row, col) = if self.transposed { (rows, col, row) } else { (cols, row, col) };
        row * (width + 2 * self.margin) + self.margin + col
    }
}

fn places() -> impl Iterator<Item = Place> {
    [(false, 0), (true, 0), (false, 3), (true, 3)]
        .into_iter()
        .map(|(transposed, margin)| Place { transposed, margin })
}

fn check(m: usize, n: usize, k: usize, [out_place, a_place, b_place]: [Place; 3], into: Into) {
    let seed = (m * 1_000_000 + n * 1000 + k) as u64;
    let mut random = Random::new(seed);
    let a = random.values(a_place.buffer_len(m, k));
    let b = random.values(b_place.buffer_len(k, n));
    let before = random.values(out_place.buffer_len(m, n));
    let mut out = before.clone();
    if into == Into::Overwrite {
        (0..m * n).for_each(|i| out[out_place.index((m, n), i / n, i % n)] = f32::NAN);
    }

    let alpha = 0.75;
    let factors = (a_place.view(&a, m, k), b_place.view(&b, k, n));
    gemm(out_place.view_mut(&mut out, m, n), into, alpha, factors.0, factors.1);

    let mut untouched = vec![true; out.len()];
    for (row, col) in (0..m).flat_map(|row| (0..n).map(move |col| (row, col))) {
        let at = out_place.index((m, n), row, col);
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for inner in 0..k {
            let left = a[a_place.index((m, k), row, inner)];
            let right = b[b_place.index((k, n), inner, col)];
            let product = 0.75 * f64::from(left) * f64::from(right);
            sum += product;
            magnitude += product.abs();
        }
        if into == Into::Accumulate {
            sum += f64::from(before[at]);
            magnitude += f64::from(before[at]).abs();
        }
        // k + 2 roundings of partial sums, whatever the order of summation.
        let bound = (k + 2) as f64 * magnitude * 2.0_f64.powi(-24);
        let error = (f64::from(out[at]) - sum).abs();
        assert!(error <= bound, "{m} x {n} x {k}, ({row}, {col}): found {}, expected {sum}", out[at]);
        untouched[at] = false;
    }
    let outside = untouched.iter().enumerate().filter(|&(_, &untouched)| untouched);
    outside.for_each(|(at, _)| {
        assert_eq!(out[at], before[at], "{m} x {n} x {k}: a value beside the output changed")
    });
}

#[test]
fn every_layout_of_every_operand_agrees_with_the_twin() {
    let sizes = [
        (1, 1, 1),
        (1, 40, 17),
        (1, 261, 43),
        (33, 1, 20),
        (5, 7, 1),
        (5, 7, 2),
        (17, 33, 9),
        (64, 48, 31),
        (70, 90, 130),
    ];
    for (m, n, k) in sizes {
        for out in places() {
            for (a, b) in places().flat_map(|a| places().map(move |b| (a, b))) {
                check(m, n, k, [out, a, b], Into::Overwrite);
                check(m, n, k, [out, a, b], Into::Accumulate);
            }
        }
    }
}

#[test]
fn sizes_around_the_kernels_tiles_agree_with_the_twin() {
    let plain = Place { transposed: false, margin: 0 };
    let transposed = Place { transposed: true, margin: 0 };
    for m in [1, 2, 15, 16, 17, 47, 48, 49, 65] {
        for n in [1, 3, 15, 16, 17, 48, 63, 97] {
            check(m, n, 24, [plain, plain, transposed], Into::Overwrite);
            check(m, n, 24, [plain, transposed, plain], Into::Accumulate);
        }
    }
}

#[test]
fn two_threads_agree_with_the_twin_and_repeat_bit_for_bit() {
    let plain = Place { transposed: false, margin: 0 };
    let transposed = Place { transposed: true, margin: 2 };
    let threads = Threads::new(2);
    threads.run(|| {
        check(150, 130, 110, [plain, plain, transposed], Into::Overwrite);
        check(150, 130, 110, [plain, transposed, plain], Into::Accumulate);
    });

    let mut random = Random::new(1);
    let (a, b) = (random.tensor(&[150, 110]), random.tensor(&[110, 130]));
    let product = || {
        let mut out = Tensor::zeros(&[150, 130]);
        gemm(out.mat_mut(), Into::Overwrite, 1.0, a.mat(), b.mat());
        out
    };
    let first = threads.run(product);
    assert!((0..5).all(|_| threads.run(product).bytes() == first.bytes()));
}

#[test]
fn empty_sums_are_zero_and_empty_outputs_are_left_alone() {
    let mut out = Tensor::from_vec(&[2, 3], vec![5.0; 6]);
    let (a, b) = (Tensor::zeros(&[2, 0]), Tensor::zeros(&[0, 3]));
    gemm(out.mat_mut(), Into::Accumulate, 1.0, a.mat(), b.mat());
    assert_eq!(out.f32(), [5.0; 6]);
    gemm(out.mat_mut(), Into::Overwrite, 1.0, a.mat(), b.mat());
    assert_eq!(out.f32(), [0.0; 6]);
    gemm(Tensor::zeros(&[0, 3]).mat_mut(), Into::Overwrite, 1.0, b.mat(), Tensor::zeros(&[3, 3]).mat());
}

#[test]
fn views_give_rows_and_parts() {
    let values: Vec<f32> = (0..20).map(|i| i as f32).collect();
    let view = Mat::strided(&values, 4, 3, 5);
    assert_eq!(view.row(3), [15.0, 16.0, 17.0]);
    assert_eq!(view.rows_range(1..3).columns(1..3).row(1), [11.0, 12.0]);
    assert_eq!(view.rows_range(4..4).num_rows(), 0);
    assert_eq!((view.t().num_rows(), view.t().num_cols(), view.row_stride()), (3, 4, 5));

    let mut target = vec![0.0; 18];
    let parts = MatMut::strided(&mut target, 4, 3, 5).split_rows(&[0..1, 1..1, 1..4]);
    for (mark, mut part) in parts.into_iter().enumerate() {
        (0..part.num_rows()).for_each(|row| part.row_mut(row).fill(1.0 + mark as f32));
    }
    assert_eq!(target, [1., 1., 1., 0., 0., 3., 3., 3., 0., 0., 3., 3., 3., 0., 0., 3., 3., 3.]);
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

#[test]
#[should_panic(expected = "expected factors of a [2, 3] matrix, got [2, 4] and [5, 3]")]
fn factors_that_do_not_fit_are_refused() {
    let mut out = Tensor::zeros(&[2, 3]);
    gemm(out.mat_mut(), Into::Overwrite, 1.0, Tensor::zeros(&[2, 4]).mat(), Tensor::zeros(&[5, 3]).mat());
}
