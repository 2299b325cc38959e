//! What is recorded of a task while it runs: its programs, and when each of their operations began and ended.
//!
//! The zero is the moment in which the rank began the task, so the time until the first operation is in it: the loading of the
//! batch, where that was not over before.

use std::sync::Arc;
use std::time::Instant;

use contraflow_runtime::schedule::{Lane, OpId, Program, Span, Timeline, Work};

/// A task that has ended.
pub struct Recording {
    /// What the rank has run, in order.
    pub programs: Vec<Arc<Program>>,
    /// When. **Units**: seconds since the rank began the task.
    pub timeline: Timeline,
    /// How long the compute lane was blocked in the passes: from their beginning to the end of the last of its operations,
    /// what it did not work. **Units**: seconds.
    pub bubble_s: f64,
}

/// Records a task under way.
pub(super) struct Recorder {
    zero: Instant,
    passes_began: f64,
    programs: Vec<Arc<Program>>,
    spans: Vec<Vec<Span>>,
}

impl Recorder {
    /// Of a task that the rank began at `zero` and whose passes begin now.
    pub fn new(zero: Instant) -> Self {
        let passes_began = zero.elapsed().as_secs_f64();
        Recorder { zero, passes_began, programs: Vec::new(), spans: Vec::new() }
    }

    /// A program begins.
    pub fn begin(&mut self, program: Arc<Program>) {
        self.spans.push(vec![Span::default(); program.ops.len()]);
        self.programs.push(program);
    }

    /// An operation of the latest program has completed.
    pub fn note(&mut self, op: OpId, began: Instant, ended: Instant) {
        let seconds = |at: Instant| at.saturating_duration_since(self.zero).as_secs_f64();
        let span = Span { start: seconds(began), end: seconds(ended) };
        if let Some(place) = self.spans.last_mut().and_then(|spans| spans.get_mut(op)) {
            *place = span;
        }
    }

    /// The task has ended.
    pub fn finish(self) -> Recording {
        let bubble_s = self.bubble();
        let timeline = Timeline::new(&self.programs, self.spans);
        Recording { programs: self.programs, timeline, bubble_s }
    }

    fn bubble(&self) -> f64 {
        let passes = self.programs.first().zip(self.spans.first());
        let ops = passes.into_iter().flat_map(|(program, spans)| program.ops.iter().zip(spans));
        let computed =
            ops.filter(|(op, _)| op.lane == Lane::Compute && matches!(op.work, Work::Component { .. }));
        let (busy, end) = computed.fold((0.0, self.passes_began), |(busy, end), (_, span)| {
            (busy + span.duration(), f64::max(end, span.end))
        });
        end - self.passes_began - busy
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contraflow_runtime::schedule::{Chunk, Component, Op, Pass};

    use super::*;

    fn op(lane: Lane, work: Work) -> Op {
        Op { lane, work, after: Vec::new(), action: None }
    }

    #[test]
    fn the_bubble_is_what_the_compute_lane_did_not_work_until_its_last_pass() {
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let pass =
            |layer| Work::Component { pass: Pass::Forward, chunk, layer, component: Component::Attention };
        let passes = Program::of(vec![
            op(Lane::Compute, pass(0)),
            op(Lane::Expert, pass(1)),
            op(Lane::Compute, pass(2)),
            op(Lane::Compute, Work::GradNorm { bucket: 0 }),
        ]);
        let update = Program::of(vec![op(Lane::Compute, Work::Balance)]);
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let mut recorder = Recorder { passes_began: 0.010, ..Recorder::new(zero) };
        recorder.begin(Arc::new(passes));
        for (op, (began, ended)) in [(12, 20), (20, 30), (31, 41), (50, 60)].into_iter().enumerate() {
            recorder.note(op, at(began), at(ended));
        }
        recorder.begin(Arc::new(update));
        recorder.note(0, at(70), at(75));
        let Recording { timeline, bubble_s, programs } = recorder.finish();
        assert!((bubble_s - 0.013).abs() < 1e-12, "2 ms until it begins and 11 ms between: {bubble_s}");
        assert_eq!(programs.len(), 2);
        let lengths: Vec<usize> = timeline.spans.iter().map(Vec::len).collect();
        assert_eq!((lengths, timeline.makespan), (vec![4, 1], 0.075));
        let busy: Vec<f64> = timeline.compute_busy.iter().map(|busy| (busy * 1e3).round()).collect();
        assert_eq!(busy, [28.0, 5.0]);
    }
}
