//! The schedules a recipe can name, what each of them demands, and the one door through which a plan is made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::action::{Action, Plan};
use super::{dualpipe, fallback, interleaved, one_f_one_b, zb1p};
use crate::faults::count;

/// A schedule with a generator of its own. Its name, which is also what it is in JSON and TOML, says all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ScheduleKind {
    /// `dualpipe`: micro-batches enter at both ends of the pipeline; rank `r` holds stages `r` and `P-1-r`.
    Dualpipe,
    /// `dualpipev`: DualPipe folded in half: rank `r` holds stages `r` and `2P-1-r`, no stage is held twice.
    Dualpipev,
    /// `1f1b`: one forward, one backward; rank `r` holds stage `r`.
    OneFOneB,
    /// `zb1p`: the same, weight gradients held back.
    Zb1p,
    /// `interleaved` with two stages on each rank, `interleaved-N` with `N`: 1F1B that goes round them; rank `r` holds the stages `r`,
    /// `r + P` and so on.
    Interleaved(usize),
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
    /// Interleaved micro-batches go round in groups.
    #[error(
        "interleaved sends micro-batches round in groups of as many as there are pipeline ranks and so needs a multiple of {pipeline}, \
         got {got}"
    )]
    UnevenGroups {
        /// Pipeline ranks.
        pipeline: usize,
        /// Micro-batches.
        got: usize,
    },
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
    #[error(
        "expected a schedule out of dualpipe, dualpipev, 1f1b, zb1p, interleaved, interleaved-N, got `{0}`"
    )]
    Unknown(String),
}

impl ScheduleKind {
    /// All of them, the interleaved one with two stages on each rank.
    pub const ALL: [ScheduleKind; 5] = [
        ScheduleKind::Dualpipe,
        ScheduleKind::Dualpipev,
        ScheduleKind::OneFOneB,
        ScheduleKind::Zb1p,
        ScheduleKind::Interleaved(2),
    ];

    /// Stages of a rank at most: more than any model has layers for.
    pub const MOST_STAGES_PER_RANK: usize = 1 << 10;

    /// Number of pipeline stages on `pipeline` ranks.
    pub fn stages(self, pipeline: usize) -> usize {
        match self {
            ScheduleKind::Dualpipe | ScheduleKind::OneFOneB | ScheduleKind::Zb1p => pipeline,
            ScheduleKind::Dualpipev => 2 * pipeline,
            ScheduleKind::Interleaved(per_rank) => per_rank * pipeline,
        }
    }

    /// The least number of micro-batches the schedule itself can run; below it the fallback does.
    pub fn min_micro_batches(self, pipeline: usize) -> usize {
        match self {
            ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => 2 * pipeline,
            ScheduleKind::OneFOneB | ScheduleKind::Zb1p => 1,
            ScheduleKind::Interleaved(_) => pipeline,
        }
    }

    /// `placement[rank]` lists the stages a rank holds.
    pub fn placement(self, pipeline: usize) -> Vec<Vec<usize>> {
        let last = self.stages(pipeline).saturating_sub(1);
        let held = |rank| match self {
            ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => vec![rank, last - rank],
            ScheduleKind::OneFOneB | ScheduleKind::Zb1p => vec![rank],
            ScheduleKind::Interleaved(per_rank) => (0..per_rank).map(|turn| turn * pipeline + rank).collect(),
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
            Err(
                why @ (ScheduleError::TooFewMicroBatches { .. }
                | ScheduleError::OddMicroBatches(_)
                | ScheduleError::UnevenGroups { .. }),
            ) => Some(format!("{why}; a plan of the kind of 1f1b runs instead")),
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
            ScheduleKind::Zb1p => zb1p::zb1p(pipeline, micro_batches, mode),
            ScheduleKind::Interleaved(per_rank) => {
                interleaved::interleaved(pipeline, per_rank, micro_batches, mode)
            }
        };
        Ok((plan?, None))
    }

    /// The plan in which rank `r` does `rank_actions(r)`, on the schedule's own placement.
    pub(super) fn with_actions(
        self,
        ranks: usize,
        micro_batches: usize,
        rank_actions: impl FnMut(usize) -> Vec<Action>,
    ) -> Plan {
        Plan {
            schedule: self.to_string(),
            stages: self.stages(ranks),
            micro_batches,
            placement: self.placement(ranks),
            actions: (0..ranks).map(rank_actions).collect(),
        }
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
        } else if matches!(self, ScheduleKind::Interleaved(_)) && !micro_batches.is_multiple_of(pipeline) {
            Err(ScheduleError::UnevenGroups { pipeline, got: micro_batches })
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScheduleKind::Dualpipe => f.pad("dualpipe"),
            ScheduleKind::Dualpipev => f.pad("dualpipev"),
            ScheduleKind::OneFOneB => f.pad("1f1b"),
            ScheduleKind::Zb1p => f.pad("zb1p"),
            ScheduleKind::Interleaved(2) => f.pad("interleaved"),
            ScheduleKind::Interleaved(per_rank) => f.pad(&format!("interleaved-{per_rank}")),
        }
    }
}

impl FromStr for ScheduleKind {
    type Err = ScheduleError;

    fn from_str(name: &str) -> Result<Self, ScheduleError> {
        let interleaved = || {
            let per_rank = name.strip_prefix("interleaved-")?.parse().ok()?;
            (1..=ScheduleKind::MOST_STAGES_PER_RANK)
                .contains(&per_rank)
                .then_some(ScheduleKind::Interleaved(per_rank))
        };
        let kind = ScheduleKind::ALL.into_iter().find(|kind| kind.to_string() == name);
        kind.or_else(interleaved).ok_or_else(|| ScheduleError::Unknown(name.to_string()))
    }
}

impl TryFrom<String> for ScheduleKind {
    type Error = ScheduleError;

    fn try_from(name: String) -> Result<Self, ScheduleError> {
        name.parse()
    }
}

impl From<ScheduleKind> for String {
    fn from(kind: ScheduleKind) -> String {
        kind.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_display_and_in_serde() {
        for kind in ScheduleKind::ALL.into_iter().chain([1, 3, 64].map(ScheduleKind::Interleaved)) {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("\"{kind}\""));
            assert_eq!(serde_json::from_str::<ScheduleKind>(&json).unwrap(), kind);
        }
        for wrong in ["interleaved-", "interleaved-0", "interleaved-x", "interleaved-99999999999999999999"] {
            assert_eq!(wrong.parse::<ScheduleKind>(), Err(ScheduleError::Unknown(wrong.into())));
        }
        let refusal = "gpipe".parse::<ScheduleKind>().unwrap_err().to_string();
        assert_eq!(
            refusal,
            "expected a schedule out of dualpipe, dualpipev, 1f1b, zb1p, interleaved, interleaved-N, got `gpipe`"
        );
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
        let (plan, why) = ScheduleKind::Interleaved(3).plan(4, 10, Mode::Train).unwrap();
        assert_eq!((plan.schedule.as_str(), plan.stages), ("one-way", 12));
        assert!(why.unwrap().contains("needs a multiple of 4, got 10"));
        for (kind, micro_batches) in
            [(ScheduleKind::Dualpipev, 9), (ScheduleKind::OneFOneB, 1), (ScheduleKind::Zb1p, 1)]
        {
            let (plan, why) = kind.plan(4, micro_batches, Mode::Train).unwrap();
            assert_eq!((plan.schedule, why), (kind.to_string(), None));
        }
    }
}
