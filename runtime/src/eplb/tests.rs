//! Properties of placements, held against counts and bounds that are worked out here in whole numbers; what is refused; what advice is
//! worth. Placements slot by slot stand in `runtime/tests/golden_eplb.rs`.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Loads of some layers, and slots that fit them.
#[derive(Clone, Debug)]
struct Case {
    loads: Vec<Vec<f32>>,
    on: Slots,
}

/// Loads with ties, zeros and single experts with most of the tokens; groups that nodes divide and others.
fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1usize..4, 1usize..4, 1usize..7, 1usize..5, 0usize..4);
    sizes.prop_flat_map(|(num_nodes, ranks_per_node, num_groups, group_size, spare)| {
        let (num_ranks, num_experts) = (num_nodes * ranks_per_node, num_groups * group_size);
        let per_rank = num_experts.div_ceil(num_ranks) + spare;
        let on = Slots { num_slots: per_rank * num_ranks, num_groups, num_nodes, num_ranks };
        let tokens = prop_oneof![Just(0u16), 0u16..10, 0u16..1_000].prop_map(f32::from);
        let layer = prop::collection::vec(tokens, num_experts);
        prop::collection::vec(layer, 1..3).prop_map(move |loads| Case { loads, on })
    })
}

/// Nodes of which each holds its own experts, as the policy has it.
fn num_parts(on: &Slots) -> usize {
    if on.policy() == Policy::Hierarchical { on.num_nodes } else { 1 }
}

