//! Sums of E4M3 products as Hopper's tensor cores make them, without promotion: a study of what promotion is for (report
//! sections 3.3.2 and 3.5.2).
//!
//! One instruction adds 32 products along K to the running sum. All 33 are aligned to the largest of their exponents, and of
//! each no more than the 14 bits from there on are used; what lies below is cut off, towards zero. Their sum is exact, and cut
//! to 14 bits in turn. So it goes over the whole of K, however long, and what is small beside the running sum is lost. Scales
//! are multiplied into the products, as if the instruction took them: between tiles nothing happens but that they change.
//! The instruction's width, alignment and cut are published; that bits are cut towards zero, and that the sum is aligned like a
//! product, is what studies of the hardware found. Products are exact but for a rounding to F32 by their scale.

use super::{Along, Factor};
use crate::{
    format::TILE,
    par,
    tensor::Tensor,
    view::{MatMut, Output},
};

/// Products that one instruction adds.
const GROUP: usize = 32;
/// Bits of a product, or of the running sum, from the largest exponent among them on.
const BITS: u32 = 14;
/// Bits of an F32 behind its first.
const MANTISSA: u32 = f32::MANTISSA_DIGITS - 1;
const EXPONENT_BIAS: u32 = 127;

/// As [`super::product`].
pub(super) fn product(out: MatMut, output: Output, a: &Factor, b: &Factor) {
    let (a, b) = (Lanes::of(a), Lanes::of(b));
    let (num_rows, num_cols) = (out.num_rows(), out.num_cols());
    assert!(
        (a.codes.rows(), b.codes.rows()) == (num_rows, num_cols) && a.codes.cols() == b.codes.cols(),
        "expected factors of a [{num_rows}, {num_cols}] matrix, got {:?} and {:?}",
        a.codes,
        b.codes
    );
    let ranges = par::partition(num_rows, 1);
    let parts = out.split_rows(&ranges);
    par::for_each(ranges.into_iter().zip(parts).collect(), |(rows, mut out): (_, MatMut)| {
        let first = std::ops::Range::<usize>::clone(&rows).start;
        for row in rows {
            let out = out.row_mut(row - first);
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for (col, out) in out.iter_mut().enumerate() {
                        let sum = dot(a.lane(row), b.lane(col));
                        *out = if output == Output::Accumulate { *out + sum } else { sum };
                    }
                },
            );
        }
    });
}

/// A factor with its sums along rows.
struct Lanes {
    /// **Shapes**: `[lanes, K]`, without scales.
    codes: Tensor,
    /// **Shapes**: `[lanes, tiles]`.
    scales: Tensor,
}

impl Lanes {
    fn of(factor: &Factor) -> Lanes {
        let mut codes = Tensor::for_overwrite(&[factor.rows.len(), factor.tensor.cols()]);
        let width = factor.tensor.cols();
        let mut bits = vec![0; width];
        for (row, out) in factor.rows.clone().zip(codes.f32_mut().chunks_mut(width.max(1))) {
            factor.tensor.decode_row(row, 0, &mut bits);
            out.iter_mut().zip(&bits).for_each(|(out, &bits)| *out = f32::from_bits(u32::from(bits) << 16));
        }
        let codes = match factor.along {
            Along::Columns => codes,
            Along::Rows => codes.transposed_rows(0..codes.rows()),
        };
        let num_tiles = codes.cols().div_ceil(TILE);
        let scale = |at: usize| factor.scale(at / num_tiles, at % num_tiles);
        let scales = (0..codes.rows() * num_tiles).map(scale).collect();
        Lanes { scales: Tensor::from_vec(&[codes.rows(), num_tiles], scales), codes }
    }

    fn lane(&self, lane: usize) -> (&[f32], &[f32]) {
        (self.codes.row(lane), self.scales.row(lane))
    }
}

#[inline(always)]
fn dot((a, scales_a): (&[f32], &[f32]), (b, scales_b): (&[f32], &[f32])) -> f32 {
    let mut sum = 0.0;
    let tiles = a.chunks(TILE).zip(b.chunks(TILE)).zip(scales_a.iter().zip(scales_b));
    for ((a, b), (scale_a, scale_b)) in tiles {
        for (a, b) in a.chunks(GROUP).zip(b.chunks(GROUP)) {
            sum = add(sum, a, b, scale_a * scale_b);
        }
    }
    sum
}

