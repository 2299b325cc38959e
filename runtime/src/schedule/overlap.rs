//! What of a rank's passes runs beside what, and the table of the orders of two passes beside each other.
//!
//! Follows from one key of the recipe. Sums are the same whatever is chosen: no two operations that add to one tensor change
//! places. Knows no lanes; `neighbours` says which actions of a plan run beside each other, `lower` lays the passes out.

use super::action::{Action, Chunk};
use super::program::StageLayout;

/// What runs beside exchanges and sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlap {
    /// Nothing: no operation of a rank begins before all that the rank has sent or exchanged is there.
    Off,
    /// The two passes of a pair beside each other; a pass alone hides what its own operations can.
    Pairs(PairOrder),
}

impl Overlap {
    /// What the ranks do by default.
    pub const DEFAULT: Overlap = Overlap::Pairs(PairOrder::DEFAULT);

    /// As `parallel.overlap` says.
    pub fn of(is_on: bool) -> Overlap {
        if is_on { Overlap::DEFAULT } else { Overlap::Off }
    }

    /// The order within a pair.
    pub(super) fn order(self) -> PairOrder {
        match self {
            Overlap::Off => PairOrder::DEFAULT,
            Overlap::Pairs(order) => order,
        }
    }
}

/// Whether both passes of a pair add to one gradient, or one of them between two sums of the other, so that their order decides about
/// bits. A head that is tied to the embedding makes its gradient in the forward pass, the embedding in the backward pass; head and
/// multi-token prediction make that of one head, both in the forward pass.
pub(super) fn share_a_gradient(pair: &Action, stages: &[StageLayout]) -> bool {
    let is = |chunk: Chunk, has: fn(&StageLayout) -> bool| stages.get(chunk.stage).is_some_and(has);
    match *pair {
        Action::ForwardBackward { forward, backward } => {
            is(forward, |layout| layout.tied)
                && is(backward, |layout| layout.embedding || layout.mtp_layer.is_some())
        }
        Action::ForwardForward { first, second } => {
            let has_both = |layout: &StageLayout| layout.head && layout.mtp_layer.is_some();
            is(first, has_both) && is(second, has_both)
        }
        _ => false,
    }
}

/// How the segments of a forward and a backward pass alternate. A segment ends behind an exchange; what the pass can do without
/// the exchange's result stands before or behind the switch to the other pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairOrder {
    /// Which pass has the first segment: the forward pass's attention then runs beside the backward pass's experts, and its experts
    /// beside the backward pass's attention. Otherwise like runs beside like.
    pub forward_first: bool,
    /// The weight gradients of both experts, which wait for the dispatch's gradient to be sent, stand before the switch.
    pub expert_weights_first: bool,
    /// The weight gradients of attention, which wait for the next layer's exchange, stand before the switch.
    pub attention_weights_first: bool,
    /// The shared expert, forward and backward, stands before the switch.
    pub shared_first: bool,
}

impl PairOrder {
    /// For DeepSeek-V3's proportions no order of the table exposes less. It is that of the report's figure 4.
    pub const DEFAULT: PairOrder = PairOrder {
        forward_first: false,
        expert_weights_first: true,
        attention_weights_first: true,
        shared_first: false,
    };

    /// Every order.
    pub fn all() -> impl Iterator<Item = PairOrder> {
        (0..16_u8).map(|bits| PairOrder {
            forward_first: bits & 8 != 0,
            expert_weights_first: bits & 4 != 0,
            attention_weights_first: bits & 2 != 0,
            shared_first: bits & 1 != 0,
        })
    }
}
