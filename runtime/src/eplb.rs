//! Where the routed experts of each layer are to stand for even load: the expert-parallel load balancer that was published beside
//! DeepSeek-V3 (EPLB). A busy expert gets copies among which its tokens are divided, and every rank has the same number of slots.
//!
//! Pure: from loads and numbers of things to a placement. Knows no run, no weights, and not what it costs to move an expert.
//!
//! Shape letters: L layers, E experts, S slots, G groups, N nodes, R ranks.

mod advice;
mod balance;

use std::fmt;

pub use self::advice::{Advice, Proposal, advise};
use self::balance::{divide, pack};
use crate::faults::Faults;

/// What experts are placed on, and which of them belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// S: copies of experts on all ranks together; at least one an expert, and as many on each rank.
    pub num_slots: usize,
    /// G: groups of neighbouring experts, as the gate limits a token to (`n_group`).
    pub num_groups: usize,
    /// N: nodes, with as many ranks each.
    pub num_nodes: usize,
    /// R: ranks among which a layer's experts are spread.
    pub num_ranks: usize,
}

/// How far an expert may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Each node gets as many groups, and all copies of a group's experts: a token that is limited to some groups is sent to as
    /// many nodes at most.
    Hierarchical,
    /// Every slot may hold every expert.
    Global,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Hierarchical => "hierarchical",
            Policy::Global => "global",
        })
    }
}

impl Slots {
    /// Hierarchical where the nodes divide the groups.
    pub fn policy(&self) -> Policy {
        if self.num_groups.is_multiple_of(self.num_nodes) { Policy::Hierarchical } else { Policy::Global }
    }

    /// Everything that keeps these loads from being placed.
    fn check(&self, loads: &[Vec<f32>]) -> Faults {
        let &Slots { num_slots, num_groups, num_nodes, num_ranks } = self;
        let mut faults = Faults::default();
        let num_experts = check_loads(loads, &mut faults);
        let counts = [
            ("num_slots", num_slots),
            ("num_groups", num_groups),
            ("num_nodes", num_nodes),
            ("num_ranks", num_ranks),
        ];
        for (name, _) in counts.iter().filter(|(_, count)| *count == 0) {
            faults.expected(*name, "at least 1", 0);
        }
        // Of what is wrong by itself no relation is asked.
        if faults.spare(&["num_slots", "loads"]) && num_slots < num_experts {
            faults.expected(
                "num_slots",
                format!("at least one for each of {num_experts} experts"),
                num_slots,
            );
        }
        if faults.spare(&["num_slots", "num_ranks"]) && !num_slots.is_multiple_of(num_ranks) {
            faults.expected("num_slots", format!("a multiple of num_ranks ({num_ranks})"), num_slots);
        }
        if faults.spare(&["num_groups", "loads"]) && !num_experts.is_multiple_of(num_groups) {
            faults.expected("num_groups", format!("a divisor of the {num_experts} experts"), num_groups);
        }
        if faults.spare(&["num_nodes", "num_ranks"]) && !num_ranks.is_multiple_of(num_nodes) {
            faults.expected("num_nodes", format!("a divisor of num_ranks ({num_ranks})"), num_nodes);
        }
        faults
    }
}

/// The number of experts, which is that of the first layer.
fn check_loads(loads: &[Vec<f32>], faults: &mut Faults) -> usize {
    let Some(num_experts) = loads.first().map(Vec::len) else {
        faults.expected("loads", "those of at least one layer", "none");
        return 0;
    };
    if num_experts == 0 {
        faults.expected("loads.0", "at least one expert", "none");
    }
    for (layer, load) in loads.iter().enumerate() {
        if load.len() != num_experts {
            let expected = format!("{num_experts} experts, as in the first layer");
            faults.expected(format!("loads.{layer}"), expected, load.len());
        }
        for (expert, &tokens) in load.iter().enumerate() {
            if !(tokens.is_finite() && tokens.is_sign_positive()) {
                faults.expected(format!("loads.{layer}.{expert}"), "a finite number, 0 or more", tokens);
            }
        }
    }
    num_experts
}

