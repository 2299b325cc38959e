//! `contraflow bench balance`: loss-free balancing beside auxiliary losses (report, sections 4.5.2 and 4.5.3).

use std::fmt;

use serde::Serialize;

use super::study::{Arm, Statistic, Study, StudyArgs, markdown, shown};
use crate::failure::Failure;

pub(super) const STUDY: Study = Study {
    name: "balance",
    steps: 720,
    arms: &[
        Arm { name: "loss-free", overrides: &["balance.sequence_alpha=0"] },
        Arm { name: "sequence-wise", overrides: &["balance.bias_speed=0", "balance.sequence_alpha=0.01"] },
        Arm {
            name: "batch-wise",
            overrides: &["balance.bias_speed=0", "balance.sequence_alpha=0", "balance.batch_alpha=0.01"],
        },
        Arm { name: "none", overrides: &["balance.bias_speed=0", "balance.sequence_alpha=0"] },
    ],
};

/// By arm.
#[derive(Debug, Serialize)]
pub(super) struct BalanceFigures {
    steps: u64,
    arms: Vec<ArmFigures>,
}

#[derive(Debug, Serialize)]
struct ArmFigures {
    name: &'static str,
    validation_loss: Option<Statistic>,
    /// By seed, that of the arm minus that of loss-free balancing. **Units**: nats per token.
    over_loss_free: Option<Statistic>,
    /// Mean over the layers and the last fifth of the steps.
    max_vio: Option<Statistic>,
}

/// **Errors**: those of the runs; a file that cannot be written.
pub(super) fn run(args: &StudyArgs) -> Result<BalanceFigures, Failure> {
    let runs = STUDY.run(args)?;
    let arms = STUDY.arms.iter().enumerate().map(|(index, arm)| ArmFigures {
        name: arm.name,
        validation_loss: runs.figure(index, |run| run.validation_loss),
        over_loss_free: runs.difference(index, |run| run.validation_loss),
        max_vio: runs.figure(index, |run| last_fifth(&run.max_vio)),
    });
    let figures = BalanceFigures { steps: STUDY.steps(args), arms: arms.collect() };
    let title = "smoothed loss over that with loss-free balancing, percent, mean over the seeds";
    STUDY.write(args, (&runs, &figures), title)?;
    Ok(figures)
}

fn last_fifth(values: &[f64]) -> f64 {
    let part = &values[values.len() - (values.len() / 5).max(1)..];
    part.iter().sum::<f64>() / part.len() as f64
}

impl fmt::Display for BalanceFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "`contraflow bench balance --steps {}`: the tiny recipe; MaxVio, mean over the layers and the last fifth of",
            self.steps
        )?;
        writeln!(f, "the steps; ± is the standard deviation of one seed.\n")?;
        let rows: Vec<[String; 4]> = self
            .arms
            .iter()
            .map(|arm| {
                [arm.name.into(), shown(arm.validation_loss), shown(arm.over_loss_free), shown(arm.max_vio)]
            })
            .collect();
        let head = ["balance", "validation loss, nats per token", "over loss-free, by seed", "MaxVio"];
        write!(f, "{}", markdown(head, &rows))
    }
}
