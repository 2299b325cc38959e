//! `contraflow bench precision`: what narrow formats do to the loss (report, appendix B.1).
//!
//! Two runs in F32 that add up in another order drift apart, too: how far is the noise that a gap is held against.

use std::fmt;

use serde::Serialize;

use super::study::{Arm, Gap, Statistic, Study, StudyArgs, markdown};
use crate::failure::Failure;

pub(super) const STUDY: Study = Study {
    name: "precision",
    steps: 2000,
    arms: &[
        Arm { name: "f32", overrides: &[] },
        Arm {
            name: "f32-other-order",
            overrides: &["parallel.schedule=1f1b", "parallel.pipeline=1", "parallel.expert=1"],
        },
        Arm { name: "bf16", overrides: &["precision.recipe=bf16"] },
        Arm { name: "fp8", overrides: &["precision.recipe=fp8"] },
        // The report's warning: blocks for gradients, too.
        Arm {
            name: "fp8-gradient-blocks",
            overrides: &["precision.recipe=fp8", "precision.gradient_scales=block"],
        },
    ],
};

/// Which arm shows the noise.
const NOISE: usize = 1;
/// What the report saw: "consistently below 0.25 %".
const PUBLISHED: Gap = 0.0025;

/// How far each arm is from F32.
#[derive(Debug, Serialize)]
pub(super) struct PrecisionFigures {
    steps: u64,
    arms: Vec<ArmFigures>,
    /// The larger of 0.25 % and the noise, once there is some.
    bound: Gap,
}

#[derive(Debug, Serialize)]
struct ArmFigures {
    name: &'static str,
    /// Of the smoothed loss, over the last fifth of the steps; by seed.
    gaps: Vec<Gap>,
    gap: Option<Statistic>,
    validation_loss: Option<Statistic>,
    cpu_seconds: Option<Statistic>,
    /// Whether the mean gap is within the bound.
    is_within: Option<bool>,
}

/// **Errors**: those of the runs; a file that cannot be written.
pub(super) fn run(args: &StudyArgs) -> Result<PrecisionFigures, Failure> {
    let runs = STUDY.run(args)?;
    let noise = Statistic::of(runs.gaps(NOISE));
    let bound = noise.map_or(PUBLISHED, |noise| noise.mean.abs().max(PUBLISHED));
    let arms = STUDY.arms.iter().enumerate().map(|(index, arm)| {
        let gaps = runs.gaps(index);
        let gap = Statistic::of(gaps.iter().copied());
        ArmFigures {
            name: arm.name,
            gaps,
            gap,
            validation_loss: runs.figure(index, |run| run.validation_loss),
            cpu_seconds: runs.figure(index, |run| run.cpu_seconds),
            is_within: gap.map(|gap| gap.mean.abs() <= bound),
        }
    });
    let figures = PrecisionFigures { steps: STUDY.steps(args), arms: arms.collect(), bound };
    let title = "smoothed loss over that in f32, percent, mean over the seeds";
    STUDY.write(args, (&runs, &figures), title)?;
    Ok(figures)
}

impl fmt::Display for PrecisionFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "`contraflow bench precision --steps {}`: the tiny recipe, relative gap of the smoothed loss to f32 over the",
            self.steps
        )?;
        writeln!(
            f,
            "last fifth of the steps, same seed and data; bound {:.2} %, the larger of 0.25 % and the gap of another",
            100.0 * self.bound
        )?;
        writeln!(f, "order of sums.\n")?;
        let share = |gap: Gap| format!("{:+.3} %", 100.0 * gap);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "not run".into());
        let rows: Vec<[String; 6]> = self
            .arms
            .iter()
            .map(|arm| {
                let seeds: Vec<String> = arm.gaps.iter().copied().map(share).collect();
                let loss =
                    arm.validation_loss.map(|loss| format!("{:.4} ± {:.4}", loss.mean, loss.deviation));
                let within = arm.is_within.map(|is_within| if is_within { "yes" } else { "no" }.to_owned());
                let cpu = arm.cpu_seconds.map(|cpu| format!("{:.0}", cpu.mean));
                let mean = arm.gap.map(|gap| share(gap.mean));
                [
                    arm.name.into(),
                    or_none(mean),
                    seeds.join(", "),
                    or_none(within),
                    or_none(loss),
                    or_none(cpu),
                ]
            })
            .collect();
        let head =
            ["arm", "gap", "by seed", "within the bound", "validation loss, nats per token", "CPU seconds"];
        write!(f, "{}", markdown(head, &rows))
    }
}
