//! DualPipe and DualPipeV: one generator, since DualPipeV is the first half of DualPipe's ranks with the others folded
//! onto it.
//!
//! **Source**: report section 3.2.1 and the public DualPipe scheduler, restated as a rule: a rank's order depends on
//! nothing but its distance from the end of the pipeline.

use std::collections::VecDeque;

use super::action::{Action, Chunk, Plan};
use super::kind::{Mode, ScheduleError, ScheduleKind};

/// DualPipe on `ranks` ranks: the first half of the micro-batches enters at the first rank and climbs through the
/// stages towards the last, the second half enters at the last rank and goes the other way.
///
/// # Errors
/// No ranks or an odd number of them; micro-batches fewer than `2 * ranks` or odd in number.
pub fn dualpipe(ranks: usize, micro_batches: usize, mode: Mode) -> Result<Plan, ScheduleError> {
    ScheduleKind::Dualpipe.validate_batch(ranks, micro_batches)?;
    let half = ranks / 2;
    let per_stream = micro_batches / 2;
    let rank_actions = |rank| {
        let from_first = ChunkStream::new(rank, 0);
        let from_last = ChunkStream::new(ranks - 1 - rank, per_stream);
        let (distance, near, far) = if rank < half {
            (rank, from_first, from_last)
        } else {
            (ranks - 1 - rank, from_last, from_first)
        };
        RankOrder::new(near, far, mode).write(half, distance, per_stream)
    };
    Ok(ScheduleKind::Dualpipe.with_actions(ranks, micro_batches, rank_actions))
}

/// DualPipeV on `ranks` ranks: every micro-batch goes down through the first `ranks` stages, turns at the last rank
/// and comes back up through the other `ranks` stages.
///
/// # Errors
/// No ranks; fewer than `2 * ranks` micro-batches.
pub fn dualpipev(ranks: usize, micro_batches: usize, mode: Mode) -> Result<Plan, ScheduleError> {
    ScheduleKind::Dualpipev.validate_batch(ranks, micro_batches)?;
    let rank_actions = |rank| {
        let down = ChunkStream::new(rank, 0);
        let up = ChunkStream::new(2 * ranks - 1 - rank, 0);
        RankOrder::new(down, up, mode).write(ranks, rank, micro_batches)
    };
    Ok(ScheduleKind::Dualpipev.with_actions(ranks, micro_batches, rank_actions))
}

/// The chunks of one stage in the order in which they come by.
struct ChunkStream {
    stage: usize,
    next_forward: usize,
    next_backward: usize,
}

impl ChunkStream {
    fn new(stage: usize, first_micro_batch: usize) -> ChunkStream {
        ChunkStream { stage, next_forward: first_micro_batch, next_backward: first_micro_batch }
    }

    fn forward(&mut self) -> Chunk {
        self.next_forward += 1;
        Chunk { stage: self.stage, micro_batch: self.next_forward - 1 }
    }

    fn backward(&mut self) -> Chunk {
        self.next_backward += 1;
        Chunk { stage: self.stage, micro_batch: self.next_backward - 1 }
    }
}

/// Which of a rank's two streams.
#[derive(Clone, Copy)]
enum Side {
    /// Enters the pipeline at this rank's own end.
    Near,
    /// Comes from beyond the middle.
    Far,
}

/// A rank's list in the making.
struct RankOrder {
    near: ChunkStream,
    far: ChunkStream,
    mode: Mode,
    /// Chunks whose weight part is deferred, oldest first.
    deferred: VecDeque<Chunk>,
    actions: Vec<Action>,
}

impl RankOrder {
    fn new(near: ChunkStream, far: ChunkStream, mode: Mode) -> RankOrder {
        RankOrder { near, far, mode, deferred: VecDeque::new(), actions: Vec::new() }
    }

    /// The eight steps. `half` is the number of ranks between an end and the middle, `distance` this rank's own
    /// distance from the nearer end, `per_stream` the number of micro-batches in each stream.
    fn write(mut self, half: usize, distance: usize, per_stream: usize) -> Vec<Action> {
        use Side::{Far, Near};
        let inward = half - 1 - distance;
        let nearby = distance + 1;

        // Fill: the near stream until the far one arrives, then both; where the far stream's first gradients come
        // back before the pairs can start, their weight parts fill the wait for the next activation.
        for _ in 0..2 * inward {
            self.forward(Near);
        }
        for _ in 0..nearby {
            self.forward(Near);
            self.forward(Far);
        }
        for _ in 0..inward {
            self.backward_input(Far);
            self.backward_weight();
            self.forward(Far);
        }
        // Steady state: pairs. On the two middle ranks the first gradient is made from a forward just run, so there
        // is nothing to overlap it with yet.
        for pass in 0..per_stream - 2 * half + nearby {
            if pass == 0 && inward == 0 {
                self.forward(Near);
                self.backward(Far);
            } else {
                self.pair(Near, Far);
            }
            self.pair(Far, Near);
        }
        // Drain: weight parts of the last gradients are put off until there is nothing else to do.
        for _ in 0..inward {
            self.backward(Far);
            self.pair(Far, Near);
        }
        for turn in 0..2 * nearby {
            let side = if turn % 2 == 0 { Far } else { Near };
            if turn < nearby {
                self.backward(side);
            } else {
                self.backward_input(side);
            }
        }
        for _ in 0..inward {
            self.backward_weight();
            self.backward_input(Near);
        }
        for _ in 0..nearby {
            self.backward_weight();
        }
        self.actions
    }

    fn stream(&mut self, side: Side) -> &mut ChunkStream {
        match side {
            Side::Near => &mut self.near,
            Side::Far => &mut self.far,
        }
    }

    fn forward(&mut self, side: Side) {
        let chunk = self.stream(side).forward();
        self.actions.push(Action::Forward(chunk));
    }

    fn backward(&mut self, side: Side) {
        if self.mode == Mode::Train {
            let chunk = self.stream(side).backward();
            self.actions.push(Action::Backward(chunk));
        }
    }

    fn backward_input(&mut self, side: Side) {
        if self.mode == Mode::Train {
            let chunk = self.stream(side).backward();
            self.deferred.push_back(chunk);
            self.actions.push(Action::BackwardInput(chunk));
        }
    }

    fn backward_weight(&mut self) {
        if let Some(chunk) = self.deferred.pop_front() {
            self.actions.push(Action::BackwardWeight(chunk));
        }
    }

    fn pair(&mut self, forward: Side, backward: Side) {
        match self.mode {
            Mode::ForwardOnly => self.forward(forward),
            Mode::Train => {
                let forward = self.stream(forward).forward();
                let backward = self.stream(backward).backward();
                self.actions.push(Action::ForwardBackward { forward, backward });
            }
        }
    }
}