proptest! {
    #[test]
    fn every_expert_has_a_slot_and_every_rank_as_many(Case { loads, on } in cases()) {
        for placement in place(&loads, &on).unwrap() {
            prop_assert_eq!(placement.ranks.len(), on.num_ranks);
            prop_assert!(placement.ranks.iter().all(|rank| rank.len() == on.num_slots / on.num_ranks));
            let physical = placement.ranks.concat();
            for (expert, slots) in placement.slots.iter().enumerate() {
                prop_assert!(!slots.is_empty() && slots.is_sorted());
                prop_assert!(slots.iter().all(|&slot| physical[slot] == expert));
            }
            prop_assert_eq!(placement.counts().iter().sum::<usize>(), on.num_slots);
        }
    }

    #[test]
    fn a_group_stays_in_one_node_and_nodes_have_as_many_where_the_nodes_divide_the_groups(case in cases()) {
        let Case { loads, on } = case;
        prop_assume!(on.policy() == Policy::Hierarchical);
        let group_size = loads[0].len() / on.num_groups;
        for placement in place(&loads, &on).unwrap() {
            let nodes: Vec<BTreeSet<usize>> = placement
                .ranks
                .chunks(on.num_ranks / on.num_nodes)
                .map(|ranks| ranks.iter().flatten().map(|expert| expert / group_size).collect())
                .collect();
            prop_assert!(nodes.iter().all(|groups| groups.len() == on.num_groups / on.num_nodes));
            let all: BTreeSet<usize> = nodes.iter().flatten().copied().collect();
            prop_assert_eq!(all.len(), on.num_groups);
        }
    }

    /// With so many slots no other choice of whom to copy has a smaller largest copy: to get below it takes more.
    #[test]
    fn no_other_choice_of_copies_makes_the_largest_copy_smaller(Case { loads, on } in cases()) {
        for (load, placement) in loads.iter().zip(place(&loads, &on).unwrap()) {
            let (counts, ranks_per_part) = (placement.counts(), on.num_ranks / num_parts(&on));
            for ranks in placement.ranks.chunks(ranks_per_part) {
                let experts: BTreeSet<usize> = ranks.iter().flatten().copied().collect();
                let of = |&expert: &usize| (load[expert] as u64, counts[expert] as u64);
                // Fractions are compared crosswise.
                let larger = |a: (u64, u64), b: (u64, u64)| if b.0 * a.1 > a.0 * b.1 { b } else { a };
                let (most, over) = experts.iter().map(of).reduce(larger).unwrap();
                if most == 0 {
                    continue;
                }
                let needed: u64 = experts.iter().map(|expert| of(expert).0 * over / most + 1).sum();
                prop_assert!(needed > ranks.concat().len() as u64, "{load:?} on {on:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn advice_is_never_less_even_than_what_is_there_and_keeps_groups_in_nodes(case in cases()) {
        let Case { loads, on } = case;
        let num_experts = loads[0].len();
        prop_assume!(num_experts.is_multiple_of(on.num_ranks));
        for (load, advice) in loads.iter().zip(advise(&loads, &on).unwrap()) {
            let largest = load
                .chunks(num_experts / on.num_ranks)
                .map(|own| f64::from(own.iter().sum::<f32>()))
                .fold(0.0, f64::max);
            let mean = f64::from(load.iter().sum::<f32>()) / on.num_ranks as f64;
            let now = if mean > 0.0 { largest / mean } else { 1.0 };
            prop_assert!((advice.now.imbalance - now).abs() < 1e-9, "{} {now}", advice.now.imbalance);
            prop_assert!(advice.moved.imbalance <= advice.now.imbalance);
            prop_assert!(advice.copied.imbalance <= advice.moved.imbalance);
            prop_assert!(advice.moved.placement.counts().iter().all(|&count| count == 1));
            prop_assert!(advice.copied.imbalance >= 1.0 - 1e-9);
            let ranks_per_part = on.num_ranks / num_parts(&on);
            for proposal in [advice.now, advice.moved, advice.copied] {
                for slots in &proposal.placement.slots {
                    let per_rank = proposal.placement.ranks[0].len();
                    let parts: BTreeSet<usize> = slots.iter().map(|slot| slot / per_rank / ranks_per_part).collect();
                    prop_assert_eq!(parts.len(), 1);
                }
            }
        }
    }
}

#[test]
fn of_equal_loads_the_first_expert_is_copied_and_the_first_rank_filled() {
    let on = Slots { num_slots: 6, num_groups: 1, num_nodes: 1, num_ranks: 2 };
    let [placement] = &place(&[vec![4.0; 4]], &on).unwrap()[..] else { panic!("one layer") };
    // Copies, as they are made: 0, 1, 2, 3 and again 0 (4 / 1, the first of four) and 1. Then 2 and 3, the heaviest, go to ranks 0 and 1,
    // and those of 2 follow in turn.
    assert_eq!(placement.ranks, [[2, 0, 0], [3, 1, 1]]);
    assert_eq!(placement.slots, [vec![1, 2], vec![4, 5], vec![0], vec![3]]);
    // A slot a rank: nothing is sorted.
    let on = Slots { num_slots: 3, num_groups: 3, num_nodes: 3, num_ranks: 3 };
    assert_eq!(place(&[vec![1.0, 3.0, 2.0]], &on).unwrap()[0].ranks, [[0], [1], [2]]);
}

#[test]
fn greedy_packing_may_come_out_worse_than_what_is_there_which_is_then_the_advice() {
    let load = vec![8.0, 1.0, 1.0, 1.0, 4.0, 3.0, 2.0, 2.0];
    for (num_slots, largest) in [(8, 12.0), (10, 34.0 / 3.0)] {
        let on = Slots { num_slots, num_groups: 1, num_nodes: 1, num_ranks: 2 };
        let placed = place(std::slice::from_ref(&load), &on).unwrap().remove(0);
        assert!((placed.imbalance(&load) - largest / 11.0).abs() < 1e-6, "{}", placed.imbalance(&load));
        let advice = advise(std::slice::from_ref(&load), &on).unwrap().remove(0);
        assert_eq!(advice.now.imbalance, 1.0, "11 on either rank");
        assert_eq!((&advice.moved, &advice.copied), (&advice.now, &advice.now));
    }
}

#[test]
fn advice_says_what_moving_and_copying_would_gain() {
    let on = Slots { num_slots: 6, num_groups: 1, num_nodes: 1, num_ranks: 2 };
    let advice = advise(&[vec![6.0, 4.0, 2.0, 0.0], vec![0.0; 4]], &on).unwrap();
    // 10 and 2; then 6 and 6. Nothing is more even than that, so copies are not proposed.
    assert_eq!((advice[0].now.imbalance, advice[0].moved.imbalance), (10.0 / 6.0, 1.0));
    assert_eq!(advice[0].moved.placement.ranks, [[0, 3], [1, 2]]);
    assert_eq!(advice[0].copied, advice[0].moved);
    assert_eq!(advice[1].copied.imbalance, 1.0, "no load is even");
    // One expert with everything: only copies divide it.
    let advice = advise(&[vec![8.0, 0.0, 0.0, 0.0]], &on).unwrap().remove(0);
    let all = [&advice.now, &advice.moved, &advice.copied].map(|proposal| proposal.imbalance);
    assert_eq!(all[..2], [2.0, 2.0]);
    assert!(all[2] < 1.5, "{all:?}");
}

#[test]
fn everything_that_cannot_be_is_refused_at_once() {
    let faults = |loads: &[Vec<f32>], on: [usize; 4]| {
        let [num_slots, num_groups, num_nodes, num_ranks] = on;
        place(loads, &Slots { num_slots, num_groups, num_nodes, num_ranks }).unwrap_err().to_string()
    };
    let twelve = vec![vec![1.0; 12]];
    assert_eq!(
        faults(&twelve, [10, 5, 3, 4]),
        "num_slots: expected at least one for each of 12 experts, got 10\n\
         num_groups: expected a divisor of the 12 experts, got 5\n\
         num_nodes: expected a divisor of num_ranks (4), got 3"
    );
    assert_eq!(faults(&twelve, [14, 4, 2, 4]), "num_slots: expected a multiple of num_ranks (4), got 14");
    assert_eq!(
        faults(&[vec![1.0, f32::NAN], vec![-1.0], vec![f32::INFINITY, 0.0]], [0, 0, 0, 0]),
        "loads.0.1: expected a finite number, 0 or more, got NaN\n\
         loads.1: expected 2 experts, as in the first layer, got 1\n\
         loads.1.0: expected a finite number, 0 or more, got -1\n\
         loads.2.0: expected a finite number, 0 or more, got inf\n\
         num_slots: expected at least 1, got 0\n\
         num_groups: expected at least 1, got 0\n\
         num_nodes: expected at least 1, got 0\n\
         num_ranks: expected at least 1, got 0"
    );
    assert_eq!(faults(&[], [4, 1, 1, 4]), "loads: expected those of at least one layer, got none");
    assert_eq!(faults(&[vec![]], [4, 1, 1, 4]), "loads.0: expected at least one expert, got none");
    let on = Slots { num_slots: 16, num_groups: 1, num_nodes: 1, num_ranks: 8 };
    assert_eq!(
        advise(&twelve, &on).unwrap_err().to_string(),
        "num_ranks: expected a divisor of the 12 experts, of which each rank holds as many now, got 8"
    );
}
