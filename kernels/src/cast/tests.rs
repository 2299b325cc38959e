//! Quantising: what holds for any values. Against recorded cases: `tests/narrow.rs`.

use super::*;
use crate::{tensor::Study, tests::noise};
use proptest::prelude::*;

const PLAIN: ScaleRule = ScaleRule { floor: false, power_of_two: false, study: Study::NONE };
const POWERS: ScaleRule = ScaleRule { power_of_two: true, ..PLAIN };

fn formats() -> [Format; 6] {
    let e4m3 = |tile, rule| Format::E4M3(tile, rule);
    [
        Format::BF16,
        e4m3(Tile::Row, PLAIN),
        e4m3(Tile::Row, POWERS),
        e4m3(Tile::Block, PLAIN),
        e4m3(Tile::Block, POWERS),
        Format::E5M6,
    ]
}

/// Values over many magnitudes, zeros among them.
fn spread(shape: &[usize], seed: u32) -> Tensor {
    let len = shape.iter().product();
    let exponents = noise(len, seed + 1000);
    let values = noise(len, seed)
        .into_iter()
        .zip(exponents)
        .map(|(value, exponent)| if exponent < -0.9 { 0.0 } else { value * (exponent * 20.0).exp2() });
    Tensor::from_vec(shape, values.collect())
}

proptest! {
    #[test]
    fn what_is_quantised_again_does_not_change(rows in 0_usize..300, half in 1_usize..150, seed in 0_u32..1000) {
        let x = spread(&[rows, 2 * half], seed);
        for format in formats() {
            let once = x.to(format).widened();
            let codes = |x: &Tensor| x.to(format).widened().f32().to_vec();
            // With a scale of amax / 448 the largest value need not come back as it was.
            let is_exact = !matches!(format, Format::E4M3(_, PLAIN));
            if is_exact {
                prop_assert_eq!(codes(&once), once.f32(), "{:?}", format);
            }
            let largest = x.f32().iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            for (was, is) in x.f32().iter().zip(once.f32()) {
                // Half of the last bit, and half of the smallest value at the scale of the tile.
                let bound = was.abs() / 16.0 + largest / 448.0 * 2.0_f32.powi(-9);
                prop_assert!((was - is).abs() <= bound, "{was:e} became {is:e} in {format:?}");
            }
        }
    }

    #[test]
    fn larger_values_have_no_smaller_codes(mut values in prop::collection::vec(-1e5_f32..1e5, 128)) {
        values.sort_by(f32::total_cmp);
        for format in formats() {
            let found = Tensor::from_vec(&[1, 128], values.clone()).to(format).widened();
            prop_assert!(found.f32().is_sorted(), "{:?}", format);
        }
    }
}

#[test]
fn a_tile_keeps_its_zeros_and_its_smallest_values() {
    let mut values = vec![0.0_f32; 256];
    values[3] = 1e-40;
    let x = Tensor::from_vec(&[1, 256], values);
    for format in formats().into_iter().filter(|&format| format != Format::BF16) {
        let narrow = x.to(format);
        assert_eq!(narrow.scales()[1], 1.0, "{format:?}");
        assert!(narrow.widened().f32()[128..].iter().all(|value| value.to_bits() == 0));
    }
    let floored = x.to(Format::E4M3(Tile::Row, ScaleRule { floor: true, ..PLAIN }));
    assert_eq!(floored.scales()[0], 1e-4 / 448.0);
}

#[test]
fn a_tile_with_a_value_that_is_not_finite_has_no_finite_one_left_and_others_are_untouched() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = noise(512, 1);
        values[130] = bad;
        let x = Tensor::from_vec(&[2, 256], values);
        for format in formats().into_iter().filter(|&format| format != Format::BF16) {
            let back = x.to(format).widened();
            let is_hit = |row: usize, tile: usize| {
                let tile = &back.row(row)[tile * 128..(tile + 1) * 128];
                tile.iter().all(|value| !value.is_finite())
            };
            let shares_rows = matches!(format, Format::E4M3(Tile::Block, _));
            assert!(is_hit(0, 1) && is_hit(1, 1) == shares_rows, "{bad} in {format:?}");
            assert!(back.row(0)[..128].iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn each_matrix_of_a_stack_has_blocks_of_its_own() {
    let format = Format::E4M3(Tile::Block, PLAIN);
    let x = spread(&[3, 130, 140], 7);
    let whole = x.to(format);
    assert_eq!((whole.scales().len(), whole.num_bytes()), (3 * 2 * 2, 3 * 130 * 140 + 4 * 12));
    for matrix in 0..3 {
        let part = x.slice_rows(matrix * 130..(matrix + 1) * 130).to(format);
        assert_eq!(part.scales(), &whole.scales()[4 * matrix..4 * (matrix + 1)]);
        assert_eq!(part.codes(), &whole.codes()[130 * 140 * matrix..130 * 140 * (matrix + 1)]);
        let wide = whole.widened();
        assert_eq!(part.widened().f32(), wide.slice_rows(matrix * 130..(matrix + 1) * 130).f32());
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let x = spread(&[300, 400], 3);
    for format in formats() {
        let bytes = |x: Tensor| x.parts().map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(bytes(par::Threads::new(3).run(|| x.to(format))), bytes(x.to(format)));
    }
}

#[test]
#[should_panic(expected = "expected formats of real numbers")]
fn ids_have_no_other_format() {
    Tensor::from_vec(&[1], vec![1_u32]).to(Format::BF16);
}
