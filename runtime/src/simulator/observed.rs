//! From steps that ranks have recorded to what operations cost: medians, lines through them, speeds.
//!
//! Pure: runs nothing and reads no clock. What the ranks of a machine did at the same time is in the durations, so record with all of
//! its cores at work.

use std::collections::{BTreeMap, HashMap};

use super::kernels::KernelShapes;
use super::link::Link;
use super::measured::{LayerShape, MeasuredModel, MeasuredOperation, UpdateSpeed};
use super::measured_durations::{kind_of, layer_of};
use super::run::with_shapes;
use super::times::update_bytes;
use crate::cost;
use crate::layout::recipe_stages;
use crate::recipe::Recipe;
use crate::schedule::{Component, Lane, LayerKind, Op, Pass, RecordedRank, RecordedStep, Span, Work};
use crate::topology::Coordinates;

/// Some steps of a run.
pub struct Observed<'a> {
    /// What was run.
    pub recipe: &'a Recipe,
    /// What its ranks have recorded.
    pub steps: &'a [RecordedStep],
}

impl Observed<'_> {
    /// What its operations cost follows from this.
    ///
    /// # Errors
    /// A recipe without a layout, or without steps.
    fn with_shapes<R>(&self, then: impl FnOnce(KernelShapes) -> R) -> Result<R, String> {
        let stages = recipe_stages(self.recipe)?;
        let step = self.steps.first().ok_or("expected recorded steps, got none")?;
        Ok(with_shapes(self.recipe, &step.plan.placement, &stages, then))
    }

    fn ranks(&self) -> impl Iterator<Item = &RecordedRank> {
        self.steps.iter().flat_map(|step| &step.ranks)
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let low = *values.get(values.len().checked_sub(1)? / 2)?;
    Some((low + values[middle]) / 2.0)
}

/// Intercept and slope of the line with the least squares, neither of them below 0.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    let together: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let through_zero = || {
        let squares: f64 = points.iter().map(|point| point.0.powi(2)).sum();
        let products: f64 = points.iter().map(|point| point.0 * point.1).sum();
        (0.0, if squares > 0.0 { products / squares } else { 0.0 })
    };
    if spread == 0.0 {
        return through_zero();
    }
    let slope = together / spread;
    let intercept = y - slope * x;
    if slope <= 0.0 {
        (y, 0.0)
    } else if intercept < 0.0 {
        through_zero()
    } else {
        (intercept, slope)
    }
}

/// A component of a model.
type Piece = (Component, Pass, Option<LayerKind>);

/// What the operations of a model took, from runs in which each rank held all of it, with micro-batches of several sizes.
///
/// # Errors
/// Nothing recorded; a rank that held a part only; runs of different layers.
pub fn measured_model(name: &str, runs: &[Observed]) -> Result<MeasuredModel, String> {
    let mut points: BTreeMap<Piece, Vec<(f64, f64)>> = BTreeMap::new();
    let (mut pauses, mut update, mut shape) = (Vec::new(), [(0.0, 0.0); 4], None);
    for run in runs {
        let topology = run.recipe.topology();
        if topology.pipeline * topology.expert != 1 {
            return Err(format!("expected ranks that hold the whole model, got {topology:?}"));
        }
        run.with_shapes(|kernels| {
            let found = LayerShape::of(kernels);
            if shape.get_or_insert_with(|| found.clone()) != &found {
                return Err("expected runs of the same layers, got others".to_owned());
            }
            let mut durations: BTreeMap<Piece, Vec<f64>> = BTreeMap::new();
            for (op, span) in run.ranks().flat_map(|rank| rank.program.ops.iter().zip(&rank.spans)) {
                if let Work::Component { pass, layer, component, .. } = op.work {
                    let piece = (component, pass, layer_of(component, kind_of(kernels, layer)));
                    durations.entry(piece).or_default().push(span.duration());
                }
                if let Some(which) = update_index(&op.work) {
                    update[which].0 += update_bytes(&op.work, kernels.shapes);
                    update[which].1 += span.duration();
                }
            }
            let tokens = kernels.shapes.micro_batch_tokens as f64;
            for (piece, durations) in durations {
                let point = median(durations).map(|seconds| (tokens, seconds));
                points.entry(piece).or_default().extend(point);
            }
            pauses.extend(run.ranks().flat_map(pauses_of));
            Ok(())
        })??;
    }
    let operations = points.into_iter().map(|((component, pass, layer), points)| {
        let (fixed_s, per_token_s) = line(&points);
        MeasuredOperation { component, pass, layer, fixed_s, per_token_s }
    });
    let [pack, norm, apply, unpack] =
        update.map(|(bytes, seconds)| if seconds > 0.0 { bytes / seconds } else { 0.0 });
    Ok(MeasuredModel {
        name: name.to_owned(),
        layers: shape.ok_or("expected runs, got none")?,
        operation_s: median(pauses).unwrap_or(0.0),
        update: UpdateSpeed { pack, norm, apply, unpack },
        operations: operations.collect(),
    })
}

