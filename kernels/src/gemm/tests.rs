//! Matrix products in every layout against the triple loop.

use super::*;
use crate::{par::Threads, tensor::Tensor, tests::noise};

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

fn check(m: usize, n: usize, k: usize, [out_place, a_place, b_place]: [Place; 3], output: Output) {
    let a = noise(a_place.buffer_len(m, k), 1);
    let b = noise(b_place.buffer_len(k, n), 2);
    let before = noise(out_place.buffer_len(m, n), 3);
    let mut out = before.clone();
    if output == Output::Overwrite {
        (0..m * n).for_each(|i| out[out_place.index((m, n), i / n, i % n)] = f32::NAN);
    }

    let alpha = 0.75;
    let factors = (a_place.view(&a, m, k), b_place.view(&b, k, n));
    gemm(out_place.view_mut(&mut out, m, n), output, alpha, factors.0, factors.1);

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
        if output == Output::Accumulate {
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
                check(m, n, k, [out, a, b], Output::Overwrite);
                check(m, n, k, [out, a, b], Output::Accumulate);
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
            check(m, n, 24, [plain, plain, transposed], Output::Overwrite);
            check(m, n, 24, [plain, transposed, plain], Output::Accumulate);
        }
    }
}

#[test]
fn two_threads_agree_with_the_twin_and_repeat_bit_for_bit() {
    let plain = Place { transposed: false, margin: 0 };
    let transposed = Place { transposed: true, margin: 2 };
    let threads = Threads::new(2);
    threads.run(|| {
        check(150, 130, 110, [plain, plain, transposed], Output::Overwrite);
        check(150, 130, 110, [plain, transposed, plain], Output::Accumulate);
    });

    let a = Tensor::from_vec(&[150, 110], noise(150 * 110, 1));
    let b = Tensor::from_vec(&[110, 130], noise(110 * 130, 2));
    let product = || {
        let mut out = Tensor::zeros(&[150, 130]);
        gemm(out.mat_mut(), Output::Overwrite, 1.0, a.mat(), b.mat());
        out
    };
    let first = threads.run(product);
    assert!((0..5).all(|_| threads.run(product).parts().eq(first.parts())));
}

#[test]
fn empty_sums_are_zero_and_empty_outputs_are_left_alone() {
    let mut out = Tensor::from_vec(&[2, 3], vec![5.0; 6]);
    let (a, b) = (Tensor::zeros(&[2, 0]), Tensor::zeros(&[0, 3]));
    gemm(out.mat_mut(), Output::Accumulate, 1.0, a.mat(), b.mat());
    assert_eq!(out.f32(), [5.0; 6]);
    gemm(out.mat_mut(), Output::Overwrite, 1.0, a.mat(), b.mat());
    assert_eq!(out.f32(), [0.0; 6]);
    gemm(Tensor::zeros(&[0, 3]).mat_mut(), Output::Overwrite, 1.0, b.mat(), Tensor::zeros(&[3, 3]).mat());
}

#[test]
#[should_panic(expected = "expected factors of a [2, 3] matrix, got [2, 4] and [5, 3]")]
fn factors_that_do_not_fit_are_refused() {
    let mut out = Tensor::zeros(&[2, 3]);
    gemm(out.mat_mut(), Output::Overwrite, 1.0, Tensor::zeros(&[2, 4]).mat(), Tensor::zeros(&[5, 3]).mat());
}
