//! Metrics as plain data: families with their samples, whoever reads them and in whatever form. Knows no run and no protocol.

/// A family of samples.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name, which ends in the base unit, and in `_total` if it only grows.
    pub name: &'static str,
    /// `gauge` or `counter`.
    pub kind: &'static str,
    /// What it is.
    pub help: &'static str,
}

/// One that goes up and down.
pub const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "gauge", help }
}

/// One that only grows.
pub const fn counter(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "counter", help }
}

/// The labels of a sample, in order: names and values.
pub type Labels = Vec<(&'static str, String)>;

/// A single label.
pub fn label(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

/// Families with their samples, in order. One without samples is not there.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Each has a sample.
    pub families: Vec<(&'static Family, Vec<(Labels, f64)>)>,
}

impl Metrics {
    /// Adds what there is of a family; what is no number is not there.
    pub fn family(&mut self, family: &'static Family, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let samples: Vec<_> = samples.into_iter().filter(|(_, value)| !value.is_nan()).collect();
        if !samples.is_empty() {
            self.families.push((family, samples));
        }
    }
}
