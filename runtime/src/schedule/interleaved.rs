//! Interleaved 1F1B: rank `r` holds the stages `r`, `r + P`, `r + 2P`, ..., so that a micro-batch passes every rank several times and the
//! pipeline fills in smaller portions.
//!
//! **Source**: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.

use super::action::{Action, Chunk, Plan};
use super::kind::{Mode, ScheduleError, ScheduleKind};

/// Interleaved 1F1B with `per_rank` stages on each of `ranks` ranks; the micro-batches go round in groups of `ranks`.
///
/// # Errors
/// No ranks, or micro-batches that are no whole groups.
pub fn interleaved(
    ranks: usize,
    per_rank: usize,
    micro_batches: usize,
    mode: Mode,
) -> Result<Plan, ScheduleError> {
    let kind = ScheduleKind::Interleaved(per_rank);
    kind.validate_batch(ranks, micro_batches)?;
    let rounds = Rounds { ranks, per_rank, micro_batches };
    Ok(kind.with_actions(ranks, micro_batches, |rank| match mode {
        Mode::Train => rounds.train(rank),
        Mode::ForwardOnly => (0..rounds.len()).map(|at| Action::Forward(rounds.forward(rank, at))).collect(),
    }))
}

/// In which order a rank comes to its chunks: a group of micro-batches on its first stage, on its second one, and so on, then the next
/// group; backward with the last stage first.
struct Rounds {
    ranks: usize,
    per_rank: usize,
    micro_batches: usize,
}

impl Rounds {
    /// Chunks of a rank.
    fn len(&self) -> usize {
        self.per_rank * self.micro_batches
    }

    /// Which of the rank's stages a chunk is on, in the order of the pass, and its micro-batch.
    fn place(&self, at: usize) -> (usize, usize) {
        let of_group = self.ranks * self.per_rank;
        let (group, turn) = (at / of_group, at % of_group / self.ranks);
        (turn, group * self.ranks + at % self.ranks)
    }

    fn forward(&self, rank: usize, at: usize) -> Chunk {
        let (turn, micro_batch) = self.place(at);
        Chunk { stage: turn * self.ranks + rank, micro_batch }
    }

    fn backward(&self, rank: usize, at: usize) -> Chunk {
        let (turn, micro_batch) = self.place(at);
        Chunk { stage: (self.per_rank - 1 - turn) * self.ranks + rank, micro_batch }
    }

    /// A warm-up of forwards, then pairs of one forward and one backward, then the backwards that are left. Before its first backward
    /// a rank has run a group on each of its stages but the last one, and two chunks more for each rank behind it.
    fn train(&self, rank: usize) -> Vec<Action> {
        let warm_up = (self.per_rank - 1) * self.ranks + 2 * (self.ranks - 1 - rank);
        let warm_up = warm_up.min(self.len());
        let forward = |at| Action::Forward(self.forward(rank, at));
        let backward = |at| Action::Backward(self.backward(rank, at));
        let mut actions: Vec<Action> = (0..warm_up).map(forward).collect();
        for at in 0..self.len() - warm_up {
            actions.push(forward(warm_up + at));
            actions.push(backward(at));
        }
        actions.extend((self.len() - warm_up..self.len()).map(backward));
        actions
    }
}
