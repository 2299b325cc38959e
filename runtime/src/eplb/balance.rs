//! The two greedy steps of the load balancer: items into packs of equal size, and copies of items that are too heavy.
//!
//! Knows no experts and no ranks. Loads are finite and not negative, so their bits are in the order of their values.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Divides items among `num_packs`, each of which gets as many: the heaviest item first, each to the lightest pack that has room. Of
/// equal packs the first one gets it, and equal items go in their order. Gives the items of each pack as they came; one item a pack
/// stays where it is.
pub(super) fn pack(loads: &[f32], num_packs: usize) -> Vec<Vec<usize>> {
    let room = loads.len() / num_packs;
    if room == 1 {
        return (0..num_packs).map(|item| vec![item]).collect();
    }
    let mut heaviest_first: Vec<usize> = (0..loads.len()).collect();
    heaviest_first.sort_by_key(|&item| Reverse(loads[item].to_bits()));
    let mut packs = vec![Vec::with_capacity(room); num_packs];
    let mut open: BinaryHeap<_> = (0..num_packs).map(|pack| Reverse((0f32.to_bits(), pack))).collect();
    for item in heaviest_first {
        // There is room for every item.
        let Some(Reverse((sum, pack))) = open.pop() else { break };
        packs[pack].push(item);
        if packs[pack].len() < room {
            open.push(Reverse(((f32::from_bits(sum) + loads[item]).to_bits(), pack)));
        }
    }
    packs
}

/// A copy of an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Share {
    /// Which item.
    pub item: usize,
    /// Its part of the item's load.
    pub load: f32,
}

/// Makes `num_copies` of items, one of each first; then, one after another, of the item whose copies have the largest load, the first
/// of equal ones. Gives them as they were made.
pub(super) fn divide(loads: &[f32], num_copies: usize) -> Vec<Share> {
    let mut counts = vec![1; loads.len()];
    let mut items: Vec<usize> = (0..loads.len()).collect();
    let mut heaviest: BinaryHeap<_> =
        loads.iter().enumerate().map(|(item, load)| (load.to_bits(), Reverse(item))).collect();
    while items.len() < num_copies {
        let Some((_, Reverse(item))) = heaviest.pop() else { break };
        items.push(item);
        counts[item] += 1;
        heaviest.push(((loads[item] / counts[item] as f32).to_bits(), Reverse(item)));
    }
    let share = |item| Share { item, load: loads[item] / counts[item] as f32 };
    items.into_iter().map(share).collect()
}
