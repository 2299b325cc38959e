//! From the records of runs to what is drawn: panels of lines in the units of the figures. Pure; knows no file and no picture.

use super::survey::{Record, Survey};

/// Points of a line that is drawn: more are not seen.
const MAX_POINTS: usize = 1000;

/// A line of this many points is also drawn smoothed.
const SMOOTHED_FROM: usize = 100;

/// The smoothed value is a mean over about this share of a line.
const SMOOTHING: f64 = 0.02;

/// A line, in order of the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Which run.
    pub run: usize,
    /// Step and value. A value that is not finite is a gap.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub style: Style,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As the figure itself.
    Plain,
    /// Behind its smoothed form.
    Faint,
    /// With a mark at each point.
    Marked,
}

/// One figure of all runs over the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Figure and unit.
    pub title: &'static str,
    /// Whether equal factors are equally far apart.
    pub is_logarithmic: bool,
    /// The lines.
    pub lines: Vec<Line>,
}

/// The panels of runs: loss, validation where there is any, gradient norm.
pub fn panels(runs: &[Survey]) -> Vec<Panel> {
    let of_records = |value: fn(&Record) -> f64| {
        let lines = runs.iter().enumerate().flat_map(|(run, survey)| {
            let points = survey.records.iter().map(|record| (record.step as f64, value(record))).collect();
            with_smoothed(run, points)
        });
        lines.collect::<Vec<Line>>()
    };
    let validation = runs.iter().enumerate().map(|(run, survey)| {
        let points = survey.validations().into_iter().map(|(step, loss)| (step as f64, loss)).collect();
        Line { run, points, style: Style::Marked }
    });
    let panels = [
        Panel {
            title: "loss, nats per token",
            is_logarithmic: false,
            lines: of_records(|record| record.loss),
        },
        Panel {
            title: "validation loss, nats per token",
            is_logarithmic: false,
            lines: validation.filter(|line| !line.points.is_empty()).collect(),
        },
        Panel {
            title: "gradient norm before clipping",
            is_logarithmic: true,
            lines: of_records(|record| record.grad_norm),
        },
    ];
    panels.into_iter().filter(|panel| !panel.lines.is_empty()).collect()
}

/// A line as it is drawn, and over it the smoothed one if it is long.
fn with_smoothed(run: usize, points: Vec<(f64, f64)>) -> Vec<Line> {
    if points.is_empty() {
        return Vec::new();
    }
    if points.len() < SMOOTHED_FROM {
        return vec![Line { run, points, style: Style::Plain }];
    }
    let smooth = thinned(&smoothed(&points));
    vec![
        Line { run, points: thinned(&points), style: Style::Faint },
        Line { run, points: smooth, style: Style::Plain },
    ]
}

/// A mean in which earlier values count less and less; the first values are not drawn towards 0.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 * SMOOTHING).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let smooth = |&(step, value): &(f64, f64)| {
        if value.is_finite() {
            (sum, weight) = (keep * sum + (1.0 - keep) * value, keep * weight + 1.0 - keep);
        }
        (step, if value.is_finite() { sum / weight } else { f64::NAN })
    };
    points.iter().map(smooth).collect()
}

/// At most [`MAX_POINTS`]: of each stretch the lowest, the highest and what is not finite, so that no spike is lost.
pub fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 3);
    let mut kept = Vec::new();
    for part in points.chunks(stretch) {
        let places = || (0..part.len()).filter(|&place| part[place].1.is_finite());
        let by_value = |a: &usize, b: &usize| part[*a].1.total_cmp(&part[*b].1);
        let gap = (0..part.len()).find(|&place| !part[place].1.is_finite());
        let mut chosen: Vec<usize> =
            [places().min_by(by_value), places().max_by(by_value), gap].into_iter().flatten().collect();
        chosen.sort_unstable();
        chosen.dedup();
        kept.extend(chosen.into_iter().map(|place| part[place]));
    }
    kept
}

/// Lowest and highest of finite values; on a logarithmic axis of those above 0. `None` if there are none.
pub fn range(values: impl Iterator<Item = f64>, is_logarithmic: bool) -> Option<(f64, f64)> {
    let shown = values.filter(|value| value.is_finite() && (!is_logarithmic || *value > 0.0));
    shown.fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// Round numbers within a range, four to ten of them if it is not a point.
pub fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let span = high - low;
    if span <= 0.0 || !span.is_finite() {
        return vec![low];
    }
    let rough = span / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|tick| tick as f64 * step).collect()
}

/// Round numbers within a range on a logarithmic axis: powers of ten, and between them 2 and 5 where that makes few.
pub fn log_ticks((low, high): (f64, f64)) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let factors: &[f64] = if decades.clone().count() <= 4 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let all = decades.flat_map(|power| factors.iter().map(move |factor| factor * 10_f64.powi(power)));
    let shown: Vec<f64> = all.filter(|tick| (low..=high).contains(tick)).collect();
    if shown.is_empty() { vec![low] } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_spikes_and_its_gaps() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|step| (f64::from(step), 2.0)).collect();
        points[12_345].1 = 9.0;
        points[23_456].1 = f64::NAN;
        points[34_567].1 = 0.5;
        let thin = thinned(&points);
        assert!(thin.len() <= MAX_POINTS, "{}", thin.len());
        assert!(thin.contains(&(12_345.0, 9.0)) && thin.contains(&(34_567.0, 0.5)));
        assert!(thin.iter().any(|(step, value)| *step == 23_456.0 && value.is_nan()));
        assert!(thin.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thinned(&points[..10]), points[..10]);
    }

    #[test]
    fn a_smoothed_line_begins_at_its_first_value_and_follows_a_constant() {
        let constant: Vec<(f64, f64)> = (0..500).map(|step| (f64::from(step), 3.0)).collect();
        assert!(smoothed(&constant).iter().all(|(_, value)| (value - 3.0).abs() < 1e-12));
        // Over 500 points it is a mean over about 10: after a jump it is there within a few times that.
        let jump: Vec<(f64, f64)> = (0..500).map(|step| (f64::from(step), f64::from(step / 250))).collect();
        let smooth = smoothed(&jump);
        assert!((smooth[0].1, smooth[249].1) == (0.0, 0.0) && smooth[300].1 > 0.99, "{:?}", smooth[300]);
    }

    #[test]
    fn ticks_are_round_and_within_the_range() {
        let cases: [((f64, f64), &[f64]); 4] = [
            ((0.0, 10.0), &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
            ((1.3, 5.8), &[2.0, 3.0, 4.0, 5.0]),
            ((0.0, 720.0), &[0.0, 200.0, 400.0, 600.0]),
            ((3.0, 3.0), &[3.0]),
        ];
        for (range, expected) in cases {
            assert_eq!(ticks(range), expected, "{range:?}");
        }
        assert_eq!(log_ticks((0.3, 30.0)), [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(log_ticks((9e-5, 1.1e4)).len(), 9);
    }

    #[test]
    fn a_range_leaves_out_what_cannot_be_drawn() {
        let values = [f64::NAN, 2.0, f64::INFINITY, -1.0, 0.0];
        assert_eq!(range(values.into_iter(), false), Some((-1.0, 2.0)));
        assert_eq!(range(values.into_iter(), true), Some((2.0, 2.0)));
        assert_eq!(range([f64::NAN].into_iter(), false), None);
    }
}
