//! The order in which sequences are drawn: a seeded permutation per epoch, computed and never stored.
//!
//! This is the whole state of the Loader beside its cursor. Position p of the run (counted in sequences from
//! its start) maps to one sequence index by arithmetic alone, so any rank, any layout and any resumed run
//! names the same sequence for it. The permutation is an own one: an order must outlive the release of
//! whatever random number crate is current.

/// Maps positions of a run to sequence indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    num_sequences: u64,
    seed: u64,
}

/// A swap-or-not shuffle of n indices needs a small multiple of log2(n) rounds to be all but uniform; these
/// are four times the log2 of a million. Part of the order's definition, never to change.
const ROUNDS: u64 = 80;

impl Sampler {
    /// An order over `num_sequences` sequences. **Errors**: panics where there are none.
    pub fn new(num_sequences: usize, seed: u64) -> Self {
        assert!(num_sequences > 0, "a sampler needs at least one sequence");
        Self { num_sequences: num_sequences as u64, seed }
    }

    /// The sequence at `position`. Epoch `position / num_sequences` holds each index exactly once.
    ///
    /// **Source**: Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012. Each
    /// round pairs index x with key - x (mod n) and swaps the two or leaves them by one coin per pair, which
    /// is a permutation for any n.
    pub fn index_at(&self, position: u64) -> usize {
        let n = self.num_sequences;
        let epoch_key = mix(mix(self.seed) ^ (position / n));
        let mut index = position % n;
        for round in 0..ROUNDS {
            let round_key = mix(epoch_key.wrapping_add(round));
            let partner = (round_key % n + n - index) % n;
            // Both of a pair must toss the same coin, so the larger one names it.
            if mix(round_key ^ index.max(partner)) >> 63 == 1 {
                index = partner;
            }
        }
        index as usize
    }

    /// The sequences of the step that starts at `cursor`: positions [cursor, cursor + global_batch).
    pub fn batch(&self, cursor: u64, global_batch: usize) -> Vec<usize> {
        (cursor..cursor + global_batch as u64).map(|position| self.index_at(position)).collect()
    }
}

/// The order over several sources, each a share of the positions as large as its weight.
///
/// Positions come in cycles as long as the sum of the weights. Within a cycle the place alone says which source is drawn
/// from, and how many were drawn from it before; so a position names its sequence by arithmetic, and each source runs
/// through its own epochs.
#[derive(Clone, Debug)]
pub struct Order {
    sources: Vec<Drawn>,
    /// For each place of a cycle the source, and how many places before it are the source's.
    cycle: Vec<(usize, u64)>,
}

/// A source in an order.
#[derive(Clone, Debug)]
struct Drawn {
    sampler: Sampler,
    /// Places of a cycle.
    weight: u64,
    /// Sequences of the sources before it.
    first: usize,
}

impl Order {
    /// An order over sources with these numbers of sequences and weights; with a single source that of [`Sampler::new`].
    ///
    /// **Errors**: panics where there is no source, or one without sequences or weight.
    pub fn new(sources: &[(usize, u32)], seed: u64) -> Self {
        let mut first = 0;
        let drawn = sources.iter().enumerate().map(|(number, &(num_sequences, weight))| {
            assert!(weight > 0, "a source needs a weight");
            let seed = seed ^ (number as u64).wrapping_mul(SQRT_2);
            let own = Drawn { sampler: Sampler::new(num_sequences, seed), weight: weight.into(), first };
            first += num_sequences;
            own
        });
        let sources: Vec<Drawn> = drawn.collect();
        assert!(!sources.is_empty(), "an order needs at least one source");
        let cycle = cycle(&sources);
        Self { sources, cycle }
    }

    /// The sequence at `position`, counted through all sources.
    pub fn index_at(&self, position: u64) -> usize {
        let length = self.cycle.len() as u64;
        let (source, before) = self.cycle[(position % length) as usize];
        let Drawn { sampler, weight, first } = &self.sources[source];
        first + sampler.index_at(position / length * weight + before)
    }
}

/// Spreads the sources evenly: at each place the one that lags furthest behind its share, the first of equals.
fn cycle(sources: &[Drawn]) -> Vec<(usize, u64)> {
    let total: u64 = sources.iter().map(|source| source.weight).sum();
    let mut taken = vec![0; sources.len()];
    (0..total)
        .map(|place| {
            let lag = |source: usize| {
                i128::from(sources[source].weight * (place + 1)) - i128::from(taken[source] * total)
            };
            let source = (0..sources.len()).rev().max_by_key(|&source| lag(source)).unwrap_or(0);
            taken[source] += 1;
            (source, taken[source] - 1)
        })
        .collect()
}

/// The first 64 bits after the point of the square roots of 2, 3 and 5: odd numbers without hidden choice.
const SQRT_2: u64 = 0x6a09_e667_f3bc_c909;
const SQRT_3: u64 = 0xbb67_ae85_84ca_a73b;
const SQRT_5: u64 = 0x3c6e_f372_fe94_f82b;

