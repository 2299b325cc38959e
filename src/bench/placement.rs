//! `contraflow bench placement`: how long it takes to find places for the ranks of a job, and how good they are.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

use contraflow_orchestrator::placement::{Placement, Slots, Supply, buddies, place, refill};
use contraflow_runtime::schedule::ScheduleKind;
use contraflow_runtime::topology::Topology;
use serde::Serialize;

use crate::failure::Failure;

/// Runs of each case; the fastest counts, because what else the machine does only adds.
const REPEATS: usize = 5;

/// Nodes of a block.
const NODES: usize = 16;

/// All cases.
#[derive(Debug, Serialize)]
pub(super) struct PlacementFigures {
    cases: Vec<PlacementCase>,
}

/// One job on twice as many slots as it has ranks: places for all its ranks, then for those of a worker that is lost.
#[derive(Debug, Serialize)]
struct PlacementCase {
    what: &'static str,
    topology: Topology,
    slots: usize,
    place_ms: f64,
    lost_ranks: usize,
    refill_ms: f64,
    buddies_ms: f64,
    /// The terms that placement minimizes, in their order of weight, before and after the loss.
    score: Vec<[String; 2]>,
}

/// Measures all cases.
///
/// **Errors**: code 1 if a job is refused.
pub(super) fn run() -> Result<PlacementFigures, Failure> {
    let wide = Topology { pipeline: 16, expert: 8, data: 16 };
    let huge = Topology { pipeline: 16, expert: 64, data: 2 };
    let dense = Topology { pipeline: 16, expert: 1, data: 128 };
    let cases = [
        ("expert groups of a node's size", wide, 8),
        ("expert groups of 8 nodes", huge, 8),
        ("nodes of uneven size", wide, 0),
        ("no expert groups", dense, 8),
        ("one slot a node, no expert groups", dense, 1),
    ];
    // 2,048 ranks, and 16,384.
    let sizes = [1, 8].into_iter().flat_map(|factor| cases.map(|case| (factor, case)));
    let cases = sizes.map(|(factor, (what, topology, slots))| {
        case(what, Topology { data: factor * topology.data, ..topology }, slots)
    });
    Ok(PlacementFigures { cases: cases.collect::<Result<_, _>>()? })
}

fn case(what: &'static str, topology: Topology, slots: usize) -> Result<PlacementCase, Failure> {
    let supply = supply(2 * topology.world(), slots);
    let refused = |refusal: contraflow_orchestrator::placement::Refusal| Failure::run(refusal.to_string());
    let (placed, seconds) = fastest(|| place(&supply, &topology, ScheduleKind::Dualpipe));
    let placed = placed.map_err(refused)?;
    let (left, lost) = after_loss(&supply, &placed);
    let (refilled, again) =
        fastest(|| refill(&left, &topology, ScheduleKind::Dualpipe, &placed.of_rank, &lost));
    let refilled = refilled.map_err(refused)?;
    let (_, replica_holders) = fastest(|| buddies(&supply, &placed.of_rank));
    let terms = placed.score.into_iter().zip(refilled.score);
    Ok(PlacementCase {
        what,
        topology,
        slots: supply.slots.iter().map(|slots| slots.free).sum(),
        place_ms: 1e3 * seconds,
        lost_ranks: lost.len(),
        refill_ms: 1e3 * again,
        buddies_ms: 1e3 * replica_holders,
        score: terms.map(|(before, after)| [before.words, after.words]).collect(),
    })
}

impl fmt::Display for PlacementFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cases.iter().try_for_each(|case| case.fmt(f))
    }
}

impl fmt::Display for PlacementCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Topology { pipeline, expert, data } = self.topology;
        writeln!(
            f,
            "{}: {} ranks ({pipeline} x {expert} x {data}) on {} slots in {:.1} ms; {} lost in {:.1} ms; buddies in {:.1} ms",
            self.what,
            self.topology.world(),
            self.slots,
            self.place_ms,
            self.lost_ranks,
            self.refill_ms,
            self.buddies_ms
        )?;
        for [before, after] in &self.score {
            writeln!(f, "  {before} (after the loss: {after})")?;
        }
        Ok(())
    }
}

/// The last answer, and the fewest seconds that one took.
fn fastest<T>(ask: impl Fn() -> T) -> (T, f64) {
    let timed = || {
        let began = Instant::now();
        let answer = ask();
        (answer, began.elapsed().as_secs_f64())
    };
    let (mut answer, mut least) = timed();
    for _ in 1..REPEATS {
        let (next, seconds) = timed();
        (answer, least) = (next, least.min(seconds));
    }
    (answer, least)
}

/// One worker a node, blocks of [`NODES`]; `slots` of 0 means nodes of 3 to 13 slots.
fn supply(total: usize, slots: usize) -> Supply {
    let mut left = total;
    let mut workers = Vec::new();
    while left > 0 {
        let worker = workers.len();
        let size = if slots == 0 { 3 + worker * 7 % 11 } else { slots };
        let free = size.min(left);
        left -= free;
        workers.push(Slots {
            worker: worker as u64,
            node: format!("node{worker:04}"),
            block: format!("block{:03}", worker / NODES),
            free,
        });
    }
    Supply { slots: workers, ..Supply::default() }
}

/// The slots that are left once the worker of the middle rank is gone, and its ranks.
fn after_loss(supply: &Supply, placed: &Placement) -> (Supply, BTreeSet<usize>) {
    let gone = placed.of_rank[placed.of_rank.len() / 2];
    let mut left = supply.clone();
    for slots in &mut left.slots {
        let used = placed.of_rank.iter().filter(|worker| **worker == slots.worker).count();
        slots.free = if slots.worker == gone { 0 } else { slots.free - used };
    }
    let ranks = placed.of_rank.iter().enumerate().filter(|(_, worker)| **worker == gone);
    (left, ranks.map(|(rank, _)| rank).collect())
}
