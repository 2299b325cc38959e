//! What a rank's recording says of the passes of a step, and the virtual clock on which operations take what they took. Pure.

use std::collections::HashMap;

use contraflow_runtime::schedule::{Action, Lane, Op, Program, Span, Work, walk};

/// The passes of a step on one rank.
#[derive(Clone, Debug)]
pub struct Passes {
    pub rank: usize,
    /// From the first operation's begin to the last one's end. **Units**: seconds.
    pub span_s: f64,
    /// The compute lane at work. **Units**: seconds.
    pub compute_s: f64,
    /// The compute lane between two operations. **Units**: seconds.
    pub waits_s: f64,
    /// The compute lane in `F&B` pairs, waits included. **Units**: seconds.
    pub pairs_s: f64,
    /// Those waits. **Units**: seconds.
    pub pair_waits_s: f64,
    /// What each operation took. **Units**: seconds.
    pub took: HashMap<Work, f64>,
}

/// Whether an operation exchanges rows with other ranks.
pub fn is_exchange(op: &Op) -> bool {
    op.lane == Lane::Expert
}

fn is_pass(op: &Op) -> bool {
    matches!(op.work, Work::Component { .. })
}

impl Passes {
    /// Of a program that ran, with the rank's actions.
    pub fn of(rank: usize, program: &Program, spans: &[Span], actions: &[Action]) -> Passes {
        let ops = || program.ops.iter().zip(spans);
        let begin =
            ops().filter(|(op, _)| is_pass(op)).map(|(_, span)| span.start).fold(f64::INFINITY, f64::min);
        let end = ops().filter(|(op, _)| is_pass(op)).map(|(_, span)| span.end).fold(begin, f64::max);
        let mut passes = Passes {
            rank,
            span_s: end - begin,
            compute_s: 0.0,
            waits_s: 0.0,
            pairs_s: 0.0,
            pair_waits_s: 0.0,
            took: ops().filter(|(op, _)| is_pass(op)).map(|(op, span)| (op.work, span.duration())).collect(),
        };
        let mut free = begin;
        for (op, span) in ops().filter(|(op, _)| op.lane == Lane::Compute) {
            let waited = f64::max(span.start - free, 0.0);
            free = f64::max(free, span.end);
            if !is_pass(op) {
                continue;
            }
            passes.compute_s += span.duration();
            passes.waits_s += waited;
            let action = op.action.and_then(|action| actions.get(action));
            if let Some(Action::ForwardBackward { .. }) = action {
                passes.pairs_s += span.duration() + waited;
                passes.pair_waits_s += waited;
            }
        }
        // What comes behind the last computation.
        passes.waits_s += f64::max(end - free, 0.0);
        passes
    }
}

/// The middle one; 0 of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// How long operations take. **Units**: seconds.
#[derive(Clone, Debug)]
pub struct Costs(HashMap<Work, f64>);

impl Costs {
    /// Medians over steps: of a computation on the slower rank, which the other one waits for; of an exchange on the one that came to
    /// it last, and so waited for no other.
    pub fn of(program: &Program, passes: &[Passes]) -> Costs {
        let ranks = passes.iter().map(|passes| passes.rank + 1).max().unwrap_or(0);
        let took = |rank: usize, work: &Work| {
            let of_rank = passes.iter().filter(|passes| passes.rank == rank);
            median(of_rank.filter_map(|passes| passes.took.get(work).copied()).collect())
        };
        let cost = |op: &Op| {
            let each = (0..ranks).map(|rank| took(rank, &op.work));
            let cost =
                if is_exchange(op) { each.fold(f64::INFINITY, f64::min) } else { each.fold(0.0, f64::max) };
            (op.work, cost)
        };
        Costs(program.ops.iter().map(cost).collect())
    }

    /// Of one operation; 0 of one that never ran.
    pub fn get(&self, work: &Work) -> f64 {
        self.0.get(work).copied().unwrap_or_default()
    }

    /// With exchanges as long as in `others` and a link's time each on top.
    pub fn with_exchanges(mut self, program: &Program, others: &Costs, link_s: f64) -> Costs {
        for op in program.ops.iter().filter(|op| is_exchange(op)) {
            self.0.insert(op.work, others.get(&op.work) + link_s);
        }
        self
    }

    /// The passes on the virtual clock.
    ///
    /// # Errors
    /// In words, if it deadlocks.
    pub fn walk(&self, program: &Program, actions: &[Action]) -> Result<Passes, String> {
        let cost = |_: usize, op: &Op| self.get(&op.work);
        let timeline = walk(std::slice::from_ref(program), cost).map_err(|deadlock| deadlock.to_string())?;
        Ok(Passes::of(0, program, &timeline.spans[0], actions))
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::schedule::{Chunk, Component, Pass};

    use super::*;

    fn op(lane: Lane, layer: usize, after: &[usize], action: usize) -> Op {
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let component = if lane == Lane::Expert { Component::Dispatch } else { Component::Attention };
        let work = Work::Component { pass: Pass::Forward, chunk, layer, component };
        Op { lane, work, after: after.to_vec(), action: Some(action) }
    }

    fn program() -> Program {
        Program::of(vec![
            op(Lane::Compute, 0, &[], 0),
            op(Lane::Expert, 0, &[0], 0),
            op(Lane::Compute, 1, &[1], 1),
            op(Lane::Compute, 2, &[], 1),
            op(Lane::Expert, 2, &[3], 1),
        ])
    }

    fn actions() -> [Action; 2] {
        let chunk = |micro_batch| Chunk { stage: 0, micro_batch };
        [Action::Forward(chunk(0)), Action::ForwardBackward { forward: chunk(1), backward: chunk(0) }]
    }

    fn passes(rank: usize, spans: &[(f64, f64)]) -> Passes {
        let spans: Vec<Span> = spans.iter().map(|&(start, end)| Span { start, end }).collect();
        Passes::of(rank, &program(), &spans, &actions())
    }

    #[test]
    fn waits_are_what_the_compute_lane_does_not_work() {
        let passes = passes(0, &[(1.0, 3.0), (3.0, 7.0), (7.0, 9.0), (10.0, 12.0), (12.0, 15.0)]);
        assert_eq!((passes.span_s, passes.compute_s, passes.waits_s), (14.0, 6.0, 4.0 + 1.0 + 3.0));
        assert_eq!((passes.pairs_s, passes.pair_waits_s), (9.0, 5.0));
    }

    #[test]
    fn the_clock_takes_the_slower_computation_and_the_exchange_that_waited_for_nobody() {
        let first = passes(0, &[(0.0, 2.0), (2.0, 6.0), (6.0, 8.0), (8.0, 10.0), (10.0, 11.0)]);
        let second = passes(1, &[(0.0, 5.0), (5.0, 6.0), (6.0, 7.0), (7.0, 8.0), (8.0, 11.0)]);
        let costs = Costs::of(&program(), &[first, second]);
        // 5, 1, 2, 2, 1 one after the other; with links 10 more for each exchange.
        assert_eq!(costs.walk(&program(), &actions()).unwrap().span_s, 11.0);
        let linked = costs.clone().with_exchanges(&program(), &costs, 10.0);
        let linked = linked.walk(&program(), &actions()).unwrap();
        // The pair waits for the first exchange.
        assert_eq!((linked.span_s, linked.pair_waits_s), (31.0, 11.0));
    }
}
