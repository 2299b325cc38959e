//! Walks a set of programs on a virtual clock: the one engine behind `check`, the bubble figures and the simulator.
//!
//! The model is the strictest transport we run on. A lane starts its operations in order, one at a time. A send and
//! its receive start together, when both are at the head of their lanes with all they wait for done, and end together;
//! nothing is buffered. All members of an expert group run the same program, so an all-to-all is ready when one of
//! them is. What passes here cannot deadlock on a transport that buffers.

use std::collections::HashMap;
use std::fmt;

use serde::Serialize;

use super::program::{Lane, Op, OpId, Program, Work};

/// When an operation ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Span {
    /// Start, in the unit of the costs.
    pub start: f64,
    /// End.
    pub end: f64,
}

/// When everything ran.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timeline {
    /// `spans[rank][op]`.
    pub spans: Vec<Vec<Span>>,
    /// The end of the last operation.
    pub makespan: f64,
    /// Per rank, how long its compute lane was busy.
    pub compute_busy: Vec<f64>,
}

/// What the head of a lane waits for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum WaitsFor {
    /// An operation of the same rank.
    Own(OpId),
    /// An operation of another rank: the other end of a transfer.
    Peer {
        /// The other rank.
        rank: usize,
        /// Its operation.
        op: OpId,
    },
    /// The other end of a transfer that no program contains.
    Nobody,
}

/// The head of a lane that never moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stuck {
    /// Pipeline rank.
    pub rank: usize,
    /// Which lane.
    pub lane: Lane,
    /// The operation at its head.
    pub op: OpId,
    /// What that operation does.
    pub work: Work,
    /// Index of the action it belongs to.
    pub action: usize,
    /// What it waits for.
    pub waits_for: WaitsFor,
}

/// The programs come to a halt: every lane that has not reached its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Deadlock {
    /// By rank and lane.
    pub stuck: Vec<Stuck>,
}

/// Runs the programs; `cost` is the duration of an operation of a rank. A transfer costs what its send costs.
///
/// # Errors
/// A [`Deadlock`] if some operations can never start.
pub fn walk(programs: &[Program], cost: impl Fn(usize, &Op) -> f64) -> Result<Timeline, Deadlock> {
    let mut walker = Walker::new(programs);
    let mut spans: Vec<Vec<Span>> = programs.iter().map(|p| vec![Span::default(); p.ops.len()]).collect();
    let mut makespan = 0.0_f64;
    let mut compute_busy = vec![0.0; programs.len()];
    while let Some(node) = walker.ready.pop() {
        let (rank, id) = walker.place(node);
        let op = &programs[rank].ops[id];
        let partner = walker.partners[node];
        let (sender, sender_op) = match (op.lane, partner) {
            (Lane::Receive(_), Some(other)) => {
                let (rank, id) = walker.place(other);
                (rank, &programs[rank].ops[id])
            }
            _ => (rank, op),
        };
        let start =
            partner.map_or(walker.earliest[node], |other| walker.earliest[node].max(walker.earliest[other]));
        let span = Span { start, end: start + cost(sender, sender_op) };
        makespan = makespan.max(span.end);
        for node in [Some(node), partner].into_iter().flatten() {
            let (rank, id) = walker.place(node);
            spans[rank][id] = span;
            if programs[rank].ops[id].lane == Lane::Compute {
                compute_busy[rank] += span.end - span.start;
            }
            walker.finish(node, span.end);
        }
    }
    let stuck = walker.stuck(programs);
    if stuck.is_empty() { Ok(Timeline { spans, makespan, compute_busy }) } else { Err(Deadlock { stuck }) }
}

/// Where the two ends of each transfer stand: `result[rank][op]` is the rank and operation at the other end of a send or
/// receive, the k-th send of a lane belonging to the k-th receive; `None` for everything else and where there is none.
pub fn partners(programs: &[Program]) -> Vec<Vec<Option<(usize, OpId)>>> {
    let lanes: Vec<HashMap<Lane, Vec<OpId>>> = programs.iter().map(by_lane).collect();
    let mut partners: Vec<Vec<Option<(usize, OpId)>>> =
        programs.iter().map(|program| vec![None; program.ops.len()]).collect();
    for (rank, own) in lanes.iter().enumerate() {
        for (lane, sends) in own {
            let &Lane::Send(peer) = lane else { continue };
            let receives = lanes.get(peer).and_then(|lanes| lanes.get(&Lane::Receive(rank)));
            for (&send, &receive) in sends.iter().zip(receives.into_iter().flatten()) {
                partners[rank][send] = Some((peer, receive));
                partners[peer][receive] = Some((rank, send));
            }
        }
    }
    partners
}

