//! A program under way: what its lanes share, and what the pipeline takes back when it has ended.
//!
//! Knows what operations work on; what they do is in `operations`.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_runtime::fabric::Endpoint;
use contraflow_runtime::flight::Recorder;
use contraflow_runtime::schedule::Program;
use parking_lot::{Mutex, MutexGuard};
use tracing::Span;

use super::compute::Compute;
use super::events::Events;
use super::in_flight::InFlight;
use super::probe::Probe;
use super::update::Update;
use crate::comm::address::StepId;
use crate::comm::all_to_all::ExpertGroup;
use crate::model::Stage;
use crate::model::micro_batch::MicroBatch;
use crate::model::precision::Precision;
use crate::optimizer::buckets::BucketGroup;

/// A program under way, shared by the lanes.
pub struct RunningProgram {
    /// Which step this is.
    pub id: StepId,
    /// What runs.
    pub program: Arc<Program>,
    /// The micro-batches, by number.
    pub batches: Vec<MicroBatch>,
    /// Tensors between operations.
    pub in_flight: InFlight,
    /// What stays the same over all programs.
    pub context: RankContext,
    compute: Mutex<Compute>,
    pub(super) update: Mutex<Option<Update>>,
    pub(super) span: Span,
    pub(super) events: Events,
}

/// What a task works on, handed from program to program.
pub struct Workload {
    /// The micro-batches, by number.
    pub batches: Vec<MicroBatch>,
    /// Tensors between operations.
    pub in_flight: InFlight,
    /// The rank's model: the compute lane works on it.
    pub compute: Compute,
    /// The update, in training.
    pub update: Option<Update>,
}

/// What stays the same over all programs of a rank.
#[derive(Clone)]
pub struct RankContext {
    /// The rank's end of the fabric.
    pub endpoint: Endpoint,
    /// All ranks of the job.
    pub world: Arc<Vec<usize>>,
    /// The ranks that share the routed experts.
    pub group: ExpertGroup,
    /// By bucket, the ranks that hold it.
    pub buckets: Arc<BTreeMap<usize, BucketGroup>>,
    /// The rank's stages.
    pub stages: Arc<Vec<Stage>>,
    /// World rank of each pipeline position in this rank's column.
    pub pipeline_peers: Vec<usize>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Formats of what is sent.
    pub precision: Precision,
    /// Takes what operations do, where that is to outlive the process.
    pub flight: Option<Arc<Recorder>>,
    /// For tests.
    pub probe: Probe,
}

impl RunningProgram {
    /// Begins a program.
    pub fn new(
        context: &RankContext,
        (id, program): (StepId, Arc<Program>),
        workload: Workload,
        span: Span,
    ) -> Self {
        let Workload { batches, in_flight, compute, update } = workload;
        RunningProgram {
            id,
            batches,
            in_flight,
            context: context.clone(),
            compute: Mutex::new(compute),
            update: Mutex::new(update),
            span,
            events: Events::new(program.ops.len()),
            program,
        }
    }

    /// Takes a program apart that has ended.
    pub fn into_workload(self) -> Workload {
        Workload {
            batches: self.batches,
            in_flight: self.in_flight,
            compute: self.compute.into_inner(),
            update: self.update.into_inner(),
        }
    }

    /// Ends every present and future wait of the lanes.
    pub fn abort(&self, reason: &str) {
        self.events.abort(reason);
        self.context.endpoint.abort(reason);
    }

    /// The rank's model. Only one lane works on it at a time: the compute lane, but for the sums of a step at its end.
    pub(super) fn compute(&self) -> MutexGuard<'_, Compute> {
        self.compute.lock()
    }

    /// The replica group of a bucket.
    ///
    /// # Panics
    /// If the rank does not hold it: the program was made for another placement.
    pub(super) fn group(&self, bucket: usize) -> &BucketGroup {
        let group = self.context.buckets.get(&bucket);
        group.unwrap_or_else(|| panic!("this rank does not hold bucket {bucket}"))
    }
}
