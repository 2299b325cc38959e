//! `contraflow bench mtp`: what multi-token prediction does to the model's own loss, and how many of its proposals would be accepted
//! in speculative decoding (report, sections 4.5.1 and 5.4.3).

use std::fmt;

use contraflow_workers::infer::evaluate::Acceptance;
use serde::Serialize;

use super::study::{Arm, Statistic, Study, StudyArgs, markdown, shown};
use crate::failure::Failure;

pub(super) const STUDY: Study = Study {
    name: "mtp",
    steps: 720,
    arms: &[
        Arm { name: "without", overrides: &["model.num_nextn_predict_layers=0", "mtp.weight=0"] },
        Arm { name: "with", overrides: &[] },
    ],
};

/// Both arms.
#[derive(Debug, Serialize)]
pub(super) struct MtpFigures {
    steps: u64,
    without: Option<Statistic>,
    with: Option<Statistic>,
    /// By seed, with minus without. **Units**: nats per token, as above.
    difference: Option<Statistic>,
    /// Share of the proposals that would be accepted.
    acceptance: Option<Statistic>,
}

/// **Errors**: those of the runs; a file that cannot be written.
pub(super) fn run(args: &StudyArgs) -> Result<MtpFigures, Failure> {
    let runs = STUDY.run(args)?;
    let share = |Acceptance { accepted, proposed }: Acceptance| accepted as f64 / proposed as f64;
    let figures = MtpFigures {
        steps: STUDY.steps(args),
        without: runs.figure(0, |run| run.validation_loss),
        with: runs.figure(1, |run| run.validation_loss),
        difference: runs.difference(1, |run| run.validation_loss),
        acceptance: Statistic::of(runs.of(1).filter_map(|run| run.acceptance).map(share)),
    };
    let title = "smoothed loss of the main model over that without multi-token prediction, percent, mean over the seeds";
    STUDY.write(args, (&runs, &figures), title)?;
    Ok(figures)
}

impl fmt::Display for MtpFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "`contraflow bench mtp --steps {}`: the tiny recipe, the main model's loss; ± is the standard deviation of one",
            self.steps
        )?;
        writeln!(
            f,
            "seed; proposals are those of speculative decoding without sampling, on validation sequences.\n"
        )?;
        let rows = [
            ["validation loss without, nats per token".into(), shown(self.without)],
            ["validation loss with".into(), shown(self.with)],
            ["difference by seed".into(), shown(self.difference)],
            ["share of proposals accepted".into(), shown(self.acceptance)],
        ];
        write!(f, "{}", markdown(["figure", "value"], &rows))
    }
}
