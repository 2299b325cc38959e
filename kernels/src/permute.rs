//! Rows of tokens sorted by expert and put back: what stands between the gate and the grouped GEMMs.
//!
//! Called on both sides of dispatch: the sending rank orders rows by destination, the owning rank by local expert.
//! It knows neither ranks nor weights; a routed row is a source row and an expert, nothing more.
//!
//! Shape letters: N source rows, R routed rows, E experts, D hidden.

use crate::{math::MIN_PARALLEL, par, tensor::Tensor};

/// Routed rows in the order the grouped GEMMs want them: by expert, and by list position within an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permutation {
    /// Rows of expert `e` are `offsets[e]..offsets[e + 1]`.
    ///
    /// **Shapes**: `[E + 1]`.
    pub offsets: Vec<usize>,
    /// Source row of each routed row.
    ///
    /// **Shapes**: `[R]`.
    pub rows: Vec<u32>,
    /// Position of each routed row in the pair list the permutation was made from.
    ///
    /// **Shapes**: `[R]`.
    pub slots: Vec<u32>,
}

/// Sorts (source row, expert) pairs by expert, keeping the list's order within an expert.
///
/// Pairs listed by ascending row, as the gate writes them, thus give ascending rows within each expert, and every
/// sum over routed rows has one order, whatever the routing.
///
/// **Errors**: panics if an expert is not below `num_experts`.
pub fn by_expert(pairs: &[(u32, u32)], num_experts: usize) -> Permutation {
    let mut offsets = vec![0; num_experts + 1];
    for &(row, expert_id) in pairs {
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
    let mut rows = vec![0; pairs.len()];
    let mut slots = vec![0; pairs.len()];
    for (slot, &(row, expert_id)) in pairs.iter().enumerate() {
        let at = &mut next[expert_id as usize];
        rows[*at] = row;
        slots[*at] = u32::try_from(slot).expect("a micro-batch has fewer than 2^32 routed rows");
        *at += 1;
    }
    Permutation { offsets, rows, slots }
}

/// Copies the named rows of `x`, in the order named; a row may be named any number of times.
///
/// **Shapes**: `x` `[N, D]`, `rows` `[R]`, result `[R, D]`.
pub fn gather(x: &Tensor, rows: &[u32]) -> Tensor {
    let mut out = Tensor::for_overwrite(&[rows.len(), x.cols()]);
    let (source, width) = (x.f32(), x.cols());
    par::for_each_chunk(out.f32_mut(), width, MIN_PARALLEL / width, |range, out| {
        for (target, &row) in out.chunks_exact_mut(width).zip(&rows[range]) {
            let start = row as usize * width;
            target.copy_from_slice(&source[start..start + width]);
        }
    });
    out
}

/// Adds row `i` of `y` to row `rows[i]` of `out`, in ascending `i`: the transpose of [`gather`].
///
/// Each thread owns some rows of `out` and looks for what goes there, so sums have one order on any number of threads.
///
/// **Shapes**: `y` `[R, D]`, `rows` `[R]`, `out` `[N, D]`.
pub fn scatter_add(y: &Tensor, rows: &[u32], out: &mut Tensor) {
    let width = out.cols();
    assert_eq!(y.shape(), [rows.len(), width], "expected one row of {width} columns for each target row");
    let (source, num_targets) = (y.f32(), out.rows());
    if let Some(row) = rows.iter().find(|&&row| row as usize >= num_targets) {
        panic!("expected target rows below {num_targets}, got {row}");
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair_lists() -> impl Strategy<Value = (usize, Vec<(u32, u32)>)> {
        (1_usize..9).prop_flat_map(|num_experts| {
            (Just(num_experts), prop::collection::vec((0_u32..20, 0..num_experts as u32), 0..60))
        })
    }

    proptest! {
        #[test]
        fn sorting_is_stable_and_keeps_every_pair((num_experts, pairs) in pair_lists()) {
            let sorted = by_expert(&pairs, num_experts);

            let mut expected: Vec<(u32, u32, u32)> =
                pairs.iter().zip(0..).map(|(&(row, expert_id), slot)| (expert_id, slot, row)).collect();
            expected.sort_unstable();
            let flat = |e: usize| (sorted.offsets[e]..sorted.offsets[e + 1]).map(move |i| (e as u32, i));
            let found: Vec<(u32, u32, u32)> =
                (0..num_experts).flat_map(flat).map(|(e, i)| (e, sorted.slots[i], sorted.rows[i])).collect();

            prop_assert_eq!(sorted.offsets.len(), num_experts + 1);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn scatter_add_is_the_transpose_of_gather(rows in prop::collection::vec(0_u32..7, 0..40)) {
            let x = Tensor::from_vec(&[7, 3], (0..21).map(|i| i as f32 - 9.0).collect());
            let y = Tensor::from_vec(&[rows.len(), 3], (0..rows.len() * 3).map(|i| (i % 11) as f32).collect());
            let mut back = Tensor::zeros(&[7, 3]);

            let gathered = gather(&x, &rows);
            scatter_add(&y, &rows, &mut back);

            // Small integers: both inner products are exact, so they are equal and not merely close.
            let inner = |a: &Tensor, b: &Tensor| a.f32().iter().zip(b.f32()).map(|(a, b)| a * b).sum::<f32>();
            prop_assert_eq!(inner(&gathered, &y), inner(&x, &back));
        }
    }

    #[test]
    fn one_expert_may_take_every_row_and_the_others_none() {
        let pairs: Vec<(u32, u32)> = (0..5).map(|row| (row, 2)).collect();

        let sorted = by_expert(&pairs, 4);

        assert_eq!(sorted.offsets, [0, 0, 0, 5, 5]);
        assert_eq!(sorted.rows, [0, 1, 2, 3, 4]);
        assert_eq!(sorted.slots, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn no_rows_at_all_is_a_permutation() {
        let sorted = by_expert(&[], 3);

        assert_eq!(sorted.offsets, [0; 4]);
        assert_eq!(gather(&Tensor::zeros(&[2, 4]), &sorted.rows).shape(), [0, 4]);
    }

    #[test]
    fn scatter_add_keeps_what_the_target_held() {
        let mut out = Tensor::from_vec(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]);

        scatter_add(&Tensor::from_vec(&[2, 2], vec![10.0, 20.0, 30.0, 40.0]), &[1, 1], &mut out);

        assert_eq!(out.f32(), [1.0, 2.0, 43.0, 64.0]);
    }

    #[test]
    #[should_panic(expected = "row 6: expected an expert below 3, got 3")]
    fn an_unknown_expert_is_refused() {
        by_expert(&[(0, 1), (6, 3)], 3);
    }
}
