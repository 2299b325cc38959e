//! The metrics actor: one summary per step out of the ranks' reports, a ring of the latest, and whoever subscribed.

use std::collections::{BTreeMap, VecDeque};

use contraflow_proto::{GradientNorms, StepReport};
use contraflow_runtime::watch::gate::GateWatch;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use serde::{Deserialize, Serialize};

/// Summaries kept for those who ask later.
const RING: usize = 4096;

/// What one step was like, over all ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepSummary {
    /// Optimizer update, counted from 1.
    pub step: u64,
    /// Tokens of the global batch.
    pub tokens: u64,
    /// Mean loss of the global batch, in nats per token.
    pub loss: f64,
    /// Mean MTP loss, in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp_loss: Option<f64>,
    /// Sequence-wise balance loss, scaled.
    pub balance_loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Wall time of the slowest rank, in seconds.
    pub seconds: f64,
    /// Share of the ranks' time in which their compute lane was blocked on a message.
    pub bubble_share: f64,
    /// (max load - mean) / mean of the experts, per MoE layer.
    pub max_vio: BTreeMap<u32, f64>,
    /// Bytes all ranks sent.
    pub sent_bytes: u64,
    /// Largest number of chunks with live activations, over ranks.
    pub peak_live_chunks: u32,
    /// Norms of the gradient before clipping: embedding, each layer, final norm and head.
    pub gradient_norms: GradientNorms,
    /// Whether no update was made: the watch skipped the batch.
    pub skipped: bool,
    /// What the watches say against this step, in words: numbers, spikes, gates.
    pub warnings: Vec<String>,
}

impl StepSummary {
    /// Puts the reports of all ranks together.
    pub fn of(reports: &[StepReport]) -> Self {
        let Some(first) = reports.first() else { return StepSummary::default() };
        let total = |value: fn(&StepReport) -> f64| reports.iter().map(value).sum::<f64>();
        let busy = total(|report| report.seconds);
        let loads = reports.iter().flat_map(|report| &report.loads);
        StepSummary {
            step: first.step,
            tokens: first.tokens,
            loss: first.loss,
            mtp_loss: first.mtp_loss,
            balance_loss: first.balance_loss,
            grad_norm: first.grad_norm,
            learning_rate: first.learning_rate,
            seconds: reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
            bubble_share: if busy > 0.0 { total(|report| report.bubble_seconds) / busy } else { 0.0 },
            max_vio: loads.map(|load| (load.layer, max_vio(&load.counts))).collect(),
            sent_bytes: reports.iter().map(|report| report.sent_bytes).sum(),
            peak_live_chunks: reports.iter().map(|report| report.peak_live_chunks).max().unwrap_or(0),
            gradient_norms: first.gradient_norms.clone().unwrap_or_default(),
            skipped: first.skipped,
            warnings: first.warning.iter().cloned().collect(),
        }
    }

    /// MaxVio averaged over the layers.
    pub fn mean_max_vio(&self) -> f64 {
        if self.max_vio.is_empty() {
            0.0
        } else {
            self.max_vio.values().sum::<f64>() / self.max_vio.len() as f64
        }
    }
}

/// How uneven the load of a layer's experts is: (max load - mean) / mean.
pub fn max_vio(counts: &[u64]) -> f64 {
    let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
    let max = counts.iter().copied().max().unwrap_or(0) as f64;
    if mean > 0.0 { (max - mean) / mean } else { 0.0 }
}

/// Hears every summary.
pub type Subscriber = Box<dyn FnMut(&StepSummary) + Send>;

/// What the metrics actor hears.
pub enum MetricsMessage {
    /// A rank's report.
    Record(StepReport),
    /// Somebody wants every summary from now on.
    Subscribe(Subscriber),
    /// The latest summaries.
    Window {
        /// How many at most.
        len: usize,
        /// Where to.
        reply: RpcReplyPort<Vec<StepSummary>>,
    },
}

/// Puts the reports of all ranks together, step by step.
#[derive(Debug)]
pub struct Collector {
    world: usize,
    /// Reports of steps that not all ranks have reported, by step and rank.
    open: BTreeMap<u64, BTreeMap<u32, StepReport>>,
    gates: GateWatch,
    /// `watch.collapse_steps`.
    collapse_steps: u64,
}