/// A bijection of 64 bits in which every input bit reaches every output bit; part of the order's definition,
/// never to change.
fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(SQRT_2);
    bits = (bits ^ (bits >> 31)).wrapping_mul(SQRT_3);
    bits = (bits ^ (bits >> 29)).wrapping_mul(SQRT_5);
    bits ^ (bits >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(sampler: Sampler, n: usize, epoch: u64) -> Vec<usize> {
        sampler.batch(epoch * n as u64, n)
    }

    #[test]
    fn each_index_exactly_once_per_epoch() {
        for n in (1..70).chain([255, 256, 257, 1000, 4096, 4097]) {
            for seed in [0, 1, u64::MAX] {
                let sampler = Sampler::new(n, seed);
                for e in [0, 1, 7] {
                    let mut drawn = epoch(sampler, n, e);
                    drawn.sort_unstable();
                    assert!(drawn.iter().copied().eq(0..n), "n {n}, seed {seed}, epoch {e}");
                }
            }
        }
    }

    #[test]
    fn the_order_does_not_depend_on_how_batches_are_cut() {
        let sampler = Sampler::new(101, 42);
        let whole = sampler.batch(0, 303);
        for global_batch in [1, 7, 64, 101, 150] {
            let mut cursor = 0;
            let mut drawn = Vec::new();
            while cursor < 303 {
                let take = global_batch.min(303 - cursor);
                drawn.extend(sampler.batch(cursor as u64, take));
                cursor += take;
            }
            assert_eq!(drawn, whole, "global batch {global_batch}");
        }
    }

    #[test]
    fn seeds_and_epochs_differ_and_equal_seeds_agree() {
        let (a, b) = (Sampler::new(1000, 1), Sampler::new(1000, 2));
        assert_eq!(epoch(a, 1000, 0), epoch(Sampler::new(1000, 1), 1000, 0));
        // Two independent random orders agree in one place on average; 12 or more has a probability below
        // 1e-9.
        let agree = |x: Vec<usize>, y: Vec<usize>| x.iter().zip(&y).filter(|(i, j)| i == j).count();
        assert!(agree(epoch(a, 1000, 0), epoch(b, 1000, 0)) < 12);
        assert!(agree(epoch(a, 1000, 0), epoch(a, 1000, 1)) < 12);
        assert!(agree(epoch(a, 1000, 0), (0..1000).collect()) < 12);
    }

    #[test]
    fn all_orders_of_a_short_range_are_about_equally_likely() {
        // 120 orders of five, 12,000 seeds: each is expected 100 times, standard deviation 10. Chi-squared
        // with 119 degrees of freedom exceeds 200 with a probability below 1e-5.
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..12_000 {
            *counts.entry(epoch(Sampler::new(5, seed), 5, 0)).or_insert(0.0) += 1.0;
        }
        let chi_squared: f64 = counts.values().map(|count: &f64| (count - 100.0).powi(2) / 100.0).sum();
        assert_eq!(counts.len(), 120);
        assert!(chi_squared < 200.0, "chi-squared {chi_squared}");
    }

    #[test]
    fn the_order_is_the_one_of_every_release() {
        assert_eq!(Sampler::new(10, 0).batch(0, 12), PINNED);
    }

    #[test]
    fn one_source_is_drawn_in_the_order_of_every_release() {
        let order = Order::new(&[(10, 7)], 0);
        assert_eq!((0..12).map(|position| order.index_at(position)).collect::<Vec<_>>(), PINNED);
    }

    proptest::proptest! {
        #[test]
        fn each_source_has_its_share_and_runs_through_its_own_epochs(
            sources in proptest::collection::vec((1usize..40, 1u32..30), 1..5),
            seed: u64,
            cycles in 1u64..8,
        ) {
            let order = Order::new(&sources, seed);
            let total: u64 = sources.iter().map(|source| u64::from(source.1)).sum();
            let drawn: Vec<usize> = (0..cycles * total).map(|position| order.index_at(position)).collect();
            let mut first = 0;
            for &(num, weight) in &sources {
                let own: Vec<usize> =
                    drawn.iter().copied().filter(|index| (first..first + num).contains(index)).collect();
                proptest::prop_assert_eq!(own.len() as u64, cycles * u64::from(weight));
                for epoch in own.chunks(num) {
                    let distinct: std::collections::BTreeSet<&usize> = epoch.iter().collect();
                    proptest::prop_assert_eq!(distinct.len(), epoch.len(), "twice in an epoch");
                }
                // At any time its share is within as many sequences as there are sources.
                for position in 0..drawn.len() {
                    let so_far = drawn[..=position].iter().filter(|index| (first..first + num).contains(*index));
                    let share = (position + 1) as f64 * f64::from(weight) / total as f64;
                    proptest::prop_assert!((so_far.count() as f64 - share).abs() <= sources.len() as f64);
                }
                first += num;
            }
        }
    }

    const PINNED: [usize; 12] = [1, 3, 7, 5, 2, 9, 0, 6, 8, 4, 4, 9];
}
