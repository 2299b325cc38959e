//! How collectives are cut over the members of a group: the shards of reduce-scatter and all-gather, the tree of an
//! all-reduce. Knows positions in a group; no ranks, no values.

use std::ops::Range;

/// The share of `len` elements that member `index` of `members` owns.
pub fn shard(len: usize, members: usize, index: usize) -> Range<usize> {
    len * index / members..len * (index + 1) / members
}

/// A group's tree is that of its positions written to this base: a parent is its child without the last digit that is not 0.
/// So each member sums a run of positions, those of one host before those of many where a host has eight; a group of at most
/// eight is summed in order, one after another.
const RADIX: usize = 8;

/// Where position `at` of a group, not the first, sends its sum.
pub fn parent(at: usize) -> usize {
    let mut span = RADIX;
    while at.is_multiple_of(span) {
        span *= RADIX;
    }
    at - at % span
}

/// The positions whose parent `at` is, ascending.
pub fn children(at: usize, members: usize) -> Vec<usize> {
    let mut children = Vec::new();
    let mut span = 1;
    while span < members && at.is_multiple_of(span * RADIX) {
        children.extend((1..RADIX).map(|digit| at + digit * span).take_while(|&child| child < members));
        span *= RADIX;
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_reaches_all_members_by_few_links() {
        for members in (1..600).chain([2048, 4097]) {
            let mut reached = vec![0; members];
            for at in 0..members {
                let below = children(at, members);
                assert!(below.is_sorted() && below.iter().all(|&child| child > at && parent(child) == at));
                below.iter().for_each(|&child| reached[child] += 1);
                let levels = (1..).find(|&levels| 8_usize.pow(levels) >= members).unwrap() as usize;
                assert!(below.len() < 7 * levels + 1, "{} links of {members} members", below.len());
            }
            assert!(reached[0] == 0 && reached[1..].iter().all(|&times| times == 1), "{members} members");
        }
    }

    #[test]
    fn shards_make_up_the_whole_and_differ_by_one_element_at_most() {
        for (len, members) in [(0, 3), (2, 3), (10, 3), (64, 8), (1_000_003, 7)] {
            let shards: Vec<Range<usize>> = (0..members).map(|index| shard(len, members, index)).collect();
            assert_eq!((shards[0].start, shards[members - 1].end), (0, len));
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(shards.iter().all(|shard| shard.len().abs_diff(len / members) <= 1));
        }
    }
}
