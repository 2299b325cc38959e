//! Which of a step's programs comes next: pure, from what the one before has left.
//!
//! Every rank has the same totals, evidence and memory of earlier steps, and so takes the same way.

use contraflow_runtime::watch::{Action, Divergence, Verdict};

use super::update::Update;
use crate::error::RankError;

/// A program of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The passes; in training also the reduction and the totals.
    Passes,
    /// The same, and the gathering of the update before.
    Gathering,
    /// The ranks tell each other what is not finite.
    Evidence,
    /// AdamW.
    Update,
    /// No update.
    Skip,
    /// The gathering of the update, where the next step does not gather it.
    Gather,
}

/// What comes after a program.
#[derive(Debug)]
pub enum Next {
    /// Another one.
    Run(Part),
    /// The task has ended.
    End,
    /// The watch has stopped the step; nothing is updated.
    Diverged(Box<Divergence>),
}

/// What comes after `part`; an evaluation has no update, and ends with its passes.
///
/// **Errors**: the totals or the evidence are not there.
pub fn next(part: Part, update: Option<&mut Update>) -> Result<Next, RankError> {
    let Some(update) = update else { return Ok(Next::End) };
    match part {
        Part::Passes | Part::Gathering if update.global()?.is_finite() => judge(update),
        Part::Passes | Part::Gathering => Ok(Next::Run(Part::Evidence)),
        Part::Evidence => judge(update),
        Part::Update if update.gathers() => Ok(Next::Run(Part::Gather)),
        Part::Update | Part::Skip | Part::Gather => Ok(Next::End),
    }
}

/// The verdict on a step, before any weight has changed.
fn judge(update: &mut Update) -> Result<Next, RankError> {
    let seen = update.seen()?;
    let Verdict { action, why } = update.optimizer.judge(&seen, update.evidence.as_ref());
    let global = update.global_mut()?;
    match action {
        Action::Update => {
            global.warning = why;
            Ok(Next::Run(Part::Update))
        }
        Action::Skip => {
            (global.skipped, global.warning) = (true, why);
            Ok(Next::Run(Part::Skip))
        }
        Action::Stop | Action::RollBack => {
            let (why, evidence) = (why.unwrap_or_default(), update.evidence.take());
            Ok(Next::Diverged(Box::new(Divergence { step: seen.step, action, why, evidence })))
        }
    }
}
