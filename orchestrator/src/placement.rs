//! Which worker hosts which rank: a pure function of the free slots and the job's layout, with readable reasons.
//!
//! Asked by the core before it assigns ranks. Goals, each only as far as the one before allows: every expert group inside
//! one block; on one node; DualPipe's mirrors on different nodes; pipeline neighbours near. The last two pull against each
//! other in one link of each column only, the middle one, so the mirrors go first. Data replicas go anywhere. No goal makes
//! a job unplaceable: only too few slots do. Knows no leases and no clock; the same input gives the same answer.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod layout;
mod reason;
mod score;
mod search;
mod sites;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use contraflow_runtime::schedule::{ScheduleKind, size};
use contraflow_runtime::topology::Topology;
use thiserror::Error;

pub use layout::{fewest, layout, named};
pub use reason::{Limit, Reason};
pub use score::Term;
use score::{Shape, UNPLACED};
use search::{Search, Unit};
use sites::{Site, sites};

/// The slots of one worker that a job may take, and where that worker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// The worker's id.
    pub worker: u64,
    /// The host; several workers may share one.
    pub node: String,
    /// What lies nearest together: a rack, a switch.
    pub block: String,
    /// Ranks it can take; 0 for a worker that is named for its place only.
    pub free: usize,
}

/// What there is to place on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Supply {
    /// Each worker once, in any order.
    pub slots: Vec<Slots>,
    /// Healthy slots that other jobs hold; for the message of a refusal.
    pub taken: usize,
    /// Slots of nodes that are being drained; for the message of a refusal.
    pub draining: usize,
    /// Free slots into which a rank of the job does not fit; for the message of a refusal.
    pub too_small: TooSmall,
}

/// Slots of workers that have too little memory for a rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TooSmall {
    /// How many.
    pub slots: usize,
    /// What a rank needs at least.
    ///
    /// **Units**: bytes.
    pub rank_bytes: u64,
    /// The most that any worker has, and its description. **Units**: bytes.
    most: Option<(u64, String)>,
}

impl TooSmall {
    /// `slots` slots of a worker that has `bytes` are too small for ranks that need `rank_bytes`; `words` describes the worker.
    pub fn note(&mut self, slots: usize, rank_bytes: u64, bytes: u64, words: impl FnOnce() -> String) {
        (self.slots, self.rank_bytes) = (self.slots + slots, rank_bytes);
        if self.most.as_ref().is_none_or(|(most, _)| *most < bytes) {
            self.most = Some((bytes, words()));
        }
    }
}

impl fmt::Display for TooSmall {
    /// A suffix for a sentence; empty if there are none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((_, most)) = &self.most else { return Ok(()) };
        let (slots, bytes) = (self.slots, size(self.rank_bytes));
        write!(f, ", {slots} with too little memory: a rank needs at least {bytes}, {most}")
    }
}

/// A worker for every rank, and how good that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The worker of each rank.
    pub of_rank: Vec<u64>,
    /// One term a goal, the weightiest first; placements compare by the values in this order, less is better.
    pub score: Vec<Term>,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// Places all ranks of a job.
///
/// # Errors
/// There are fewer free slots than ranks.
pub fn place(supply: &Supply, topology: &Topology, schedule: ScheduleKind) -> Result<Placement, Refusal> {
    let ground = Inventory::new(supply);
    ground.refuse_too_few(supply, topology.world())?;
    let shape = Shape::new(topology, schedule, &ground.block_of_node);
    let groups = topology.pipeline * topology.data;
    let sites = sites(&ground.free_of_node, &ground.block_of_node, topology.expert, groups);
    let mut search = Search::new(&shape, vec![UNPLACED; topology.world()], sites);
    search.run(&chains(topology, shape.mirrors));
    let spread: Vec<usize> =
        (0..groups).filter(|&group| shape.group_crosses(&search.node_of_rank, group).1).collect();
    if !spread.is_empty() {
        let mut free = ground.free_of_node.clone();
        search.node_of_rank.iter().for_each(|&node| free[node] -= 1);
        let ranks = spread.iter().flat_map(|group| group * topology.expert..(group + 1) * topology.expert);
        search.polish(ranks, free.into_iter());
    }
    let mut of_rank = vec![0; topology.world()];
    ground.seat(&search.node_of_rank, topology.ranks(), &mut of_rank);
    Ok(Placement { of_rank, score: shape.terms(&search.node_of_rank) })
}

