//! The record of a step: one value that the progress line, metrics.jsonl, the store and the Watch stream show, made of the
//! reports of all ranks and a few constants of the job. Pure: knows no clock, no file and no driver.

use std::collections::BTreeMap;

pub use contraflow_proto::StepRecord;
use contraflow_proto::{LayerLoad, StepReport};
use contraflow_runtime::cost;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::stability::gate::GateWatch;

/// What records need beside the reports: known before the first step of a formation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JobConstants {
    /// Number of ranks.
    pub world: usize,
    /// `watch.collapse_steps`: steps in a row over which an expert must starve for a warning; 0: no warning.
    pub collapse_steps: u64,
    /// Training FLOP per token, forward and backward.
    pub flops_per_token: f64,
    /// Measured peak of the cores in use; `None` if not measured. **Units**: FLOP/s.
    pub peak_flops: Option<f64>,
}

impl JobConstants {
    /// Of a recipe on this number of ranks.
    pub fn new(recipe: &Recipe, world: usize, peak_flops: Option<f64>) -> Self {
        let length = recipe.training.sequence_length;
        JobConstants {
            world,
            collapse_steps: recipe.watch.collapse_steps,
            flops_per_token: cost::training_flops_per_token(&recipe.model_config, length) as f64,
            peak_flops: peak_flops.filter(|&peak| peak > 0.0),
        }
    }
}

/// Puts the reports of all ranks together, step by step.
#[derive(Debug, Default)]
pub struct Collector {
    constants: JobConstants,
    /// Reports of steps that not all ranks have reported, by step and rank.
    open: BTreeMap<u64, BTreeMap<u32, StepReport>>,
    gates: GateWatch,
}

impl Collector {
    /// For a job, from its first step on.
    pub fn new(constants: JobConstants) -> Self {
        Collector { constants, ..Collector::default() }
    }

    /// The job has re-formed and continues: ranks report again what not all of them had reported. Gates are watched on
    /// across the formations.
    pub fn reform(&mut self, constants: JobConstants) {
        self.constants = constants;
        self.open.clear();
    }

    /// The job rolls back to a checkpoint: the steps after it are repeated, and so is what the gate watch has seen.
    pub fn go_back(&mut self) {
        *self = Collector::new(self.constants);
    }

    /// Takes a report in; the record of its step if it was the last of them.
    pub fn record(&mut self, report: StepReport) -> Option<StepRecord> {
        let step = report.step;
        let reports = self.open.entry(step).or_default();
        reports.insert(report.rank, report);
        if reports.len() < self.constants.world {
            return None;
        }
        let reports: Vec<StepReport> = self.open.remove(&step).unwrap_or_default().into_values().collect();
        let mut record = self.put_together(&reports);
        record.warnings.extend(self.watch_gates(&reports));
        Some(record)
    }

    /// Sums over the global batch are the same in all reports that have them; rank 0 has all that are not by layer.
    fn put_together(&self, reports: &[StepReport]) -> StepRecord {
        let Some(first) = reports.first() else { return StepRecord::default() };
        let total = |value: fn(&StepReport) -> f64| reports.iter().map(value).sum::<f64>();
        let seconds = reports.iter().map(|report| report.seconds).fold(0.0, f64::max);
        let tokens_per_second = ratio(first.tokens as f64, seconds);
        let loads = reports.iter().flat_map(|report| &report.loads);
        // Several ranks may report a layer, and count the same.
        let loads: BTreeMap<u32, &LayerLoad> = loads.map(|load| (load.layer, load)).collect();
        let mfu = |peak: f64| tokens_per_second * self.constants.flops_per_token / peak;
        StepRecord {
            step: first.step,
            generation: first.generation,
            tokens: first.tokens,
            loss: first.loss,
            mtp_loss: first.mtp_loss,
            balance_loss: first.balance_loss,
            grad_norm: first.grad_norm,
            learning_rate: first.learning_rate,
            seconds,
            tokens_per_second,
            // More than all of the peak shows that it was measured while others were at work.
            mfu: self.constants.peak_flops.map(mfu).filter(|mfu| *mfu <= 1.0),
            bubble_share: ratio(total(|report| report.bubble_seconds), total(|report| report.seconds)),
            max_vio: loads.iter().map(|(&layer, load)| (layer, max_vio(&load.counts))).collect(),
            sent_bytes: reports.iter().map(|report| report.sent_bytes).sum(),
            peak_live_chunks: reports.iter().map(|report| report.peak_live_chunks).max().unwrap_or(0),
            gradient_norms: first.gradient_norms.clone(),
            skipped: first.skipped,
            warnings: first.warning.iter().cloned().collect(),
            unix_ms: reports.iter().map(|report| report.unix_ms).max().unwrap_or(0),
            validation_loss: first.validation_loss,
            ends_early: first.ends_early,
            loads: loads.into_values().cloned().collect(),
        }
    }

    /// Several ranks may report a layer, and count the same.
    fn watch_gates(&mut self, reports: &[StepReport]) -> Vec<String> {
        let loads = reports.iter().flat_map(|report| &report.loads);
        let loads: BTreeMap<u32, &[u64]> = loads.map(|load| (load.layer, load.counts.as_slice())).collect();
        let see = |(layer, counts)| self.gates.see(layer, counts, self.constants.collapse_steps);
        loads.into_iter().filter_map(see).collect()
    }
}

/// 0 where there is nothing to divide by.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// How uneven the load of a layer's experts is: (max load - mean) / mean.
pub fn max_vio(counts: &[u64]) -> f64 {
    let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
    let max = counts.iter().copied().max().unwrap_or(0) as f64;
    ratio(max - mean, mean)
}

