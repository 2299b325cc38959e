//! A step that ranks have run, as they recorded it, and the same programs on the virtual clock beside it.
//!
//! Knows no clock and no files: the recording itself is the ranks' (`workers`), pictures of it are the simulator's.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::action::{Chunk, Plan};
use super::deadlock::Deadlock;
use super::program::{Component, Op, Program, Work};
use super::timeline::{Span, Timeline};
use super::walk::walk;

/// A step of a run, of every rank that recorded it.
#[derive(Clone, Debug)]
pub struct RecordedStep {
    /// Its number.
    pub step: u64,
    /// The plan of its passes.
    pub plan: Arc<Plan>,
    /// By rank.
    pub ranks: Vec<RecordedRank>,
}

/// What one rank ran of a step.
#[derive(Clone, Debug)]
pub struct RecordedRank {
    /// The rank in the world.
    pub rank: usize,
    /// Its position in the pipeline: which actions of the plan are its own.
    pub pipeline: usize,
    /// The programs of the step, one after the other.
    pub program: Program,
    /// When its operations ran. **Units**: seconds since the first rank began the step.
    pub spans: Vec<Span>,
}

impl RecordedStep {
    /// What the plan makes of the step: the programs of each pipeline coordinate on the virtual clock, where an operation takes as
    /// long as those of its kind took there. Computation counts with its mean; what waits for other ranks with its shortest time,
    /// in which the waiting is least. **Units**: seconds.
    ///
    /// So what is measured takes longer by what a plan does not know: ranks that wait for a core, and operations of uneven length.
    ///
    /// # Errors
    /// A [`Deadlock`], if the programs are not of one step.
    pub fn planned(&self) -> Result<(Vec<Program>, Timeline), Deadlock> {
        let mut times: HashMap<(usize, Work), Time> = HashMap::new();
        let mut programs: BTreeMap<usize, &Program> = BTreeMap::new();
        for rank in &self.ranks {
            programs.entry(rank.pipeline).or_insert(&rank.program);
            for (op, span) in rank.program.ops.iter().zip(&rank.spans) {
                times.entry((rank.pipeline, kind(&op.work))).or_default().add(span.duration());
            }
        }
        let programs: Vec<Program> = programs.into_values().cloned().collect();
        let cost = |pipeline: usize, op: &Op| {
            let time = times.get(&(pipeline, kind(&op.work)));
            time.map_or(0.0, |time| if waits_for_others(&op.work) { time.shortest } else { time.mean() })
        };
        let timeline = walk(&programs, cost)?;
        Ok((programs, timeline))
    }
}

/// Times of the operations of one kind. **Units**: seconds.
struct Time {
    sum: f64,
    count: f64,
    shortest: f64,
}

impl Default for Time {
    fn default() -> Self {
        Time { sum: 0.0, count: 0.0, shortest: f64::INFINITY }
    }
}

impl Time {
    fn add(&mut self, seconds: f64) {
        (self.sum, self.count) = (self.sum + seconds, self.count + 1.0);
        self.shortest = f64::min(self.shortest, seconds);
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }
}

/// The operation, of whichever micro-batch.
fn kind(work: &Work) -> Work {
    let any = |chunk: Chunk| Chunk { micro_batch: 0, ..chunk };
    match *work {
        Work::Component { pass, chunk, layer, component } => {
            Work::Component { pass, chunk: any(chunk), layer, component }
        }
        Work::Send { kind, chunk } => Work::Send { kind, chunk: any(chunk) },
        Work::Receive { kind, chunk } => Work::Receive { kind, chunk: any(chunk) },
        work => work,
    }
}

/// Whether what an operation takes is mostly the waiting for other ranks.
fn waits_for_others(work: &Work) -> bool {
    match work {
        Work::Component { component, .. } => matches!(component, Component::Dispatch | Component::Combine),
        Work::Send { .. } | Work::Receive { .. } | Work::AwaitReplica => true,
        work => work.is_collective(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::program::{Lane, Pass, TransferKind};
    use super::*;

    fn op(lane: Lane, work: Work, after: &[usize]) -> Op {
        Op { lane, work, after: after.to_vec(), action: None }
    }

    fn forward(stage: usize, micro_batch: usize) -> Work {
        let chunk = Chunk { stage, micro_batch };
        Work::Component { pass: Pass::Forward, chunk, layer: stage, component: Component::Attention }
    }

    #[test]
    fn the_walk_takes_means_of_computation_and_no_waiting() {
        let sent = |micro_batch| Chunk { stage: 0, micro_batch };
        let send = |micro_batch| Work::Send { kind: TransferKind::Activation, chunk: sent(micro_batch) };
        let receive =
            |micro_batch| Work::Receive { kind: TransferKind::Activation, chunk: sent(micro_batch) };
        let first = Program::of(vec![
            op(Lane::Compute, forward(0, 0), &[]),
            op(Lane::Send(1), send(0), &[0]),
            op(Lane::Compute, forward(0, 1), &[]),
            op(Lane::Send(1), send(1), &[2]),
        ]);
        let second = Program::of(vec![
            op(Lane::Receive(0), receive(0), &[]),
            op(Lane::Compute, forward(1, 0), &[0]),
            op(Lane::Receive(0), receive(1), &[]),
            op(Lane::Compute, forward(1, 1), &[2]),
        ]);
        let spans = |times: &[(f64, f64)]| times.iter().map(|&(start, end)| Span { start, end }).collect();
        let plan = Plan {
            schedule: "test".into(),
            stages: 2,
            micro_batches: 2,
            placement: vec![vec![0], vec![1]],
            actions: vec![Vec::new(), Vec::new()],
        };
        let ranks = vec![
            RecordedRank {
                rank: 0,
                pipeline: 0,
                program: first,
                spans: spans(&[(0.0, 2.0), (2.0, 2.5), (2.0, 6.0), (6.0, 9.0)]),
            },
            RecordedRank {
                rank: 1,
                pipeline: 1,
                program: second,
                spans: spans(&[(0.0, 2.6), (3.0, 4.0), (2.6, 9.0), (9.0, 10.0)]),
            },
        ];
        let (programs, timeline) = RecordedStep { step: 1, plan: Arc::new(plan), ranks }.planned().unwrap();
        // Forward passes of 3 and 1, transfers of 0.5: the second rank ends with the second one.
        assert_eq!(programs.len(), 2);
        assert_eq!(timeline.spans[0][2], Span { start: 3.0, end: 6.0 });
        assert_eq!(timeline.spans[1][3], Span { start: 6.5, end: 7.5 });
        assert_eq!(timeline.makespan, 7.5);
    }
}
