//! Decides about a run whose step the stability watch has stopped: it rolls back to its newest checkpoint and skips the
//! sequences that led there, or it ends. Pure: the one policy of runs in one process and of jobs in a cluster.

use contraflow_runtime::faults::count;
use contraflow_runtime::stability::{Divergence, StepAction};
use serde::{Deserialize, Serialize};

/// A checkpoint that a run can go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Optimizer updates made.
    pub step: u64,
    /// Sequences used.
    pub cursor: u64,
}

/// How often a run has gone back to one checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollBackCount {
    /// Step of the checkpoint; 0: it has never gone back.
    pub to: u64,
    /// How often in a row.
    pub times: u64,
}

impl RollBackCount {
    /// After one more, to the checkpoint of this step.
    pub fn and_one_more(self, step: u64) -> Self {
        RollBackCount { to: step, times: if self.to == step { self.times + 1 } else { 1 } }
    }
}

/// What the decision depends on beside the divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RollBack {
    /// The newest checkpoint, if there is one.
    pub newest: Option<Checkpoint>,
    /// Returns so far.
    pub returns: RollBackCount,
    /// `watch.max_skips`: how often in a row a run may go back to one checkpoint.
    pub max_returns: u64,
}

/// The run goes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollBackTarget {
    /// Step of the checkpoint.
    pub to: u64,
    /// Returns so far, this one included.
    pub returns: RollBackCount,
    /// Sequences between the checkpoint and the place where the run continues: they are left out.
    pub skipped: u64,
    /// Why, to where, and past how much.
    pub why: String,
}

impl RollBack {
    /// Decides on a step that was stopped when `cursor` sequences had been used, its batch included.
    ///
    /// **Errors**: where the run ends.
    pub fn decide(&self, divergence: &Divergence, cursor: u64) -> Result<RollBackTarget, String> {
        let why = &divergence.why;
        if divergence.action != StepAction::RollBack {
            return Err(why.clone());
        }
        let Some(Checkpoint { step, cursor: before }) = self.newest else {
            return Err(format!("{why}; there is no checkpoint to roll back to"));
        };
        let returns = self.returns.and_one_more(step);
        if returns.times > self.max_returns {
            let most = self.max_returns;
            return Err(format!("{why}; the run rolled back to step {step} {most} times (watch.max_skips)"));
        }
        let skipped = cursor.saturating_sub(before);
        let left_out = count(skipped, "sequence");
        let why = format!("{why}; rolling back to step {step}, skipping {left_out}");
        Ok(RollBackTarget { to: step, returns, skipped, why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diverged(action: StepAction) -> Divergence {
        Divergence { step: 9, action, why: "a spike".into(), evidence: None }
    }

    const ROLL_BACK: RollBack = RollBack {
        newest: Some(Checkpoint { step: 8, cursor: 64 }),
        returns: RollBackCount { to: 8, times: 1 },
        max_returns: 2,
    };

    #[test]
    fn a_run_rolls_back_to_its_newest_checkpoint_and_skips_what_led_astray() {
        let expected = RollBackTarget {
            to: 8,
            returns: RollBackCount { to: 8, times: 2 },
            skipped: 24,
            why: "a spike; rolling back to step 8, skipping 24 sequences".into(),
        };
        assert_eq!(ROLL_BACK.decide(&diverged(StepAction::RollBack), 88), Ok(expected));
    }

    #[test]
    fn a_run_that_rolls_back_too_often_ends_and_another_checkpoint_resets_the_count() {
        let twice = RollBack { returns: RollBackCount { to: 8, times: 2 }, ..ROLL_BACK };
        let words = "a spike; the run rolled back to step 8 2 times (watch.max_skips)";
        assert_eq!(twice.decide(&diverged(StepAction::RollBack), 88), Err(words.into()));
        let later = RollBack { newest: Some(Checkpoint { step: 12, cursor: 120 }), ..twice };
        let returned = later.decide(&diverged(StepAction::RollBack), 128).unwrap();
        assert_eq!((returned.returns, returned.skipped), (RollBackCount { to: 12, times: 1 }, 8));
        let never = RollBack { max_returns: 0, ..ROLL_BACK };
        assert!(never.decide(&diverged(StepAction::RollBack), 88).is_err());
    }

    #[test]
    fn a_run_ends_where_the_watch_says_so_or_no_checkpoint_is_there() {
        assert_eq!(ROLL_BACK.decide(&diverged(StepAction::Stop), 88), Err("a spike".into()));
        let none = RollBack { newest: None, ..ROLL_BACK };
        let words = "a spike; there is no checkpoint to roll back to";
        assert_eq!(none.decide(&diverged(StepAction::RollBack), 88), Err(words.into()));
    }
}
