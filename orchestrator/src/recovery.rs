//! What the workers of a formation that has ended still have in memory, and what of it a job can resume from, in the same layout or in
//! another one: a pure function of their inventories. Knows no clock and no messages; the core asks for inventories.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

use contraflow_runtime::topology::{Generation, Rank, Topology};
use std::collections::{BTreeMap, BTreeSet};

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
    /// By rank of the state: the rank of the new formation whose worker has that part, in the same layout the rank itself wherever it can
    /// be; numbers after those of the ranks are of [`InMemory::bringers`].
    pub holders: Vec<Rank>,
    /// The axes of the state, if they are not those of the new formation.
    #[serde(default)]
    pub axes: Option<Topology>,
    /// Workers that host no rank of the new formation, and bring parts to it.
    #[serde(default)]
    pub bringers: Vec<u64>,
}

/// The newest step of which every rank's part survives, for a formation of these `axes` at these `places`; the error is a
/// rank whose shard of the newest step is missing, if there is any replica at all.
///
/// `replicas` are the inventories by worker; `layout_of` says in which layout a generation's step is, if it is of the job's present
/// history. Who has ranks of the new formation brings a part before anybody else does, and of several the one that brings least.
pub fn newest_complete(
    replicas: &BTreeMap<u64, Vec<ReplicaShard>>,
    (axes, places): (&Topology, &[u64]),
    layout_of: impl Fn(Generation, u64) -> Option<Topology>,
) -> Result<InMemory, Option<Rank>> {
    let mut versions: BTreeMap<(u64, Generation), Version> = BTreeMap::new();
    for (&worker, shards) in replicas {
        for shard in shards {
            let Some(layout) = layout_of(shard.generation, shard.step) else { continue };
            let version = versions.entry((shard.step, shard.generation));
            let version = version.or_insert_with(|| (layout, vec![BTreeSet::new(); layout.world()]));
            if let Some(keepers) = version.1.get_mut(shard.rank.index()) {
                keepers.insert(worker);
            }
        }
    }
    let mut missing = None;
    for ((step, generation), (layout, keepers)) in versions.into_iter().rev() {
        match keepers.iter().position(BTreeSet::is_empty) {
            Some(lost) => missing = missing.or(Some(Rank::at(lost))),
            None => {
                let is_same = layout == *axes;
                let (holders, bringers) = bringers(&keepers, places, is_same);
                return Ok(InMemory {
                    generation,
                    step,
                    holders,
                    axes: (!is_same).then_some(layout),
                    bringers,
                });
            }
        }
    }
    Err(missing)
}

/// A state: its layout, and by rank the workers that have its part.
type Version = (Topology, Vec<BTreeSet<u64>>);