/// MaxVio of a step, averaged over the layers.
pub fn mean_max_vio(record: &StepRecord) -> f64 {
    ratio(record.max_vio.values().sum(), record.max_vio.len() as f64)
}

#[cfg(test)]
mod tests {
    use contraflow_proto::GradientNorms;

    use super::*;

    fn report(rank: u32, seconds: f64, bubble_seconds: f64) -> StepReport {
        let norms = GradientNorms { embedding: 1.0, layers: vec![2.0], head: 3.0 };
        StepReport {
            rank,
            generation: 2,
            step: 7,
            tokens: 600,
            loss: 1.5,
            seconds,
            bubble_seconds,
            sent_bytes: 10,
            peak_live_chunks: 3 - rank,
            loads: vec![LayerLoad { layer: rank, counts: vec![6, 2, 0, 0] }],
            gradient_norms: (rank == 0).then_some(norms),
            unix_ms: 1_000 + u64::from(rank),
            validation_loss: Some(1.25),
            ..StepReport::default()
        }
    }

    fn constants(world: usize) -> JobConstants {
        JobConstants { world, collapse_steps: 2, flops_per_token: 50.0, peak_flops: Some(20_000.0) }
    }

    #[test]
    fn a_record_is_made_once_every_rank_has_reported() {
        let mut collector = Collector::new(constants(2));
        assert_eq!(collector.record(report(1, 2.0, 1.0)), None);
        let record = collector.record(report(0, 3.0, 0.0)).unwrap();
        assert_eq!((record.step, record.generation, record.seconds, record.bubble_share), (7, 2, 3.0, 0.2));
        // 600 tokens in the 3 s of the slower rank, 50 FLOP each, of 20,000 FLOP/s.
        assert_eq!((record.tokens_per_second, record.mfu), (200.0, Some(0.5)));
        assert_eq!(record.max_vio, BTreeMap::from([(0, 2.0), (1, 2.0)]));
        assert_eq!((record.unix_ms, record.validation_loss, record.ends_early), (1_001, Some(1.25), false));
        assert_eq!((record.sent_bytes, record.peak_live_chunks), (20, 3));
        assert_eq!(record.gradient_norms.as_ref().unwrap().layers, [2.0]);
        assert_eq!(mean_max_vio(&record), 2.0);
        assert_eq!(record.loads.iter().map(|load| load.layer).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn what_cannot_be_divided_is_left_out_or_0() {
        let constants = JobConstants { peak_flops: None, ..constants(1) };
        let record = Collector::new(constants).record(report(0, 0.0, 0.0)).unwrap();
        assert_eq!((record.tokens_per_second, record.mfu, record.bubble_share), (0.0, None, 0.0));
        assert_eq!((max_vio(&[]), max_vio(&[0, 0]), mean_max_vio(&StepRecord::default())), (0.0, 0.0, 0.0));
    }

    #[test]
    fn a_peak_that_was_passed_was_none() {
        // 300 tokens/s of 50 FLOP each: 15,000 FLOP/s.
        let mfu = |peak| {
            let constants = JobConstants { peak_flops: Some(peak), ..constants(1) };
            Collector::new(constants).record(report(0, 2.0, 0.0)).unwrap().mfu
        };
        assert_eq!((mfu(20_000.0), mfu(15_000.0), mfu(14_000.0)), (Some(0.75), Some(1.0), None));
    }

    #[test]
    fn gates_are_watched_after_the_job_re_forms() {
        let mut collector = Collector::new(constants(1));
        let mut warnings = |step, reforms| {
            if reforms {
                collector.reform(constants(1));
            }
            collector.record(StepReport { step, ..report(0, 1.0, 0.0) }).unwrap().warnings
        };
        assert!(warnings(1, false).is_empty());
        let warned = warnings(2, true);
        assert!(warned.len() == 1 && warned[0].contains("its gate collapses"), "{warned:?}");
        assert!(warnings(3, true).is_empty(), "a layer is warned of once");
    }

    #[test]
    fn what_a_broken_formation_has_reported_does_not_count_in_the_next_one() {
        let mut collector = Collector::new(constants(2));
        assert_eq!(collector.record(report(0, 1.0, 0.0)), None);
        collector.reform(constants(2));
        assert_eq!(collector.record(report(1, 1.0, 0.0)), None);
        assert!(collector.record(report(0, 1.0, 0.0)).is_some());
    }

    #[test]
    fn a_record_survives_json_whatever_its_numbers_are() {
        let mut collector = Collector::new(constants(1));
        let record = collector.record(report(0, 1.0, 0.5)).unwrap();
        let text = serde_json::to_string(&record).unwrap();
        assert!(!text.contains("loads"), "{text}");
        let record = StepRecord { loads: Vec::new(), ..record };
        assert_eq!(serde_json::from_str::<StepRecord>(&text).unwrap(), record);
        let norms = GradientNorms { embedding: f64::NAN, layers: vec![1.0, f64::NAN], head: f64::NAN };
        let record =
            StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, gradient_norms: Some(norms), ..record };
        let text = serde_json::to_string(&record).unwrap();
        let again: StepRecord = serde_json::from_str(&text).unwrap();
        assert!(again.loss.is_nan() && again.grad_norm.is_nan(), "{again:?}");
        let norms = again.gradient_norms.unwrap();
        assert!(norms.layers[1].is_nan() && norms.layers[0] == 1.0, "{norms:?}");
        assert_eq!(again.step, record.step);
    }
}
