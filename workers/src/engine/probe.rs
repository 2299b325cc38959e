//! Where tests look in: a closure that is called before each event and may be slow or panic.
//!
//! Without one this is a null check.

use std::sync::Arc;

use contraflow_runtime::schedule::Op;

use super::recording::Recording;
use crate::model::params::RankParams;

/// A point a probe is called at.
pub enum ProbePoint<'a> {
    /// A lane is about to run an operation.
    Op {
        /// Whose lane.
        rank: usize,
        /// The step under way.
        step: u64,
        /// The operation.
        op: &'a Op,
    },
    /// The gradients of a bucket are about to be reduced.
    Gradients {
        /// Whose gradients.
        rank: usize,
        /// The step under way.
        step: u64,
        /// Which bucket; those of others may not be complete yet, or on their way already.
        bucket: usize,
        /// All parameters; those of the bucket with the gradients of this rank's own tokens, to be spoilt if need be.
        params: &'a mut RankParams,
    },
    /// A task has ended.
    Recorded {
        /// Whose task.
        rank: usize,
        /// Which step; 0 outside of training.
        step: u64,
        /// What was run, and when.
        recording: &'a Recording,
        /// **Units**: seconds that the rank reports.
        seconds: f64,
    },
    /// An actor is about to do its part of a step.
    Actor {
        /// Whose actor.
        rank: usize,
        /// The step under way.
        step: u64,
        /// Name of the actor.
        name: &'static str,
    },
}

type ProbeFn = dyn Fn(ProbePoint) + Send + Sync;

/// A closure to be called at every point, or none.
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<ProbeFn>>);

impl Probe {
    /// Calls `look` at every point.
    pub fn new(look: impl Fn(ProbePoint) + Send + Sync + 'static) -> Self {
        Probe(Some(Arc::new(look)))
    }

    /// Calls the probe.
    pub fn at(&self, point: ProbePoint) {
        if let Some(look) = &self.0 {
            look(point);
        }
    }
}
