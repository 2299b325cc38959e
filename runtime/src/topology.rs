//! The place of a rank: coordinates along the three axes, and the groups along each of them.
//!
//! World = pipeline x expert x data. Expert ranks are neighbours in number so that an expert group falls into one node
//! or block; then data, then pipeline. Ranks are numbers here, in loops and sums; who is meant says
//! an id (`ids`). Knows no hosts and no transport.

mod ids;
mod job_id;

pub use ids::{FormationId, Generation, Rank};
pub use job_id::JobId;

pub mod collective;

use serde::{Deserialize, Serialize};

/// Sizes of the three axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Topology {
    /// Pipeline ranks.
    pub pipeline: usize,
    /// Expert ranks: the routed experts are spread over them.
    pub expert: usize,
    /// Data ranks: copies of everything else.
    pub data: usize,
}

/// A rank's place on the three axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Coordinates {
    /// Along the pipeline axis.
    pub pipeline: usize,
    /// Along the data axis.
    pub data: usize,
    /// Along the expert axis.
    pub expert: usize,
}

impl Topology {
    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.pipeline * self.expert * self.data
    }

    /// Number of columns: groups of ranks that see different tokens (expert x data).
    pub fn dp_size(&self) -> usize {
        self.expert * self.data
    }

    /// The coordinates of a rank.
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        Coordinates {
            pipeline: rank / self.dp_size(),
            data: rank % self.dp_size() / self.expert,
            expert: rank % self.expert,
        }
    }

    /// The rank at some coordinates.
    pub fn rank(&self, at: Coordinates) -> usize {
        (at.pipeline * self.data + at.data) * self.expert + at.expert
    }

    /// The column of a rank: which share of the global batch its pipeline works on.
    pub fn dp_rank(&self, rank: usize) -> usize {
        rank % self.dp_size()
    }

    /// The ranks of the expert group of `rank`, in order.
    pub fn expert_group(&self, rank: usize) -> Vec<usize> {
        let at = self.coordinates(rank);
        (0..self.expert).map(|expert| self.rank(Coordinates { expert, ..at })).collect()
    }

    /// One rank of each column, by column: those at pipeline position `pipeline`.
    pub fn dp_group(&self, pipeline: usize) -> Vec<usize> {
        (pipeline * self.dp_size()..(pipeline + 1) * self.dp_size()).collect()
    }

    /// The rank at pipeline position `pipeline` in the column of `rank`.
    pub fn pipeline_peer(&self, rank: usize, pipeline: usize) -> usize {
        self.rank(Coordinates { pipeline, ..self.coordinates(rank) })
    }

    /// Every rank, in order.
    pub fn ranks(&self) -> std::ops::Range<usize> {
        0..self.world()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_and_rank_are_inverse() {
        let topology = Topology { pipeline: 4, expert: 3, data: 2 };
        for rank in topology.ranks() {
            assert_eq!(topology.rank(topology.coordinates(rank)), rank);
            assert!(topology.expert_group(rank).contains(&rank));
            assert_eq!(topology.pipeline_peer(rank, topology.coordinates(rank).pipeline), rank);
        }
        assert_eq!(topology.expert_group(7), vec![6, 7, 8]);
    }
}
