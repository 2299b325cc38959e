//! Which of a step's programs comes next: pure, from what the one before has left.
//!
//! Every rank has the same totals, evidence and memory of earlier steps, and so takes the same way.

use contraflow_runtime::stability::evidence::Evidence;
use contraflow_runtime::stability::{Divergence, StepAction, Verdict};

use super::update::Update;
use crate::error::RankError;

/// A program of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProgramKind {
    /// The passes; in training also the reduction and the totals.
    Passes,
    /// The same, and the gathering of the update before.
    Gathering,
    /// The ranks exchange what is not finite.
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
    Run(ProgramKind),
    /// The task has ended.
    End,
    /// The watch has stopped the step; nothing is updated.
    Diverged(Box<Divergence>),
}

/// What comes after `part`; an evaluation has no update, and ends with its passes.
///
/// **Errors**: the totals or the evidence are not there.
pub fn next(part: ProgramKind, update: Option<&mut Update>) -> Result<Next, RankError> {
    let Some(update) = update else { return Ok(Next::End) };
    match part {
        ProgramKind::Passes | ProgramKind::Gathering if update.global()?.is_finite() => judge(update),
        ProgramKind::Passes | ProgramKind::Gathering => Ok(Next::Run(ProgramKind::Evidence)),
        ProgramKind::Evidence => judge(update),
        ProgramKind::Update if update.gathers() => Ok(Next::Run(ProgramKind::Gather)),
        ProgramKind::Update | ProgramKind::Skip | ProgramKind::Gather => Ok(Next::End),
    }
}

/// The verdict on a step, before any weight has changed.
fn judge(update: &mut Update) -> Result<Next, RankError> {
    let seen = update.seen()?;
    let Verdict { action, why } = update.optimizer.judge(&seen, update.evidence.as_ref());
    let global = update.global_mut()?;
    match action {
        StepAction::Update => {
            global.warning = why;
            Ok(Next::Run(ProgramKind::Update))
        }
        StepAction::Skip => {
            (global.skipped, global.warning) = (true, why);
            Ok(Next::Run(ProgramKind::Skip))
        }
        StepAction::Stop | StepAction::RollBack => {
            // Of a spike there is nothing to find on the ranks, but the batch.
            let of_spike = || Evidence::new(seen.step, (seen.loss, seen.grad_norm), &[], &[]);
            let evidence = Some(update.evidence.take().unwrap_or_else(of_spike));
            let why = why.unwrap_or_default();
            Ok(Next::Diverged(Box::new(Divergence { step: seen.step, action, why, evidence })))
        }
    }
}