/// Where the experts of a layer stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// R x S/R: which expert each slot holds, rank by rank; ranks of a node are neighbours. One after another they are the map from
    /// physical to logical experts.
    pub ranks: Vec<Vec<usize>>,
    /// E: the slots of each expert, ascending: the map from logical to physical experts. Each has at least one.
    pub slots: Vec<Vec<usize>>,
}

impl Placement {
    fn of(ranks: Vec<Vec<usize>>, num_experts: usize) -> Self {
        let mut slots = vec![Vec::new(); num_experts];
        ranks.iter().flatten().enumerate().for_each(|(slot, &expert)| slots[expert].push(slot));
        Placement { ranks, slots }
    }

    /// One copy each, in order: as the ranks of a job hold them. `num_ranks` divides the experts.
    fn in_order(num_experts: usize, num_ranks: usize) -> Self {
        let experts: Vec<usize> = (0..num_experts).collect();
        Placement::of(experts.chunks(num_experts / num_ranks).map(<[usize]>::to_vec).collect(), num_experts)
    }

    /// E: how many copies there are of each expert.
    pub fn counts(&self) -> Vec<usize> {
        self.slots.iter().map(Vec::len).collect()
    }

    /// Largest load of a rank over the mean, where copies share their expert's load (E) evenly; 1 is even, and no load at all is.
    pub fn imbalance(&self, load: &[f32]) -> f64 {
        let of_copy = |&expert: &usize| f64::from(load[expert]) / self.slots[expert].len() as f64;
        let of_ranks = self.ranks.iter().map(|experts| experts.iter().map(of_copy).sum::<f64>());
        let (largest, sum) =
            of_ranks.fold((0.0, 0.0), |(most, sum): (f64, f64), own| (most.max(own), sum + own));
        if sum > 0.0 { largest * self.ranks.len() as f64 / sum } else { 1.0 }
    }
}

/// The published placement for `loads` (L x E: tokens of each expert, in any unit), layer by layer. Where two are equal the first one
/// is taken, and loads are added and divided in f32, so that it is the published program's, slot by slot. That program sorts equal
/// loads in no particular order, here they stay as they are.
///
/// **Errors**: every number that cannot be, with the field of [`Slots`], or `loads.LAYER.EXPERT`.
///
/// **Source**: github.com/deepseek-ai/EPLB; the inference section of the DeepSeek-V3 report (redundant experts).
pub fn place(loads: &[Vec<f32>], on: &Slots) -> Result<Vec<Placement>, Faults> {
    on.check(loads).into_result(())?;
    Ok(loads.iter().map(|load| place_layer(load, on)).collect())
}

/// Groups to nodes, then copies of the node's experts, then copies to the node's ranks. What `on` says fits `load` (E).
fn place_layer(load: &[f32], on: &Slots) -> Placement {
    let (num_groups, num_nodes) = match on.policy() {
        Policy::Hierarchical => (on.num_groups, on.num_nodes),
        Policy::Global => (1, 1),
    };
    let group_size = load.len() / num_groups;
    // Rounded once: the order in which the published program adds them up depends on the machine.
    let of_group = |group: &[f32]| group.iter().map(|&tokens| f64::from(tokens)).sum::<f64>() as f32;
    let of_groups: Vec<f32> = load.chunks(group_size).map(of_group).collect();
    let mut ranks = Vec::with_capacity(on.num_ranks);
    for groups in pack(&of_groups, num_nodes) {
        let experts: Vec<usize> =
            groups.into_iter().flat_map(|group| group * group_size..(group + 1) * group_size).collect();
        let own: Vec<f32> = experts.iter().map(|&expert| load[expert]).collect();
        let copies = divide(&own, on.num_slots / num_nodes);
        let of_copies: Vec<f32> = copies.iter().map(|copy| copy.load).collect();
        for held in pack(&of_copies, on.num_ranks / num_nodes) {
            ranks.push(held.into_iter().map(|copy| experts[copies[copy].item]).collect());
        }
    }
    Placement::of(ranks, load.len())
}

#[cfg(test)]
mod tests;
