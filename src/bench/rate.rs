//! A rate over the repeats of one measurement.

use std::fmt;

use serde::Serialize;

/// What is done in a second. The median and the best repeat, by the wall clock; and by the CPU time of all threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Rate {
    pub(super) median: f64,
    pub(super) best: f64,
    pub(super) per_cpu_second: f64,
}

impl Rate {
    /// Of repeats that each did `amount`, from their wall times and the CPU time of one of them.
    ///
    /// # Panics
    /// Without repeats.
    pub(super) fn new(amount: f64, mut seconds: Vec<f64>, cpu_seconds: f64) -> Self {
        seconds.sort_by(f64::total_cmp);
        Rate {
            median: amount / seconds[seconds.len() / 2],
            best: amount / seconds[0],
            per_cpu_second: amount / cpu_seconds.max(1e-9),
        }
    }
}

impl fmt::Display for Rate {
    /// With the precision of the formatter, else none after the point.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rate { median, best, per_cpu_second } = self;
        let digits = f.precision().unwrap_or(0);
        write!(f, "{median:.digits$} median, {best:.digits$} best; {per_cpu_second:.digits$} per CPU second")
    }
}
