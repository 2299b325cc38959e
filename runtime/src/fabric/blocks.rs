//! Which ranges of a link's shared memory are in use. The sender keeps the book: a block is taken for a frame and comes back
//! when its receiver has dropped the frame, in any order.
//!
//! Pure: offsets and lengths, no memory.

use std::collections::BTreeMap;

use super::arrived::ALIGNMENT;

/// The book of one segment.
pub struct Blocks {
    /// Free ranges by where they begin; no two touch.
    free: BTreeMap<usize, usize>,
    /// Blocks in use by where they begin.
    used: BTreeMap<usize, usize>,
}

impl Blocks {
    /// All of `len` bytes is free.
    pub fn new(len: usize) -> Self {
        Blocks { free: BTreeMap::from([(0, len)]), used: BTreeMap::new() }
    }

    /// The lowest free block of `len` bytes, so that the same pages are used again and again; `None` if there is none.
    pub fn take(&mut self, len: usize) -> Option<usize> {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        let (&start, &room) = self.free.iter().find(|&(_, &room)| room >= len)?;
        self.free.remove(&start);
        if room > len {
            self.free.insert(start + len, room - len);
        }
        self.used.insert(start, len);
        Some(start)
    }

    /// A block is free again.
    ///
    /// **Errors**: if no block in use begins there.
    pub fn give_back(&mut self, start: u64) -> Result<(), String> {
        let known = usize::try_from(start).ok().and_then(|start| Some((start, self.used.remove(&start)?)));
        let (mut start, mut len) = known.ok_or_else(|| format!("no block in use begins at {start}"))?;
        if let Some((&before, &room)) = self.free.range(..start).next_back()
            && before + room == start
        {
            self.free.remove(&before);
            (start, len) = (before, room + len);
        }
        if let Some(room) = self.free.remove(&(start + len)) {
            len += room;
        }
        self.free.insert(start, len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Blocks never overlap, and when all have come back, in any order, all is one free range again.
        #[test]
        fn blocks_are_apart_and_come_back(sizes in proptest::collection::vec(0_usize..3000, 1..80),
                                          picks in proptest::collection::vec(any::<proptest::sample::Index>(), 1..80)) {
            const LEN: usize = 64 << 10;
            let mut blocks = Blocks::new(LEN);
            let mut held: Vec<(usize, usize)> = Vec::new();
            for (&size, pick) in sizes.iter().zip(picks.iter().cycle()) {
                match blocks.take(size) {
                    Some(start) => {
                        prop_assert!(start % ALIGNMENT == 0 && start + size <= LEN);
                        prop_assert!(held.iter().all(|&(other, len)| start + size.max(1) <= other || other + len <= start));
                        held.push((start, size.max(1)));
                    }
                    None if held.is_empty() => prop_assert!(false, "nothing is held and {size} bytes do not fit"),
                    None => {
                        let (start, _) = held.swap_remove(pick.index(held.len()));
                        blocks.give_back(start as u64).unwrap();
                    }
                }
            }
            for (start, _) in held {
                blocks.give_back(start as u64).unwrap();
                prop_assert!(blocks.give_back(start as u64).is_err());
            }
            prop_assert_eq!(blocks.free, BTreeMap::from([(0, LEN)]));
        }
    }
}
