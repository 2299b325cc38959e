//! Where a step's time goes, by kind of action, as the published breakdown has it: from a timeline and its programs.
//!
//! On a rank's compute lane an action lasts from where its first operation could have begun to the end of its last one, the waits for
//! its exchanges included. What is spent waiting for another pipeline rank, and behind the last pass until the last rank has finished
//! its passes, is the bubble. The optimizer is what the update adds before the first and behind the last pass of all.

use std::ops::{Add, AddAssign};

use serde::Serialize;

use crate::schedule::{Action, Lane, Plan, Program, Timeline, UnitCosts, Work};

/// The six components, as a mean over ranks. **Units**: seconds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Components {
    /// Forward passes, no backward pass beside them.
    #[serde(rename = "1F")]
    pub forward: f64,
    /// Waits for other pipeline ranks.
    pub bubble: f64,
    /// Backward passes, whole ones and those for the input, no forward pass beside them.
    #[serde(rename = "1B")]
    pub backward: f64,
    /// Weight gradients alone.
    #[serde(rename = "1W")]
    pub weight: f64,
    /// Pairs of a forward and a backward pass.
    #[serde(rename = "1F1B")]
    pub pair: f64,
    /// What the update adds.
    pub optimizer: f64,
}

impl Components {
    /// With their names.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        let Components { forward, bubble, backward, weight, pair, optimizer } = *self;
        [
            ("1F", forward),
            ("bubble", bubble),
            ("1B", backward),
            ("1W", weight),
            ("1F1B", pair),
            ("optimizer", optimizer),
        ]
    }

    /// All of them.
    pub fn sum(&self) -> f64 {
        self.named().into_iter().map(|(_, seconds)| seconds).sum()
    }

    fn of_action(&mut self, action: &Action) -> &mut f64 {
        match action {
            Action::Forward(_) | Action::ForwardForward { .. } => &mut self.forward,
            Action::Backward(_) | Action::BackwardInput(_) | Action::InputWeight { .. } => &mut self.backward,
            Action::BackwardWeight(_) => &mut self.weight,
            Action::ForwardBackward { .. } => &mut self.pair,
        }
    }

    fn scaled(self, by: f64) -> Components {
        let Components { forward, bubble, backward, weight, pair, optimizer } = self;
        Components {
            forward: by * forward,
            bubble: by * bubble,
            backward: by * backward,
            weight: by * weight,
            pair: by * pair,
            optimizer: by * optimizer,
        }
    }
}

impl Add for Components {
    type Output = Components;

    fn add(self, other: Components) -> Components {
        Components {
            forward: self.forward + other.forward,
            bubble: self.bubble + other.bubble,
            backward: self.backward + other.backward,
            weight: self.weight + other.weight,
            pair: self.pair + other.pair,
            optimizer: self.optimizer + other.optimizer,
        }
    }
}

impl AddAssign for Components {
    fn add_assign(&mut self, other: Components) {
        *self = *self + other;
    }
}

/// What a timeline says.
#[derive(Clone, Debug, PartialEq)]
pub struct Breakdown {
    /// Mean over the ranks; their sum is the step.
    pub mean: Components,
    /// By pipeline rank.
    pub ranks: Vec<Components>,
    /// By pipeline rank: waits for exchanges inside of actions.
    pub exposed: Vec<f64>,
}

/// Of the programs of a whole step.
pub fn breakdown(plan: &Plan, programs: &[Program], timeline: &Timeline) -> Breakdown {
    let is_pass = |work: &Work| matches!(work, Work::Component { .. });
    let passes = || {
        let ranks = programs.iter().zip(&timeline.spans);
        ranks.flat_map(|(program, spans)| program.ops.iter().zip(spans)).filter(|(op, _)| is_pass(&op.work))
    };
    let begin = passes().map(|(_, span)| span.start).fold(f64::INFINITY, f64::min).min(timeline.makespan);
    let end = passes().map(|(_, span)| span.end).fold(begin, f64::max);
    let optimizer = begin + timeline.makespan - end;
    let (mut ranks, mut exposed) = (Vec::new(), Vec::new());
    for (rank, program) in programs.iter().enumerate() {
        let spans = &timeline.spans[rank];
        let (mut components, mut waited) = (Components { optimizer, ..Components::default() }, 0.0);
        let mut free = begin;
        for (id, op) in program.ops.iter().enumerate().filter(|(_, op)| op.lane == Lane::Compute) {
            let span = spans[id];
            if let (true, Some(action)) = (is_pass(&op.work), op.action) {
                // Up to the arrival of what comes from another pipeline rank it is the bubble, then the action's own exchange.
                let from_ranks = |earlier: &&usize| !matches!(program.ops[**earlier].lane, Lane::Expert);
                let arrived = op.after.iter().filter(from_ranks).map(|&earlier| spans[earlier].end);
                let arrived = arrived.fold(free, f64::max).min(span.start);
                components.bubble += arrived - free;
                let own = components.of_action(&plan.actions[rank][action]);
                *own += span.end - arrived;
                waited += span.start - arrived;
                free = span.end;
            } else if span.start < end {
                // Gradients are packed, weights unpacked, between passes: time that the update adds to the passes.
                let inside = span.end.min(end).max(free) - span.start.max(free).min(end);
                components.bubble += span.start.min(end).max(free) - free;
                components.optimizer += inside;
                free = span.end.min(end).max(free);
            }
        }
        components.bubble += (end - free).max(0.0);
        ranks.push(components);
        exposed.push(waited);
    }
    let mean = ranks
        .iter()
        .fold(Components::default(), |sum, &one| sum + one)
        .scaled(1.0 / ranks.len().max(1) as f64);
    Breakdown { mean, ranks, exposed }
}

/// The same where each kind of action has one duration.
pub fn of_actions(plan: &Plan, unit: UnitCosts, timeline: &Timeline, optimizer: f64) -> Breakdown {
    let of_rank = |(actions, busy): (&Vec<Action>, &f64)| {
        let bubble = timeline.makespan - busy;
        let mut components = Components { bubble, optimizer, ..Components::default() };
        for action in actions {
            *components.of_action(action) += unit.of(action);
        }
        components
    };
    let ranks: Vec<Components> = plan.actions.iter().zip(&timeline.compute_busy).map(of_rank).collect();
    let mean = ranks
        .iter()
        .fold(Components::default(), |sum, &one| sum + one)
        .scaled(1.0 / ranks.len().max(1) as f64);
    Breakdown { mean, exposed: vec![0.0; ranks.len()], ranks }
}
