//! How long ranks stand idle in a bare plan, for costs in units of a chunk's forward pass.
//!
//! Transfers are free and components are not looked at: this is the arithmetic behind the bubble formulas of the
//! report (section 3.2.1, table 2). The simulator with real costs is another user of the same walk.

use serde::{Deserialize, Serialize};

use super::action::{Action, Chunk, Plan};
use super::deadlock::Deadlock;
use super::lower::lower;
use super::program::{Component, Op, Pass, Program, Work};
use super::timeline::Timeline;
use super::walk::walk;

/// Durations of the actions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitCosts {
    /// `F`, forward.
    pub f: f64,
    /// `B`, full backward.
    pub b: f64,
    /// `I`, backward for the input.
    pub i: f64,
    /// `W`, backward for the weights.
    pub w: f64,
    /// `F&B`, a forward and a full backward overlapped.
    pub fb: f64,
}

impl UnitCosts {
    /// Forward, input gradient and weight gradient cost the same and overlap gains nothing.
    pub const SUM: UnitCosts = UnitCosts { f: 1.0, b: 2.0, i: 1.0, w: 1.0, fb: 3.0 };
    /// The same where the overlap hides the forward pass wholly.
    pub const HIDDEN: UnitCosts = UnitCosts { fb: 2.0, ..UnitCosts::SUM };

    /// Of one action.
    pub fn of(&self, action: &Action) -> f64 {
        match action {
            Action::Forward(_) => self.f,
            Action::Backward(_) => self.b,
            Action::BackwardInput(_) => self.i,
            Action::BackwardWeight(_) => self.w,
            Action::ForwardBackward { .. } => self.fb,
            Action::ForwardForward { .. } => 2.0 * self.f,
            Action::InputWeight { .. } => self.i + self.w,
        }
    }
}

/// What the clock says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bubble {
    /// Duration of the step.
    pub makespan: f64,
    /// Per rank, how much of it nothing ran.
    pub idle: Vec<f64>,
    /// The largest of them: what the formulas give.
    pub max_idle: f64,
    /// Share of all ranks' time in which nothing ran.
    pub share: f64,
}

/// Runs a plan with one duration per kind of action and free transfers. The results of an action are there when all of
/// it is done, as in the formulas.
///
/// # Errors
/// The plan deadlocks.
pub fn simulate(plan: &Plan, costs: UnitCosts) -> Result<Bubble, Deadlock> {
    let (_, timeline) = clock(plan, costs)?;
    let makespan = timeline.makespan;
    let idle: Vec<f64> = timeline.compute_busy.iter().map(|busy| makespan - busy).collect();
    let max_idle = idle.iter().copied().fold(0.0, f64::max);
    let all = makespan * idle.len() as f64;
    let share = if all > 0.0 { idle.iter().sum::<f64>() / all } else { 0.0 };
    Ok(Bubble { makespan, idle, max_idle, share })
}

/// The same as programs, where a chunk is one operation, and their timeline.
///
/// # Errors
/// The plan deadlocks.
pub fn clock(plan: &Plan, costs: UnitCosts) -> Result<(Vec<Program>, Timeline), Deadlock> {
    clock_by(plan, |action| costs.of(action))
}

/// As [`clock`], where every action has a duration of its own.
///
/// # Errors
/// The plan deadlocks.
pub fn clock_by(
    plan: &Plan,
    duration: impl Fn(&Action) -> f64,
) -> Result<(Vec<Program>, Timeline), Deadlock> {
    let programs = lower(plan, None, 1);
    let cost = |rank: usize, op: &Op| match (op.work, op.action) {
        (Work::Component { pass, chunk, component: Component::Chunk, .. }, Some(action)) => {
            let action = &plan.actions[rank][action];
            if (pass, chunk) == leader(action) { duration(action) } else { 0.0 }
        }
        _ => 0.0,
    };
    let timeline = walk(&programs, cost)?;
    Ok((programs, timeline))
}

/// An action's first operation, which carries the duration of the whole action: what follows it directly takes no time, so
/// everything the action makes is there at its end.
fn leader(action: &Action) -> (Pass, Chunk) {
    match *action {
        Action::Forward(chunk)
        | Action::ForwardBackward { forward: chunk, .. }
        | Action::ForwardForward { first: chunk, .. } => (Pass::Forward, chunk),
        Action::Backward(chunk) | Action::BackwardInput(chunk) | Action::InputWeight { input: chunk, .. } => {
            (Pass::BackwardInput, chunk)
        }
        Action::BackwardWeight(chunk) => (Pass::BackwardWeight, chunk),
    }
}
