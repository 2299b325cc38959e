//! Which activations and gradients cross between pipeline ranks: a consequence of who runs which chunk.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::action::{Action, Chunk, Plan};
use super::program::TransferKind;

/// One activation or gradient on its way from one pipeline rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Message {
    /// Activation or gradient.
    pub kind: TransferKind,
    /// Micro-batch it belongs to.
    pub micro_batch: usize,
    /// The stage that made it.
    pub stage: usize,
    /// Pipeline rank that sends.
    pub from: usize,
    /// Pipeline rank that receives.
    pub to: usize,
}

/// Every message of a plan, by sending rank and there in the order of the actions that make them. Where both stages
/// are on one rank there is no message.
pub fn messages(plan: &Plan) -> Vec<Message> {
    let owners = Owners::of(plan);
    let mut found = Vec::new();
    for (from, list) in plan.actions.iter().enumerate() {
        for product in list.iter().flat_map(products) {
            if let Some(to) = owners.consumer(product).filter(|&to| to != from) {
                let Product { kind, chunk } = product;
                found.push(Message { kind, micro_batch: chunk.micro_batch, stage: chunk.stage, from, to });
            }
        }
    }
    found
}

/// What a chunk makes for its neighbour: the address of a message, or of a local hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    /// Activation or gradient.
    pub kind: TransferKind,
    /// The chunk that made it.
    pub chunk: Chunk,
}

impl Product {
    /// The chunk that needs it, unless it leaves the pipeline.
    pub fn consumer(self) -> Option<Chunk> {
        let stage = match self.kind {
            TransferKind::Activation => self.chunk.stage.checked_add(1),
            TransferKind::Gradient => self.chunk.stage.checked_sub(1),
        };
        stage.map(|stage| Chunk { stage, ..self.chunk })
    }

    /// What `chunk` needs from its neighbour to run forward (an activation) or backward (a gradient); nothing at the
    /// stage where a pass begins, which a plan shows by having no chunk there.
    pub fn needed_by(kind: TransferKind, chunk: Chunk) -> Option<Product> {
        let stage = match kind {
            TransferKind::Activation => chunk.stage.checked_sub(1),
            TransferKind::Gradient => chunk.stage.checked_add(1),
        };
        stage.map(|stage| Product { kind, chunk: Chunk { stage, ..chunk } })
    }
}

/// What an action makes for other stages.
fn products(action: &Action) -> impl Iterator<Item = Product> {
    let activations = action.forwards().map(|chunk| Product { kind: TransferKind::Activation, chunk });
    let gradient = action.backward_input().map(|chunk| Product { kind: TransferKind::Gradient, chunk });
    activations.chain(gradient)
}

/// Which rank runs which chunk. Where a faulty plan runs one twice, the first rank counts.
pub(super) struct Owners {
    forward: HashMap<Chunk, usize>,
    backward: HashMap<Chunk, usize>,
}

impl Owners {
    pub fn of(plan: &Plan) -> Owners {
        let mut owners = Owners { forward: HashMap::new(), backward: HashMap::new() };
        for (rank, list) in plan.actions.iter().enumerate() {
            for action in list {
                for chunk in action.forwards() {
                    owners.forward.entry(chunk).or_insert(rank);
                }
                if let Some(chunk) = action.backward_input() {
                    owners.backward.entry(chunk).or_insert(rank);
                }
            }
        }
        owners
    }

    /// The rank that needs a product, if any does.
    pub fn consumer(&self, product: Product) -> Option<usize> {
        let chunk = product.consumer()?;
        match product.kind {
            TransferKind::Activation => self.forward.get(&chunk).copied(),
            TransferKind::Gradient => self.backward.get(&chunk).copied(),
        }
    }
}
