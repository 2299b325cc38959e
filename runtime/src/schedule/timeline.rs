//! When the operations of a step ran: on the virtual clock of [`walk`](super::walk()), or on a rank's own.
//!
//! One type for both, so that a plan, its simulation and a run of it can be laid side by side. Knows no clock.

use std::borrow::Borrow;

use serde::Serialize;

use super::program::{Lane, Program};

/// When an operation ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
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
}
