//! What is recorded of a task while it runs: its programs, and when each of their operations began and ended.
//!
//! The zero is the moment in which the rank began the task, so the time until the first operation is in it: the loading of the
//! batch, where that was not over before.

use std::sync::Arc;
use std::time::Instant;

use contraflow_runtime::schedule::{Idle, OpId, Program, Span, Timeline};

/// A task that has ended.
pub struct Recording {
    /// When the rank began the task.
    pub zero: Instant,
    /// What the rank has run, in order.
    pub programs: Vec<Arc<Program>>,
    /// When. **Units**: seconds since the rank began the task.
    pub timeline: Timeline,
    /// How long the compute lane was blocked since the first program began. **Units**: seconds.
    pub idle: Idle,
}

/// Records a task under way.
pub(super) struct Recorder {
    zero: Instant,
    /// When the first program began.
    began: f64,
    programs: Vec<Arc<Program>>,
    spans: Vec<Vec<Span>>,
}

impl Recorder {
    /// Of a task that the rank began at `zero` and whose first program begins now.
    pub fn new(zero: Instant) -> Self {
        let began = zero.elapsed().as_secs_f64();
        Recorder { zero, began, programs: Vec::new(), spans: Vec::new() }
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
        let timeline = Timeline::new(&self.programs, self.spans);
        let idle = timeline.idle(&self.programs, 0..self.programs.len(), self.began);
        Recording { zero: self.zero, programs: self.programs, timeline, idle }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contraflow_runtime::schedule::{Chunk, Component, Lane, Op, Pass, Work};

    use super::*;

    fn op(lane: Lane, work: Work, after: &[OpId]) -> Op {
        Op { lane, work, after: after.to_vec(), action: None }
    }

    #[test]
    fn idle_is_what_an_operation_lacks_from_other_lanes_and_no_late_start() {
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let pass =
            |layer| Work::Component { pass: Pass::Forward, chunk, layer, component: Component::Attention };
        let passes = Program::of(vec![
            op(Lane::Compute, pass(0), &[]),
            op(Lane::Expert, pass(1), &[0]),
            op(Lane::Compute, pass(2), &[1]),
            op(Lane::Collective, Work::Reduce { bucket: 0 }, &[2]),
            op(Lane::Compute, pass(3), &[0]),
            op(Lane::Compute, Work::GradNorm { bucket: 0 }, &[3]),
        ]);
        let update = Program::of(vec![
            op(Lane::Compute, Work::Balance, &[]),
            op(Lane::Collective, Work::Gather { bucket: 0 }, &[0]),
        ]);
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let mut recorder = Recorder { began: 0.010, ..Recorder::new(zero) };
        recorder.begin(Arc::new(passes));
        let spans = [(12, 20), (21, 30), (31, 41), (41, 58), (47, 50), (60, 70)];
        for (op, (began, ended)) in spans.into_iter().enumerate() {
            recorder.note(op, at(began), at(ended));
        }
        recorder.begin(Arc::new(update));
        recorder.note(0, at(73), at(75));
        recorder.note(1, at(75), at(90));
        let Recording { timeline, idle, programs, .. } = recorder.finish();
        let ms = |seconds: f64| (seconds * 1e3).round();
        // 10 from the first pass to what it gave the experts and got back, nothing before the first and the third, which could
        // have started earlier; 8 until the reduction's end, and 15 behind the biases.
        assert_eq!([idle.passes, idle.update].map(ms), [10.0, 23.0]);
        assert_eq!(programs.len(), 2);
        let lengths: Vec<usize> = timeline.spans.iter().map(Vec::len).collect();
        assert_eq!((lengths, ms(timeline.makespan)), (vec![6, 2], 90.0));
        assert_eq!(timeline.compute_busy.iter().copied().map(ms).collect::<Vec<_>>(), [31.0, 2.0]);
    }
}
