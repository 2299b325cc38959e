//! What a placement is worth: four counts, compared one after the other, lower is better; and the same as text.

use std::collections::BTreeSet;
use std::ops::Range;

use contraflow_runtime::schedule::ScheduleKind;
use contraflow_runtime::topology::Topology;
use serde::{Deserialize, Serialize};

/// The node of a rank that has no place yet. What lies between such a rank and others costs nothing.
pub(super) const UNPLACED: usize = usize::MAX;

/// Twice the values of the terms, so that what lies between two ranks has a half for either.
pub(super) type Cost = [u64; 4];

/// One goal of a placement and how far it was missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// The name of the goal.
    pub name: String,
    /// 0 where it is fully reached.
    pub value: u64,
    /// The same for a reader.
    pub words: String,
}

/// A job's layout on nodes and blocks.
pub(super) struct Shape<'a> {
    topology: &'a Topology,
    /// Whether pipeline ranks `p` and `P-1-p` hold the same stages.
    pub mirrors: bool,
    pub block_of_node: &'a [usize],
}

impl<'a> Shape<'a> {
    pub fn new(topology: &'a Topology, schedule: ScheduleKind, block_of_node: &'a [usize]) -> Shape<'a> {
        Shape { topology, mirrors: schedule == ScheduleKind::Dualpipe, block_of_node }
    }

    /// What the ranks of `units` cost together: their expert groups and all links that end at one of them. The difference of
    /// two such costs is that of the whole placements if only these ranks have moved.
    pub fn cost(&self, node_of_rank: &[usize], units: &[&Range<usize>]) -> Cost {
        let mut cost = [0; 4];
        let group = |unit: &Range<usize>| unit.start / self.topology.expert;
        for (index, unit) in units.iter().enumerate() {
            if units[..index].iter().all(|other| group(other) != group(unit)) {
                let (blocks, nodes) = self.group_crosses(node_of_rank, group(unit));
                cost[0] += 2 * u64::from(blocks);
                cost[1] += 2 * u64::from(nodes);
            }
            for rank in (*unit).clone() {
                self.add_links(node_of_rank, rank, units, &mut cost);
            }
        }
        cost
    }

    /// The nodes of all ranks with which the ranks of `unit` have to do, those without a place left out.
    pub fn linked_nodes(&self, node_of_rank: &[usize], unit: &Range<usize>) -> BTreeSet<usize> {
        let (dp_size, expert) = (self.topology.dp_size(), self.topology.expert);
        let links = unit.clone().flat_map(|rank| {
            let mirror = rank % dp_size + (self.topology.pipeline - 1 - rank / dp_size) * dp_size;
            [rank.checked_sub(dp_size), Some(rank + dp_size), self.mirrors.then_some(mirror)]
        });
        let group = unit.start / expert * expert;
        let peers = (group..group + expert).filter(|rank| !unit.contains(rank));
        let nodes = links.flatten().chain(peers).filter_map(|rank| node_of_rank.get(rank).copied());
        nodes.filter(|node| *node != UNPLACED).collect()
    }

    /// Ranks of an expert group.
    pub fn group_size(&self) -> usize {
        self.topology.expert
    }

    fn add_links(&self, node_of_rank: &[usize], rank: usize, units: &[&Range<usize>], cost: &mut Cost) {
        let (dp_size, last) = (self.topology.dp_size(), self.topology.pipeline - 1);
        let pipeline = rank / dp_size;
        let share = |other: usize| if units.iter().any(|unit| unit.contains(&other)) { 1 } else { 2 };
        if self.mirrors && last != 2 * pipeline {
            let mirror = rank % dp_size + (last - pipeline) * dp_size;
            cost[2] += u64::from(node_of_rank[mirror] == node_of_rank[rank]) * share(mirror);
        }
        if pipeline > 0 {
            let before = rank - dp_size;
            cost[3] += self.distance(node_of_rank[before], node_of_rank[rank]) * share(before);
        }
        if pipeline < last {
            let after = rank + dp_size;
            cost[3] += self.distance(node_of_rank[rank], node_of_rank[after]) * share(after);
        }
    }

    /// Whether an expert group lies in several blocks, and on several nodes.
    pub fn group_crosses(&self, node_of_rank: &[usize], group: usize) -> (bool, bool) {
        let expert = self.topology.expert;
        let mut nodes =
            node_of_rank[group * expert..(group + 1) * expert].iter().filter(|node| **node != UNPLACED);
        let Some(&first) = nodes.next() else { return (false, false) };
        nodes.fold((false, false), |(blocks, several), &node| {
            (blocks || self.block_of_node[node] != self.block_of_node[first], several || node != first)
        })
    }

    /// 0 on one node, 1 within a block, 2 beyond.
    fn distance(&self, a: usize, b: usize) -> u64 {
        if a == b || a == UNPLACED || b == UNPLACED {
            0
        } else {
            1 + u64::from(self.block_of_node[a] != self.block_of_node[b])
        }
    }

    /// The terms of a whole placement.
    pub fn terms(&self, node_of_rank: &[usize]) -> Vec<Term> {
        let Topology { pipeline, expert, data } = *self.topology;
        let groups: Vec<_> =
            (0..pipeline * data).map(|group| self.group_crosses(node_of_rank, group)).collect();
        let crossing = |value: usize, what: &str| {
            format!(
                "{} of {} expert groups of {expert} inside one {what}",
                groups.len() - value,
                groups.len()
            )
        };
        let blocks = groups.iter().filter(|(blocks, _)| *blocks).count();
        let nodes = groups.iter().filter(|(_, nodes)| *nodes).count();
        let term = |name: &str, value: u64, words| Term { name: name.to_owned(), value, words };
        let mut terms = vec![
            term("expert groups across blocks", blocks as u64, crossing(blocks, "block")),
            term("expert groups across nodes", nodes as u64, crossing(nodes, "node")),
        ];
        let dp_size = self.topology.dp_size();
        if self.mirrors {
            let pairs = pipeline / 2 * dp_size;
            let together = (0..pairs).filter(|rank| {
                let mirror = rank % dp_size + (pipeline - 1 - rank / dp_size) * dp_size;
                node_of_rank[mirror] == node_of_rank[*rank]
            });
            let together = together.count();
            let words = format!("{} of {pairs} mirrors on another node", pairs - together);
            terms.push(term("mirrors on one node", together as u64, words));
        }
        let links = (dp_size..self.topology.world())
            .map(|rank| self.distance(node_of_rank[rank - dp_size], node_of_rank[rank]));
        let mut at = [0_u64; 3];
        links.filter_map(|distance| usize::try_from(distance).ok()).for_each(|distance| at[distance] += 1);
        let words = format!(
            "of {} pipeline links {} on one node, {} within a block",
            at.iter().sum::<u64>(),
            at[0],
            at[1]
        );
        terms.push(term("pipeline distance", at[1] + 2 * at[2], words));
        terms
    }
}
