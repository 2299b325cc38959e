//! The steps of a job as they are watched: reports of all ranks put together, each step once.

use contraflow_proto::StepReport;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::metrics::{Collector, StepSummary};

/// A step as it is kept.
#[derive(Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// Count of (re)formations at this step.
    pub generation: u32,
    /// What all ranks together say.
    #[serde(flatten)]
    pub summary: serde_json::Value,
}

impl StepRecord {
    /// A number of the summary.
    pub fn number(&self, key: &str) -> f64 {
        self.summary.get(key).and_then(serde_json::Value::as_f64).unwrap_or_default()
    }
}

/// How far a job's kept steps go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The latest step that is durable.
    pub step: u64,
    /// Log lines so far.
    pub lines: u64,
    /// Nothing more will come.
    pub has_ended: bool,
}

/// The steps of one job.
pub struct Steps {
    collector: Collector,
    generation: u32,
    /// The latest step that is complete.
    pub last: u64,
    /// Its loss.
    pub loss: Option<f64>,
    /// By rank, the latest step that it has reported.
    pub by_rank: Vec<u64>,
    /// Who watches is woken by it.
    pub kept: watch::Sender<Kept>,
}

impl Steps {
    /// Of a job whose steps up to `last` are kept.
    pub fn new(last: u64, loss: Option<f64>, lines: u64, has_ended: bool) -> Self {
        Steps {
            collector: Collector::new(0, 0),
            generation: 0,
            last,
            loss,
            by_rank: Vec::new(),
            kept: watch::Sender::new(Kept { step: last, lines, has_ended }),
        }
    }

    /// The job has been formed, with so many ranks.
    pub fn formed(&mut self, generation: u32, world: usize, collapse_steps: u64) {
        self.collector = Collector::new(world, collapse_steps);
        self.generation = generation;
        self.by_rank = vec![0; world];
    }

    /// Takes a report in; the step, if that made it complete. One that was complete before is recomputed: it is told once.
    pub fn record(&mut self, report: StepReport) -> Option<(u64, Vec<u8>)> {
        if let Some(latest) = self.by_rank.get_mut(report.rank as usize) {
            *latest = (*latest).max(report.step);
        }
        if report.generation != self.generation || report.step <= self.last {
            return None;
        }
        let summary: StepSummary = self.collector.record(report)?;
        self.last = summary.step;
        self.loss = Some(summary.loss);
        let summary_json = serde_json::to_value(&summary).ok()?;
        let record = StepRecord { generation: self.generation, summary: summary_json };
        Some((summary.step, serde_json::to_vec(&record).ok()?))
    }
}
