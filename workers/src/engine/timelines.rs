//! The last steps of the ranks of this process, as they recorded them: a ring for each rank, always on.
//!
//! A rank puts a step here when it has ended: one lock, and the recording moves. What is asked for is put together only then. Knows
//! no actor, and nobody who reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use contraflow_runtime::schedule::{Plan, Program, RecordedRank, RecordedStep, Span};
use parking_lot::Mutex;

use super::recording::{Recorder, Recording};

/// How many steps of each rank are kept: of each 16 bytes for an operation, since its programs are the plan's own.
pub const KEPT_STEPS: usize = 4;

/// A step of a rank.
pub struct RankStep {
    /// The rank in the world.
    pub rank: usize,
    /// Its position in the pipeline.
    pub pipeline: usize,
    /// Number of the step.
    pub step: u64,
    /// The plan of its passes.
    pub plan: Arc<Plan>,
    /// What it ran, and when.
    pub recording: Recording,
}

/// The last steps of the ranks of a formation in this process. Clones share them.
#[derive(Clone)]
pub struct Timelines {
    num_ranks: usize,
    by_rank: Arc<Mutex<BTreeMap<usize, VecDeque<Arc<RankStep>>>>>,
}

impl Timelines {
    /// Of that many ranks, none of which has recorded anything.
    pub fn new(num_ranks: usize) -> Timelines {
        Timelines { num_ranks, by_rank: Arc::default() }
    }

    /// A rank has ended a step; the oldest that it has here goes.
    pub fn keep(&self, step: RankStep) {
        let step = Arc::new(step);
        let mut by_rank = self.by_rank.lock();
        let kept = by_rank.entry(step.rank).or_insert_with(|| VecDeque::with_capacity(KEPT_STEPS));
        let oldest = if kept.len() == KEPT_STEPS { kept.pop_front() } else { None };
        kept.push_back(step);
        drop(by_rank);
        // What is given back to the allocator is so outside of the lock.
        drop(oldest);
    }

    /// The newest step that every rank has ended; none before the first one has been.
    pub fn latest(&self) -> Option<RecordedStep> {
        self.ended().last().and_then(|steps| put_together(steps))
    }

    /// Every step that is kept and that every rank has ended, the newest one last.
    pub fn kept(&self) -> Vec<RecordedStep> {
        self.ended().iter().filter_map(|steps| put_together(steps)).collect()
    }

    /// The steps that every rank has ended, by rank.
    fn ended(&self) -> Vec<Vec<Arc<RankStep>>> {
        let by_rank = self.by_rank.lock();
        if by_rank.len() < self.num_ranks {
            return Vec::new();
        }
        let of_rank =
            |kept: &VecDeque<Arc<RankStep>>, step| kept.iter().find(|kept| kept.step == step).cloned();
        let steps = by_rank.values().next().into_iter().flatten().map(|kept| kept.step);
        steps.filter_map(|step| by_rank.values().map(|kept| of_rank(kept, step)).collect()).collect()
    }
}

/// The same step of all ranks, on one clock.
fn put_together(steps: &[Arc<RankStep>]) -> Option<RecordedStep> {
    let began = steps.iter().map(|step| step.recording.zero).min()?;
    let first = steps.first()?;
    let (step, plan) = (first.step, first.plan.clone());
    Some(RecordedStep { step, plan, ranks: steps.iter().map(|step| step.since(began)).collect() })
}

impl RankStep {
    /// The same as one program, its times counted from `began`.
    fn since(&self, began: Instant) -> RecordedRank {
        let offset = self.recording.zero.saturating_duration_since(began).as_secs_f64();
        let Recording { programs, timeline, .. } = &self.recording;
        let whole = |whole: Program, next: &Arc<Program>| whole.then(next);
        let first = programs.first().map(|program| Program::clone(program)).unwrap_or_default();
        let program = programs.iter().skip(1).fold(first, whole);
        let shift = |span: &Span| Span { start: span.start + offset, end: span.end + offset };
        let spans = timeline.spans.iter().flatten().map(shift).collect();
        RecordedRank { rank: self.rank, pipeline: self.pipeline, program, spans }
    }
}

/// What recording a step again takes, on one core and in the best of many times: the clock read twice for each operation, its span
/// noted, the idle time added up, the step put into a full ring. **Units**: seconds, all ranks of the step together.
pub fn cost_of_recording(step: &RecordedStep) -> f64 {
    const TIMES: usize = 32;
    let timelines = Timelines::new(step.ranks.len());
    let programs: Vec<Arc<Program>> = step.ranks.iter().map(|rank| Arc::new(rank.program.clone())).collect();
    let record = || {
        let began = Instant::now();
        for (rank, program) in step.ranks.iter().zip(&programs) {
            let mut recorder = Recorder::new(Instant::now());
            recorder.begin(program.clone());
            (0..program.ops.len()).for_each(|op| recorder.note(op, Instant::now(), Instant::now()));
            let (rank, pipeline, plan) = (rank.rank, rank.pipeline, step.plan.clone());
            timelines.keep(RankStep { rank, pipeline, step: step.step, plan, recording: recorder.finish() });
        }
        began.elapsed().as_secs_f64()
    };
    (0..TIMES).map(|_| record()).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contraflow_runtime::schedule::{Lane, Op, Timeline, Work};

    use super::*;

    /// A step in which AdamW's neighbour runs from 1 s to 2 s, of a rank that begins `late` after `zero`.
    fn step(rank: usize, step: u64, zero: Instant, late: u64) -> RankStep {
        let op = Op { lane: Lane::Compute, work: Work::Balance, after: Vec::new(), action: None };
        let programs = vec![Arc::new(Program::of(vec![op]))];
        let timeline = Timeline::new(&programs, vec![vec![Span { start: 1.0, end: 2.0 }]]);
        let zero = zero + Duration::from_secs(late);
        let recording = Recording { zero, programs, timeline, idle: Default::default() };
        let plan = Plan {
            schedule: "test".into(),
            stages: 1,
            micro_batches: 1,
            placement: vec![vec![0]],
            actions: vec![Vec::new()],
        };
        RankStep { rank, pipeline: 0, step, plan: Arc::new(plan), recording }
    }

    #[test]
    fn the_latest_is_the_newest_step_of_all_ranks_on_one_clock_and_the_memory_is_bounded() {
        let (timelines, zero) = (Timelines::new(2), Instant::now());
        assert!(timelines.latest().is_none());
        for number in 1..=100 {
            timelines.keep(step(1, number, zero, 3));
            assert_eq!(timelines.latest().map(|step| step.step), (number > 1).then(|| number - 1));
            timelines.keep(step(0, number, zero, 0));
            assert_eq!(timelines.latest().unwrap().step, number);
        }
        timelines.keep(step(0, 101, zero, 5));
        let latest = timelines.latest().unwrap();
        assert_eq!(latest.step, 100);
        let begins: Vec<_> = latest.ranks.iter().map(|rank| (rank.rank, rank.spans[0].start)).collect();
        assert_eq!(begins, [(0, 1.0), (1, 4.0)]);
        let kept: Vec<u64> = timelines.kept().iter().map(|step| step.step).collect();
        assert_eq!(kept, [98, 99, 100], "rank 0 has dropped 97, rank 1 has not ended 101");
        assert!(timelines.by_rank.lock().values().all(|kept| kept.len() == KEPT_STEPS));
    }
}