/// Places the `lost` ranks of a job again; all others stay where `before` has them. The slots of lost ranks are free only if
/// `supply` says so; the workers of the others must be named in it, if with no slot.
///
/// # Errors
/// There are fewer free slots than lost ranks; a rank stays on a worker that `supply` does not name.
pub fn refill(
    supply: &Supply,
    topology: &Topology,
    schedule: ScheduleKind,
    before: &[u64],
    lost: &BTreeSet<usize>,
) -> Result<Placement, Refusal> {
    let ground = Inventory::new(supply);
    ground.refuse_too_few(supply, lost.len())?;
    let shape = Shape::new(topology, schedule, &ground.block_of_node);
    let mut node_of_rank = vec![UNPLACED; topology.world()];
    for (rank, worker) in before.iter().enumerate().filter(|(rank, _)| !lost.contains(rank)) {
        let unknown = || Refusal(format!("rank {rank} is on worker {worker}, which is not in the cluster"));
        node_of_rank[rank] = *ground.node_of_worker.get(worker).ok_or_else(unknown)?;
    }
    let single = ground.free_of_node.iter().enumerate().filter(|(_, free)| **free > 0);
    let sites = single.map(|(node, &free)| Site { nodes: vec![node], free }).collect();
    let mut search = Search::new(&shape, node_of_rank, sites);
    search.run(&lost_units(topology, lost));
    let mut of_rank = before.to_vec();
    ground.seat(&search.node_of_rank, lost.iter().copied(), &mut of_rank);
    Ok(Placement { of_rank, score: shape.terms(&search.node_of_rank) })
}

/// Which rank holds the replica of each rank's state: `buddies[rank]`; every rank holds one. On another block,
/// node, worker than the rank itself for as many ranks as can be; `None` where all are on one worker.
///
/// Half a turn around the ranks in order of place does it: a run of equals (a node's ranks) of length `k` among `n` is left
/// by every step of at least `k` and at most `n - k`; and where `k` is more than half, a step from `n - k` to `k` takes all
/// the `n - k` others into the run and as many out of it, and more there are not. Half of `n` lies in either range, whatever
/// `k` is, so it is best for blocks, nodes and workers at once.
pub fn buddies(supply: &Supply, of_rank: &[u64]) -> Option<Vec<usize>> {
    let first = of_rank.first()?;
    if of_rank.iter().all(|worker| worker == first) {
        return None;
    }
    let ground = Inventory::new(supply);
    let place = |rank: &usize| {
        let node = ground.node_of_worker.get(&of_rank[*rank]).copied().unwrap_or(UNPLACED);
        (ground.block_of_node.get(node).copied(), node, of_rank[*rank], *rank)
    };
    let mut ranks: Vec<usize> = (0..of_rank.len()).collect();
    ranks.sort_by_key(place);
    let mut replica_holders = vec![0; ranks.len()];
    for (index, &rank) in ranks.iter().enumerate() {
        replica_holders[rank] = ranks[(index + ranks.len() / 2) % ranks.len()];
    }
    Some(replica_holders)
}

/// Nodes and blocks by number, in the order of their names.
struct Inventory {
    block_of_node: Vec<usize>,
    free_of_node: Vec<usize>,
    node_of_worker: BTreeMap<u64, usize>,
    /// Free slots of each worker of a node, in order of the workers' ids.
    workers_of_node: Vec<Vec<(u64, usize)>>,
}