/// The running sum after one more instruction.
#[inline(always)]
fn add(sum: f32, a: &[f32], b: &[f32], scale: f32) -> f32 {
    let mut products = [0.0_f32; GROUP];
    products.iter_mut().zip(a.iter().zip(b)).for_each(|(product, (a, b))| *product = a * b * scale);
    // Magnitudes are ordered as their bits are, and what is not finite lies above all.
    let magnitude = |value: f32| value.to_bits() & 0x7fff_ffff;
    let largest = products.iter().fold(magnitude(sum), |most, &product| most.max(magnitude(product)));
    if largest >= f32::INFINITY.to_bits() {
        return products.iter().fold(sum, |sum, product| sum + product);
    }
    // What the last of the 14 bits stands for; so small that it were no normal number it is the smallest one.
    let exponent = (largest >> MANTISSA).max(BITS);
    let unit = f32::from_bits((exponent + 1 - BITS) << MANTISSA);
    let units_in_one = f32::from_bits((2 * EXPONENT_BIAS + BITS - 1 - exponent) << MANTISSA);
    let aligned = |value: f32| (value * units_in_one) as i32;
    let total = products.iter().fold(aligned(sum), |total, &product| total + aligned(product));
    // At most 33 numbers of 14 bits: exact in F32.
    let cut = !((1 << (MANTISSA + 1 - BITS)) - 1);
    f32::from_bits((total as f32).to_bits() & cut) * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        linear,
        tensor::{Format, ScaleRule, Study, Tile},
        tests::noise,
    };

    const STUDY: Study = Study { tensor_core_sums: true, gradient_blocks: false };

    fn weight(values: &Tensor, study: Study) -> Tensor {
        values.to(Format::E4M3(Tile::Block, ScaleRule { study, ..ScaleRule::default() }))
    }

    #[test]
    fn bits_below_the_fourteenth_are_lost() {
        let power = |exponent: i32| 2.0_f32.powi(exponent);
        assert_eq!(add(0.0, &[1.0, power(-13)], &[1.0, 1.0], 1.0), 1.0 + power(-13));
        assert_eq!(add(0.0, &[1.0, power(-7)], &[1.0, power(-7)], 1.0), 1.0);
        // Each is lost, however many there are; added up before they are aligned they would not be.
        assert_eq!(add(0.0, &[[1.0].as_slice(), &[power(-14); 31]].concat(), &[1.0; 32], 1.0), 1.0);
        // So is what is added to the sum, towards zero on either side of it.
        for (sum, one, expected) in [(8192.0, 1.0, 8193.0), (16384.0, 1.0, 16384.0), (16384.0, -1.0, 16384.0)]
        {
            assert_eq!(add(sum, &[one], &[1.0], 1.0), expected);
            assert_eq!(add(-sum, &[one], &[-1.0], 1.0), -expected);
        }
        // A sum that has grown beyond 14 bits is cut.
        assert_eq!(add(0.0, &[1.5, 1.5, power(-13)], &[1.0; 3], 1.0), 3.0);
        assert_eq!(add(0.0, &[448.0], &[448.0], power(-120)), 448.0 * 448.0 * power(-120));
        // Where the last bit were no normal number: 12.25 times the smallest one, then less than once.
        assert_eq!(add(0.0, &[448.0], &[448.0], power(-140)), 12.0 * power(-126));
        assert_eq!(add(0.0, &[448.0], &[448.0], power(-149)), 0.0);
        assert_eq!(add(0.0, &[], &[], 1.0), 0.0);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for (value, scale) in [(f32::NAN, 1.0), (1.0, f32::NAN), (1.0, f32::INFINITY)] {
            assert!(!add(1.0, &[value, 0.5], &[1.0, 1.0], scale).is_finite());
        }
        assert!(add(f32::NAN, &[1.0], &[1.0], 1.0).is_nan());
    }

    /// Report section 3.3.2: at K = 4096 limited accumulation has a largest relative error of nearly 2 %. On normal numbers, and
    /// relative to the root of the mean square of the exact results, as single ones may be near zero.
    #[test]
    fn the_error_that_the_report_warns_of_is_there_without_promotion_and_gone_with_it() {
        // The sum of twelve uniform numbers is nearly normal; more of them than `noise` has of a seed.
        let normal = |rows: usize, seed: u64| {
            let mut state = seed;
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 24) as f32
            };
            let values = (0..rows * 4096).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0);
            Tensor::from_vec(&[rows, 4096], values.collect())
        };
        let error = |study: Study| {
            let w = weight(&normal(256, 1), study);
            let x = linear::input(&normal(16, 2), &w);
            let mut found = Tensor::zeros(&[16, 256]);
            linear::add_product(found.mat_mut(), Output::Overwrite, &x, &w, 0..256);
            let (x, w) = (x.widened(), w.widened());
            let (mut worst, mut squares) = (0.0_f64, 0.0);
            for row in 0..16 {
                for col in 0..256 {
                    let terms = x.row(row).iter().zip(w.row(col));
                    let exact: f64 = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    worst = worst.max((f64::from(found.row(row)[col]) - exact).abs());
                    squares += exact * exact;
                }
            }
            worst / (squares / (16.0 * 256.0)).sqrt()
        };
        let (tensor_core, promoted) = (error(STUDY), error(Study::NONE));
        println!("without promotion {tensor_core:.2e}, with it {promoted:.2e}");
        assert!((0.015..0.025).contains(&tensor_core), "{tensor_core}");
        assert!(promoted < 1e-5, "{promoted}");
    }

    /// The definition, in f64 and one product after another.
    fn slowly(a: &Factor, b: &Factor, row: usize, col: usize) -> f32 {
        let (a_lanes, b_lanes) = (Lanes::of(a), Lanes::of(b));
        let cut = |value: f64, unit: f64| (value / unit).trunc() * unit;
        let unit = |largest: f64| 2.0_f64.powi(largest.log2().floor() as i32 - 13);
        let mut sum = 0.0_f64;
        let codes: Vec<_> = a_lanes.codes.row(row).iter().zip(b_lanes.codes.row(col)).enumerate().collect();
        for group in codes.chunks(32) {
            let scale = |k: usize| a.scale(row, k / 128) * b.scale(col, k / 128);
            let products: Vec<f64> = group.iter().map(|&(k, (a, b))| f64::from(a * b * scale(k))).collect();
            let largest = products.iter().fold(sum.abs(), |most, product| most.max(product.abs()));
            if largest > 0.0 {
                let total: f64 = products.iter().chain([&sum]).map(|&value| cut(value, unit(largest))).sum();
                sum = if total == 0.0 { 0.0 } else { cut(total, unit(total.abs())) };
            }
        }
        sum as f32
    }

    #[test]
    fn every_product_of_a_layer_is_the_definitions() {
        let (x, w, dy) = ([5, 300], [130, 300], [5, 130]);
        let [x, w, dy] = [x, w, dy]
            .map(|[rows, cols]| Tensor::from_vec(&[rows, cols], noise(rows * cols, (rows + cols) as u32)));
        let w = weight(&w, STUDY);
        // Rows as they come from another rank, with scales of their own.
        let powers = ScaleRule { power_of_two: true, ..ScaleRule::default() };
        for x in [x.clone(), x.to(Format::E4M3(Tile::Row, powers))] {
            let x = linear::input(&x, &w);
            let mut y = Tensor::zeros(&[5, 130]);
            linear::add_product(y.mat_mut(), Output::Overwrite, &x, &w, 0..130);
            let (a, b) = (Factor::rows(&x, 0..5), Factor::rows(&w, 0..130));
            assert_eq!(y.row(3)[129], slowly(&a, &b, 3, 129));
            let tiled = linear::input(&dy, &w);
            let dx = linear::backward_input(&dy, &w);
            let exact = slowly(&Factor::rows(&tiled, 0..5), &Factor::columns(&w, 0..130), 4, 299);
            assert_eq!(
                dx.widened().row(4)[299],
                Tensor::from_vec(&[1], vec![exact]).to(Format::BF16).widened().row(0)[0]
            );
            let mut dw = Tensor::zeros(&[130, 300]);
            linear::backward_weight(&dy, &x, &mut dw);
            let format = x.format();
            let [dy_t, x_t] = [&dy, &x].map(|tensor| tensor.transposed_rows(0..5).to(format));
            let (a, b) = (Factor::rows(&dy_t, 0..130), Factor::rows(&x_t, 0..300));
            assert_eq!(dw.row(129)[7], slowly(&a, &b, 129, 7));
        }
    }
}
