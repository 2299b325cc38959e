//! When the operations of a step ran: on the virtual clock of [`walk`](super::walk()), or on a rank's own.
//!
//! One type for both, so that a plan, its simulation and a run of it can be laid side by side. Knows no clock.

use std::borrow::Borrow;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::program::{Lane, Program, Work};

/// When an operation ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Start: in the unit of the costs on a virtual clock, in seconds of a run.
    pub start: f64,
    /// End.
    pub end: f64,
}

impl Span {
    /// Its length.
    pub fn duration(&self) -> f64 {
        self.end - self.start
    }
}

/// Time in which a compute lane was free and could not go on, because something that its next operation needs from another
/// lane, and so mostly from another rank, was missing. What passes between the moment in which an operation could start and
/// its start is none of it: that is the cost of issuing and, where ranks outnumber cores, the wait for a core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Idle {
    /// Before operations of the passes: the bubble.
    pub passes: f64,
    /// Before operations of the update, and behind the last one: communication that nothing hides.
    pub update: f64,
}

/// When everything ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Timeline {
    /// `spans[program][op]`: one program for each pipeline rank on a virtual clock; of a run the programs that one rank has
    /// run, one after the other.
    pub spans: Vec<Vec<Span>>,
    /// The end of the last operation.
    pub makespan: f64,
    /// Per program, how long the compute lane was busy.
    pub compute_busy: Vec<f64>,
}

impl Timeline {
    /// Of programs whose operations ran at `spans[program][op]`.
    ///
    /// # Panics
    /// If there are more programs or operations than spans.
    pub fn new(programs: &[impl Borrow<Program>], spans: Vec<Vec<Span>>) -> Timeline {
        let makespan = spans.iter().flatten().map(|span| span.end).fold(0.0, f64::max);
        let busy = |(index, program): (usize, &Program)| {
            let on_compute = |id: &usize| program.ops[*id].lane == Lane::Compute;
            (0..program.ops.len()).filter(on_compute).map(|id| spans[index][id].duration()).sum()
        };
        let programs = programs.iter().map(Borrow::borrow);
        let compute_busy = programs.enumerate().map(busy).collect();
        Timeline { spans, makespan, compute_busy }
    }

    /// How long the compute lane was blocked in the programs `which`, one after the other, from `begin` until the end of their
    /// last operation.
    ///
    /// # Panics
    /// If there are no such programs.
    pub fn idle(&self, programs: &[impl Borrow<Program>], which: Range<usize>, begin: f64) -> Idle {
        let mut idle = Idle::default();
        let (mut free, mut end) = (begin, begin);
        for index in which {
            let (ops, spans) = (&programs[index].borrow().ops, &self.spans[index]);
            let begun = end;
            for (op, span) in ops.iter().zip(spans) {
                end = f64::max(end, span.end);
                if op.lane == Lane::Compute {
                    let ready = op.after.iter().map(|&needed| spans[needed].end).fold(begun, f64::max);
                    let blocked = f64::max(f64::min(ready, span.start) - free, 0.0);
                    match op.work {
                        Work::Component { .. } => idle.passes += blocked,
                        _ => idle.update += blocked,
                    }
                    free = f64::max(free, span.end);
                }
            }
        }
        idle.update += end - free;
        idle
    }
}