fn by_lane(program: &Program) -> HashMap<Lane, Vec<OpId>> {
    let mut lanes: HashMap<Lane, Vec<OpId>> = HashMap::new();
    for (id, op) in program.ops.iter().enumerate() {
        lanes.entry(op.lane).or_default().push(id);
    }
    lanes
}

/// All operations of all ranks as the nodes of one graph. An operation is ready when nothing it waits for is left;
/// two ends of a transfer become ready as one.
struct Walker {
    /// First node of each rank.
    offsets: Vec<usize>,
    /// Nodes that wait for this one.
    followers: Vec<Vec<usize>>,
    /// How many things this node still waits for. The other end of a transfer is not among them.
    waiting: Vec<usize>,
    /// The latest end of what it waited for.
    earliest: Vec<f64>,
    partners: Vec<Option<usize>>,
    done: Vec<bool>,
    ready: Vec<usize>,
}

impl Walker {
    fn new(programs: &[Program]) -> Walker {
        let mut offsets = Vec::with_capacity(programs.len());
        let mut nodes = 0;
        for program in programs {
            offsets.push(nodes);
            nodes += program.ops.len();
        }
        let mut walker = Walker {
            followers: vec![Vec::new(); nodes],
            waiting: vec![0; nodes],
            earliest: vec![0.0; nodes],
            partners: partners(programs)
                .into_iter()
                .flatten()
                .map(|partner| partner.map(|(rank, op)| offsets[rank] + op))
                .collect(),
            done: vec![false; nodes],
            ready: Vec::new(),
            offsets,
        };
        for (rank, program) in programs.iter().enumerate() {
            walker.link(rank, program);
        }
        walker.ready =
            (0..nodes).filter(|&node| walker.is_ready(node) && walker.speaks_for_pair(node)).collect();
        walker
    }

    fn link(&mut self, rank: usize, program: &Program) {
        let offset = self.offsets[rank];
        let mut tails: HashMap<Lane, usize> = HashMap::new();
        for (id, op) in program.ops.iter().enumerate() {
            let node = offset + id;
            if let Some(before) = tails.insert(op.lane, node) {
                self.followers[before].push(node);
                self.waiting[node] += 1;
            }
            for &earlier in &op.after {
                // An operation that does not exist never ends.
                if earlier < program.ops.len() {
                    self.followers[offset + earlier].push(node);
                }
                self.waiting[node] += 1;
            }
            if matches!(op.lane, Lane::Send(_) | Lane::Receive(_)) && self.partners[node].is_none() {
                self.waiting[node] += 1;
            }
        }
    }

    fn place(&self, node: usize) -> (usize, OpId) {
        let rank = self.offsets.partition_point(|&offset| offset <= node) - 1;
        (rank, node - self.offsets[rank])
    }

    fn is_ready(&self, node: usize) -> bool {
        self.waiting[node] == 0 && self.partners[node].is_none_or(|other| self.waiting[other] == 0)
    }

    /// One of the two ends of a transfer, so that it is started once.
    fn speaks_for_pair(&self, node: usize) -> bool {
        self.partners[node].is_none_or(|other| node < other)
    }

    fn finish(&mut self, node: usize, end: f64) {
        self.done[node] = true;
        for follower in std::mem::take(&mut self.followers[node]) {
            self.waiting[follower] -= 1;
            self.earliest[follower] = self.earliest[follower].max(end);
            if self.is_ready(follower) {
                self.ready.push(follower);
            }
        }
    }

    /// The first unfinished operation of every lane, with the first thing it waits for.
    fn stuck(&self, programs: &[Program]) -> Vec<Stuck> {
        let mut stuck = Vec::new();
        for (rank, program) in programs.iter().enumerate() {
            let offset = self.offsets[rank];
            let mut heads: Vec<(Lane, OpId)> = Vec::new();
            for (id, op) in program.ops.iter().enumerate() {
                if !self.done[offset + id] && heads.iter().all(|&(lane, _)| lane != op.lane) {
                    heads.push((op.lane, id));
                }
            }
            heads.sort_unstable();
            stuck.extend(heads.into_iter().map(|(lane, id)| {
                let op = &program.ops[id];
                let waits_for = self.waits_for(rank, id, op);
                Stuck { rank, lane, op: id, work: op.work, action: op.action, waits_for }
            }));
        }
        stuck
    }

