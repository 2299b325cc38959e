//! The schedules a recipe can name, what each of them demands, and the one door through which a plan is made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::action::Plan;
use super::{dualpipe, fallback, one_f_one_b};
use crate::faults::count;

/// A schedule with a generator of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// Micro-batches enter at both ends of the pipeline; rank `r` holds stages `r` and `P-1-r`.
    #[serde(rename = "dualpipe")]
    Dualpipe,
    /// DualPipe folded in half: rank `r` holds stages `r` and `2P-1-r`, no stage is held twice.
    #[serde(rename = "dualpipev")]
    Dualpipev,
    /// One forward, one backward; rank `r` holds stage `r`.
    #[serde(rename = "1f1b")]
    OneFOneB,
}

/// Whether a plan has a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Forward and backward: one optimizer step.
    Train,
    /// Forward only: validation, generation.
    ForwardOnly,
}

/// Why a schedule cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// A pipeline of no ranks.
    #[error("expected at least 1 pipeline rank, got 0")]
    NoRanks,
    /// Nothing to do.
    #[error("expected at least 1 micro-batch, got 0")]
    NoMicroBatches,
    /// DualPipe pairs rank `r` with rank `P-1-r`.
    #[error(
        "dualpipe pairs rank r with rank P-1-r and so needs an even number of pipeline ranks, got {0}; \
         use an even pipeline, or dualpipev or 1f1b"
    )]
    OddPipeline(usize),
    /// Half of DualPipe's micro-batches enter at each end.
    #[error(
        "dualpipe sends half of the micro-batches from each end and so needs an even number of them, got {0}"
    )]
    OddMicroBatches(usize),
    /// Too few micro-batches to fill the pipeline.
    #[error("{schedule} on {} needs at least {needed} micro-batches, got {got}", count(.pipeline, "pipeline rank"))]
    TooFewMicroBatches {
        /// Which schedule.
        schedule: ScheduleKind,
        /// Pipeline ranks.
        pipeline: usize,
        /// The least number that works.
        needed: usize,
        /// What there is.
        got: usize,
    },
    /// No schedule of that name.
    #[error("expected a schedule out of dualpipe, dualpipev, 1f1b, got `{0}`")]
    Unknown(String),
}

impl ScheduleKind {
    /// All of them.
    pub const ALL: [ScheduleKind; 3] =
        [ScheduleKind::Dualpipe, ScheduleKind::Dualpipev, ScheduleKind::OneFOneB];

    /// Number of pipeline stages on `pipeline` ranks.
    pub fn stages(self, pipeline: usize) -> usize {
        match self {
            ScheduleKind::Dualpipe | ScheduleKind::OneFOneB => pipeline,
            ScheduleKind::Dualpipev => 2 * pipeline,
        }
    }

    /// The least number of micro-batches the schedule itself can run; below it the fallback does.
    pub fn min_micro_batches(self, pipeline: usize) -> usize {
        match self {
            ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => 2 * pipeline,
            ScheduleKind::OneFOneB => 1,
        }
    }

    /// `placement[rank]` lists the stages a rank holds.
    pub fn placement(self, pipeline: usize) -> Vec<Vec<usize>> {
        let last = self.stages(pipeline).saturating_sub(1);
        let held = |rank| match self {
            ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => vec![rank, last - rank],
            ScheduleKind::OneFOneB => vec![rank],
        };
        (0..pipeline).map(held).collect()
    }

    /// Whether the schedule exists on that many ranks.
    ///
    /// # Errors
    /// No ranks at all, or an odd number of them for DualPipe.
    pub fn validate(self, pipeline: usize) -> Result<(), ScheduleError> {
        match self {
            _ if pipeline == 0 => Err(ScheduleError::NoRanks),
            ScheduleKind::Dualpipe if pipeline % 2 == 1 => Err(ScheduleError::OddPipeline(pipeline)),
            _ => Ok(()),
        }
    }

    /// Why a step of this many micro-batches (both directions together) falls back to the plan of [`fallback`], if it does: the batch
    /// is too small or too uneven for the schedule.
    pub fn fallback(self, pipeline: usize, micro_batches: usize) -> Option<String> {
        match self.validate_batch(pipeline, micro_batches) {
            Err(why @ (ScheduleError::TooFewMicroBatches { .. } | ScheduleError::OddMicroBatches(_))) => {
                Some(format!("{why}; a plan of the kind of 1f1b runs instead"))
            }
            Ok(()) | Err(_) => None,
        }
    }

