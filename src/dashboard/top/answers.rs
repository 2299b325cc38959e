//! What `/api/v1` answers, as far as it is shown here. Knows no socket and no terminal.
//!
//! What another process says is not trusted: a text has no character that acts on a terminal, and a bounded length, from the moment it is
//! read on.

use std::collections::BTreeMap;
use std::fmt;

use contraflow_runtime::control::text::tidy;
use serde::Deserialize;

use crate::dashboard::shown::Phase;

/// Longest text that is kept. **Units**: bytes.
const MAX_TEXT: usize = 512;

/// A text in a printable form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct Text(String);

impl From<String> for Text {
    fn from(mut text: String) -> Self {
        tidy(&mut text, MAX_TEXT);
        Text(text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl std::ops::Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is served there: runs of one process, or the jobs of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct About {
    /// `runs` or `cluster`.
    pub kind: Text,
    /// The newest first where they are jobs.
    pub runs: Vec<Entry>,
}

impl About {
    /// Whether the runs are jobs of a cluster.
    pub fn is_cluster(&self) -> bool {
        &*self.kind == "cluster"
    }
}

/// A run or a job in a list.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// What it is called in addresses.
    pub id: Text,
    /// What it is called.
    pub name: Text,
    /// How far it has come.
    pub phase: Phase,
    /// The latest step.
    pub step: u64,
    /// Steps of its recipe, where they are known.
    pub steps: Option<u64>,
    /// Of the latest step. **Units**: nats per token.
    pub loss: Option<f64>,
}

/// What is known of a run beside its curves.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Overview {
    /// What it is called in addresses.
    pub id: Text,
    /// What it is called.
    pub name: Text,
    /// How far it has come.
    pub phase: Phase,
    /// Why it has ended, or what it waits for.
    pub outcome: Text,
    /// The latest step.
    pub step: u64,
    /// Steps of its recipe, where they are known.
    pub steps: Option<u64>,
    /// What is left of it. **Units**: seconds.
    pub seconds_left: Option<f64>,
    /// What all ranks need together, by the plan. **Units**: bytes.
    pub planned_memory: Option<u64>,
    /// By place in the pipeline, what a rank needs, by the plan; empty where that is not known. **Units**: bytes.
    pub planned_ranks: Vec<u64>,
    /// How its ranks are laid out, where its recipe is known.
    pub layout: Option<Layout>,
    /// The latest values.
    pub figures: Vec<Figure>,
    /// What has happened, in the order in which it was noted.
    pub annotations: Vec<Annotation>,
    /// Whether its plan is known.
    pub has_plan: bool,
    /// Whether its ranks record their steps where they can be asked.
    pub has_recording: bool,
}

impl Overview {
    /// The latest value of a figure.
    pub fn last(&self, key: &str) -> Option<f64> {
        self.figures.iter().find(|figure| &*figure.key == key)?.last
    }
}

/// Ranks along the axes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Layout {
    /// Pipeline ranks.
    pub pipeline: usize,
    /// Expert ranks.
    pub expert: usize,
    /// Data ranks.
    pub data: usize,
    /// The schedule's name.
    pub schedule: Text,
}

/// A figure's latest value.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Figure {
    /// Its name in addresses.
    pub key: Text,
    /// Absent where no step had a number.
    pub last: Option<f64>,
}

/// Something that happened at a step.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Annotation {
    /// After which step.
    pub step: u64,
    /// `warning`, `failure`, `rollback` and so on.
    pub kind: Text,
    /// In words.
    pub text: Text,
}

/// A figure over the steps.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Series {
    /// The steps, as many as are worth a point.
    pub step: Vec<u64>,
    /// By key; absent is a gap.
    pub figures: BTreeMap<String, Vec<Option<f64>>>,
}

/// A timeline.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Pipeline {
    /// Where the times are from, in words.
    pub source: Text,
    /// When the last operation ends. **Units**: those of all times here.
    pub makespan: f64,
    /// `s`, or `F` for that of a forward pass.
    pub unit: Text,
    /// By rank, or by place in the pipeline.
    pub ranks: Vec<Row>,
}

/// A rank of a timeline.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Row {
    /// The stages that it holds, where the plan knows.
    pub stages: Option<Vec<u64>>,
    /// What runs beside what.
    pub lanes: Vec<Lane>,
}

