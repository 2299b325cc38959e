//! Rows of tokens sorted by expert and put back: the step between the gate and the grouped GEMMs.
//!
//! Called on both sides of dispatch: the sending rank orders rows by destination, the owning rank by local expert.
//! It knows neither ranks nor weights; a routed row is a source row and an expert, nothing more.
//!
//! Shape letters: N source rows, R routed rows, E experts, D hidden.

use crate::{
    par::{self, MIN_PARALLEL},
    tensor::{Format, Tensor},
};

/// Routed rows in the order the grouped GEMMs want them: by expert, and by list position within an expert.
#[derive(Clone, Debug)]
pub struct Permutation {
    /// Rows of expert `e` are `offsets[e]..offsets[e + 1]`.
    ///
    /// **Shapes**: `[E + 1]` in U32.
    pub offsets: Tensor,
    /// Source row of each routed row.
    ///
    /// **Shapes**: `[R]` in U32.
    pub rows: Tensor,
    /// Position of each routed row in the pair list the permutation was made from.
    ///
    /// **Shapes**: `[R]` in U32.
    pub slots: Tensor,
}

/// Sorts (source row, expert) pairs by expert, keeping the list's order within an expert.
///
/// Pairs listed by ascending row, as the gate writes them, thus give ascending rows within each expert, and every
/// sum over routed rows has one order, whatever the routing.
///
/// **Shapes**: `pairs` `[R, 2]` in U32.
/// **Errors**: panics if an expert is not below `num_experts`.
pub fn by_expert(pairs: &Tensor, num_experts: usize) -> Permutation {
    let pairs = pairs_of(pairs);
    let mut offsets = vec![0_u32; num_experts + 1];
    for &[row, expert_id] in pairs {
        assert!(
            (expert_id as usize) < num_experts,
            "row {row}: expected an expert below {num_experts}, got {expert_id}"
        );
        offsets[expert_id as usize + 1] += 1;
    }
    for expert_id in 0..num_experts {
        offsets[expert_id + 1] += offsets[expert_id];
    }

    let mut next = offsets.clone();
    let mut rows = Tensor::for_overwrite_in(Format::U32, &[pairs.len()]);
    let mut slots = Tensor::for_overwrite_in(Format::U32, &[pairs.len()]);
    let (row_of, slot_of) = (rows.u32_mut(), slots.u32_mut());
    for (slot, &[row, expert_id]) in pairs.iter().enumerate() {
        let at = &mut next[expert_id as usize];
        row_of[*at as usize] = row;
        slot_of[*at as usize] = u32::try_from(slot).expect("a micro-batch has fewer than 2^32 routed rows");
        *at += 1;
    }
    Permutation { offsets: Tensor::from_vec(&[num_experts + 1], offsets), rows, slots }
}

/// The pairs of a list.
///
/// **Errors**: panics unless `pairs` is `[R, 2]` in U32.
pub(crate) fn pairs_of(pairs: &Tensor) -> &[[u32; 2]] {
    assert_eq!(pairs.shape(), [pairs.rows(), 2], "expected pairs of a row and an expert");
    pairs.u32().as_chunks().0
}

/// Copies the named rows of `x`, in the order named; a row may be named any number of times. Scales go with their rows.
///
/// **Shapes**: `x` `[N, ..]`, `rows` `[R]` in U32, result `[R, ..]`.
pub fn gather(x: &Tensor, rows: &Tensor) -> Tensor {
    let mut shape = x.shape().to_vec();
    shape[0] = rows.len();
    let mut out = Tensor::for_overwrite_in(x.format(), &shape);
    let (rows, width) = (rows.u32(), x.format().value_bytes(row_width(x)));
    let num_scales = x.scales().len() / x.shape()[0].max(1);
    let (codes, scales) = out.codes_and_scales_mut();
    gather_rows(codes, x.codes(), rows, width);
    gather_rows(scales, x.scales(), rows, num_scales);
    out
}

fn gather_rows<T: Copy + Send + Sync>(out: &mut [T], source: &[T], rows: &[u32], width: usize) {
    if width == 0 {
        return;
    }
    par::for_each_chunk(out, width, MIN_PARALLEL / width, |range, out| {
        for (target, &row) in out.chunks_exact_mut(width).zip(&rows[range]) {
            let start = row as usize * width;
            target.copy_from_slice(&source[start..start + width]);
        }
    });
}

/// Copies row `i` of `y` to row `rows[i]` of `out`: takes back what [`gather`] did where no row is named twice.
///
/// **Shapes**: `y` `[R, ..]`, `rows` `[R]` in U32, `out` `[N, ..]`.
/// **Errors**: panics if a row is not below N.
pub fn scatter(y: &Tensor, rows: &Tensor, out: &mut Tensor) {
    let width = check_rows(y, rows, out);
    let (source, target) = (y.f32().chunks_exact(width), out.f32_mut());
    for (values, &row) in source.zip(rows.u32()) {
        let start = row as usize * width;
        target[start..start + width].copy_from_slice(values);
    }
}

