//! What one rank does in one step, as operations on in-order lanes with the events that order them.
//!
//! A program is what `lower` makes of a plan and what the pipeline actor issues. It knows components and peers, no tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action::Chunk;

/// Index of an operation in its rank's program.
pub type OpId = usize;

/// An in-order queue of operations: a thread on a CPU, a stream on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Lane {
    /// Arithmetic.
    Compute,
    /// All-to-all of the expert group.
    Expert,
    /// Activations and gradients to one pipeline rank.
    Send(usize),
    /// Activations and gradients from one pipeline rank.
    Receive(usize),
}

/// Which pass a component runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pass {
    /// Forward.
    Forward,
    /// Gradient with respect to the input.
    BackwardInput,
    /// Gradient with respect to the weights.
    BackwardWeight,
}

/// A piece of a chunk, cut where it communicates (ARCHITECTURE.md, "The layer contract").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Component {
    /// A whole chunk at once: schedules looked at without a model.
    Chunk,
    /// Token embedding (first stage).
    Embedding,
    /// Norm, attention, residual, norm, gate.
    Attention,
    /// Tokens to their experts. Its backward is a combine.
    Dispatch,
    /// The shared expert, or the whole FFN of a dense layer.
    SharedExpert,
    /// The routed experts this rank owns.
    Experts,
    /// Expert outputs back home. Its backward is a dispatch.
    Combine,
    /// Final norm, head and loss (last stage).
    Head,
    /// Multi-token prediction: norms, concatenation and projection before its block (last stage).
    MtpJoin,
    /// Multi-token prediction: its norm, the shared head and its loss (last stage).
    MtpHead,
}

/// What crosses a stage boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TransferKind {
    /// The output of `stage`, on its way to `stage + 1`.
    Activation,
    /// The gradient with respect to the input of `stage`, on its way to `stage - 1`.
    Gradient,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Work {
    /// One component of one layer of one chunk. `layer` counts within the whole model as in the weight names
    /// (the first MTP depth is `num_hidden_layers`); it is 0 where the component belongs to no layer.
    Component {
        /// Forward or one of the two backward passes.
        pass: Pass,
        /// Stage and micro-batch.
        chunk: Chunk,
        /// Layer of the model.
        layer: usize,
        /// Which piece.
        component: Component,
    },
    /// Send to the pipeline rank of the lane.
    Send {
        /// Activation or gradient.
        kind: TransferKind,
        /// The chunk that made it.
        chunk: Chunk,
    },
    /// Receive from the pipeline rank of the lane.
    Receive {
        /// Activation or gradient.
        kind: TransferKind,
        /// The chunk that made it.
        chunk: Chunk,
    },
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    /// Where it runs.
    pub lane: Lane,
    /// What it does.
    pub work: Work,
    /// Operations of this rank, on other lanes, that must have completed before it starts.
    pub after: Vec<OpId>,
    /// Index of the action of the plan it belongs to.
    pub action: usize,
}

/// One rank's operations in issue order. An operation waits only for earlier ones of its own rank, and for its peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The operations; an [`OpId`] indexes this list.
    pub ops: Vec<Op>,
}

/// What a layer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LayerKind {
    /// Attention and a dense FFN: nothing to dispatch.
    Dense,
    /// Attention, shared and routed experts.
    Moe,
}

/// The layers of one stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageLayout {
    /// First layer of the stage, counted over the model.
    pub first_layer: usize,
    /// Its layers in order.
    pub layers: Vec<LayerKind>,
    /// The stage begins with the embedding.
    pub embedding: bool,
    /// The stage ends with the head and the loss.
    pub head: bool,
    /// The stage has a multi-token-prediction block after its head: the layer index of that block.
    pub mtp_layer: Option<usize>,
}

impl fmt::Display for Work {
    /// `forward of experts, layer 3, stage 0, micro-batch 2`; `send of the gradient of stage 1, micro-batch 2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, kind, chunk) = match *self {
            Work::Component { pass, chunk, layer, component } => {
                let pass = match pass {
                    Pass::Forward => "forward",
                    Pass::BackwardInput => "input gradient",
                    Pass::BackwardWeight => "weight gradient",
                };
                let Chunk { stage, micro_batch } = chunk;
                return match component {
                    Component::Chunk => write!(f, "{pass} of stage {stage}, micro-batch {micro_batch}"),
                    _ => write!(
                        f,
                        "{pass} of {component:?}, layer {layer}, stage {stage}, micro-batch {micro_batch}"
                    ),
                };
            }
            Work::Send { kind, chunk } => ("send", kind, chunk),
            Work::Receive { kind, chunk } => ("receive", kind, chunk),
        };
        write!(f, "{what} of the {kind} of stage {}, micro-batch {}", chunk.stage, chunk.micro_batch)
    }
}

impl fmt::Display for TransferKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TransferKind::Activation => "activation",
            TransferKind::Gradient => "gradient",
        })
    }
}
