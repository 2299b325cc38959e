//! Where an expert group can go: as many places on one node as are needed, then places within one block, then the rest.
//!
//! All groups are of one size, so to fill nodes first and blocks next leaves as few groups as possible to cross a node, and
//! as few as possible to cross a block: a node that could have taken one more never stays below that.

use std::collections::BTreeMap;

/// A place for a group: a node for each of its ranks; and how many groups find that same place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    pub nodes: Vec<usize>,
    pub free: usize,
}

/// Sites for at least `groups` groups of `size` ranks; the slots must suffice.
pub(super) fn sites(free: &[usize], block_of_node: &[usize], size: usize, groups: usize) -> Vec<Site> {
    let mut found: Vec<Site> = Vec::new();
    let mut left: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
    for (node, &slots) in free.iter().enumerate() {
        if slots >= size {
            found.push(Site { nodes: vec![node; size], free: slots / size });
        }
        if slots % size > 0 {
            left.entry(block_of_node[node]).or_default().push((slots % size, node));
        }
    }
    let mut missing = groups.saturating_sub(found.iter().map(|site| site.free).sum());
    // Within a block those with most slots first, so that a group comes to lie on few nodes.
    let mut rest: Vec<Vec<usize>> = left.into_values().map(most_first).collect();
    for block in &mut rest {
        while missing > 0 && block.len() >= size {
            found.push(Site { nodes: block.drain(..size).collect(), free: 1 });
            missing -= 1;
        }
    }
    // What is left of a block stays together as far as it goes.
    rest.sort_by_key(|block| std::cmp::Reverse(block.len()));
    let mut rest = rest.into_iter().flatten();
    for _ in 0..missing {
        found.push(Site { nodes: rest.by_ref().take(size).collect(), free: 1 });
    }
    found
}

/// The node of every slot, the nodes with most slots first.
fn most_first(mut nodes: Vec<(usize, usize)>) -> Vec<usize> {
    nodes.sort_by_key(|&(slots, node)| (std::cmp::Reverse(slots), node));
    nodes.into_iter().flat_map(|(slots, node)| std::iter::repeat_n(node, slots)).collect()
}
