//! Where a frame belongs: the part of its tag that stays the same within a program.
//!
//! Knows steps and chunks, no tensors.

use contraflow_runtime::fabric::{FrameKind, Phase, Tag};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::FormationId;

/// Which step of which job this is: the part of every tag that does not change within a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepId {
    /// Whose ranks make it.
    pub formation: FormationId,
    /// Training, validation or update.
    pub phase: Phase,
    /// Optimizer update, counted from 1.
    pub step: u64,
}

impl StepId {
    /// The address of a frame about a chunk. `source` is the rank that sends it.
    pub fn tag(&self, kind: FrameKind, chunk: Chunk, layer: usize, source: usize) -> Tag {
        Tag {
            formation: self.formation,
            phase: self.phase,
            step: self.step,
            kind,
            stage: chunk.stage as u32,
            micro_batch: chunk.micro_batch as u32,
            layer: layer as u32,
            hop: 0,
            source: source as u32,
        }
    }
}

#[cfg(test)]
impl StepId {
    /// The first step of the only job, for tests.
    pub fn first(phase: Phase) -> Self {
        Self { formation: FormationId::default(), phase, step: 1 }
    }
}
