//! Long rows of numbers in few characters: a rank's step as a strip of cells, a curve as the points of a sparkline. Pure.

use contraflow_runtime::simulator::Shade;

use super::answers::{Row, Series};

/// How long a rank worked and waited in a timeline. **Units**: those of its times.
pub fn busy_and_idle(row: &Row, makespan: f64) -> (f64, f64) {
    let busy: f64 = row.computed().map(|op| (op.e - op.s).max(0.0)).sum();
    (busy, (makespan - busy).max(0.0))
}

/// The compute lane of a rank in `width` cells: each has the colour of what took most of its time, none where that was waiting.
pub fn strip(row: &Row, makespan: f64, width: usize) -> Vec<Option<Shade>> {
    let mut cells = vec![[0.0; Shade::ALL.len()]; width];
    let scale = width as f64 / makespan;
    if !(scale.is_finite() && scale > 0.0) {
        return vec![None; width];
    }
    for op in row.computed() {
        let Some(colour) = op.c.filter(|colour| *colour < Shade::ALL.len()) else { continue };
        let (begin, end) = ((op.s * scale).max(0.0), (op.e * scale).min(width as f64));
        let first = begin as usize;
        // As many cells as there are, whatever another process says.
        for (place, cell) in cells.iter_mut().enumerate().take(end.ceil() as usize).skip(first) {
            let inside = end.min(place as f64 + 1.0) - begin.max(place as f64);
            cell[colour] += inside.max(0.0);
        }
    }
    cells.iter().map(shade_of_cell).collect()
}

fn shade_of_cell(cell: &[f64; Shade::ALL.len()]) -> Option<Shade> {
    let idle = 1.0 - cell.iter().sum::<f64>();
    let (shade, most) = Shade::ALL.into_iter().zip(cell).max_by(|a, b| a.1.total_cmp(b.1))?;
    (*most > 0.0 && *most >= idle).then_some(shade)
}

/// A figure in `width` columns of equally many steps: the mean of each, none where there is no number.
pub fn columns(series: &Series, key: &str, width: usize) -> Vec<Option<f64>> {
    let values = series.figures.get(key).map_or(&[][..], Vec::as_slice);
    let (Some(&first), Some(&last)) = (series.step.first(), series.step.last()) else { return Vec::new() };
    // A column a step, until there are more steps than columns.
    let steps = last.saturating_sub(first).saturating_add(1);
    let width = width.min(usize::try_from(steps).unwrap_or(width));
    let mut sums = vec![(0.0, 0_u32); width];
    for (step, value) in series.step.iter().zip(values) {
        let place = step.saturating_sub(first) as f64 / steps as f64 * width as f64;
        if let (Some(value), Some((sum, count))) = (value, sums.get_mut((place as usize).min(width - 1))) {
            (*sum, *count) = (*sum + value, *count + 1);
        }
    }
    sums.into_iter().map(|(sum, count)| (count > 0).then(|| sum / f64::from(count))).collect()
}

/// First and last number of a figure.
pub fn ends(series: &Series, key: &str) -> Option<(f64, f64)> {
    let mut values = series.figures.get(key)?.iter().flatten();
    let first = *values.next()?;
    Some((first, *values.next_back().unwrap_or(&first)))
}

/// Heights from 1 to `levels` for values from the lowest to the highest.
pub fn heights(values: &[Option<f64>], levels: u64) -> Vec<Option<u64>> {
    let numbers = || values.iter().flatten().copied().filter(|value| value.is_finite());
    let (low, high) = numbers()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (value.min(low), value.max(high)));
    let height = |value: f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.5 };
        1 + (share * levels.saturating_sub(1) as f64).round() as u64
    };
    values.iter().map(|value| value.filter(|value| value.is_finite()).map(height)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dashboard::top::answers::{Lane, Op};

    fn row(ops: &[(f64, f64, usize)]) -> Row {
        let ops = ops.iter().map(|&(s, e, c)| Op { s, e, c: Some(c) }).collect();
        Row { stages: None, lanes: vec![Lane { name: "compute".into(), ops }] }
    }

    #[test]
    fn a_cell_has_the_colour_of_what_took_most_of_its_time() {
        let (f, b) = (Some(Shade::Forward), Some(Shade::Backward));
        // Two units a cell: F F, F B B, idle, B, a little of B.
        let row = row(&[(0.0, 2.5, 0), (2.5, 4.0, 1), (6.0, 7.5, 1), (7.5, 8.0, 99), (8.0, 8.5, 1)]);
        assert_eq!(strip(&row, 10.0, 5), [f, b, None, b, None]);
        assert_eq!(busy_and_idle(&row, 10.0), (6.5, 3.5));
    }

    #[test]
    fn a_timeline_that_makes_no_sense_is_a_strip_without_a_cell_in_colour() {
        let wild = row(&[(-1e300, 1e300, 0), (f64::NAN, f64::INFINITY, 1), (5.0, -5.0, 2)]);
        for makespan in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-320] {
            assert_eq!(strip(&wild, makespan, 3), [None; 3], "{makespan}");
        }
        assert_eq!(strip(&wild, 8.0, 0), []);
        assert_eq!(strip(&wild, 8.0, 2).len(), 2);
    }

    fn series(steps: &[u64], values: &[Option<f64>]) -> Series {
        Series { step: steps.into(), figures: [("loss".to_owned(), values.to_vec())].into() }
    }

    #[test]
    fn a_curve_has_a_column_for_as_many_steps_each_and_gaps_where_there_is_no_number() {
        let all = series(&[1, 2, 3, 4, 5, 6], &[Some(6.0), Some(4.0), None, None, Some(2.0), Some(1.0)]);
        assert_eq!(columns(&all, "loss", 3), [Some(5.0), None, Some(1.5)]);
        // As many columns as steps at the most.
        assert_eq!(columns(&all, "loss", 80).len(), 6);
        // Points that are far apart stand far apart.
        assert_eq!(
            columns(&series(&[1, 10], &[Some(3.0), Some(1.0)]), "loss", 5),
            [Some(3.0), None, None, None, Some(1.0)]
        );
        assert_eq!(columns(&Series::default(), "loss", 5), []);
        assert_eq!(
            columns(&series(&[0, u64::MAX], &[Some(1.0), Some(2.0)]), "loss", 2),
            [Some(1.0), Some(2.0)]
        );
        assert_eq!((ends(&all, "loss"), ends(&all, "mfu")), (Some((6.0, 1.0)), None));
    }

    #[test]
    fn heights_go_from_the_lowest_value_to_the_highest() {
        assert_eq!(heights(&[Some(3.0), None, Some(1.0), Some(2.0)], 9), [Some(9), None, Some(1), Some(5)]);
        assert_eq!(heights(&[Some(2.0), Some(2.0)], 9), [Some(5), Some(5)]);
        assert_eq!(heights(&[Some(f64::INFINITY), Some(1.0)], 9), [None, Some(5)]);
    }
}
