//! `contraflow bench balance`: loss-free balancing beside auxiliary losses (report, sections 4.5.2 and 4.5.3).

use std::fmt;

use serde::Serialize;

use super::study::report::{distance_line, markdown, write};
use super::study::{Arm, Statistic, Study, StudyArgs, TrainingRun, runs};
use crate::failure::Failure;
use crate::runs::curves::Panel;

const STUDY: Study = Study {
    name: "balance",
    common: &[],
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
    let runs = runs(&STUDY, args)?;
    let pairs = |arm: usize| -> Vec<(&TrainingRun, &TrainingRun)> {
        runs[arm]
            .iter()
            .zip(&runs[0])
            .filter_map(|(run, free)| Some((run.as_ref()?, free.as_ref()?)))
            .collect()
    };
    let arms = STUDY.arms.iter().enumerate().map(|(index, arm)| {
        let own = || runs[index].iter().flatten();
        ArmFigures {
            name: arm.name,
            validation_loss: Statistic::of(own().map(|run| run.validation_loss)),
            over_loss_free: Statistic::of(
                pairs(index).iter().map(|(run, free)| run.validation_loss - free.validation_loss),
            ),
            max_vio: Statistic::of(own().map(|run| last_fifth(&run.max_vio))),
        }
    });
    let figures = BalanceFigures { steps: args.steps, arms: arms.collect() };
    let lines = (1..STUDY.arms.len()).filter(|&arm| !pairs(arm).is_empty()).map(|arm| {
        let losses: Vec<_> =
            pairs(arm).iter().map(|(run, free)| (run.loss.as_slice(), free.loss.as_slice())).collect();
        distance_line(arm, &losses)
    });
    let panel = Panel {
        title: "smoothed loss over that with loss-free balancing, percent, mean over the seeds",
        is_logarithmic: false,
        lines: lines.collect(),
    };
    let names: Vec<String> = STUDY.arms.iter().map(|arm| arm.name.to_owned()).collect();
    write(&args.results.join(STUDY.name), &figures.to_string(), (&names, &[panel]))?;
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
        let shown = |statistic: Option<Statistic>| {
            statistic.map_or_else(|| "not run".into(), |s| format!("{:.4} ± {:.4}", s.mean, s.deviation))
        };
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
