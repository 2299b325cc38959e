//! What the lanes of a rank share while a program runs: the tensors on their way from one operation to the next.
//!
//! Ownership moves through here: an operation takes what the one before it put. Knows tensors and chunks, no arithmetic.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use contraflow_kernels::gate::Routing;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::schedule::{Chunk, TransferKind};
use parking_lot::{Mutex, MutexGuard};

use crate::comm::all_to_all::Route;
use crate::error::Missing;
use crate::model::experts::Arrivals;

/// What one layer of one chunk has under way between the compute lane and the expert lane.
#[derive(Default)]
pub struct LayerInFlight {
    /// Attention -> Dispatch.
    pub normed: Option<(Tensor, Arc<Routing>)>,
    /// Dispatch -> Experts.
    pub arrivals: Option<Arrivals>,
    /// Dispatch -> Combine and both backward passes.
    pub route: Option<Arc<Route>>,
    /// Experts -> Combine.
    pub outputs: Option<Tensor>,
    /// SharedExpert -> Combine: residual plus shared expert.
    pub home: Option<Tensor>,
    /// Combine's backward -> Experts' backward.
    pub d_outputs: Option<Tensor>,
    /// Experts' backward -> Dispatch's backward: of the rows, of the pairs' routing weights.
    pub d_arrivals: Option<(Tensor, Tensor)>,
    /// Dispatch's backward -> Attention's backward: of the normed rows, of the routing weights.
    pub d_normed: Option<(Tensor, Tensor)>,
}

/// What one bucket has under way between the compute lane and the collective lane.
#[derive(Default)]
pub struct BucketInFlight {
    /// Pack -> Reduce: the rank's gradients, by member of the group.
    pub packed: Option<Vec<Tensor>>,
    /// Reduce -> GradNorm and Apply: this rank's shard of the summed gradient.
    pub reduced: Option<Tensor>,
    /// GradNorm -> Totals: sums of squares with the places of the parameters.
    pub squares: Option<Vec<(usize, f64)>>,
    /// Apply -> Gather, perhaps of the next step: the step, and this rank's shard of the weights.
    pub updated: Option<(u64, Vec<Tensor>)>,
    /// Gather -> Unpack: the other shards, with their ranges.
    pub gathered: Option<Vec<(Range<usize>, Tensor)>>,
}

impl BucketInFlight {
    fn is_empty(&self) -> bool {
        let BucketInFlight { packed, reduced, squares, updated, gathered } = self;
        let is_none = [packed.is_none(), reduced.is_none(), squares.is_none(), updated.is_none()];
        is_none.into_iter().all(|is_none| is_none) && gathered.is_none()
    }
}

/// The tensors under way.
#[derive(Default)]
pub struct InFlight {
    /// The activation or gradient at the present end of a chunk; at a stage's edge, what the neighbour stage takes.
    streams: Mutex<HashMap<(TransferKind, Chunk), Tensor>>,
    layers: Mutex<HashMap<(Chunk, usize), LayerInFlight>>,
    buckets: Mutex<HashMap<usize, BucketInFlight>>,
}

impl InFlight {
    fn streams(&self) -> MutexGuard<'_, HashMap<(TransferKind, Chunk), Tensor>> {
        self.streams.lock()
    }

    /// Puts the present end of a chunk.
    pub fn put(&self, kind: TransferKind, chunk: Chunk, tensor: Tensor) {
        self.streams().insert((kind, chunk), tensor);
    }

    /// Takes the present end of a chunk.
    ///
    /// **Errors**: [`Missing`].
    pub fn take(&self, kind: TransferKind, chunk: Chunk) -> Result<Tensor, Missing> {
        self.streams().remove(&(kind, chunk)).ok_or(Missing::OfChunk { what: name(kind), chunk, layer: 0 })
    }

    /// Shares the present end of a chunk with an operation that is not its last user.
    ///
    /// **Errors**: [`Missing`].
    pub fn share(&self, kind: TransferKind, chunk: Chunk) -> Result<Tensor, Missing> {
        self.streams().get(&(kind, chunk)).cloned().ok_or(Missing::OfChunk {
            what: name(kind),
            chunk,
            layer: 0,
        })
    }

    /// Works on what a layer has under way; nothing slow may happen inside.
    pub fn layer<T>(&self, chunk: Chunk, layer: usize, work: impl FnOnce(&mut LayerInFlight) -> T) -> T {
        work(self.layers.lock().entry((chunk, layer)).or_default())
    }

    /// Takes one value out of a layer's transit.
    ///
    /// **Errors**: [`Missing`].
    pub fn take_from<T>(
        &self,
        (chunk, layer): (Chunk, usize),
        what: &'static str,
        field: impl FnOnce(&mut LayerInFlight) -> &mut Option<T>,
    ) -> Result<T, Missing> {
        self.layer(chunk, layer, |in_flight| field(in_flight).take()).ok_or(Missing::OfChunk {
            what,
            chunk,
            layer,
        })
    }

    /// Forgets a layer whose backward pass has ended.
    pub fn forget(&self, chunk: Chunk, layer: usize) {
        self.layers.lock().remove(&(chunk, layer));
    }

    /// Works on what a bucket has under way; nothing slow may happen inside.
    pub fn bucket<T>(&self, bucket: usize, work: impl FnOnce(&mut BucketInFlight) -> T) -> T {
        work(self.buckets.lock().entry(bucket).or_default())
    }

    /// Takes one value out of a bucket's transit.
    ///
    /// **Errors**: [`Missing`].
    pub fn take_from_bucket<T>(
        &self,
        bucket: usize,
        what: &'static str,
        field: impl FnOnce(&mut BucketInFlight) -> &mut Option<T>,
    ) -> Result<T, Missing> {
        self.bucket(bucket, |in_flight| field(in_flight).take()).ok_or(Missing::OfBucket { what, bucket })
    }

    /// Takes out what was updated and is not gathered yet, by bucket: the next step's transit begins with it.
    pub fn take_updated(&self) -> BTreeMap<usize, (u64, Vec<Tensor>)> {
        let mut buckets = self.buckets.lock();
        let updated =
            buckets.iter_mut().map(|(&bucket, in_flight)| Some((bucket, in_flight.updated.take()?)));
        updated.flatten().collect()
    }

    /// Forgets the gradients of a step that is not updated.
    pub fn forget_buckets(&self) {
        self.buckets.lock().clear();
    }

    /// Number of tensors still under way: none, after a whole training step.
    pub fn num_left(&self) -> usize {
        let layers = self.layers.lock().len();
        let buckets = self.buckets.lock();
        self.streams().len() + layers + buckets.values().filter(|bucket| !bucket.is_empty()).count()
    }
}

fn name(kind: TransferKind) -> &'static str {
    match kind {
        TransferKind::Activation => "the activation",
        TransferKind::Gradient => "the gradient",
    }
}
