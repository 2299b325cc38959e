//! From a long history the points that a plot of some width shows. Pure.

use super::history::Point;

/// What stands on the axis of a plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Optimizer updates.
    Step,
    /// Tokens.
    Tokens,
    /// Seconds of training.
    Time,
}

impl Axis {
    /// By its name in addresses.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "step" => Some(Axis::Step),
            "tokens" => Some(Axis::Tokens),
            "time" => Some(Axis::Time),
            _ => None,
        }
    }

    /// Where a point stands.
    pub fn of(self, point: &Point) -> f64 {
        match self {
            Axis::Step => point.step as f64,
            Axis::Tokens => point.tokens as f64,
            Axis::Time => point.seconds,
        }
    }
}

/// Places of at most about `most` points that show `figures` (places in a point's values): of each stretch the lowest and the highest
/// of each figure, and the first gap behind a number, so that no spike is lost. The first and the last point are among them.
pub fn thinned(points: &[Point], figures: &[usize], most: usize) -> Vec<usize> {
    let per_stretch = 3 * figures.len().max(1);
    let stretches = (most / per_stretch).max(1);
    if points.len() <= stretches * per_stretch {
        return (0..points.len()).collect();
    }
    let length = points.len().div_ceil(stretches);
    let mut kept = vec![0, points.len() - 1];
    for (index, stretch) in points.chunks(length).enumerate() {
        for &figure in figures {
            let (mut low, mut high, mut gap) = (None, None, None);
            for (place, point) in stretch.iter().enumerate() {
                let value = point.values[figure];
                if !value.is_finite() {
                    // A figure that is there now and then has no gaps: only one that was there in the step before.
                    let is_first = place > 0 && stretch[place - 1].values[figure].is_finite();
                    gap = gap.or(is_first.then_some(place));
                    continue;
                }
                if low.is_none_or(|(_, lowest)| value < lowest) {
                    low = Some((place, value));
                }
                if high.is_none_or(|(_, highest)| value > highest) {
                    high = Some((place, value));
                }
            }
            let chosen = [low.map(|(place, _)| place), high.map(|(place, _)| place), gap];
            kept.extend(chosen.into_iter().flatten().map(|place| index * length + place));
        }
    }
    kept.sort_unstable();
    kept.dedup();
    kept
}

#[cfg(test)]
mod tests {
    use super::super::history::FIGURES_LEN;
    use super::*;

    fn points(count: u64, value: impl Fn(u64) -> [f32; 2]) -> Vec<Point> {
        let point = |step| {
            let mut values = [f32::NAN; FIGURES_LEN];
            values[..2].copy_from_slice(&value(step));
            Point { step, tokens: 8 * step, seconds: 0.5 * step as f64, unix_ms: 0, values }
        };
        (0..count).map(point).collect()
    }

    #[test]
    fn a_million_steps_become_a_thousand_points_and_no_extreme_is_lost() {
        let value = |step| match step {
            123_456 => [99.0, 1.0],
            654_321 => [2.0, -7.0],
            777_777 => [f32::NAN, 1.0],
            _ => [2.0, 1.0],
        };
        let points = points(1_000_000, value);
        let kept = thinned(&points, &[0, 1], 1_000);
        assert!(kept.len() <= 1_002, "{}", kept.len());
        for place in [0, 123_456, 654_321, 777_777, 999_999] {
            assert!(kept.contains(&place), "{place}");
        }
        assert!(kept.is_sorted());
    }

    #[test]
    fn a_short_history_stays_whole_and_a_figure_that_is_rarely_there_keeps_its_values() {
        let short = points(100, |_| [1.0, 1.0]);
        assert_eq!(thinned(&short, &[0], 1_000), (0..100).collect::<Vec<_>>());
        let rare = points(30_000, |step| [if step % 1_000 == 0 { step as f32 } else { f32::NAN }, 1.0]);
        let kept = thinned(&rare, &[0], 300);
        assert_eq!(kept.iter().filter(|&&place| place % 1_000 == 0).count(), 30);
        assert_eq!(thinned(&[], &[0], 300), Vec::<usize>::new());
    }

    #[test]
    fn axes_are_steps_tokens_and_time() {
        let point = points(3, |_| [0.0; 2])[2];
        let places = ["step", "tokens", "time"].map(|name| Axis::parse(name).unwrap().of(&point));
        assert_eq!((places, Axis::parse("x")), ([2.0, 16.0, 1.0], None));
    }
}
