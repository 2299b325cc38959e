//! What a plan is made of: actions of stages and micro-batches, and the per-rank lists of them.
//!
//! A plan is plain data. It knows no tensors, no time and no transport; generators make it, `check` proves it,
//! `lower` turns it into programs, and the text form writes it down.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One micro-batch at one pipeline stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Chunk {
    /// Pipeline stage, 0 takes the tokens and the last one computes the loss.
    pub stage: usize,
    /// Micro-batch of the step, counted over both directions.
    pub micro_batch: usize,
}

/// One entry of a rank's plan (report section 3.2.1, zero-bubble split of the backward pass).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// `F`: forward.
    Forward(Chunk),
    /// `B`: full backward, inputs and weights.
    Backward(Chunk),
    /// `I`: backward for the input only; the weight part is queued.
    BackwardInput(Chunk),
    /// `W`: the queued weight part of this chunk.
    BackwardWeight(Chunk),
    /// `F&B`: a forward and a full backward of two different chunks, their components interleaved.
    ForwardBackward {
        /// The chunk that runs forward.
        forward: Chunk,
        /// The chunk that runs backward.
        backward: Chunk,
    },
    /// `F&F`: the forwards of two different chunks, their components interleaved.
    ForwardForward {
        /// The chunk that begins.
        first: Chunk,
        /// The other one.
        second: Chunk,
    },
    /// `I&W`: the input gradient of a chunk, its exchanges hidden by the queued weight part of another one.
    InputWeight {
        /// The chunk whose input gradient is computed.
        input: Chunk,
        /// The chunk whose weight gradients are computed.
        weight: Chunk,
    },
}

impl Action {
    /// The two actions beside each other, in the order in which a pair is written; `None` if there is no such pair.
    pub fn pair(first: Action, second: Action) -> Option<Action> {
        match (first, second) {
            (Action::Forward(forward), Action::Backward(backward)) => {
                Some(Action::ForwardBackward { forward, backward })
            }
            (Action::Forward(first), Action::Forward(second)) => {
                Some(Action::ForwardForward { first, second })
            }
            (Action::BackwardInput(input), Action::BackwardWeight(weight)) => {
                Some(Action::InputWeight { input, weight })
            }
            _ => None,
        }
    }

    /// What a pair consists of, in the order in which it is written; anything else is itself.
    pub fn parts(&self) -> (Action, Option<Action>) {
        match *self {
            Action::ForwardBackward { forward, backward } => {
                (Action::Forward(forward), Some(Action::Backward(backward)))
            }
            Action::ForwardForward { first, second } => {
                (Action::Forward(first), Some(Action::Forward(second)))
            }
            Action::InputWeight { input, weight } => {
                (Action::BackwardInput(input), Some(Action::BackwardWeight(weight)))
            }
            lone => (lone, None),
        }
    }

    /// The chunks this action runs forward.
    pub fn forwards(&self) -> impl Iterator<Item = Chunk> + use<> {
        let (first, second) = match *self {
            Action::Forward(chunk) | Action::ForwardBackward { forward: chunk, .. } => (Some(chunk), None),
            Action::ForwardForward { first, second } => (Some(first), Some(second)),
            _ => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// The chunk whose input gradient this action computes, if it does.
    pub fn backward_input(&self) -> Option<Chunk> {
        match *self {
            Action::Backward(chunk)
            | Action::BackwardInput(chunk)
            | Action::ForwardBackward { backward: chunk, .. }
            | Action::InputWeight { input: chunk, .. } => Some(chunk),
            _ => None,
        }
    }

    /// The chunk whose weight gradients this action computes, if it does.
    pub fn backward_weight(&self) -> Option<Chunk> {
        match *self {
            Action::Backward(chunk)
            | Action::BackwardWeight(chunk)
            | Action::ForwardBackward { backward: chunk, .. }
            | Action::InputWeight { weight: chunk, .. } => Some(chunk),
            _ => None,
        }
    }
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.stage, self.micro_batch)
    }
}

impl fmt::Display for Action {
    /// `F0.3`, `B1.2`, `I0.1`, `W0.1`, `F0.4&B3.0`: the letter, the stage, the micro-batch; pairs with `&`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Forward(c) => write!(f, "F{c}"),
            Action::Backward(c) => write!(f, "B{c}"),
            Action::BackwardInput(c) => write!(f, "I{c}"),
            Action::BackwardWeight(c) => write!(f, "W{c}"),
            Action::ForwardBackward { forward, backward } => write!(f, "F{forward}&B{backward}"),
            Action::ForwardForward { first, second } => write!(f, "F{first}&F{second}"),
            Action::InputWeight { input, weight } => write!(f, "I{input}&W{weight}"),
        }
    }
}

/// Per pipeline rank, what it does in one step, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Name of the schedule that made it (`dualpipe`, `dualpipev`, `1f1b`, `one-way`, `two-way`, or the user's own).
    pub schedule: String,
    /// Number of pipeline stages.
    pub stages: usize,
    /// Number of micro-batches, both directions together.
    pub micro_batches: usize,
    /// `placement[rank]` lists the stages the rank holds.
    pub placement: Vec<Vec<usize>>,
    /// `actions[rank]` is the rank's list.
    pub actions: Vec<Vec<Action>>,
}

impl Plan {
    /// Number of pipeline ranks.
    pub fn ranks(&self) -> usize {
        self.actions.len()
    }

    /// The rank that runs `chunk` forward, or `None` if the plan never does.
    pub fn owner(&self, chunk: Chunk) -> Option<usize> {
        self.actions
            .iter()
            .position(|list| list.iter().any(|action| action.forwards().any(|own| own == chunk)))
    }

    /// Whether the plan has no backward pass (validation, generation).
    pub fn is_forward_only(&self) -> bool {
        self.actions.iter().flatten().all(|action| action.backward_input().is_none())
    }
}
