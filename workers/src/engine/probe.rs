//! Where tests look in: a closure that is told what is about to happen and may be slow or panic.
//!
//! Without one this is a null check.

use std::sync::Arc;

use contraflow_runtime::schedule::Op;

use crate::model::params::RankParams;

/// A point a probe is called at.
pub enum ProbePoint<'a> {
    /// A lane is about to run an operation.
    Op {
        /// Whose lane.
        rank: usize,
        /// Which step.
        step: u64,
        /// The operation.
        op: &'a Op,
    },
    /// The optimizer is about to reduce this rank's gradients.
    Gradients {
        /// Whose gradients.
        rank: usize,
        /// Which step.
        step: u64,
        /// Parameters with the gradients of this rank's own tokens, to be spoilt if need be.
        params: &'a mut RankParams,
    },
    /// An actor is about to do its part of a step.
    Actor {
        /// Whose actor.
        rank: usize,
        /// Which step.
        step: u64,
        /// Its name.
        name: &'static str,
    },
}

type Look = dyn Fn(ProbePoint) + Send + Sync;

/// A closure to be called at every point, or none.
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<Look>>);

impl Probe {
    /// Calls `look` at every point.
    pub fn new(look: impl Fn(ProbePoint) + Send + Sync + 'static) -> Self {
        Probe(Some(Arc::new(look)))
    }

    /// Tells the probe.
    pub fn at(&self, point: ProbePoint) {
        if let Some(look) = &self.0 {
            look(point);
        }
    }
}
