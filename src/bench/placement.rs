//! `contraflow bench placement`: how long it takes to find places for the ranks of a job, and how good they are.

use std::collections::BTreeSet;
use std::time::Instant;

use contraflow_orchestrator::placement::{Placement, Slots, Supply, buddies, place, refill};
use contraflow_runtime::schedule::ScheduleKind;
use contraflow_runtime::topology::Topology;

use crate::failure::Failure;
use crate::output::print;

/// Runs of each case; the fastest counts, because what else the machine does only adds.
const REPEATS: usize = 5;

/// Nodes of a block.
const NODES: usize = 16;

/// Runs the command; figures go to stdout.
///
/// **Errors**: code 1 if a job is refused.
pub fn run() -> Result<(), Failure> {
    let mut lines = String::new();
    let wide = Topology { pipeline: 16, expert: 8, data: 16 };
    let huge = Topology { pipeline: 16, expert: 64, data: 2 };
    let dense = Topology { pipeline: 16, expert: 1, data: 128 };
    for (what, topology, slots) in [
        ("expert groups of a node's size", wide, 8),
        ("expert groups of 8 nodes", huge, 8),
        ("nodes of uneven size", wide, 0),
        ("no expert groups", dense, 8),
        ("one slot a node, no expert groups", dense, 1),
    ] {
        lines += &case(what, &topology, slots)?;
    }
    print(&lines)
}

fn case(what: &str, topology: &Topology, slots: usize) -> Result<String, Failure> {
    let supply = supply(4096, slots);
    let refused = |refusal: contraflow_orchestrator::placement::Refusal| Failure::run(refusal.to_string());
    let (placed, seconds) = fastest(|| place(&supply, topology, ScheduleKind::Dualpipe));
    let placed = placed.map_err(refused)?;
    let (left, lost) = after_loss(&supply, &placed);
    let (refilled, again) =
        fastest(|| refill(&left, topology, ScheduleKind::Dualpipe, &placed.of_rank, &lost));
    let refilled = refilled.map_err(refused)?;
    let (_, replica_holders) = fastest(|| buddies(&supply, &placed.of_rank));
    let mut lines = format!(
        "{what}: {} ranks ({} x {} x {}) on 4096 slots in {:.1} ms; {} lost in {:.1} ms; buddies in {:.1} ms\n",
        topology.world(),
        topology.pipeline,
        topology.expert,
        topology.data,
        1e3 * seconds,
        lost.len(),
        1e3 * again,
        1e3 * replica_holders
    );
    for (term, after) in placed.score.iter().zip(&refilled.score) {
        lines += &format!("  {} (after the loss: {})\n", term.words, after.words);
    }
    Ok(lines)
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
