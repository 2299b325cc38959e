//! The address of a frame: everything that distinguishes one message of a job from every other.
//!
//! Tags are values; they know no transport and no payload.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::topology::FormationId;

/// Which part of a step a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Forward and backward of the plan.
    Train,
    /// A forward-only plan.
    Validate,
    /// Gradient reduction, optimizer, weight gathering.
    Update,
    /// Beside the steps: copies of the state, and resuming from them.
    Replicate,
}

impl Phase {
    /// All of them, each at the place of its number on the wire and in a ring.
    pub(crate) const ALL: [Phase; 4] = [Phase::Train, Phase::Validate, Phase::Update, Phase::Replicate];
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FrameKind {
    /// Output of a stage.
    Activation,
    /// Gradient with respect to the input of a stage.
    Gradient,
    /// Token rows to the ranks that own their experts.
    Dispatch,
    /// Expert outputs back home.
    Combine,
    /// Gradient of the expert outputs: the backward pass of `Combine`.
    CombineGradient,
    /// Gradient of the dispatched rows and of the routing weights: the backward pass of `Dispatch`.
    DispatchGradient,
    /// A share of gradients to the rank that owns the shard.
    ReduceScatter,
    /// An updated shard to the ranks that hold a copy.
    AllGather,
    /// A small vector to be summed, or its sum.
    AllReduce,
    /// A rank's part of the state, or some of it; the layer says whose, the micro-batch counts the pieces.
    State,
    /// A buddy's acknowledgement that it holds a rank's shard.
    StateReplicated,
    /// What a rank wants of a state in memory that is in another layout.
    StateWanted,
}

impl FrameKind {
    /// All of them, each at the place of its number on the wire and in a ring.
    pub(crate) const ALL: [FrameKind; 12] = [
        FrameKind::Activation,
        FrameKind::Gradient,
        FrameKind::Dispatch,
        FrameKind::Combine,
        FrameKind::CombineGradient,
        FrameKind::DispatchGradient,
        FrameKind::ReduceScatter,
        FrameKind::AllGather,
        FrameKind::AllReduce,
        FrameKind::State,
        FrameKind::StateReplicated,
        FrameKind::StateWanted,
    ];
}

/// The address of a frame. Two frames of a job never have the same tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tag {
    /// Whose ranks exchange it: frames of an earlier formation are dropped.
    pub formation: FormationId,
    /// Part of the step.
    pub phase: Phase,
    /// Optimizer update, counted from 1.
    pub step: u64,
    /// What the frame carries.
    pub kind: FrameKind,
    /// Stage of the chunk that made it; 0 in collectives.
    pub stage: u32,
    /// Micro-batch of the chunk that made it; 0 in collectives.
    pub micro_batch: u32,
    /// Layer of the model; in collectives the number of the bucket.
    pub layer: u32,
    /// Leg of a journey that takes several.
    pub hop: u8,
    /// Rank that sent the frame.
    pub source: u32,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of stage {} micro-batch {} layer {} from rank {} ({:?}, step {}, generation {})",
            self.kind,
            self.stage,
            self.micro_batch,
            self.layer,
            self.source,
            self.phase,
            self.step,
            self.formation.generation
        )
    }
}
