//! What another placement of the experts would make of a load that was seen.
//!
//! Knows loads and placements; not whether anybody follows the advice.

use super::{Placement, Slots, place_layer};
use crate::faults::Faults;

/// A placement and what it makes of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// Where the experts stand.
    pub placement: Placement,
    /// See [`Placement::imbalance`].
    pub imbalance: f64,
}

impl Proposal {
    fn of(placement: Placement, load: &[f32]) -> Self {
        let imbalance = placement.imbalance(load);
        Proposal { placement, imbalance }
    }

    /// The other one, if it is more even than this one.
    fn or_better(&self, other: Placement, load: &[f32]) -> Self {
        let other = Proposal::of(other, load);
        if other.imbalance < self.imbalance { other } else { self.clone() }
    }
}

/// Placements of a layer's experts, none less even than the one before: packing is greedy, and now and then comes out worse than what
/// was there, which is then proposed itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// In order, as the ranks of a job hold them.
    pub now: Proposal,
    /// The same experts, once each, elsewhere.
    pub moved: Proposal,
    /// With copies of busy ones.
    pub copied: Proposal,
}

/// Advice for each layer of `loads` (L x E: tokens of each expert, in any unit), if there are the slots of `on`.
///
/// **Errors**: as [`super::place`], and experts that the ranks do not divide.
pub fn advise(loads: &[Vec<f32>], on: &Slots) -> Result<Vec<Advice>, Faults> {
    let mut faults = on.check(loads);
    let num_experts = loads.first().map_or(0, Vec::len);
    if faults.spare(&["loads", "num_ranks"]) && !num_experts.is_multiple_of(on.num_ranks) {
        let expected =
            format!("a divisor of the {num_experts} experts, of which each rank holds as many now");
        faults.expected("num_ranks", expected, on.num_ranks);
    }
    faults.into_result(())?;
    let once = Slots { num_slots: num_experts, ..*on };
    let of_layer = |load: &Vec<f32>| {
        let now = Proposal::of(Placement::in_order(num_experts, on.num_ranks), load);
        let moved = now.or_better(place_layer(load, &once), load);
        let copied = moved.or_better(place_layer(load, on), load);
        Advice { now, moved, copied }
    };
    Ok(loads.iter().map(of_layer).collect())
}
