//! `contraflow bench step`: training steps of a benchmark model on one rank.

use std::fmt;
use std::time::Instant;

use contraflow_runtime::cost;
use contraflow_runtime::flight::{About, Event, Recorders};
use contraflow_runtime::schedule::Work;
use contraflow_runtime::topology::{FormationId, Generation, JobId};
use contraflow_workers::engine::timelines::{Timelines, cost_of_recording};
use serde::Serialize;

use super::rate::Rate;
use super::{WARM_UP, benchmark, train_quietly, with_changes};
use crate::failure::Failure;
use crate::machine;

/// What the steps made of the machine.
#[derive(Debug, Serialize)]
pub(super) struct StepSpeed {
    model: String,
    /// What differs from the model's recipe.
    changes: Vec<String>,
    threads: usize,
    steps: usize,
    tokens_per_step: f64,
    tokens_per_second: Rate,
    /// Shares of the peak.
    mfu_median: f64,
    mfu_best: f64,
    /// f32 product of 1024 x 1024 on one core by its CPU time, the best on such a machine so far, times the threads.
    peak_gflops: f64,
    mflop_per_token: f64,
    /// What recording a step's timeline takes.
    recording: RecordingCost,
}

/// What it takes to record the operations of a step, beside the step.
#[derive(Debug, Serialize)]
pub(super) struct RecordingCost {
    operations: usize,
    microseconds_per_step: f64,
    /// Of the median step.
    pub(super) share: f64,
    /// A record of the flight recorder in a file's ring, on one core. **Units**: ns.
    ring_ns_per_record: f64,
    /// Of the median step: two records an operation.
    ring_share: f64,
}

impl RecordingCost {
    /// Of the last step of a rank, in a step that takes so long.
    ///
    /// **Errors**: code 1 if nothing was recorded, or the system has no place for a ring.
    pub(super) fn of(timelines: &Timelines, step_s: f64) -> Result<RecordingCost, Failure> {
        let recorded = timelines.latest().ok_or_else(|| Failure::run("no step was recorded"))?;
        let operations = recorded.ranks.iter().map(|rank| rank.program.ops.len()).sum();
        let seconds = cost_of_recording(&recorded);
        let record_s = cost_of_a_record().map_err(|error| Failure::run(format!("a ring: {error}")))?;
        Ok(RecordingCost {
            operations,
            microseconds_per_step: seconds * 1e6,
            share: seconds / step_s,
            ring_ns_per_record: record_s * 1e9,
            ring_share: 2.0 * operations as f64 * record_s / step_s,
        })
    }
}

/// What a record in a ring takes, the clock read for it included, in the best of many times. **Units**: seconds.
fn cost_of_a_record() -> std::io::Result<f64> {
    const RECORDS: u64 = 10_000;
    let folder = std::env::temp_dir().join(format!("contraflow-bench-ring-{}", std::process::id()));
    let about = About { formation: FormationId::new(JobId::default(), Generation::FIRST), world: 1 };
    let recorders = Recorders::create(&folder, &about);
    // The ring stays mapped without its name.
    std::fs::remove_dir_all(&folder)?;
    let Some(recorder) = recorders?.of(0) else { return Ok(0.0) };
    let some = || {
        let began = Instant::now();
        (0..RECORDS).for_each(|step| recorder.note(Event::Began(Work::Totals, step), Instant::now()));
        began.elapsed().as_secs_f64() / RECORDS as f64
    };
    Ok((0..32).map(|_| some()).fold(f64::INFINITY, f64::min))
}

/// **Errors**: code 2 for a model that is not built in, or changes that its recipe refuses; code 1 if the run fails.
pub(super) fn run(
    model: &str,
    threads: usize,
    steps: usize,
    changes: &[String],
) -> Result<StepSpeed, Failure> {
    let (recipe, datasets) = benchmark(model, threads, steps + WARM_UP, changes)?;
    let length = recipe.training.sequence_length;
    let flops_per_token = cost::training_flops_per_token(&recipe.model_config, length) as f64;
    let peak = machine::peak(threads);
    let tokens = (recipe.training.global_batch_size * length) as f64;
    let (records, cpu_seconds, timelines) = train_quietly(recipe, datasets)?;
    let seconds: Vec<f64> = records.iter().skip(WARM_UP).map(|record| record.seconds).collect();
    let steps = seconds.len();
    // From the end of the warm-up on: making the model is no part of a step.
    let cpu_seconds = cpu_seconds[cpu_seconds.len() - 1] - cpu_seconds[WARM_UP - 1];
    let median_s = tokens / Rate::new(tokens, seconds.clone(), 1.0).median;
    let recording = RecordingCost::of(&timelines, median_s)?;
    let tokens_per_second = Rate::new(tokens, seconds, cpu_seconds / steps as f64);
    let mfu = |rate: f64| rate * flops_per_token / peak;
    Ok(StepSpeed {
        model: model.to_owned(),
        changes: changes.to_vec(),
        threads,
        steps,
        tokens_per_step: tokens,
        tokens_per_second,
        mfu_median: mfu(tokens_per_second.median),
        mfu_best: mfu(tokens_per_second.best),
        peak_gflops: peak / 1e9,
        mflop_per_token: flops_per_token / 1e6,
        recording,
    })
}

impl fmt::Display for StepSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepSpeed { threads, steps, tokens_per_step, tokens_per_second, .. } = self;
        let model = with_changes(&self.model, &self.changes);
        writeln!(f, "{model}, {threads} thread(s), {steps} steps of {tokens_per_step} tokens")?;
        writeln!(f, "tokens/s: {tokens_per_second}")?;
        writeln!(
            f,
            "MFU: {:.0}% median, {:.0}% best, of {:.0} GFLOP/s (f32 product of 1024 x 1024 on a core, times the threads)",
            100.0 * self.mfu_median,
            100.0 * self.mfu_best,
            self.peak_gflops
        )?;
        writeln!(
            f,
            "FLOP per token: {:.2} M (matrix products, causal half of attention, three times forward, no MTP)",
            self.mflop_per_token
        )?;
        let RecordingCost { operations, microseconds_per_step, share, ring_ns_per_record, ring_share } =
            &self.recording;
        writeln!(
            f,
            "recording the timeline: {microseconds_per_step:.0} us for the {operations} operations of a step, {:.3}% of its time",
            100.0 * share
        )?;
        writeln!(
            f,
            "flight recorder: {ring_ns_per_record:.0} ns a record, two an operation: {:.3}% of a step",
            100.0 * ring_share
        )
    }
}