impl Row {
    /// What the rank computed, in order.
    pub fn computed(&self) -> impl Iterator<Item = &Op> {
        self.lanes.iter().filter(|lane| &*lane.name == "compute").flat_map(|lane| &lane.ops)
    }
}

/// A lane of a rank.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Lane {
    /// `compute`, or what it sends or receives.
    pub name: Text,
    /// In order.
    pub ops: Vec<Op>,
}

/// An operation.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Op {
    /// Its begin.
    pub s: f64,
    /// Its end.
    pub e: f64,
    /// Number of its colour.
    pub c: Option<usize>,
}

/// Loads of experts.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Experts {
    /// Of the latest step whose loads are known.
    pub layers: Vec<Load>,
    /// MaxVio over some steps, layer by layer.
    pub max_vio: Vec<MaxVio>,
}

impl Experts {
    /// The latest MaxVio of every layer.
    pub fn latest(&self) -> Vec<(u32, f64)> {
        if self.layers.is_empty() {
            let last = self.max_vio.iter().rev().find(|sample| !sample.layers.is_empty());
            return last.map_or_else(Vec::new, |last| last.layers.clone().into_iter().collect());
        }
        self.layers.iter().map(|load| (load.layer, load.max_vio)).collect()
    }
}

/// Of one layer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Load {
    /// The layer.
    pub layer: u32,
    /// (largest load - mean) / mean.
    pub max_vio: f64,
}

/// Of one step.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct MaxVio {
    /// By layer.
    pub layers: BTreeMap<u32, f64>,
}

/// What an orchestrator knows of a job besides.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Job {
    /// The latest step of which all ranks have reported.
    pub step: u64,
    /// Its state, as the command line has it.
    pub state: Text,
    /// Count of formations.
    pub generation: u32,
    /// What it waits for; empty if for nothing.
    pub waiting_for: Text,
    /// What an operator should look at; empty if nothing.
    pub warning: Text,
    /// Where its ranks are.
    pub ranks: Vec<Place>,
}

/// Where a rank is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Place {
    /// The rank.
    pub rank: usize,
    /// Its worker.
    pub worker: Text,
    /// The node of its worker.
    pub node: Text,
    /// How long it works in a step. **Units**: seconds.
    pub busy_seconds: f64,
    /// How long it waits in a step. **Units**: seconds.
    pub waited_seconds: f64,
    /// Whether it holds the others up.
    pub slow: bool,
    /// Memory of its worker's process, all of whose ranks are in it; 0: not known. **Units**: bytes.
    pub memory_bytes: u64,
}

/// Failures of a job, the latest first.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Incidents {
    /// As stories.
    pub incidents: Vec<Incident>,
}

/// A failure.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Incident {
    /// The first sign. **Units**: milliseconds since 1970.
    pub began_unix_ms: u64,
    /// When the job went on, or had ended; none if it has not.
    pub over_unix_ms: Option<u64>,
    /// The first sign, in words.
    pub sign: Text,
}

/// Why a request is refused.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Refused {
    /// One or more.
    pub faults: Vec<Text>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_no_character_that_acts_on_a_terminal_and_a_bounded_length() {
        let entry: Entry =
            serde_json::from_str(r#"{"name": "a\u001b[2J\u202eb\n", "phase": "training"}"#).unwrap();
        assert_eq!((&*entry.name, entry.phase), ("a\\u{1b}[2J\\u{202e}b\\n", Phase::Training));
        assert_eq!(Text::from("x".repeat(10_000)).len(), MAX_TEXT);
    }

    #[test]
    fn the_latest_balance_is_that_of_the_loads_or_where_there_are_none_of_the_latest_sample() {
        let sampled = r#""max_vio": [{"step": 1, "layers": {"1": 0.5}}, {"step": 2, "layers": {"1": 0.25, "10": 1.0}}, {"step": 3, "layers": {}}]"#;
        let of = |layers: &str| {
            serde_json::from_str::<Experts>(&format!("{{\"layers\": [{layers}], {sampled}}}"))
                .unwrap()
                .latest()
        };
        assert_eq!(of(""), [(1, 0.25), (10, 1.0)]);
        assert_eq!(of(r#"{"layer": 7, "max_vio": 2.0}"#), [(7, 2.0)]);
    }
}
