//! Walks a set of programs on a virtual clock: the one engine behind `check`, the bubble figures and the simulator.
//!
//! The model is the strictest transport we run on. A lane starts its operations in order, one at a time. A send and
//! its receive start together, when both are at the head of their lanes with all they wait for done, and end together;
//! nothing is buffered. So do the members of a collective. Members that share a pipeline coordinate run the same program,
//! so one of them represents all: an all-to-all of the expert group is ready when one of them is, a collective of a replica
//! group when each pipeline rank that takes part has come to it. What passes here cannot deadlock on a transport that
//! buffers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::deadlock::{Deadlock, Stuck, WaitsFor};
use super::program::{Lane, Op, OpId, Program, Work};
use super::timeline::{Span, Timeline};

/// Runs the programs; `cost` is the duration of an operation of a rank. A transfer costs what its send costs, a collective
/// what it costs the member that it costs most.
///
/// # Errors
/// A [`Deadlock`] if some operations can never start.
pub fn walk(programs: &[Program], cost: impl Fn(usize, &Op) -> f64) -> Result<Timeline, Deadlock> {
    let mut walker = Walker::new(programs);
    let mut spans: Vec<Vec<Span>> = programs.iter().map(|p| vec![Span::default(); p.ops.len()]).collect();
    while let Some(node) = walker.ready.pop() {
        let together = walker.together(node);
        let start = together.iter().map(|&node| walker.earliest[node]).fold(0.0, f64::max);
        let cost_of = |&node: &usize| {
            let (rank, id) = walker.place(node);
            let op = &programs[rank].ops[id];
            if matches!(op.lane, Lane::Receive(_)) { 0.0 } else { cost(rank, op) }
        };
        let end = start + together.iter().map(cost_of).fold(0.0, f64::max);
        for node in together {
            let (rank, id) = walker.place(node);
            spans[rank][id] = Span { start, end };
            walker.finish(node, end);
        }
    }
    let stuck = walker.stuck(programs);
    if stuck.is_empty() { Ok(Timeline::new(programs, spans)) } else { Err(Deadlock { stuck }) }
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

/// The pipeline ranks that take part in a collective, as one of their programs says.
fn members(work: Work, program: &Program, ranks: usize) -> Vec<usize> {
    match work.bucket() {
        Some(number) => {
            let bucket = program.buckets.iter().find(|bucket| bucket.number == number);
            bucket.map(|bucket| bucket.positions.clone()).unwrap_or_default()
        }
        None => (0..ranks).collect(),
    }
}

/// One collective.
#[derive(Default)]
struct Collective {
    /// Who takes part, by any of the programs.
    members: BTreeSet<usize>,
    /// By pipeline rank, its operation.
    ops: BTreeMap<usize, OpId>,
}

/// Every collective of the programs; the k-th one of a kind in one program belongs to the k-th one in another.
fn collectives(programs: &[Program]) -> Vec<Collective> {
    let mut found: HashMap<(Work, usize), Collective> = HashMap::new();
    for (rank, program) in programs.iter().enumerate() {
        let mut seen: HashMap<Work, usize> = HashMap::new();
        for (id, op) in program.ops.iter().enumerate().filter(|(_, op)| op.work.is_collective()) {
            let times = seen.entry(op.work).or_default();
            let collective = found.entry((op.work, *times)).or_default();
            collective.members.extend(members(op.work, program, programs.len()));
            collective.members.insert(rank);
            collective.ops.insert(rank, id);
            *times += 1;
        }
    }
    found.into_values().collect()
}

/// Operations of several ranks that run as one: the ends of a transfer, the members of a collective.
struct Group {
    nodes: Vec<usize>,
    /// Ranks that take part but have no such operation.
    missing: Vec<usize>,
}

/// All operations of all ranks as the nodes of one graph. An operation is ready when nothing it waits for is left; those of
/// a group become ready as one.
struct Walker {
    /// First node of each rank.
    offsets: Vec<usize>,
    /// Nodes that wait for this one.
    followers: Vec<Vec<usize>>,
    /// How many things this node still waits for. The others of its group are not among them.
    waiting: Vec<usize>,
    /// The latest end of what it waited for.
    earliest: Vec<f64>,
    groups: Vec<Group>,
    /// The group of each node, if it has one.
    group_of: Vec<Option<usize>>,
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
            groups: Vec::new(),
            group_of: vec![None; nodes],
            done: vec![false; nodes],
            ready: Vec::new(),
            offsets,
        };
        walker.group(programs);
        for (rank, program) in programs.iter().enumerate() {
            walker.link(rank, program);
        }
        let starts = |&node: &usize| walker.is_ready(node) && walker.leader(node) == node;
        walker.ready = (0..nodes).filter(starts).collect();
        walker
    }

    fn group(&mut self, programs: &[Program]) {
        let mut add = |nodes: Vec<usize>, missing: Vec<usize>| {
            nodes.iter().for_each(|&node| self.group_of[node] = Some(self.groups.len()));
            self.groups.push(Group { nodes, missing });
        };
        for (rank, row) in partners(programs).into_iter().enumerate() {
            for (id, partner) in row.into_iter().enumerate() {
                let (own, other) =
                    (self.offsets[rank] + id, partner.map(|(rank, id)| self.offsets[rank] + id));
                if let Some(other) = other.filter(|&other| own < other) {
                    add(vec![own, other], Vec::new());
                }
            }
        }
        for Collective { members, ops } in collectives(programs) {
            let missing = members.into_iter().filter(|member| !ops.contains_key(member)).collect();
            add(ops.into_iter().map(|(rank, id)| self.offsets[rank] + id).collect(), missing);
        }
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
            let never_paired =
                matches!(op.lane, Lane::Send(_) | Lane::Receive(_)) && self.group_of[node].is_none();
            let never_complete =
                self.group_of[node].is_some_and(|group| !self.groups[group].missing.is_empty());
            if never_paired || never_complete {
                self.waiting[node] += 1;
            }
        }
    }

    fn place(&self, node: usize) -> (usize, OpId) {
        let rank = self.offsets.partition_point(|&offset| offset <= node) - 1;
        (rank, node - self.offsets[rank])
    }

    /// The nodes that run as one with this one, itself among them.
    fn together(&self, node: usize) -> Vec<usize> {
        self.group_of[node].map_or_else(|| vec![node], |group| self.groups[group].nodes.clone())
    }

    /// One of those nodes, so that they are started once.
    fn leader(&self, node: usize) -> usize {
        self.group_of[node].map_or(node, |group| self.groups[group].nodes[0])
    }

    fn is_ready(&self, node: usize) -> bool {
        match self.group_of[node] {
            None => self.waiting[node] == 0,
            Some(group) => self.groups[group].nodes.iter().all(|&node| self.waiting[node] == 0),
        }
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
        let Some(group) = self.group_of[offset + id].map(|group| &self.groups[group]) else {
            return WaitsFor::Nobody;
        };
        if op.work.is_collective() {
            return WaitsFor::Members(self.absent(group));
        }
        let other = group.nodes.iter().find(|&&node| node != offset + id);
        other.map_or(WaitsFor::Nobody, |&other| {
            let (rank, op) = self.place(other);
            WaitsFor::Peer { rank, op }
        })
    }

    /// The ranks of a group that have not come to its operation, or never do.
    fn absent(&self, group: &Group) -> Vec<usize> {
        // That one of them is missing is counted at every node.
        let counted = usize::from(!group.missing.is_empty());
        let late = group.nodes.iter().filter(|&&node| self.waiting[node] > counted);
        let mut absent: Vec<usize> = late.map(|&node| self.place(node).0).collect();
        absent.extend(&group.missing);
        absent.sort_unstable();
        absent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Chunk, Component, Pass, TransferKind};

    const CHUNK: Chunk = Chunk { stage: 0, micro_batch: 0 };

    fn compute(after: &[OpId]) -> Op {
        let work =
            Work::Component { pass: Pass::Forward, chunk: CHUNK, layer: 0, component: Component::Chunk };
        Op { lane: Lane::Compute, work, after: after.to_vec(), action: Some(0) }
    }

    fn send(to: usize, after: &[OpId]) -> Op {
        let work = Work::Send { kind: TransferKind::Activation, chunk: CHUNK };
        Op { lane: Lane::Send(to), work, after: after.to_vec(), action: Some(0) }
    }

    fn receive(from: usize, after: &[OpId]) -> Op {
        let work = Work::Receive { kind: TransferKind::Activation, chunk: CHUNK };
        Op { lane: Lane::Receive(from), work, after: after.to_vec(), action: Some(0) }
    }

    fn walk_ops(ops: [Vec<Op>; 2]) -> Result<Timeline, Deadlock> {
        let cost =
            |rank: usize, op: &Op| if op.lane == Lane::Compute { 10.0 * (rank as f64 + 1.0) } else { 3.0 };
        walk(&ops.map(Program::of), cost)
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
        let waits: Vec<_> =
            stuck.into_iter().map(|stuck| (stuck.rank, stuck.lane, stuck.waits_for)).collect();
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
        assert_eq!((stuck.len(), &stuck[0].waits_for), (1, &WaitsFor::Nobody));
        // With a buffer rank 0's send would pass and let its compute continue.
        let rank_0 = vec![send(1, &[]), compute(&[0]), send(1, &[1])];
        let rank_1 = vec![compute(&[2]), receive(0, &[0]), receive(0, &[])];
        assert!(walk_ops([rank_0, rank_1]).is_err());
    }
}
