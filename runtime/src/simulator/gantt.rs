//! Rows of operations as lines of text: of each its compute lane, a character for each equal part of the step.
//!
//! Knows no terminal: how wide it is and whether it has colours, the caller says.

use super::palette::Shade;
use super::rows::{Block, Row};
use crate::schedule::{Lane, Plan};

/// What stands for a part of the step in which mostly nothing ran.
const IDLE: char = '.';
/// Below that many characters nothing could be told apart.
const LEAST: usize = 16;

/// The lines, of `width` characters each, in the colours of the palette or without; the time in `unit`.
///
/// Each character stands for what took most of its part of the step, or for idleness where that is more than half of it.
pub fn gantt(plan: &Plan, rows: &[Row], unit: &str, width: usize, is_coloured: bool) -> String {
    let label = rows.iter().map(|row| row.name.len()).max().unwrap_or_default() + 1;
    let cells = width.saturating_sub(label).max(LEAST);
    let end = rows.iter().flat_map(|row| row.spans).map(|span| span.end).fold(0.0, f64::max);
    let mut seen = Vec::new();
    let mut text = String::new();
    for row in rows {
        let shades = shades(&row.blocks(plan), end, cells);
        seen.extend(shades.iter().flatten().copied());
        text += &format!("{:<label$}{}\n", row.name, line(&shades, is_coloured));
    }
    let ends = format!("{} {unit}", significant(end));
    text += &format!("{:<label$}0{ends:>rest$}\n", "", rest = cells - 1);
    let legend = Shade::ALL.into_iter().filter(|shade| seen.contains(shade));
    let legend = legend.map(|shade| match shade.name() {
        name if name.len() == 1 => line(&[Some(shade)], is_coloured),
        name => format!("{} {name}", line(&[Some(shade)], is_coloured)),
    });
    text + &legend.chain([format!("{IDLE} idle")]).collect::<Vec<_>>().join("  ") + "\n"
}

/// What each of so many equal parts of the step is shown as.
fn shades(blocks: &[Block], end: f64, cells: usize) -> Vec<Option<Shade>> {
    let cell = end / cells as f64;
    let mut shares = vec![[0.0; Shade::ALL.len()]; cells];
    for block in blocks.iter().filter(|block| block.lane == Lane::Compute && block.span.duration() > 0.0) {
        let first = (block.span.start / cell) as usize;
        for (index, shares) in shares.iter_mut().enumerate().skip(first) {
            let begin = index as f64 * cell;
            if begin >= block.span.end {
                break;
            }
            let overlap = block.span.end.min(begin + cell) - block.span.start.max(begin);
            shares[block.shade as usize] += overlap.max(0.0);
        }
    }
    let of_cell = |shares: &[f64; Shade::ALL.len()]| {
        let largest =
            Shade::ALL.into_iter().max_by(|a, b| shares[*a as usize].total_cmp(&shares[*b as usize]));
        // A hair below a half: sums of parts of a step are not exact.
        largest.filter(|_| shares.iter().sum::<f64>() >= 0.4999 * cell && cell > 0.0)
    };
    shares.iter().map(of_cell).collect()
}

/// The characters, equal ones under one colour.
fn line(shades: &[Option<Shade>], is_coloured: bool) -> String {
    let run = |run: &[Option<Shade>]| {
        let letter = run[0].map_or(IDLE, letter).to_string().repeat(run.len());
        match run[0] {
            Some(shade) if is_coloured => {
                let (paper, ink) = (rgb(shade.colour()), rgb(shade.ink()));
                format!("\x1b[48;2;{paper};38;2;{ink}m{letter}\x1b[0m")
            }
            _ => letter,
        }
    };
    shades.chunk_by(|a, b| a == b).map(run).collect()
}

/// What stands for it in a line.
fn letter(shade: Shade) -> char {
    match shade {
        Shade::Forward => 'F',
        Shade::Backward => 'B',
        Shade::BackwardInput => 'I',
        Shade::BackwardWeight => 'W',
        Shade::ForwardBackward => '&',
        Shade::Dispatch => 'd',
        Shade::Combine => 'c',
        Shade::Optimizer => 'o',
        Shade::Transfer => 't',
    }
}

/// `#0072b2` as a terminal takes it: `0;114;178`.
fn rgb(colour: &str) -> String {
    let part = |at: usize| colour.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
    [1, 3, 5].map(|at| part(at).unwrap_or_default().to_string()).join(";")
}

/// With four digits that count.
fn significant(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let scale = 10.0_f64.powf(3.0 - value.log10().floor());
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::super::rows::rows;
    use super::*;
    use crate::schedule::{Mode, ScheduleKind, UnitCosts, clock};

    fn drawn(width: usize, is_coloured: bool) -> String {
        let (plan, _) = ScheduleKind::OneFOneB.plan(2, 3, Mode::Train).unwrap();
        let (programs, timeline) = clock(&plan, UnitCosts::SUM).unwrap();
        gantt(&plan, &rows("rank", &programs, &timeline), "F", width, is_coloured)
    }

    /// F0 F1 B0 F2 B1 B2 of 1 and 2 units, and 12 units in all: two characters each.
    #[test]
    fn every_character_is_what_ran_there() {
        let expected = "\
rank 0 FFFF....BBBBFFBBBB..BBBB
rank 1 ..FFBBBBFFBBBBFFBBBB....
       0                   12 F
F  B  . idle
";
        assert_eq!(drawn(7 + 24, false), expected);
    }

    #[test]
    fn lines_are_as_wide_as_asked_and_colours_change_no_character() {
        for width in [24, 31, 80, 200] {
            let plain = drawn(width, false);
            assert!(plain.lines().take(3).all(|line| line.len() == width), "{plain}");
            let coloured = drawn(width, true);
            let mut stripped = String::new();
            let mut rest = coloured.as_str();
            while let Some((before, after)) = rest.split_once('\x1b') {
                stripped += before;
                rest = after.split_once('m').unwrap().1;
            }
            assert_eq!(stripped + rest, plain);
            assert!(coloured.contains("\x1b[48;2;86;180;233;38;2;0;0;0mF"));
        }
    }
}
