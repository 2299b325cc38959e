//! Which operations of a program are issued next: those of a lane in order, up to a bound ahead of the lane's last completed one.
//!
//! The bound is of each lane for itself, so it holds back nothing that the order of a lane does not hold back by itself: the
//! proof of a plan, which knows no bound, holds for what is issued. Knows neither threads nor clocks.

use std::collections::{HashMap, VecDeque};

use contraflow_runtime::schedule::{Lane, OpId, Program};

/// Operations of a lane that are issued and not yet completed; it bounds what an abort has to wait for and what lies in the
/// lanes' queues.
const PER_LANE: usize = 32;

/// The operations of a program that are not yet issued.
#[derive(Default)]
pub struct Unissued {
    by_lane: HashMap<Lane, VecDeque<OpId>>,
}

impl Unissued {
    /// Of a program that begins, and what is issued at once, in program order.
    pub fn begin(program: &Program) -> (Unissued, Vec<OpId>) {
        let mut by_lane: HashMap<Lane, VecDeque<OpId>> = HashMap::new();
        for (id, op) in program.ops.iter().enumerate() {
            by_lane.entry(op.lane).or_default().push_back(id);
        }
        let first = |queue: &mut VecDeque<OpId>| queue.drain(..PER_LANE.min(queue.len())).collect::<Vec<_>>();
        let mut at_once: Vec<OpId> = by_lane.values_mut().flat_map(first).collect();
        at_once.sort_unstable();
        (Unissued { by_lane }, at_once)
    }

    /// An operation of this lane has completed; returns the one to issue for it.
    pub fn next(&mut self, lane: Lane) -> Option<OpId> {
        self.by_lane.get_mut(&lane)?.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::schedule::{Chunk, Op, TransferKind, Work};

    use super::*;

    fn program(lanes: &[(Lane, usize)]) -> Program {
        let work = Work::Send { kind: TransferKind::Activation, chunk: Chunk { stage: 0, micro_batch: 0 } };
        let ops = lanes.iter().flat_map(|&(lane, times)| (0..times).map(move |_| lane));
        Program::of(ops.map(|lane| Op { lane, work, after: Vec::new(), action: None }).collect())
    }

    #[test]
    fn a_lane_that_waits_holds_no_other_lane_back() {
        let program = program(&[(Lane::Receive(1), 1000), (Lane::Compute, 3), (Lane::Send(1), 40)]);
        let (mut unissued, at_once) = Unissued::begin(&program);
        let receives = 0..PER_LANE;
        assert_eq!(at_once, receives.chain(1000..1003).chain(1003..1003 + PER_LANE).collect::<Vec<_>>());
        assert_eq!(unissued.next(Lane::Compute), None);
        assert_eq!(unissued.next(Lane::Send(1)), Some(1003 + PER_LANE));
        assert_eq!(unissued.next(Lane::Receive(1)), Some(PER_LANE));
    }
}