    /// The plan for a step of `micro_batches` (both directions together). Where the batch is too small or too uneven
    /// for the schedule, the plan of [`fallback`] on the same placement, and why.
    ///
    /// # Errors
    /// See [`ScheduleKind::validate`]; also no micro-batches.
    pub fn plan(
        self,
        pipeline: usize,
        micro_batches: usize,
        mode: Mode,
    ) -> Result<(Plan, Option<String>), ScheduleError> {
        if let Some(why) = self.fallback(pipeline, micro_batches) {
            return Ok((fallback::fallback(self, pipeline, micro_batches, mode)?, Some(why)));
        }
        let plan = match self {
            ScheduleKind::Dualpipe => dualpipe::dualpipe(pipeline, micro_batches, mode),
            ScheduleKind::Dualpipev => dualpipe::dualpipev(pipeline, micro_batches, mode),
            ScheduleKind::OneFOneB => one_f_one_b::one_f_one_b(pipeline, micro_batches, mode),
        };
        Ok((plan?, None))
    }

    /// Refuses what the generator cannot run.
    ///
    /// # Errors
    /// All of [`ScheduleError`]'s but `Unknown`.
    pub(super) fn validate_batch(self, pipeline: usize, micro_batches: usize) -> Result<(), ScheduleError> {
        self.validate(pipeline)?;
        let needed = self.min_micro_batches(pipeline);
        if micro_batches == 0 {
            Err(ScheduleError::NoMicroBatches)
        } else if micro_batches < needed {
            Err(ScheduleError::TooFewMicroBatches { schedule: self, pipeline, needed, got: micro_batches })
        } else if self == ScheduleKind::Dualpipe && micro_batches % 2 == 1 {
            Err(ScheduleError::OddMicroBatches(micro_batches))
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ScheduleKind::Dualpipe => "dualpipe",
            ScheduleKind::Dualpipev => "dualpipev",
            ScheduleKind::OneFOneB => "1f1b",
        })
    }
}

impl FromStr for ScheduleKind {
    type Err = ScheduleError;

    fn from_str(name: &str) -> Result<Self, ScheduleError> {
        ScheduleKind::ALL
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| ScheduleError::Unknown(name.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_display_and_in_serde() {
        for kind in ScheduleKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
        let refusal = "gpipe".parse::<ScheduleKind>().unwrap_err().to_string();
        assert_eq!(refusal, "expected a schedule out of dualpipe, dualpipev, 1f1b, got `gpipe`");
    }

    #[test]
    fn impossible_pipelines_are_refused_with_a_message() {
        let odd = ScheduleKind::Dualpipe.plan(3, 8, Mode::Train).unwrap_err();
        assert_eq!(odd, ScheduleError::OddPipeline(3));
        assert!(odd.to_string().contains("even number of pipeline ranks, got 3"));
        for kind in ScheduleKind::ALL {
            assert_eq!(kind.plan(0, 8, Mode::Train), Err(ScheduleError::NoRanks));
            assert_eq!(kind.plan(2, 0, Mode::Train), Err(ScheduleError::NoMicroBatches));
        }
    }

    #[test]
    fn small_and_uneven_batches_fall_back_and_say_why() {
        let (plan, why) = ScheduleKind::Dualpipe.plan(4, 6, Mode::Train).unwrap();
        assert!(["one-way", "two-way"].contains(&plan.schedule.as_str()), "{}", plan.schedule);
        assert_eq!(
            why.unwrap(),
            "dualpipe on 4 pipeline ranks needs at least 8 micro-batches, got 6; a plan of the kind of 1f1b runs instead"
        );
        let (plan, why) = ScheduleKind::Dualpipe.plan(4, 9, Mode::Train).unwrap();
        assert_eq!(plan.placement, ScheduleKind::Dualpipe.placement(4));
        assert!(why.unwrap().contains("even number of them, got 9"));
        for (kind, micro_batches) in [(ScheduleKind::Dualpipev, 9), (ScheduleKind::OneFOneB, 1)] {
            let (plan, why) = kind.plan(4, micro_batches, Mode::Train).unwrap();
            assert_eq!((plan.schedule, why), (kind.to_string(), None));
        }
    }
}
