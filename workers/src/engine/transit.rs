//! What the lanes of a rank share while a program runs: the tensors on their way from one operation to the next.
//!
//! Ownership moves through here: an operation takes what the one before it put. Knows tensors and chunks, no arithmetic.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contraflow_kernels::gate::Routing;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::schedule::{Chunk, TransferKind};

use crate::comm::all_to_all::Route;
use crate::error::Missing;
use crate::model::experts::Arrivals;

/// What one layer of one chunk has under way between the compute lane and the expert lane.
#[derive(Default)]
pub struct LayerTransit {
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

/// The tensors under way.
#[derive(Default)]
pub struct Transit {
    /// The activation or gradient at the present end of a chunk; at a stage's edge, what the neighbour stage takes.
    streams: Mutex<HashMap<(TransferKind, Chunk), Tensor>>,
    layers: Mutex<HashMap<(Chunk, usize), LayerTransit>>,
}

impl Transit {
    fn streams(&self) -> MutexGuard<'_, HashMap<(TransferKind, Chunk), Tensor>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the present end of a chunk.
    pub fn put(&self, kind: TransferKind, chunk: Chunk, tensor: Tensor) {
        self.streams().insert((kind, chunk), tensor);
    }

    /// Takes the present end of a chunk.
    ///
    /// **Errors**: [`Missing`].
    pub fn take(&self, kind: TransferKind, chunk: Chunk) -> Result<Tensor, Missing> {
        self.streams().remove(&(kind, chunk)).ok_or(Missing { what: name(kind), chunk, layer: 0 })
    }

    /// Shares the present end of a chunk with an operation that is not its last user.
    ///
    /// **Errors**: [`Missing`].
    pub fn share(&self, kind: TransferKind, chunk: Chunk) -> Result<Tensor, Missing> {
        self.streams().get(&(kind, chunk)).cloned().ok_or(Missing { what: name(kind), chunk, layer: 0 })
    }

    /// Works on what a layer has under way; nothing slow may happen inside.
    pub fn layer<T>(&self, chunk: Chunk, layer: usize, work: impl FnOnce(&mut LayerTransit) -> T) -> T {
        work(self.layers.lock().unwrap_or_else(PoisonError::into_inner).entry((chunk, layer)).or_default())
    }

    /// Takes one value out of a layer's transit.
    ///
    /// **Errors**: [`Missing`].
    pub fn take_from<T>(
        &self,
        (chunk, layer): (Chunk, usize),
        what: &'static str,
        field: impl FnOnce(&mut LayerTransit) -> &mut Option<T>,
    ) -> Result<T, Missing> {
        self.layer(chunk, layer, |transit| field(transit).take()).ok_or(Missing { what, chunk, layer })
    }

    /// Forgets a layer whose backward pass has ended.
    pub fn forget(&self, chunk: Chunk, layer: usize) {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).remove(&(chunk, layer));
    }

    /// Number of tensors still under way: none, after a whole training step.
    pub fn num_left(&self) -> usize {
        self.streams().len() + self.layers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

fn name(kind: TransferKind) -> &'static str {
    match kind {
        TransferKind::Activation => "the activation",
        TransferKind::Gradient => "the gradient",
    }
}
