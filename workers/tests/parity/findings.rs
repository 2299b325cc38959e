//! What a check found: how far values lie from the truth, what is wrong, and what was not checked.
//!
//! Knows numbers and marks, nothing of models.

use std::collections::BTreeMap;
use std::io::Write as _;

/// How far a value may lie from the truth.
///
/// The truth is itself f32; a second implementation in f64 lies within 5e-6 of its logits, 6e-7 of its losses and 2e-6
/// of a gradient tensor's maximum.
#[derive(Clone, Copy)]
pub enum Mark {
    /// The same for every value.
    Absolute(f64),
    /// Times the largest value of the tensor where that is above 1: rounding errors of the residual stream and of sums
    /// over it are in proportion to its size.
    Scaled(f64),
    /// In proportion to each value.
    Relative(f64),
    /// 1e-5 of the tensor's maximum, and 1e-7 for tensors whose gradient all but vanishes.
    Gradient,
}

/// Ten times what rounding does to logits of the fixtures.
pub const LOGITS: Mark = Mark::Absolute(5e-5);
/// As far as logits, which are sums over such values.
pub const ACTIVATIONS: Mark = Mark::Scaled(5e-5);
/// Ten times what rounding does to losses.
pub const LOSS: Mark = Mark::Absolute(1e-5);

/// Faults that are printed when a check fails: one cause has hundreds of them.
const NUM_TOLD: usize = 20;

impl Mark {
    fn limit(self, truth: f64, largest: f64) -> f64 {
        match self {
            Mark::Absolute(mark) => mark,
            Mark::Scaled(mark) => mark * largest.max(1.0),
            Mark::Relative(mark) => mark * truth.abs(),
            Mark::Gradient => 1e-5 * largest + 1e-7,
        }
    }
}

/// The largest deviation of one kind of value.
#[derive(Default)]
struct Largest {
    deviation: f64,
    /// Largest deviation as a share of what is allowed there, and where.
    share: f64,
    key: String,
}

/// What one check found in all fixtures.
#[derive(Default)]
pub struct Findings {
    fixture: String,
    faults: Vec<String>,
    largest: BTreeMap<(String, String), Largest>,
}

impl Findings {
    /// Continues with another fixture.
    pub fn begin(&mut self, fixture: &str) {
        self.fixture = fixture.to_owned();
    }

    /// Notes a fault unless `holds`.
    pub fn check(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.faults.push(format!("{}: {}", self.fixture, fault()));
        }
    }

    /// Says that no check looks at this value. Past the test harness, which swallows what a passing test prints.
    pub fn unknown(&self, key: &str) {
        let line = format!("parity: {}: no check knows the value {key}\n", self.fixture);
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }

    /// Compares values of one kind with the truth.
    pub fn compare(&mut self, kind: &str, key: &str, truth: &[f64], found: &[f32], mark: Mark) {
        let same = truth.len() == found.len();
        self.check(same, || format!("{key}: expected {} values, got {}", truth.len(), found.len()));
        if !same {
            return;
        }
        let largest = truth.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
        let entry = self.largest.entry((self.fixture.clone(), kind.to_owned())).or_default();
        let mut worst: Option<(usize, f64)> = None;
        for (at, (truth, found)) in truth.iter().zip(found).enumerate() {
            let deviation = (f64::from(*found) - truth).abs();
            let limit = mark.limit(*truth, largest);
            // A value that is no number is infinitely wrong, zero exactly where nothing else is allowed is right.
            let share = match deviation {
                0.0 => 0.0,
                deviation if deviation.is_nan() => f64::INFINITY,
                deviation => deviation / limit,
            };
            entry.deviation = entry.deviation.max(deviation);
            if share >= entry.share {
                (entry.share, entry.key) = (share, key.to_owned());
            }
            if worst.is_none_or(|(_, before)| share > before) {
                worst = Some((at, share));
            }
        }
        if let Some((at, share)) = worst {
            let (truth, found) = (truth[at], found[at]);
            let words =
                || format!("{kind}: {key}[{at}]: expected {truth}, got {found}: {share:.1} times the mark");
            self.check(share <= 1.0, words);
        }
    }

    /// Prints the largest deviations.
    ///
    /// # Panics
    /// If anything is wrong, with the first faults and their number.
    pub fn finish(self) {
        println!("fixture | kind | largest deviation | share of the mark | where that is largest");
        for ((fixture, kind), Largest { deviation, share, key }) in &self.largest {
            println!("{fixture} | {kind} | {deviation:.1e} | {share:.3} | {key}");
        }
        let (num_faults, first) = (self.faults.len(), &self.faults[..self.faults.len().min(NUM_TOLD)]);
        assert!(
            first.is_empty(),
            "{num_faults} faults, of which the first {}:\n{}",
            first.len(),
            first.join("\n")
        );
    }
}
