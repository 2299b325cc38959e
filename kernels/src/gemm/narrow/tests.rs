//! Products of narrow formats against sums in f64, over ragged shapes, on either path.

use super::*;
use crate::{par::Threads, tensor::ScaleRule, tests::noise};

const SHAPES: [[usize; 3]; 10] = [
    [1, 1, 1],
    [1, 203, 270],
    [8, 48, 128],
    [9, 49, 129],
    [7, 47, 255],
    [16, 96, 2],
    [33, 130, 300],
    [3, 200, 384],
    [64, 5, 77],
    [120, 160, 257],
];

type Path = fn(MatMut, Output, &Factor, &Factor);

/// Either path; only the portable one where the machine has no other.
fn paths() -> Vec<Path> {
    let portable: Path = widened_product;
    #[cfg(target_arch = "x86_64")]
    if avx512::is_supported() {
        return vec![portable, product];
    }
    println!("skipped: this machine has no AVX512-BF16");
    vec![portable]
}

fn e4m3(tile: Tile) -> Format {
    Format::E4M3(tile, ScaleRule::default())
}

/// Checks `a b^T` where both are stored as the flags say.
fn check(path: Path, [m, n, k]: [usize; 3], formats: [Format; 2], by_columns: [bool; 2]) {
    let stored = |lanes: usize, by_columns: bool| if by_columns { [k, lanes] } else { [lanes, k] };
    let (shape_a, shape_b) = (stored(m, by_columns[0]), stored(n, by_columns[1]));
    let a = Tensor::from_vec(&shape_a, noise(m * k, 1)).to(formats[0]);
    let b = Tensor::from_vec(&shape_b, noise(n * k, 2)).to(formats[1]);
    let factor = |tensor, by_columns| match by_columns {
        true => Factor::columns(tensor, 0..k),
        false => Factor::rows(tensor, 0..tensor.rows()),
    };
    let mut out = Tensor::from_vec(&[m, n], noise(m * n, 3));
    let before = out.clone();
    path(out.mat_mut(), Output::Accumulate, &factor(&a, by_columns[0]), &factor(&b, by_columns[1]));
    let (a, b) = (a.widened(), b.widened());
    let at = |x: &Tensor, by_columns: bool, lane: usize, k: usize| {
        f64::from(if by_columns { x.row(k)[lane] } else { x.row(lane)[k] })
    };
    for row in 0..m {
        for col in 0..n {
            let terms = (0..k).map(|k| at(&a, by_columns[0], row, k) * at(&b, by_columns[1], col, k));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let expected = f64::from(before.row(row)[col]) + sum;
            // Each addition, and each of two multiplications by a scale, is off by half an ulp of what it gives at most.
            let bound = (k + 4) as f64 * 2.0_f64.powi(-24) * (size + expected.abs());
            let found = f64::from(out.row(row)[col]);
            assert!((found - expected).abs() <= bound, "{m}x{n}x{k} {formats:?}: {found} for {expected}");
        }
    }
}

#[test]
fn products_agree_with_f64_in_every_layout_that_training_has() {
    for path in paths() {
        for shape in SHAPES {
            for by_columns in [[false, false], [false, true], [true, true]] {
                check(path, shape, [Format::BF16; 2], by_columns);
            }
            check(path, shape, [e4m3(Tile::Row), e4m3(Tile::Block)], [false, false]);
            check(path, shape, [e4m3(Tile::Row), e4m3(Tile::Block)], [false, true]);
            check(path, shape, [e4m3(Tile::Row), e4m3(Tile::Row)], [false, false]);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let a = Tensor::from_vec(&[130, 300], noise(39_000, 1));
    let b = Tensor::from_vec(&[100, 300], noise(30_000, 2));
    for formats in [[Format::BF16; 2], [e4m3(Tile::Row), e4m3(Tile::Block)]] {
        let (a, b) = (a.to(formats[0]), b.to(formats[1]));
        let run = || {
            let mut out = Tensor::for_overwrite(&[130, 100]);
            product(out.mat_mut(), Output::Overwrite, &Factor::rows(&a, 0..130), &Factor::rows(&b, 0..100));
            out.f32().to_vec()
        };
        assert_eq!(Threads::new(3).run(run), run());
    }
}

#[test]
fn rows_of_a_stack_find_their_own_scales() {
    let w = Tensor::from_vec(&[2, 130, 140], noise(2 * 130 * 140, 1));
    let mut scaled = w.clone();
    scaled.f32_mut()[130 * 140..].iter_mut().for_each(|value| *value *= 1000.0);
    let x = Tensor::from_vec(&[4, 140], noise(560, 2)).to(e4m3(Tile::Row));
    let (whole, part) = (scaled.to(e4m3(Tile::Block)), scaled.slice_rows(130..260).to(e4m3(Tile::Block)));
    let run = |w: &Tensor, rows: Range<usize>| {
        let mut out = Tensor::for_overwrite(&[4, 130]);
        product(out.mat_mut(), Output::Overwrite, &Factor::rows(&x, 0..4), &Factor::rows(w, rows));
        out.f32().to_vec()
    };
    assert_eq!(run(&whole, 130..260), run(&part, 0..130));
}

#[test]
fn no_rows_give_no_rows_and_no_length_gives_zeros() {
    for path in paths() {
        let (empty, b) = (Tensor::zeros(&[0, 4]).to(Format::BF16), Tensor::zeros(&[3, 4]).to(Format::BF16));
        let mut out = Tensor::zeros(&[0, 3]);
        path(out.mat_mut(), Output::Overwrite, &Factor::rows(&empty, 0..0), &Factor::rows(&b, 0..3));
        let (a, b) = (Tensor::zeros(&[0, 2]).to(Format::BF16), Tensor::zeros(&[0, 3]).to(Format::BF16));
        let mut out = Tensor::from_vec(&[2, 3], noise(6, 1));
        path(out.mat_mut(), Output::Overwrite, &Factor::columns(&a, 0..0), &Factor::columns(&b, 0..0));
        assert_eq!(out.f32(), [0.0; 6]);
    }
}

#[test]
#[should_panic(expected = "expected scales that do not change along the sum")]
fn sums_across_the_tiles_of_rows_are_refused() {
    Factor::columns(&Tensor::zeros(&[4, 4]).to(e4m3(Tile::Row)), 0..4);
}
