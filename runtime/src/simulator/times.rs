//! What durations of operations have in common, wherever they come from.

use crate::cost::{self, Shapes};
use crate::recipe::NumberFormat;
use crate::schedule::{Op, Work};

/// How long operations take, however that is known.
pub trait OperationTimes {
    /// Of an operation of pipeline rank `pipeline`; of a receive it is that of its send.
    ///
    /// **Units**: seconds.
    fn of(&self, pipeline: usize, op: &Op) -> f64;

    /// What the profile says nothing of though one of these needs it, in words; each once.
    fn missing(&self, works: &[&Work]) -> Vec<String>;
}

/// What an operation of the update reads and writes; of others nothing.
///
/// **Units**: bytes.
pub(super) fn update_bytes(work: &Work, shapes: &Shapes) -> f64 {
    let (Work::Pack { bucket: number }
    | Work::GradNorm { bucket: number }
    | Work::Apply { bucket: number }
    | Work::Unpack { bucket: number }) = *work
    else {
        return 0.0;
    };
    let Some(bucket) = shapes.buckets.iter().find(|bucket| bucket.number == number) else { return 0.0 };
    let elements =
        cost::bucket_elements(bucket, shapes.config, shapes.stages, &shapes.topology, shapes.precision);
    let all = elements.all() as f64;
    let shard = all / bucket.copies as f64;
    let moments = if shapes.precision.moments == NumberFormat::Bf16 { 2.0 } else { 4.0 };
    let compute = if shapes.precision.linear == NumberFormat::Fp8 { 1.0 } else { 2.0 };
    match work {
        // Gradients in f32 read, and written in flat parts.
        Work::Pack { .. } => 8.0 * all,
        Work::GradNorm { .. } => 4.0 * shard,
        // The gradient read; master and both moments read and written; what is computed with written.
        Work::Apply { .. } => (4.0 + 2.0 * (4.0 + 2.0 * moments) + compute) * shard,
        // Gathered in bf16, written as it is computed with.
        _ => (2.0 + compute) * all,
    }
}

pub(super) fn format_name(format: NumberFormat) -> &'static str {
    match format {
        NumberFormat::F32 => "f32",
        NumberFormat::Bf16 => "bf16",
        NumberFormat::Fp8 => "fp8",
        NumberFormat::E5m6 => "e5m6",
    }
}
