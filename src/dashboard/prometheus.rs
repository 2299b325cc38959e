//! The text of `/metrics`: the Prometheus exposition format, version 0.0.4. Pure; knows no metric.

use std::fmt::Write;

use crate::otlp::families::{Family, Metrics};

/// All of them as text.
pub fn exposition(metrics: &Metrics) -> String {
    let mut text = String::new();
    for (Family { name, kind, help }, samples) in &metrics.families {
        // Writing to a string does not fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            let labels: Vec<String> =
                labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
            let _ = match labels[..] {
                [] => writeln!(text, "{name} {value}"),
                _ => writeln!(text, "{name}{{{}}} {value}", labels.join(",")),
            };
        }
    }
    text
}

/// The value of a label as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::otlp::families::{counter, gauge, label};

    static PLAIN: Family = gauge("contraflow_a", "A.");
    static LABELLED: Family = counter("contraflow_b_total", "B.");
    static EMPTY: Family = gauge("contraflow_c", "C.");

    #[test]
    fn labels_are_quoted_and_a_family_without_numbers_is_left_out() {
        let mut metrics = Metrics::default();
        metrics.family(&PLAIN, [(Vec::new(), 1.5)]);
        metrics.family(&EMPTY, [(Vec::new(), f64::NAN)]);
        let labels = [label("of", "a\"b\\c\nd"), label("in", "e")].concat();
        metrics.family(&LABELLED, [(labels, 2.0), (label("of", "x"), f64::NAN)]);
        let expected = "# HELP contraflow_a A.\n# TYPE contraflow_a gauge\ncontraflow_a 1.5\n\
                        # HELP contraflow_b_total B.\n# TYPE contraflow_b_total counter\n\
                        contraflow_b_total{of=\"a\\\"b\\\\c\\nd\",in=\"e\"} 2\n";
        assert_eq!(exposition(&metrics), expected);
    }
}
