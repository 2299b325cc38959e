//! The files of a study beside its raw results: a table in Markdown and a picture. Knows no question.

use std::path::Path;

use crate::failure::Failure;
use crate::runs::curves::{Line, Panel, Style, thinned};
use crate::runs::svg::picture;

use super::curve::distances;

/// Writes `README.md`, the command and the table, and `curves.svg` into the study's folder.
///
/// **Errors**: what cannot be written, with its path.
pub(in crate::bench) fn write(
    folder: &Path,
    table: &str,
    (names, panels): (&[String], &[Panel]),
) -> Result<(), Failure> {
    for (name, text) in [("README.md", table.to_owned()), ("curves.svg", picture(names, panels))] {
        let path = folder.join(name);
        std::fs::write(&path, text)
            .map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

/// How far the smoothed loss of an arm is from the reference, in percent, mean over the seeds that both have.
pub(in crate::bench) fn distance_line(run: usize, pairs: &[(&[f64], &[f64])]) -> Line {
    let steps = pairs.iter().map(|(loss, reference)| loss.len().min(reference.len())).min().unwrap_or(0);
    let mut sums = vec![0.0; steps];
    for (loss, reference) in pairs {
        sums.iter_mut().zip(distances(loss, reference)).for_each(|(sum, distance)| *sum += distance);
    }
    let point = |(step, sum): (usize, &f64)| ((step + 1) as f64, 100.0 * sum / pairs.len() as f64);
    let points: Vec<_> = sums.iter().enumerate().map(point).collect();
    Line { run, points: thinned(&points), style: Style::Plain }
}

/// A table in Markdown.
pub(in crate::bench) fn markdown<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let line = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let rows = rows.iter().map(|row| line(&row.each_ref().map(String::as_str)));
    line(&head) + &line(&["---"; N]) + &rows.collect::<String>()
}
