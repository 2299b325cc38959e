//! What is shown of a run: its steps, what happened beside them, loads of experts and norms of gradients. Pure; bounded in all that
//! is not one number a step.

use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use contraflow_proto::LayerLoad;
use serde::Serialize;

/// A figure of every step.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// Its name in addresses and files.
    pub key: &'static str,
    /// What a page calls it.
    pub title: &'static str,
    /// As it stands behind a number; empty where there is none.
    pub unit: &'static str,
    /// Of a step.
    pub of: fn(&StepRecord) -> f64,
}

/// Number of figures.
pub const FIGURES_LEN: usize = 14;

/// All of them, in the order of a point's values.
pub const FIGURES: [Figure; FIGURES_LEN] = [
    Figure { key: "loss", title: "Loss", unit: "nats/token", of: |record| record.loss },
    Figure { key: "mtp_loss", title: "MTP loss", unit: "nats/token", of: |record| or_gap(record.mtp_loss) },
    Figure { key: "balance_loss", title: "Balance loss", unit: "", of: |record| record.balance_loss },
    Figure {
        key: "validation_loss",
        title: "Validation loss",
        unit: "nats/token",
        of: |record| or_gap(record.validation_loss),
    },
    Figure { key: "learning_rate", title: "Learning rate", unit: "", of: |record| record.learning_rate },
    Figure { key: "grad_norm", title: "Gradient norm", unit: "", of: |record| record.grad_norm },
    Figure {
        key: "tokens_per_second",
        title: "Tokens per second",
        unit: "tokens/s",
        of: |record| record.tokens_per_second,
    },
    Figure { key: "mfu", title: "MFU", unit: "ratio", of: |record| or_gap(record.mfu) },
    Figure { key: "bubble_share", title: "Bubble", unit: "ratio", of: |record| record.bubble_share },
    Figure { key: "seconds", title: "Step time", unit: "s", of: |record| record.seconds },
    Figure { key: "max_vio", title: "MaxVio", unit: "", of: mean_max_vio },
    Figure { key: "sent_bytes", title: "Sent", unit: "B", of: |record| record.sent_bytes as f64 },
    Figure {
        key: "peak_live_chunks",
        title: "Chunks in flight",
        unit: "",
        of: |record| f64::from(record.peak_live_chunks),
    },
    // Not in the record: see [`History::push`].
    Figure { key: "memory_bytes", title: "Memory", unit: "B", of: |_| f64::NAN },
];

/// Place of the memory among the figures.
const MEMORY: usize = FIGURES_LEN - 1;

fn or_gap(value: Option<f64>) -> f64 {
    value.unwrap_or(f64::NAN)
}

/// Place of a figure by its key.
pub fn figure(key: &str) -> Option<usize> {
    FIGURES.iter().position(|figure| figure.key == key)
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Optimizer update, from 1.
    pub step: u64,
    /// Tokens of all steps so far.
    pub tokens: u64,
    /// Time of all steps so far. **Units**: seconds.
    pub seconds: f64,
    /// When it ended. **Units**: milliseconds since 1970.
    pub unix_ms: u64,
    /// By [`FIGURES`]; NaN where there is none.
    pub values: [f32; FIGURES_LEN],
}

/// Something that happened at a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Annotation {
    /// After which step; 0: before the first.
    pub step: u64,
    /// `checkpoint`, `resume`, `rollback`, `skipped`, `warning`, `failure`, `end`.
    pub kind: &'static str,
    /// In words.
    pub text: String,
}

/// Values that are too large to be kept of every step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Of which step.
    pub step: u64,
    /// Tokens per expert, layer by layer.
    pub loads: Vec<(u32, Vec<u64>)>,
    /// MaxVio, layer by layer.
    pub max_vio: Vec<(u32, f64)>,
    /// Norms of the gradient: embedding, layers in order, head; empty where they are not known.
    pub norms: Vec<f64>,
}

/// Most annotations of a history: the earliest go first.
const MAX_ANNOTATIONS: usize = 2_000;

/// Most samples. When there are more, every other one goes, and from then on half as many come.
pub const MAX_SAMPLES: usize = 256;

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct History {
    points: Vec<Point>,
    annotations: Vec<Annotation>,
    samples: Vec<Sample>,
    /// Of how many steps one is sampled, less 1.
    gap: u64,
    /// The latest step's, which need not be among the samples.
    latest: Sample,
    /// By figure, the latest step that has it, and its value: a long run need not be searched for one that it never had.
    last: [Option<(u64, f32)>; FIGURES_LEN],
    generation: u32,
    /// Of the process that trains. **Units**: bytes.
    peak_memory: u64,
    /// Counts of what has happened, for whoever counts.
    skipped: u64,
    rollbacks: u64,
    warnings: u64,
}

