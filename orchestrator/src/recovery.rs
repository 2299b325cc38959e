//! What the survivors of a broken formation still have in memory, and what of it a job can resume from: a pure function of
//! their inventories. Knows no clock and no messages; the core asks for inventories.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

use contraflow_runtime::topology::{Generation, Rank};
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A rank's part of the state after a step, in the memory of some worker: the rank's own or its buddy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplicaShard {
    /// Of the formation that made the step.
    pub generation: Generation,
    /// The step.
    pub step: u64,
    /// Whose part.
    pub rank: Rank,
}

/// The state after a step, whole in memory, and who brings it to the ranks of the formation that resumes from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InMemory {
    /// Of the formation that made the step.
    pub generation: Generation,
    /// The step.
    pub step: u64,
    /// By rank of the state: the rank of the new formation whose worker has that part. The rank itself wherever it can be.
    pub holders: Vec<Rank>,
}

/// The newest step of which every rank's part survives, for a formation of the same axes at these `places`; the error is a
/// rank whose shard of the newest step is missing, if there is any replica at all.
///
/// `replicas` are the survivors' inventories by worker; `counts` says whether a generation's step is of the job's present
/// history.
pub fn newest_complete(
    replicas: &BTreeMap<u64, Vec<ReplicaShard>>,
    places: &[u64],
    counts: impl Fn(Generation, u64) -> bool,
) -> Result<InMemory, Option<Rank>> {
    // Only workers of the new formation can send it a shard.
    let mut rank_at: BTreeMap<u64, Rank> = BTreeMap::new();
    for (rank, &worker) in places.iter().enumerate() {
        rank_at.entry(worker).or_insert(Rank::at(rank));
    }
    let mut versions: BTreeMap<(u64, Generation), Vec<Option<Rank>>> = BTreeMap::new();
    for (worker, shards) in replicas {
        let Some(&bringer) = rank_at.get(worker) else { continue };
        for shard in shards.iter().filter(|shard| counts(shard.generation, shard.step)) {
            let holders = versions.entry((shard.step, shard.generation));
            let holders = holders.or_insert_with(|| vec![None; places.len()]);
            let is_own = places.get(shard.rank.index()) == Some(worker);
            match holders.get_mut(shard.rank.index()) {
                Some(holder) if is_own => *holder = Some(shard.rank),
                Some(holder) => drop(holder.get_or_insert(bringer)),
                None => {}
            }
        }
    }
    let mut missing = None;
    for ((step, generation), holders) in versions.into_iter().rev() {
        match holders.iter().copied().collect::<Option<Vec<Rank>>>() {
            Some(holders) => return Ok(InMemory { generation, step, holders }),
            None => missing = missing.or(holders.iter().position(Option::is_none).map(Rank::at)),
        }
    }
    Err(missing)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shard(generation: u32, step: u64, rank: usize) -> ReplicaShard {
        ReplicaShard { generation: Generation::new(generation), step, rank: Rank::at(rank) }
    }

    /// Three ranks on workers 1, 2, 3, each kept by the next worker too; step 7 is acknowledged, step 8 only half.
    fn inventories() -> BTreeMap<u64, Vec<ReplicaShard>> {
        BTreeMap::from([
            (1, vec![shard(1, 7, 0), shard(1, 7, 2), shard(1, 8, 0)]),
            (2, vec![shard(1, 7, 1), shard(1, 7, 0), shard(1, 8, 1), shard(1, 8, 0)]),
            (3, vec![shard(1, 7, 2), shard(1, 7, 1), shard(1, 8, 2)]),
        ])
    }

    #[test]
    fn with_all_survivors_every_rank_holds_its_own_newest_step() {
        let whole = newest_complete(&inventories(), &[1, 2, 3], |_, _| true).unwrap();
        assert_eq!(
            whole,
            InMemory { generation: Generation::FIRST, step: 8, holders: [0, 1, 2].map(Rank::new).into() }
        );
    }

    #[test]
    fn a_lost_rank_comes_from_its_buddy_at_the_newest_step_that_is_whole() {
        let mut replicas = inventories();
        replicas.remove(&1);
        // Worker 4 is fresh. Of step 8 rank 0 is with its buddy already.
        let whole = newest_complete(&replicas, &[4, 2, 3], |_, _| true).unwrap();
        assert_eq!(
            whole,
            InMemory { generation: Generation::FIRST, step: 8, holders: [1, 1, 2].map(Rank::new).into() }
        );
        let mut replicas = inventories();
        replicas.remove(&3);
        let whole = newest_complete(&replicas, &[1, 2, 4], |_, _| true).unwrap();
        assert_eq!(
            whole,
            InMemory { generation: Generation::FIRST, step: 7, holders: [0, 1, 0].map(Rank::new).into() }
        );
    }

    #[test]
    fn an_owner_and_its_buddy_are_missed_by_rank() {
        let mut replicas = inventories();
        replicas.remove(&1);
        replicas.remove(&2);
        assert_eq!(newest_complete(&replicas, &[4, 5, 3], |_, _| true), Err(Some(Rank::ZERO)));
        assert_eq!(newest_complete(&BTreeMap::new(), &[4, 5, 3], |_, _| true), Err(None));
    }

    #[test]
    fn what_is_of_another_history_does_not_count() {
        let replicas = inventories();
        let whole = newest_complete(&replicas, &[1, 2, 3], |_, step| step < 8).unwrap();
        assert_eq!(whole.step, 7);
        assert_eq!(
            newest_complete(&replicas, &[1, 2, 3], |generation, _| generation > Generation::FIRST),
            Err(None)
        );
    }

    proptest! {
        /// Against the definition, written down as it is said: there is no newer step whose every part some worker of the new
        /// formation has, and each part is where the answer says.
        #[test]
        fn the_answer_is_whole_and_nothing_newer_is(
            shards in proptest::collection::vec((0_u64..5, 1_u32..3, 1_u64..4, 0_usize..3), 0..40),
            places in proptest::collection::vec(0_u64..5, 3),
        ) {
            let mut replicas: BTreeMap<u64, Vec<ReplicaShard>> = BTreeMap::new();
            for (worker, generation, step, rank) in shards {
                replicas.entry(worker).or_default().push(shard(generation, step, rank));
            }
            let has = |worker: u64, wanted: ReplicaShard| replicas.get(&worker).is_some_and(|all| all.contains(&wanted));
            let is_whole = |generation, step| {
                (0..3).all(|rank| places.iter().any(|&worker| has(worker, shard(generation, step, rank))))
            };
            let versions = (1..4_u64).flat_map(|step| (1..3_u32).map(move |generation| (step, generation)));
            let newest = versions.filter(|&(step, generation)| is_whole(generation, step)).max();
            match newest_complete(&replicas, &places, |_, _| true) {
                Ok(found) => {
                    let generation = found.generation.number();
                    prop_assert_eq!(Some((found.step, generation)), newest);
                    for (rank, holder) in found.holders.iter().map(|holder| holder.index()).enumerate() {
                        let wanted = shard(generation, found.step, rank);
                        prop_assert!(has(places[holder], wanted));
                        prop_assert!(holder == rank || !has(places[rank], wanted));
                    }
                }
                Err(_) => prop_assert_eq!(newest, None),
            }
        }
    }
}
