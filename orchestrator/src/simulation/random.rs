//! Draws for the simulation, the same for the same seed. Knows nothing of what is drawn.

use contraflow_runtime::random::SplitMix64;

/// A stream of numbers.
#[derive(Clone, Debug)]
pub(super) struct Random(SplitMix64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        let mut numbers = SplitMix64::new(seed);
        numbers.next_u64();
        Random(numbers)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// At least `from`, less than `to`; `from` where that is nothing.
    pub(super) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % to.saturating_sub(from).max(1)
    }

    pub(super) fn is_one_in(&mut self, many: u64) -> bool {
        self.next().is_multiple_of(many)
    }

    /// One of several, if there are any.
    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let index = self.between(0, from.len() as u64) as usize;
        from.get(index).copied()
    }
}