/// Adds row `i` of `y` to row `rows[i]` of `out`, which is in F32, in ascending `i`: the transpose of [`gather`].
///
/// Each thread owns some rows of `out` and looks for what goes there, so sums have one order on any number of threads.
///
/// **Shapes**: `y` `[R, ..]`, `rows` `[R]` in U32, `out` `[N, ..]`.
/// **Errors**: panics if a row is not below N.
pub fn scatter_add(y: &Tensor, rows: &Tensor, out: &mut Tensor) {
    let width = check_rows(y, rows, out);
    let (y, rows) = (y.widened(), rows.u32());
    let source = y.f32();
    par::for_each_chunk(out.f32_mut(), width, MIN_PARALLEL / width, |owned, target| {
        for (values, &row) in source.chunks_exact(width).zip(rows) {
            let row = row as usize;
            if owned.contains(&row) {
                let start = (row - owned.start) * width;
                target[start..start + width].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
    });
}

/// Values in each row along the first dim.
fn row_width(x: &Tensor) -> usize {
    x.shape()[1..].iter().product()
}

/// The width of the rows, once they are known to fit.
fn check_rows(y: &Tensor, rows: &Tensor, out: &Tensor) -> usize {
    assert_eq!(y.shape()[0], rows.len(), "expected one row for each target row");
    assert_eq!(y.shape()[1..], out.shape()[1..], "expected rows of the target's width");
    let num_targets = out.shape()[0];
    if let Some(row) = rows.u32().iter().find(|&&row| row as usize >= num_targets) {
        panic!("expected target rows below {num_targets}, got {row}");
    }
    row_width(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair_lists() -> impl Strategy<Value = (usize, Vec<(u32, u32)>)> {
        (1_usize..9).prop_flat_map(|num_experts| {
            (Just(num_experts), prop::collection::vec((0_u32..20, 0..num_experts as u32), 0..60))
        })
    }

    fn ids(ids: &[u32]) -> Tensor {
        Tensor::from_vec(&[ids.len()], ids.to_vec())
    }

    fn list(pairs: &[(u32, u32)]) -> Tensor {
        Tensor::from_vec(&[pairs.len(), 2], pairs.iter().flat_map(|&(row, expert)| [row, expert]).collect())
    }

    proptest! {
        #[test]
        fn sorting_is_stable_and_keeps_every_pair((num_experts, pairs) in pair_lists()) {
            let sorted = by_expert(&list(&pairs), num_experts);

            let mut expected: Vec<(u32, u32, u32)> =
                pairs.iter().zip(0..).map(|(&(row, expert_id), slot)| (expert_id, slot, row)).collect();
            expected.sort_unstable();
            let (offsets, rows, slots) = (sorted.offsets.u32(), sorted.rows.u32(), sorted.slots.u32());
            let flat = |e: usize| (offsets[e] as usize..offsets[e + 1] as usize).map(move |i| (e as u32, i));
            let found: Vec<(u32, u32, u32)> =
                (0..num_experts).flat_map(flat).map(|(e, i)| (e, slots[i], rows[i])).collect();

            prop_assert_eq!(offsets.len(), num_experts + 1);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn scatter_add_is_the_transpose_of_gather(rows in prop::collection::vec(0_u32..7, 0..40)) {
            let x = Tensor::from_vec(&[7, 3], (0..21).map(|i| i as f32 - 9.0).collect());
            let y = Tensor::from_vec(&[rows.len(), 3], (0..rows.len() * 3).map(|i| (i % 11) as f32).collect());
            let mut back = Tensor::zeros(&[7, 3]);

            let gathered = gather(&x, &ids(&rows));
            scatter_add(&y, &ids(&rows), &mut back);

            // Small integers: both inner products are exact, so they are equal and not merely close.
            let inner = |a: &Tensor, b: &Tensor| a.f32().iter().zip(b.f32()).map(|(a, b)| a * b).sum::<f32>();
            prop_assert_eq!(inner(&gathered, &y), inner(&x, &back));
        }
    }

    #[test]
    fn one_expert_may_take_every_row_and_the_others_none() {
        let pairs: Vec<(u32, u32)> = (0..5).map(|row| (row, 2)).collect();

        let sorted = by_expert(&list(&pairs), 4);

        assert_eq!(sorted.offsets.u32(), [0, 0, 0, 5, 5]);
        assert_eq!(sorted.rows.u32(), [0, 1, 2, 3, 4]);
        assert_eq!(sorted.slots.u32(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn no_rows_at_all_is_a_permutation() {
        let sorted = by_expert(&list(&[]), 3);

        assert_eq!(sorted.offsets.u32(), [0; 4]);
        assert_eq!(gather(&Tensor::zeros(&[2, 4]), &sorted.rows).shape(), [0, 4]);
    }

    #[test]
    fn scatter_add_keeps_what_the_target_held() {
        let mut out = Tensor::from_vec(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]);

        scatter_add(&Tensor::from_vec(&[2, 2], vec![10.0, 20.0, 30.0, 40.0]), &ids(&[1, 1]), &mut out);

        assert_eq!(out.f32(), [1.0, 2.0, 43.0, 64.0]);
    }

    #[test]
    fn scatter_takes_back_what_gather_did_to_rows_and_to_single_values() {
        let order = ids(&[2, 0, 1]);
        for shape in [&[3, 2][..], &[3]] {
            let x = Tensor::from_vec(shape, (0..shape.iter().product::<usize>()).map(|i| i as f32).collect());
            let mut back = Tensor::zeros(shape);
            let gathered = gather(&x, &order);
            assert_eq!(gathered.f32()[..x.len() / 3], x.f32()[x.len() / 3 * 2..]);
            scatter(&gathered, &order, &mut back);
            assert_eq!(back.f32(), x.f32());
        }
    }

    #[test]
    #[should_panic(expected = "expected target rows below 2, got 2")]
    fn a_row_beyond_the_target_is_refused() {
        scatter(&Tensor::zeros(&[1, 4]), &ids(&[2]), &mut Tensor::zeros(&[2, 4]));
    }

    #[test]
    #[should_panic(expected = "row 6: expected an expert below 3, got 3")]
    fn an_unknown_expert_is_refused() {
        by_expert(&list(&[(0, 1), (6, 3)]), 3);
    }
}
