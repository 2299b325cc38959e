//! A bucket: parameters that are reduced, updated and gathered together, and the ranks that hold them. Knows no operation.

use serde::{Deserialize, Serialize};

use crate::topology::Topology;

/// What a bucket holds of its stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Contents {
    /// Everything but the other two.
    Dense,
    /// The token embedding, which multi-token prediction, and a head that is tied to it, share with the first stage.
    Embedding,
    /// The routed experts.
    Experts,
}

/// Parameters that are reduced, updated and gathered together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// The same number on every rank that holds it.
    pub number: usize,
    /// What it holds.
    pub contents: Contents,
    /// Of which stages; more than one only where they share a tensor.
    pub stages: Vec<usize>,
    /// For the embedding: whether it is the head as well.
    pub tied: bool,
    /// The pipeline ranks that hold one of these stages, ascending.
    pub positions: Vec<usize>,
    /// How many ranks hold the same parameters.
    pub copies: usize,
}

impl Bucket {
    /// The ranks that hold the same parameters as the one with expert coordinate `expert`, ascending: its replica group.
    pub fn ranks(&self, topology: &Topology, expert: usize) -> Vec<usize> {
        let holds = |rank: &usize| {
            let at = topology.coordinates(*rank);
            self.positions.contains(&at.pipeline)
                && (self.contents != Contents::Experts || at.expert == expert)
        };
        topology.ranks().filter(holds).collect()
    }
}