    fn waits_for(&self, rank: usize, id: OpId, op: &Op) -> WaitsFor {
        let offset = self.offsets[rank];
        let num_ops = self.offsets.get(rank + 1).copied().unwrap_or(self.done.len()) - offset;
        let is_done = |earlier: OpId| earlier < num_ops && self.done[offset + earlier];
        if let Some(&own) = op.after.iter().find(|&&earlier| !is_done(earlier)) {
            return WaitsFor::Own(own);
        }
        match self.partners[offset + id] {
            Some(other) => {
                let (rank, op) = self.place(other);
                WaitsFor::Peer { rank, op }
            }
            None => WaitsFor::Nobody,
        }
    }
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waits for ", self.work)?;
        match self.waits_for {
            WaitsFor::Own(op) => write!(f, "its own operation {op}"),
            WaitsFor::Peer { rank, op } => write!(f, "operation {op} of rank {rank}"),
            WaitsFor::Nobody => f.write_str("a peer that never comes"),
        }
    }
}

impl fmt::Display for Deadlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("deadlock")?;
        for stuck in &self.stuck {
            write!(f, "\n  rank {}, {:?} lane, action {}: {stuck}", stuck.rank, stuck.lane, stuck.action)?;
        }
        Ok(())
    }
}

impl std::error::Error for Deadlock {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Chunk, Component, Pass, TransferKind};

    const CHUNK: Chunk = Chunk { stage: 0, micro_batch: 0 };

    fn compute(after: &[OpId]) -> Op {
        let work =
            Work::Component { pass: Pass::Forward, chunk: CHUNK, layer: 0, component: Component::Chunk };
        Op { lane: Lane::Compute, work, after: after.to_vec(), action: 0 }
    }

    fn send(to: usize, after: &[OpId]) -> Op {
        let work = Work::Send { kind: TransferKind::Activation, chunk: CHUNK };
        Op { lane: Lane::Send(to), work, after: after.to_vec(), action: 0 }
    }

    fn receive(from: usize, after: &[OpId]) -> Op {
        let work = Work::Receive { kind: TransferKind::Activation, chunk: CHUNK };
        Op { lane: Lane::Receive(from), work, after: after.to_vec(), action: 0 }
    }

    fn walk_ops(ops: [Vec<Op>; 2]) -> Result<Timeline, Deadlock> {
        let cost =
            |rank: usize, op: &Op| if op.lane == Lane::Compute { 10.0 * (rank as f64 + 1.0) } else { 3.0 };
        walk(&ops.map(|ops| Program { ops }), cost)
    }

    #[test]
    fn both_ends_of_a_transfer_run_together_when_both_are_ready() {
        // Rank 1 is ready to receive only at 20, rank 0 to send at 10; rank 0's second send waits for the first.
        let rank_0 = vec![compute(&[]), send(1, &[0]), send(1, &[])];
        let rank_1 = vec![compute(&[]), receive(0, &[0]), compute(&[1]), receive(0, &[])];
        let timeline = walk_ops([rank_0, rank_1]).unwrap();
        let span = |start, end| Span { start, end };
        assert_eq!(timeline.spans[0], [span(0.0, 10.0), span(20.0, 23.0), span(23.0, 26.0)]);
        assert_eq!(
            timeline.spans[1],
            [span(0.0, 20.0), span(20.0, 23.0), span(23.0, 43.0), span(23.0, 26.0)]
        );
        assert_eq!((timeline.makespan, timeline.compute_busy), (43.0, vec![10.0, 40.0]));
    }

    #[test]
    fn a_circle_through_two_ranks_is_a_deadlock_on_all_its_lanes() {
        // Each rank receives before it computes what the other one waits for.
        let rank = |peer| vec![receive(peer, &[]), compute(&[0]), send(peer, &[1])];
        let Deadlock { stuck } = walk_ops([rank(1), rank(0)]).unwrap_err();
        let waits: Vec<_> = stuck.iter().map(|stuck| (stuck.rank, stuck.lane, stuck.waits_for)).collect();
        let expected = [
            (0, Lane::Compute, WaitsFor::Own(0)),
            (0, Lane::Send(1), WaitsFor::Own(1)),
            (0, Lane::Receive(1), WaitsFor::Peer { rank: 1, op: 2 }),
            (1, Lane::Compute, WaitsFor::Own(0)),
            (1, Lane::Send(0), WaitsFor::Own(1)),
            (1, Lane::Receive(0), WaitsFor::Peer { rank: 0, op: 2 }),
        ];
        assert_eq!(waits, expected);
    }

    #[test]
    fn a_missing_peer_is_a_deadlock_and_buffers_do_not_help() {
        let Deadlock { stuck } = walk_ops([vec![send(1, &[])], vec![]]).unwrap_err();
        assert_eq!((stuck.len(), stuck[0].waits_for), (1, WaitsFor::Nobody));
        // With a buffer rank 0's send would pass and let its compute go on.
        let rank_0 = vec![send(1, &[]), compute(&[0]), send(1, &[1])];
        let rank_1 = vec![compute(&[2]), receive(0, &[0]), receive(0, &[])];
        assert!(walk_ops([rank_0, rank_1]).is_err());
    }
}
