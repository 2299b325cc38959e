//! `contraflow bench mtp`: what multi-token prediction does to the model's own loss, and how many of its proposals would be accepted
//! in speculative decoding (report, sections 4.5.1 and 5.4.3).

use std::fmt;

use contraflow_workers::infer::evaluate::Acceptance;
use serde::Serialize;

use super::study::report::{distance_line, markdown, write};
use super::study::{Arm, Statistic, Study, StudyArgs, TrainingRun, runs};
use crate::failure::Failure;
use crate::runs::curves::Panel;

const STUDY: Study = Study {
    name: "mtp",
    common: &[],
    arms: &[
        Arm { name: "without", overrides: &["model.num_nextn_predict_layers=0"] },
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
    let runs = runs(&STUDY, args)?;
    let [without, with] = &runs[..] else { unreachable!("the study has two arms") };
    let pairs: Vec<(&TrainingRun, &TrainingRun)> = with
        .iter()
        .zip(without)
        .filter_map(|(with, without)| Some((with.as_ref()?, without.as_ref()?)))
        .collect();
    let validation =
        |arm: &[Option<TrainingRun>]| Statistic::of(arm.iter().flatten().map(|run| run.validation_loss));
    let share = |Acceptance { accepted, proposed }: Acceptance| accepted as f64 / proposed as f64;
    let figures = MtpFigures {
        steps: args.steps,
        without: validation(without),
        with: validation(with),
        difference: Statistic::of(
            pairs.iter().map(|(with, without)| with.validation_loss - without.validation_loss),
        ),
        acceptance: Statistic::of(with.iter().flatten().filter_map(|run| run.acceptance).map(share)),
    };
    let losses: Vec<_> =
        pairs.iter().map(|(with, without)| (with.loss.as_slice(), without.loss.as_slice())).collect();
    let panel = Panel {
        title: "smoothed loss of the main model over that without multi-token prediction, percent, mean over the seeds",
        is_logarithmic: false,
        lines: if losses.is_empty() { Vec::new() } else { vec![distance_line(1, &losses)] },
    };
    let names: Vec<String> = STUDY.arms.iter().map(|arm| arm.name.to_owned()).collect();
    write(&args.results.join(STUDY.name), &figures.to_string(), (&names, &[panel]))?;
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
        let shown = |statistic: Option<Statistic>| {
            statistic.map_or_else(|| "not run".into(), |s| format!("{:.4} ± {:.4}", s.mean, s.deviation))
        };
        let rows = [
            ["validation loss without, nats per token".into(), shown(self.without)],
            ["validation loss with".into(), shown(self.with)],
            ["difference by seed".into(), shown(self.difference)],
            ["share of proposals accepted".into(), shown(self.acceptance)],
        ];
        write!(f, "{}", markdown(["figure", "value"], &rows))
    }
}
