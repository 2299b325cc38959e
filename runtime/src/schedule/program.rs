//! What one rank does in one step, as operations on in-order lanes with the events that order them.
//!
//! A program is what `lower` makes of a plan and what the pipeline actor issues. It knows components and peers, no tensors.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::action::Chunk;
use super::bucket::Bucket;

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
    /// Collectives of replica groups and of the whole world.
    Collective,
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
    /// Copies a bucket's gradients into flat parts, one for each rank that holds the bucket.
    Pack {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Reduce-scatter: sums the flat parts over the ranks that hold the bucket; each keeps the sum of its own shard.
    Reduce {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Sums the squares of this rank's shard of a bucket's summed gradient.
    GradNorm {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Waits until the state after the step before is replicated in the memory of another worker.
    AwaitReplica,
    /// All-reduce over the world: the gradient norm, the losses, the tokens per expert.
    Totals,
    /// Looks through this rank's tensors for what is not finite. Runs only in a step whose totals are not.
    Inspect,
    /// All-reduce over the world of what each rank has found.
    Evidence,
    /// AdamW on this rank's shard of a bucket.
    Apply {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Moves the gate biases by the step's tokens per expert.
    Balance,
    /// All-gather: each rank that holds the bucket gets the updated shards of the others.
    Gather {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Copies what was gathered into a bucket's weights.
    Unpack {
        /// Number of the bucket.
        bucket: usize,
    },
    /// Takes a snapshot of this rank's shards, if the state after the step is to be saved or replicated.
    Snapshot,
}

impl Work {
    /// Whether it runs together with the same operation of other ranks: it starts when all of them have come to it.
    pub fn is_collective(&self) -> bool {
        matches!(self, Work::Reduce { .. } | Work::Totals | Work::Evidence | Work::Gather { .. })
    }

    /// The bucket it belongs to, if it belongs to one.
    pub fn bucket(&self) -> Option<usize> {
        match *self {
            Work::Pack { bucket }
            | Work::Reduce { bucket }
            | Work::GradNorm { bucket }
            | Work::Apply { bucket }
            | Work::Gather { bucket }
            | Work::Unpack { bucket } => Some(bucket),
            _ => None,
        }
    }
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
    /// Index of the action of the plan it belongs to; the update belongs to none.
    pub action: Option<usize>,
}

/// One rank's operations in issue order. An operation waits only for earlier ones of its own rank, and for its peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The operations; an [`OpId`] indexes this list.
    pub ops: Vec<Op>,
    /// The buckets that its operations name, by number, with the pipeline ranks that take part in their collectives.
    pub buckets: Vec<Bucket>,
}

impl Program {
    /// Operations that name no bucket.
    pub fn of(ops: Vec<Op>) -> Program {
        Program { ops, buckets: Vec::new() }
    }

    /// Both as one program: the second begins when the first has ended.
    pub fn then(&self, second: &Program) -> Program {
        let offset = self.ops.len();
        let mut whole = self.clone();
        let mut begun: Vec<Lane> = Vec::new();
        for op in &second.ops {
            let mut op = op.clone();
            op.after.iter_mut().for_each(|earlier| *earlier += offset);
            if !begun.contains(&op.lane) {
                begun.push(op.lane);
                op.after.extend(tails(&self.ops, op.lane));
            }
            whole.ops.push(op);
        }
        whole
    }
}

/// The last operation of every lane but one.
fn tails(ops: &[Op], but: Lane) -> Vec<OpId> {
    let mut tails: BTreeMap<Lane, OpId> = ops.iter().enumerate().map(|(id, op)| (op.lane, id)).collect();
    tails.remove(&but);
    tails.into_values().collect()
}

/// What a layer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// That head is the embedding (`tie_word_embeddings`).
    pub tied: bool,
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
            Work::Pack { bucket } => return write!(f, "packing of the gradients of bucket {bucket}"),
            Work::Reduce { bucket } => return write!(f, "reduce-scatter of bucket {bucket}"),
            Work::GradNorm { bucket } => return write!(f, "gradient norm of bucket {bucket}"),
            Work::AwaitReplica => return f.write_str("wait for the replica of the step before"),
            Work::Totals => return f.write_str("all-reduce of the step's totals"),
            Work::Inspect => return f.write_str("search for what is not finite"),
            Work::Evidence => return f.write_str("all-reduce of what is not finite"),
            Work::Apply { bucket } => return write!(f, "AdamW on bucket {bucket}"),
            Work::Balance => return f.write_str("move of the gate biases"),
            Work::Gather { bucket } => return write!(f, "all-gather of bucket {bucket}"),
            Work::Unpack { bucket } => return write!(f, "unpacking of the weights of bucket {bucket}"),
            Work::Snapshot => return f.write_str("snapshot of the state"),
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