impl History {
    /// Takes a step in. `memory` is what the process of the ranks has in use, where it is known. **Units**: bytes.
    pub fn push(&mut self, record: &StepRecord, memory: Option<u64>) {
        self.go_back(record);
        let (tokens, seconds) = self.points.last().map_or((0, 0.0), |point| (point.tokens, point.seconds));
        let mut values = FIGURES.map(|figure| (figure.of)(record) as f32);
        if let Some(bytes) = memory {
            values[MEMORY] = bytes as f32;
            self.peak_memory = self.peak_memory.max(bytes);
        }
        for (last, value) in self.last.iter_mut().zip(values).filter(|(_, value)| value.is_finite()) {
            *last = Some((record.step, value));
        }
        self.points.push(Point {
            step: record.step,
            tokens: tokens + record.tokens,
            seconds: seconds + record.seconds,
            unix_ms: record.unix_ms,
            values,
        });
        if record.skipped {
            self.skipped += 1;
            self.annotate(record.step, "skipped", "the watch has skipped this batch".into());
        }
        for warning in &record.warnings {
            self.warnings += 1;
            self.annotate(record.step, "warning", warning.clone());
        }
        self.sample(record);
    }

    /// Steps after a checkpoint that are made again replace what they were.
    fn go_back(&mut self, record: &StepRecord) {
        let is_formed_anew = !self.points.is_empty() && record.generation > self.generation;
        self.generation = self.generation.max(record.generation);
        if self.points.last().is_some_and(|last| record.step <= last.step) {
            let last = self.points.last().map_or(0, |last| last.step);
            self.points.retain(|point| point.step < record.step);
            self.last = std::array::from_fn(|figure| last_of(&self.points, figure));
            self.samples.retain(|sample| sample.step < record.step);
            self.rollbacks += 1;
            let back = record.step - 1;
            self.annotate(back, "rollback", format!("back from step {last} to step {back}"));
        } else if is_formed_anew {
            let generation = record.generation;
            self.annotate(record.step - 1, "resume", format!("formation {generation} goes on"));
        }
    }

    fn sample(&mut self, record: &StepRecord) {
        let norms = record.gradient_norms.as_ref().map(|norms| {
            std::iter::once(norms.embedding).chain(norms.layers.iter().copied()).chain([norms.head]).collect()
        });
        self.latest = Sample {
            step: record.step,
            loads: record.loads.iter().map(|load| (load.layer, load.counts.clone())).collect(),
            max_vio: record.max_vio.iter().map(|(&layer, &vio)| (layer, vio)).collect(),
            norms: norms.unwrap_or_default(),
        };
        let due = self.samples.last().map_or(0, |last| last.step + 1 + self.gap);
        if record.step < due {
            return;
        }
        self.samples.push(self.latest.clone());
        if self.samples.len() > MAX_SAMPLES {
            self.halve();
            self.gap = 2 * self.gap + 1;
        }
    }

    fn halve(&mut self) {
        let mut place = 0;
        self.samples.retain(|_| {
            place += 1;
            place % 2 == 1
        });
    }

    /// Puts the tokens per expert of a sampled step beside what is known of it: lines of metrics do not have them.
    pub fn put_loads(&mut self, step: u64, loads: &[LayerLoad]) {
        let of = |sample: &&mut Sample| sample.step == step;
        let loads: Vec<(u32, Vec<u64>)> =
            loads.iter().map(|load| (load.layer, load.counts.clone())).collect();
        match self.samples.iter_mut().find(of) {
            Some(sample) => sample.loads = loads.clone(),
            None => {
                let place = self.samples.partition_point(|sample| sample.step < step);
                let sample = Sample { step, loads: loads.clone(), ..Sample::default() };
                self.samples.insert(place, sample);
                if self.samples.len() > 2 * MAX_SAMPLES {
                    self.halve();
                }
            }
        }
        // An earlier step's are not the latest ones, though there be no others.
        if step >= self.latest.step {
            self.latest.loads = loads;
        }
    }

    /// Notes that something has happened.
    pub fn annotate(&mut self, step: u64, kind: &'static str, text: String) {
        if self.annotations.len() >= MAX_ANNOTATIONS {
            self.annotations.remove(0);
        }
        self.annotations.push(Annotation { step, kind, text });
    }

