//! The stability watch: decides about steps whose numbers are not finite or far from those before.
//!
//! Pure decisions over the totals of a step, which are the same on every rank: so all ranks come to one verdict without
//! further communication. [`evidence`] names what was not finite, [`gate`] watches the experts' loads,
//! [`validation`] the validation loss. Knows no tensors and
//! no actor.

pub mod evidence;
pub mod gate;
#[cfg(test)]
mod tests;
pub mod validation;
mod wire;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use self::evidence::Evidence;
use self::validation::ValidationWatch;
use crate::recipe::{OnFault, OnSpike, WatchSection};

/// From a standard deviation to the median absolute deviation of a normal distribution.
const MAD_PER_SIGMA: f64 = 0.674_489_75;

/// The spread counts as at least this share of the median: the values of a run that has converged hardly differ, and the
/// next one is no spike because of that.
const LEAST_SPREAD: f64 = 0.01;

/// The totals of a step, before its update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Optimizer update, counted from 1.
    pub step: u64,
    /// Mean loss of the global batch, in nats per token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
}

/// The action taken on a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepAction {
    /// The weights are updated.
    Update,
    /// No rank updates; the run continues with the next batch.
    Skip,
    /// No rank updates; the run ends.
    Stop,
    /// No rank updates; the run goes back to the last committed checkpoint.
    RollBack,
}

/// The watch's verdict on a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The action taken.
    pub action: StepAction,
    /// What is wrong with it; `None` if nothing is.
    pub why: Option<String>,
}

/// A step that ended the training: no rank has updated its weights, and each waits for what is to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divergence {
    /// Optimizer update that was not made.
    pub step: u64,
    /// [`StepAction::Stop`] or [`StepAction::RollBack`].
    pub action: StepAction,
    /// What is wrong, in one sentence.
    pub why: String,
    /// What was not finite, if anything was.
    pub evidence: Option<Evidence>,
}

/// State of the stability watch. A checkpoint holds it, so that a resumed run comes to the verdicts of an undisturbed one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StabilityWatch {
    /// Of the latest steps that were updated, oldest first.
    losses: VecDeque<f64>,
    /// Of the same steps.
    grad_norms: VecDeque<f64>,
    /// Steps skipped since the last update.
    skips_in_a_row: u64,
    /// Steps skipped since the start.
    skipped: u64,
    /// What the validations of the run have shown so far.
    #[serde(default, skip_serializing_if = "ValidationWatch::is_new")]
    pub validation: ValidationWatch,
}

impl StabilityWatch {
    /// Updates that have been made when step `step` is the running one, that one included: what AdamW corrects its
    /// moments for.
    pub fn updates_at(&self, step: u64) -> u64 {
        step - self.skipped
    }

    /// Judges a step. `fault` describes what is not finite about it, if anything is.
    pub fn judge(&self, rules: &WatchSection, seen: &Seen, fault: Option<String>) -> Verdict {
        let found = match fault {
            Some(fault) => Some((action_on(rules.on_nan), fault)),
            None if rules.on_spike == OnSpike::Off => None,
            None => self.spike(rules, seen).map(|spike| (action_on_spike(rules.on_spike), spike)),
        };
        let Some((mut action, mut why)) = found else {
            return Verdict { action: StepAction::Update, why: None };
        };
        if action == StepAction::Skip && self.skips_in_a_row >= rules.max_skips {
            action = StepAction::Stop;
            why += &format!("; {} batches in a row were skipped (watch.max_skips)", rules.max_skips);
        }
        if action != StepAction::Update {
            why += "; no rank has updated its weights";
        }
        Verdict { action, why: Some(why) }
    }

    /// Remembers a step and what became of it. Only values of steps that were updated are kept.
    pub fn note(&mut self, rules: &WatchSection, seen: &Seen, action: StepAction) {
        match action {
            StepAction::Update => {
                self.skips_in_a_row = 0;
                push(&mut self.losses, seen.loss, rules.spike_window);
                push(&mut self.grad_norms, seen.grad_norm, rules.spike_window);
            }
            StepAction::Skip => {
                self.skips_in_a_row += 1;
                self.skipped += 1;
            }
            StepAction::Stop | StepAction::RollBack => {}
        }
    }

    fn spike(&self, rules: &WatchSection, seen: &Seen) -> Option<String> {
        let watched =
            [("loss", &self.losses, seen.loss), ("gradient norm", &self.grad_norms, seen.grad_norm)];
        let (name, history, value, bound) = watched.into_iter().find_map(|(name, history, value)| {
            let bound = bound(history, rules.spike_window, rules.spike_factor)?;
            (value > bound).then_some((name, history, value, bound))
        })?;
        Some(format!(
            "step {}: the {name} has a spike: {value:.4}, where the {} updates before have a median of {:.4} and allow {bound:.4}",
            seen.step,
            history.len(),
            median(history.iter().copied())
        ))
    }
}

fn action_on(policy: OnFault) -> StepAction {
    match policy {
        OnFault::Stop => StepAction::Stop,
        OnFault::Skip => StepAction::Skip,
        OnFault::Rollback => StepAction::RollBack,
    }
}

fn action_on_spike(policy: OnSpike) -> StepAction {
    match policy {
        OnSpike::Off | OnSpike::Warn => StepAction::Update,
        OnSpike::Stop => StepAction::Stop,
        OnSpike::Skip => StepAction::Skip,
        OnSpike::Rollback => StepAction::RollBack,
    }
}

fn push(history: &mut VecDeque<f64>, value: f64, window: usize) {
    history.push_back(value);
    while history.len() > window {
        history.pop_front();
    }
}

/// Above what a value is a spike: the median of the window plus `factor` standard deviations, these estimated from the
/// median absolute deviation, which the spikes in the window hardly move. `None` until the window is full.
fn bound(history: &VecDeque<f64>, window: usize, factor: f64) -> Option<f64> {
    if history.len() < window {
        return None;
    }
    let middle = median(history.iter().copied());
    let deviation = median(history.iter().map(|value| (value - middle).abs()));
    let sigma = (deviation / MAD_PER_SIGMA).max(LEAST_SPREAD * middle.abs());
    Some(middle + factor * sigma)
}

/// The middle of the sorted values; of the two in the middle the upper one.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