impl Inventory {
    fn new(supply: &Supply) -> Inventory {
        let mut slots: Vec<&Slots> = supply.slots.iter().collect();
        slots.sort_by_key(|slots| slots.worker);
        // A node is where its first worker says.
        let mut block_of_name = BTreeMap::new();
        for slots in &slots {
            block_of_name.entry(slots.node.as_str()).or_insert(slots.block.as_str());
        }
        let blocks: BTreeSet<&str> = block_of_name.values().copied().collect();
        let blocks: BTreeMap<&str, usize> = blocks.into_iter().zip(0..).collect();
        let nodes: BTreeMap<&str, usize> = block_of_name.keys().copied().zip(0..).collect();
        let mut workers_of_node = vec![Vec::new(); nodes.len()];
        let mut node_of_worker = BTreeMap::new();
        for slots in slots {
            let node = nodes[slots.node.as_str()];
            workers_of_node[node].push((slots.worker, slots.free));
            node_of_worker.insert(slots.worker, node);
        }
        let free = |workers: &Vec<(u64, usize)>| workers.iter().map(|(_, free)| free).sum();
        Inventory {
            block_of_node: block_of_name.values().map(|block| blocks[block]).collect(),
            free_of_node: workers_of_node.iter().map(free).collect(),
            node_of_worker,
            workers_of_node,
        }
    }

    fn refuse_too_few(&self, supply: &Supply, needed: usize) -> Result<(), Refusal> {
        let free: usize = self.free_of_node.iter().sum();
        if needed <= free {
            return Ok(());
        }
        let taken =
            if supply.taken > 0 { format!(" ({} of them taken)", supply.taken) } else { String::new() };
        let draining =
            if supply.draining > 0 { format!(", {} draining", supply.draining) } else { String::new() };
        let small = &supply.too_small;
        let healthy = free + supply.taken + small.slots;
        let ranks = if needed == 1 { "rank" } else { "ranks" };
        Err(Refusal(format!("needs {needed} {ranks}, {healthy} healthy{taken}{draining}{small}")))
    }

    /// Gives `ranks` the workers of their nodes, in the order of ranks and of workers.
    fn seat(&self, node_of_rank: &[usize], ranks: impl Iterator<Item = usize>, of_rank: &mut [u64]) {
        let free = |workers: &Vec<(u64, usize)>| {
            let slots = workers.clone().into_iter();
            slots.flat_map(|(worker, free)| std::iter::repeat_n(worker, free))
        };
        let mut seats: Vec<_> = self.workers_of_node.iter().map(free).collect();
        for rank in ranks {
            if let Some(worker) = seats[node_of_rank[rank]].next() {
                of_rank[rank] = worker;
            }
        }
    }
}

/// The expert groups in the order in which they are placed: replica by replica along the pipeline, which with mirrors is
/// two chains.
fn chains(topology: &Topology, mirrors: bool) -> Vec<Unit> {
    let half = if mirrors { topology.pipeline / 2 } else { topology.pipeline };
    let mut units = Vec::new();
    for data in 0..topology.data {
        for pipeline in 0..topology.pipeline {
            let start = (pipeline * topology.data + data) * topology.expert;
            let end = if pipeline < half { half } else { topology.pipeline };
            units.push(Unit {
                ranks: start..start + topology.expert,
                left_for_node: end - pipeline,
                left_for_block: topology.pipeline - pipeline,
            });
        }
    }
    units
}

/// The lost ranks one by one; those of one expert group make a chain.
fn lost_units(topology: &Topology, lost: &BTreeSet<usize>) -> Vec<Unit> {
    let unit = |&rank: &usize| {
        let end = (rank / topology.expert + 1) * topology.expert;
        let left = lost.range(rank..end).count();
        Unit { ranks: rank..rank + 1, left_for_node: left, left_for_block: left }
    };
    lost.iter().map(unit).collect()
}
