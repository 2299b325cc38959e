//! The files of a study beside its raw results: a table in Markdown and a picture. Knows no question.

use std::fmt::Display;

use super::curve::{Statistic, distances};
use super::{Runs, Study, StudyArgs};
use crate::failure::Failure;
use crate::runs::curves::{Line, Panel, Style, thinned};
use crate::runs::svg::picture;

impl Study {
    /// Writes `README.md`, the figures, and `curves.svg`, how far each arm is from the first, into the study's folder.
    ///
    /// **Errors**: what cannot be written, with its path.
    pub(in crate::bench) fn write(
        &self,
        args: &StudyArgs,
        (runs, figures): (&Runs, &impl Display),
        title: &'static str,
    ) -> Result<(), Failure> {
        let names: Vec<String> = self.arms.iter().map(|arm| arm.name.to_owned()).collect();
        let lines = (1..self.arms.len()).filter_map(|arm| distance_line(runs, arm));
        let panel = Panel { title, is_logarithmic: false, lines: lines.collect() };
        for (name, text) in [("README.md", figures.to_string()), ("curves.svg", picture(&names, &[panel]))] {
            let path = args.results.join(self.name).join(name);
            std::fs::write(&path, text)
                .map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
        }
        Ok(())
    }
}

/// How far the smoothed loss of an arm is from the first one's, in percent, mean over the seeds that both have.
fn distance_line(runs: &Runs, arm: usize) -> Option<Line> {
    let by_seed: Vec<Vec<f64>> =
        runs.pairs(arm).map(|(run, first)| distances(&run.loss, &first.loss).collect()).collect();
    let steps = by_seed.iter().map(Vec::len).min()?;
    let mean =
        |step: usize| by_seed.iter().map(|distances| distances[step]).sum::<f64>() / by_seed.len() as f64;
    let points: Vec<_> = (0..steps).map(|step| ((step + 1) as f64, 100.0 * mean(step))).collect();
    Some(Line { run: arm, points: thinned(&points), style: Style::Plain })
}

/// Mean and deviation, or that there is none yet.
pub(in crate::bench) fn shown(statistic: Option<Statistic>) -> String {
    statistic.map_or_else(|| "not run".into(), |s| format!("{:.4} ± {:.4}", s.mean, s.deviation))
}

/// A table in Markdown.
pub(in crate::bench) fn markdown<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let line = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let rows = rows.iter().map(|row| line(&row.each_ref().map(String::as_str)));
    line(&head) + &line(&["---"; N]) + &rows.collect::<String>()
}