impl Collector {
    /// For so many ranks; gates are watched over `collapse_steps` steps.
    pub fn new(world: usize, collapse_steps: u64) -> Self {
        Collector { world, open: BTreeMap::new(), gates: GateWatch::default(), collapse_steps }
    }

    /// Takes a report in; the summary of its step if it was the last of them.
    pub fn record(&mut self, report: StepReport) -> Option<StepSummary> {
        let step = report.step;
        let reports = self.open.entry(step).or_default();
        reports.insert(report.rank, report);
        if reports.len() < self.world {
            return None;
        }
        let reports: Vec<StepReport> = self.open.remove(&step).unwrap_or_default().into_values().collect();
        let mut summary = StepSummary::of(&reports);
        summary.warnings.extend(self.watch_gates(&reports));
        Some(summary)
    }

    /// Several ranks hold a layer and count the same.
    fn watch_gates(&mut self, reports: &[StepReport]) -> Vec<String> {
        let loads = reports.iter().flat_map(|report| &report.loads);
        let loads: BTreeMap<u32, &[u64]> = loads.map(|load| (load.layer, load.counts.as_slice())).collect();
        let see = |(layer, counts)| self.gates.see(layer, counts, self.collapse_steps);
        loads.into_iter().filter_map(see).collect()
    }
}

/// The actor's state.
pub struct MetricsState {
    collector: Collector,
    ring: VecDeque<StepSummary>,
    subscribers: Vec<Subscriber>,
}

impl MetricsState {
    fn new((world, collapse_steps): (usize, u64)) -> Self {
        let collector = Collector::new(world, collapse_steps);
        MetricsState { collector, ring: VecDeque::new(), subscribers: Vec::new() }
    }

    fn record(&mut self, report: StepReport) {
        let Some(summary) = self.collector.record(report) else { return };
        self.subscribers.iter_mut().for_each(|subscriber| subscriber(&summary));
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(summary);
    }

    fn window(&self, len: usize) -> Vec<StepSummary> {
        self.ring.iter().skip(self.ring.len().saturating_sub(len)).cloned().collect()
    }
}

/// The metrics actor.
pub struct Metrics;

impl Actor for Metrics {
    type Msg = MetricsMessage;
    type State = MetricsState;
    /// Number of ranks; `watch.collapse_steps`.
    type Arguments = (usize, u64);

    async fn pre_start(
        &self,
        _myself: ActorRef<MetricsMessage>,
        arguments: (usize, u64),
    ) -> Result<MetricsState, ActorProcessingErr> {
        Ok(MetricsState::new(arguments))
    }

    async fn handle(
        &self,
        _myself: ActorRef<MetricsMessage>,
        message: MetricsMessage,
        state: &mut MetricsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MetricsMessage::Record(report) => state.record(report),
            MetricsMessage::Subscribe(subscriber) => state.subscribers.push(subscriber),
            MetricsMessage::Window { len, reply } => {
                // Who asked may have left.
                let _ = reply.send(state.window(len));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contraflow_proto::LayerLoad;

    fn report(rank: u32, seconds: f64, bubble_seconds: f64) -> StepReport {
        let loads = vec![LayerLoad { layer: rank, counts: vec![6, 2, 0, 0] }];
        StepReport {
            rank,
            step: 7,
            tokens: 8,
            loss: 1.5,
            seconds,
            bubble_seconds,
            loads,
            ..StepReport::default()
        }
    }

    #[test]
    fn a_summary_appears_once_every_rank_has_reported() {
        let mut state = MetricsState::new((2, 0));
        state.record(report(1, 2.0, 1.0));
        assert!(state.window(9).is_empty());
        state.record(report(0, 3.0, 0.0));
        let summary = &state.window(9)[0];
        assert_eq!((summary.step, summary.seconds, summary.bubble_share), (7, 3.0, 0.2));
        assert_eq!(summary.max_vio, BTreeMap::from([(0, 2.0), (1, 2.0)]));
        assert_eq!(summary.mean_max_vio(), 2.0);
    }

    #[test]
    fn the_ring_keeps_the_latest() {
        let mut state = MetricsState::new((1, 0));
        for step in 0..RING as u64 + 5 {
            state.record(StepReport { step, ..StepReport::default() });
        }
        let steps: Vec<u64> = state.window(2).iter().map(|summary| summary.step).collect();
        assert_eq!(steps, [RING as u64 + 3, RING as u64 + 4]);
        assert_eq!(state.window(usize::MAX).len(), RING);
    }
}
