//! Gives units of ranks their sites: one after the other where it costs least, then by moves and swaps that cost less.
//!
//! A unit is an expert group when a job is placed, one rank when a lost one is placed again. Knows costs, no goals.

use std::ops::Range;

use super::score::{Cost, Shape};
use super::sites::Site;

/// Ranks that the improvement looks at before it is content with what it has: some ten milliseconds.
const BUDGET: usize = 400_000;

/// Ranks that are placed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub ranks: Range<usize>,
    /// This unit and those right after it that should be on its node.
    pub left_for_node: usize,
    /// This unit and those right after it that should be in its block.
    pub left_for_block: usize,
}

/// Where a site is.
struct Candidate {
    /// Its first node.
    node: usize,
    block: usize,
    is_one_node: bool,
}

impl Candidate {
    fn of(site: &Site, shape: &Shape) -> Candidate {
        let node = site.nodes[0];
        let is_one_node = site.nodes.iter().all(|other| *other == node);
        Candidate { node, block: shape.block_of_node[node], is_one_node }
    }
}

/// Sorts by how well `left` units fit into `free` places: least left over first; then, where they do not fit, most first.
fn fit(free: usize, left: usize) -> (u8, usize) {
    if free >= left { (0, free) } else { (1, usize::MAX - free) }
}

/// Units on their way to sites.
pub(super) struct Search<'a> {
    shape: &'a Shape<'a>,
    /// The answer; ranks that are in no unit keep their nodes.
    pub node_of_rank: Vec<usize>,
    /// `free` counts down as units come.
    sites: Vec<Site>,
    site_of_unit: Vec<usize>,
    budget: usize,
}

impl<'a> Search<'a> {
    pub fn new(shape: &'a Shape<'a>, node_of_rank: Vec<usize>, sites: Vec<Site>) -> Search<'a> {
        Search { shape, node_of_rank, sites, site_of_unit: Vec::new(), budget: BUDGET }
    }

    /// Places all units; there must be sites for all.
    pub fn run(&mut self, units: &[Unit]) {
        self.site_of_unit.clear();
        let spots: Vec<Candidate> = self.sites.iter().map(|site| Candidate::of(site, self.shape)).collect();
        let blocks = self.shape.block_of_node.iter().max().map_or(0, |last| last + 1);
        let mut free_of_block = vec![0; blocks];
        for (spot, site) in spots.iter().zip(&self.sites) {
            free_of_block[spot.block] += site.free;
        }
        for unit in units {
            let site = self.cheapest(unit, &spots, &free_of_block);
            free_of_block[spots[site].block] -= 1;
            self.sites[site].free -= 1;
            self.site_of_unit.push(site);
            self.put(&unit.ranks, site);
        }
        while self.budget > 0 && self.improve(units) {}
    }

    /// Then improves rank by rank on the nodes already used: those of groups that found no node of their own can change
    /// places among one another. `free` counts what is free on each node.
    pub fn polish(&mut self, ranks: impl Iterator<Item = usize>, free: impl Iterator<Item = usize>) {
        let unit = |rank| Unit { ranks: rank..rank + 1, left_for_node: 1, left_for_block: 1 };
        let units: Vec<Unit> = ranks.map(unit).collect();
        self.sites = free.enumerate().map(|(node, free)| Site { nodes: vec![node], free }).collect();
        self.site_of_unit = units.iter().map(|unit| self.node_of_rank[unit.ranks.start]).collect();
        self.budget = BUDGET;
        while self.budget > 0 && self.improve(&units) {}
    }

    fn put(&mut self, ranks: &Range<usize>, site: usize) {
        self.node_of_rank[ranks.clone()].copy_from_slice(&self.sites[site].nodes);
    }

    fn cost(&self, units: &[&Range<usize>]) -> Cost {
        self.shape.cost(&self.node_of_rank, units)
    }

    /// The site that costs least; among equals one in a block, then on a node, that takes what follows too and has little left
    /// over; where none takes it, the largest.
    fn cheapest(&mut self, unit: &Unit, spots: &[Candidate], free_of_block: &[usize]) -> usize {
        let linked: Vec<usize> =
            self.shape.linked_nodes(&self.node_of_rank, &unit.ranks).into_iter().collect();
        // Apart from the nodes of linked ranks, all nodes of a block cost the same: the best fit represents them.
        let mut elsewhere = vec![None; free_of_block.len()];
        let mut candidates = Vec::new();
        for (site, spot) in spots.iter().enumerate() {
            let free = self.sites[site].free;
            if free == 0 {
                continue;
            }
            if spot.is_one_node && !linked.contains(&spot.node) {
                let (key, best) = ((fit(free, unit.left_for_node), site), &mut elsewhere[spot.block]);
                if best.is_none_or(|best| key < best) {
                    *best = Some(key);
                }
            } else {
                candidates.push(site);
            }
        }
        candidates.extend(elsewhere.into_iter().flatten().map(|(_, site)| site));
        let key = |site: usize| {
            self.put(&unit.ranks, site);
            let block = fit(free_of_block[spots[site].block], unit.left_for_block);
            let node = fit(self.sites[site].free, unit.left_for_node);
            (self.cost(&[&unit.ranks]), block.0, node, block.1, site)
        };
        candidates.into_iter().map(key).min().map_or(0, |key| key.4)
    }

    /// One round of changes, the first that helps of each unit; whether there was any.
    fn improve(&mut self, units: &[Unit]) -> bool {
        let mut improved = false;
        for unit in 0..units.len() {
            if self.budget == 0 {
                break;
            }
            if self.cost(&[&units[unit].ranks]) != [0; 4] {
                improved |= self.move_away(units, unit) || self.swap_away(units, unit);
            }
        }
        improved
    }

    fn spend(&mut self, units: &[Unit], unit: usize) -> bool {
        // A cost walks along the unit and its expert group.
        self.budget = self.budget.saturating_sub(units[unit].ranks.len() + self.shape.group_size());
        self.budget > 0
    }

    fn move_away(&mut self, units: &[Unit], unit: usize) -> bool {
        let (ranks, from) = (&units[unit].ranks, self.site_of_unit[unit]);
        let before = self.cost(&[ranks]);
        for site in 0..self.sites.len() {
            if self.sites[site].free == 0 || site == from || !self.spend(units, unit) {
                continue;
            }
            self.put(ranks, site);
            if self.cost(&[ranks]) < before {
                self.sites[from].free += 1;
                self.sites[site].free -= 1;
                self.site_of_unit[unit] = site;
                return true;
            }
        }
        self.put(ranks, from);
        false
    }

    fn swap_away(&mut self, units: &[Unit], unit: usize) -> bool {
        let from = self.site_of_unit[unit];
        for other in 0..units.len() {
            let to = self.site_of_unit[other];
            if to == from || !self.spend(units, unit) {
                continue;
            }
            let pair = [&units[unit].ranks, &units[other].ranks];
            let before = self.cost(&pair);
            self.put(pair[0], to);
            self.put(pair[1], from);
            if self.cost(&pair) < before {
                self.site_of_unit.swap(unit, other);
                return true;
            }
            self.put(pair[0], from);
            self.put(pair[1], to);
        }
        false
    }
}