/// By rank of a state, who brings its part, and those among them that host no rank.
fn bringers(keepers: &[BTreeSet<u64>], places: &[u64], is_same: bool) -> (Vec<Rank>, Vec<u64>) {
    let mut rank_at: BTreeMap<u64, Rank> = BTreeMap::new();
    for (rank, &worker) in places.iter().enumerate() {
        rank_at.entry(worker).or_insert(Rank::at(rank));
    }
    let mut brings: BTreeMap<u64, usize> = BTreeMap::new();
    let chosen = keepers.iter().enumerate().filter_map(|(rank, keepers)| {
        let own = places.get(rank).filter(|own| is_same && keepers.contains(own));
        if let Some(&own) = own {
            return Some((own, Some(Rank::at(rank))));
        }
        let load = |worker: &&u64| {
            (!rank_at.contains_key(*worker), brings.get(*worker).copied().unwrap_or_default(), **worker)
        };
        let worker = keepers.iter().min_by_key(load).copied()?;
        *brings.entry(worker).or_default() += 1;
        Some((worker, None))
    });
    let chosen: Vec<(u64, Option<Rank>)> = chosen.collect();
    let others: BTreeSet<u64> =
        chosen.iter().map(|(worker, _)| *worker).filter(|worker| !rank_at.contains_key(worker)).collect();
    let others: Vec<u64> = others.into_iter().collect();
    let number = |worker: u64| match rank_at.get(&worker) {
        Some(&rank) => rank,
        None => Rank::at(places.len() + others.partition_point(|other| *other < worker)),
    };
    let holders = chosen.into_iter().map(|(worker, own)| own.unwrap_or_else(|| number(worker))).collect();
    (holders, others)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shard(generation: u32, step: u64, rank: usize) -> ReplicaShard {
        ReplicaShard { generation: Generation::new(generation), step, rank: Rank::at(rank) }
    }

    const THREE: Topology = Topology { pipeline: 1, expert: 1, data: 3 };
    const TWO: Topology = Topology { pipeline: 1, expert: 1, data: 2 };

    fn newest(replicas: &BTreeMap<u64, Vec<ReplicaShard>>, places: &[u64]) -> Result<InMemory, Option<Rank>> {
        newest_complete(replicas, (&THREE, places), |_, _| Some(THREE))
    }

    fn same(step: u64, holders: [u32; 3], bringers: &[u64]) -> InMemory {
        let holders = holders.map(Rank::new).into();
        InMemory { generation: Generation::FIRST, step, holders, axes: None, bringers: bringers.into() }
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
        assert_eq!(newest(&inventories(), &[1, 2, 3]), Ok(same(8, [0, 1, 2], &[])));
    }

    #[test]
    fn a_lost_rank_comes_from_its_buddy_at_the_newest_step_that_is_whole() {
        let mut replicas = inventories();
        replicas.remove(&1);
        // Worker 4 is fresh. Of step 8 rank 0 is with its buddy already.
        assert_eq!(newest(&replicas, &[4, 2, 3]), Ok(same(8, [1, 1, 2], &[])));
        let mut replicas = inventories();
        replicas.remove(&3);
        assert_eq!(newest(&replicas, &[1, 2, 4]), Ok(same(7, [0, 1, 0], &[])));
    }

    #[test]
    fn a_worker_without_a_rank_brings_what_only_it_has() {
        // Worker 1 is drained.
        assert_eq!(newest(&inventories(), &[4, 2, 3]), Ok(same(8, [1, 1, 2], &[])));
        let mut replicas = inventories();
        replicas.get_mut(&2).unwrap().retain(|kept| kept.rank != Rank::ZERO);
        assert_eq!(newest(&replicas, &[4, 2, 3]), Ok(same(8, [3, 1, 2], &[1])));
    }

    #[test]
    fn for_another_layout_the_parts_are_spread_over_those_that_have_them() {
        let of = |axes: Topology, places: &[u64]| {
            newest_complete(&inventories(), (&axes, places), |_, step| (step < 8).then_some(THREE))
        };
        let moved = |holders: [u32; 3], bringers: &[u64]| InMemory {
            axes: Some(THREE),
            ..same(7, holders, bringers)
        };
        // 0 is with 1 and 2, 1 with 2 and 3, 2 with 3 and 1.
        assert_eq!(of(TWO, &[1, 2]), Ok(moved([0, 1, 0], &[])));
        assert_eq!(of(TWO, &[3, 4]), Ok(moved([2, 0, 0], &[1])));
        assert_eq!(of(TWO, &[4, 5]), Ok(moved([2, 3, 4], &[1, 2, 3])));
    }

    #[test]
    fn an_owner_and_its_buddy_are_missed_by_rank() {
        let mut replicas = inventories();
        replicas.remove(&1);
        replicas.remove(&2);
        assert_eq!(newest(&replicas, &[4, 5, 3]), Err(Some(Rank::ZERO)));
        assert_eq!(newest(&BTreeMap::new(), &[4, 5, 3]), Err(None));
    }

    #[test]
    fn what_is_of_another_history_does_not_count() {
        let replicas = inventories();
        let of = |counts: fn(Generation, u64) -> bool| {
            newest_complete(&replicas, (&THREE, &[1, 2, 3]), |generation, step| {
                counts(generation, step).then_some(THREE)
            })
        };
        assert_eq!(of(|_, step| step < 8).unwrap().step, 7);
        assert_eq!(of(|generation, _| generation > Generation::FIRST), Err(None));
    }

    proptest! {
        /// Against the definition, written down as it is said: there is no newer step whose every part some worker has, and each part is
        /// where the answer says.
        #[test]
        fn the_answer_is_whole_and_nothing_newer_is(
            shards in proptest::collection::vec((0_u64..5, 1_u32..3, 1_u64..4, 0_usize..3), 0..40),
            places in proptest::collection::vec(0_u64..5, 2..4),
        ) {
            let mut replicas: BTreeMap<u64, Vec<ReplicaShard>> = BTreeMap::new();
            for (worker, generation, step, rank) in shards {
                replicas.entry(worker).or_default().push(shard(generation, step, rank));
            }
            let has = |worker: u64, wanted: ReplicaShard| replicas.get(&worker).is_some_and(|all| all.contains(&wanted));
            let is_whole = |generation, step| {
                (0..3).all(|rank| (0..5).any(|worker| has(worker, shard(generation, step, rank))))
            };
            let versions = (1..4_u64).flat_map(|step| (1..3_u32).map(move |generation| (step, generation)));
            let newest = versions.filter(|&(step, generation)| is_whole(generation, step)).max();
            let axes = if places.len() == 3 { THREE } else { TWO };
            match newest_complete(&replicas, (&axes, &places), |_, _| Some(THREE)) {
                Ok(found) => {
                    let generation = found.generation.number();
                    prop_assert_eq!(Some((found.step, generation)), newest);
                    prop_assert_eq!(found.axes, (axes != THREE).then_some(THREE));
                    prop_assert!(found.bringers.iter().all(|worker| !places.contains(worker)));
                    let all: Vec<u64> = places.iter().chain(&found.bringers).copied().collect();
                    for (rank, holder) in found.holders.iter().map(|holder| holder.index()).enumerate() {
                        let wanted = shard(generation, found.step, rank);
                        prop_assert!(has(all[holder], wanted));
                        let has_own = places.get(rank).is_some_and(|own| has(*own, wanted));
                        prop_assert!(found.axes.is_some() || holder == rank || !has_own);
                        // Whoever has no rank is asked last.
                        let is_near = places.iter().any(|worker| has(*worker, wanted));
                        prop_assert_eq!(holder < places.len(), is_near);
                    }
                    prop_assert_eq!(found.holders.len(), 3);
                }
                Err(_) => prop_assert_eq!(newest, None),
            }
        }
    }
}