fn update_index(work: &Work) -> Option<usize> {
    match work {
        Work::Pack { .. } => Some(0),
        Work::GradNorm { .. } => Some(1),
        Work::Apply { .. } => Some(2),
        Work::Unpack { .. } => Some(3),
        _ => None,
    }
}

/// How long operations of the compute lane begin after all that they waited for has ended.
fn pauses_of(rank: &RecordedRank) -> Vec<f64> {
    let (mut last, mut pauses) = (None, Vec::new());
    for (op, span) in rank.program.ops.iter().zip(&rank.spans) {
        if op.lane != Lane::Compute {
            continue;
        }
        let waited_for = op.after.iter().filter_map(|&id| rank.spans.get(id)).map(|span| span.end);
        if let Some(ready) = last.into_iter().chain(waited_for).reduce(f64::max) {
            pauses.push((span.start - ready).max(0.0));
        }
        last = Some(span.end);
    }
    pauses
}

/// The same transfer at all ranks that take part.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Transfer {
    /// Of a pipeline rank's experts.
    Exchange(usize, Work),
    /// A send and its receive.
    Between(Work),
    /// Of replicas, or of the whole world.
    Collective(Work),
}

/// `expert` ranks share a layer's experts: one alone exchanges nothing.
fn transfer_of(expert: usize, pipeline: usize, op: &Op) -> Option<Transfer> {
    match op.work {
        Work::Component { component: Component::Dispatch | Component::Combine, .. } if expert > 1 => {
            Some(Transfer::Exchange(pipeline, op.work))
        }
        Work::Send { .. } => Some(Transfer::Between(op.work)),
        Work::Receive { kind, chunk } => Some(Transfer::Between(Work::Send { kind, chunk })),
        Work::Reduce { .. } | Work::Gather { .. } | Work::Totals => Some(Transfer::Collective(op.work)),
        _ => None,
    }
}

/// Send, exchange and collective links, from runs in which there is such a transfer: it takes from when all that take part have begun it
/// to when all have ended it. Of an exchange goes off what `model` takes for it on a rank alone. A kind without transfers is free.
///
/// # Errors
/// Nothing recorded.
pub fn measured_links(model: &MeasuredModel, runs: &[Observed]) -> Result<[Link; 3], String> {
    let mut points: [Vec<(f64, f64)>; 3] = Default::default();
    for run in runs {
        run.with_shapes(|kernels| {
            let topology = run.recipe.topology();
            // By kind and bytes.
            let mut durations: BTreeMap<(usize, u64), Vec<f64>> = BTreeMap::new();
            for step in run.steps {
                let mut transfers: HashMap<Transfer, (usize, Span)> = HashMap::new();
                // From when the last one has begun it.
                for rank in &step.ranks {
                    for (op, span) in rank.program.ops.iter().zip(&rank.spans) {
                        let Some(transfer) = transfer_of(topology.expert, rank.pipeline, op) else {
                            continue;
                        };
                        let (ranks, whole) = transfers.entry(transfer).or_insert((0, *span));
                        *ranks += 1;
                        whole.start = whole.start.max(span.start);
                        whole.end = whole.end.max(span.end);
                    }
                }
                let of_several = transfers.into_iter().filter(|(_, (ranks, _))| *ranks > 1);
                for (transfer, (_, span)) in of_several {
                    let (kind, pipeline, work) = match transfer {
                        Transfer::Between(work) => (0, 0, work),
                        Transfer::Exchange(pipeline, work) => (1, pipeline, work),
                        Transfer::Collective(work) => (2, 0, work),
                    };
                    let rank = topology.rank(Coordinates { pipeline, data: 0, expert: 0 });
                    let bytes = cost::of(&work, rank, kernels.shapes).sent_bytes;
                    let alone = match work {
                        Work::Component { pass, component, .. } => model
                            .operations
                            .iter()
                            .find(|known| (known.pass, known.component) == (pass, component))
                            .map_or(0.0, |known| {
                                known.fixed_s + known.per_token_s * kernels.shapes.micro_batch_tokens as f64
                            }),
                        _ => 0.0,
                    };
                    let seconds = (span.duration() - alone).max(0.0);
                    durations.entry((kind, bytes)).or_default().push(seconds);
                }
            }
            for ((kind, bytes), durations) in durations {
                points[kind].extend(median(durations).map(|seconds| (bytes as f64, seconds)));
            }
        })?;
    }
    Ok(points.map(|points| {
        let (latency_s, per_byte) = if points.is_empty() { (0.0, 0.0) } else { line(&points) };
        // A speed that no time shows is as good as any that is far above.
        Link { bytes_per_s: if per_byte > 0.0 { 1.0 / per_byte } else { f64::MAX }, latency_s }
    }))
}

#[cfg(test)]
mod tests;