    /// Every step.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Those after a step.
    pub fn since(&self, step: u64) -> &[Point] {
        &self.points[self.points.partition_point(|point| point.step <= step)..]
    }

    /// What happened, in the order in which it was noted.
    pub fn annotations(&self) -> &[Annotation] {
        &self.annotations
    }

    /// Some steps, evenly spread.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The latest step, whether it is among the samples or not.
    pub fn latest(&self) -> &Sample {
        &self.latest
    }

    /// The latest step; 0: there is none.
    pub fn step(&self) -> u64 {
        self.points.last().map_or(0, |last| last.step)
    }

    /// Count of formations.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Most memory seen. **Units**: bytes.
    pub fn peak_memory(&self) -> u64 {
        self.peak_memory
    }

    /// Batches that the watch has skipped, returns to a checkpoint, warnings.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.skipped, self.rollbacks, self.warnings)
    }

    /// Latest value of a figure that is a number, with its step.
    pub fn last(&self, key: &str) -> Option<(u64, f64)> {
        self.last[figure(key)?].map(|(step, value)| (step, f64::from(value)))
    }
}

fn last_of(points: &[Point], figure: usize) -> Option<(u64, f32)> {
    let values = points.iter().rev().map(|point| (point.step, point.values[figure]));
    values.into_iter().find(|(_, value)| value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            generation: 1,
            tokens: 10,
            seconds: 0.5,
            loss: step as f64,
            ..StepRecord::default()
        }
    }

    #[test]
    fn tokens_and_time_add_up_and_absent_figures_are_gaps() {
        let mut history = History::default();
        (1..=3).for_each(|step| history.push(&record(step), Some(7 * step)));
        let last = history.points().last().unwrap();
        assert_eq!((last.step, last.tokens, last.seconds), (3, 30, 1.5));
        assert!(last.values[figure("mtp_loss").unwrap()].is_nan());
        assert_eq!(
            (history.last("loss"), history.last("mfu"), history.peak_memory()),
            (Some((3, 3.0)), None, 21)
        );
        assert_eq!(history.since(1).iter().map(|point| point.step).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn steps_that_are_made_again_replace_what_they_were() {
        let mut history = History::default();
        let mtp_loss = |step| (step % 2 == 0).then_some(7.0);
        (1..=5).for_each(|step| {
            history.push(&StepRecord { mtp_loss: mtp_loss(step), ..record(step) }, None);
        });
        history.push(&StepRecord { generation: 2, loss: 9.0, ..record(3) }, None);
        assert_eq!(history.points().iter().map(|point| point.step).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((history.last("loss"), history.counts()), (Some((3, 9.0)), (0, 1, 0)));
        assert_eq!(history.last("mtp_loss"), Some((2, 7.0)), "that of step 4 is no more");
        let Annotation { step, kind, text } = history.annotations().last().unwrap();
        assert_eq!((*step, *kind, text.as_str()), (2, "rollback", "back from step 5 to step 2"));
        assert_eq!(history.points().last().unwrap().tokens, 30);
    }

    #[test]
    fn samples_stay_few_and_evenly_spread_however_long_a_run_is() {
        let mut history = History::default();
        (1..=10_000).for_each(|step| history.push(&record(step), None));
        let steps: Vec<u64> = history.samples().iter().map(|sample| sample.step).collect();
        assert!((MAX_SAMPLES / 2..=MAX_SAMPLES).contains(&steps.len()), "{}", steps.len());
        let gaps: Vec<u64> = steps.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| *gap == gaps[0]), "{gaps:?}");
        assert_eq!(history.latest().step, 10_000);
        (1..=10_000).for_each(|step| history.put_loads(step, &[LayerLoad { layer: 1, counts: vec![step] }]));
        assert!(history.samples().len() <= 2 * MAX_SAMPLES, "{}", history.samples().len());
        assert_eq!(history.latest().loads, [(1, vec![10_000])]);
        history.push(&record(10_001), None);
        history.put_loads(5, &[LayerLoad { layer: 1, counts: vec![5] }]);
        assert_eq!(
            (history.latest().step, history.latest().loads.len()),
            (10_001, 0),
            "those of step 5 are not"
        );
        (1..=10_000).for_each(|step| history.annotate(step, "warning", String::new()));
        assert_eq!(history.annotations().len(), MAX_ANNOTATIONS);
    }
}
