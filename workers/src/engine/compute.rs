//! The compute lane's own state: the rank's stages with their parameters, and the activations saved between passes.
//!
//! Runs one component of one layer of one chunk at a time. Knows no fabric: what other lanes bring and fetch goes through
//! [`InFlight`].

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use contraflow_kernels::cross_entropy::Targets;
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::embedding;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::schedule::{Chunk, Component, Pass, TransferKind};

use super::in_flight::InFlight;
use crate::data::batches::TaskKind;
use crate::error::{Missing, RankError};
use crate::model::attention::{self, AttentionGradient};
use crate::model::head::{self, LossHead};
use crate::model::micro_batch::MicroBatch;
use crate::model::params::RankParams;
use crate::model::weight_work::WeightWork;
use crate::model::{Architecture, Layer, Stage, expert_counts, experts, ffn, mtp};
use crate::optimizer::totals::Totals;

/// What a layer keeps between its forward and its backward pass.
#[derive(Default)]
struct SavedLayer {
    attention: Option<attention::SavedAttention>,
    /// Attention -> SharedExpert: normed rows and residual stream.
    ffn_input: Option<(Tensor, Tensor)>,
    ffn: Option<ffn::SavedFfn>,
    experts: Option<experts::SavedExperts>,
    /// SharedExpert's backward -> Attention's backward.
    d_normed: Option<Tensor>,
}

/// What the last stage keeps.
#[derive(Default)]
struct SavedEnd {
    head: Option<head::SavedHead>,
    /// Head -> MtpJoin: the normed hidden state.
    hidden: Option<Tensor>,
    mtp_join: Option<mtp::SavedMtp>,
    mtp_head: Option<head::SavedHead>,
    /// MtpJoin's backward -> Head's backward.
    d_hidden: Option<Tensor>,
}

/// One operation of the compute lane.
#[derive(Clone, Copy, Debug)]
pub struct ComputeOp {
    /// Which pass.
    pub pass: Pass,
    /// Stage and micro-batch.
    pub chunk: Chunk,
    /// Layer of the model.
    pub layer: usize,
    /// Which component.
    pub component: Component,
}

/// The place of an operation and what it may access.
#[derive(Clone, Copy)]
struct OpContext<'a> {
    op: ComputeOp,
    stage: &'a Stage,
    in_flight: &'a InFlight,
    batch: &'a MicroBatch,
}

/// The rank's model at work.
pub struct Compute {
    arch: Arc<Architecture>,
    stages: Arc<Vec<Stage>>,
    /// Handed over for one task.
    pub params: RankParams,
    /// Sums of the running program.
    pub totals: Totals,
    kind: TaskKind,
    layers: HashMap<(Chunk, usize), SavedLayer>,
    ends: HashMap<Chunk, SavedEnd>,
    work: HashMap<(Chunk, usize, Component), WeightWork>,
    live: BTreeSet<Chunk>,
}

impl Compute {
    /// Puts the model together for one task.
    pub fn new(arch: Arc<Architecture>, stages: Arc<Vec<Stage>>, params: RankParams, kind: TaskKind) -> Self {
        Compute {
            arch,
            stages,
            params,
            totals: Totals::default(),
            kind,
            layers: HashMap::new(),
            ends: HashMap::new(),
            work: HashMap::new(),
            live: BTreeSet::new(),
        }
    }

    /// Runs one component.
    ///
    /// **Errors**: [`RankError::Missing`] if its input is not there.
    pub fn run(&mut self, op: ComputeOp, in_flight: &InFlight, batch: &MicroBatch) -> Result<(), RankError> {
        let stages = self.stages.clone();
        let stage = stage_of(&stages, op.chunk.stage);
        let at = OpContext { op, stage, in_flight, batch };
        match op.pass {
            Pass::Forward => {
                if self.kind.has_backward() && self.live.insert(op.chunk) {
                    self.totals.peak_live_chunks = self.totals.peak_live_chunks.max(self.live.len());
                }
                self.forward(at)
            }
            Pass::BackwardInput => {
                self.backward_input(at)?;
                if stage.is_last_of_backward(op.component, op.layer) {
                    self.live.remove(&op.chunk);
                }
                Ok(())
            }
            Pass::BackwardWeight => self.backward_weight(op),
        }
    }

    fn saved(&mut self, op: ComputeOp) -> &mut SavedLayer {
        self.layers.entry((op.chunk, op.layer)).or_default()
    }

    fn end(&mut self, chunk: Chunk) -> &mut SavedEnd {
        self.ends.entry(chunk).or_default()
    }

    fn forward(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let chunk = op.chunk;
        match op.component {
            Component::Embedding => {
                let table = present(stage.embedding, "the embedding", op)?;
                in_flight.put(
                    TransferKind::Activation,
                    chunk,
                    embedding::forward(&batch.ids, self.params.dense.weight(table)),
                );
            }
            Component::Attention => self.attention_forward(at)?,
            Component::SharedExpert => {
                let layer = stage.layer(op.layer);
                let (normed, residual) = present(self.saved(op).ffn_input.take(), "the normed rows", op)?;
                let (output, saved) =
                    ffn::forward(&self.arch, &layer.ffn, &self.params.dense, &normed, &residual);
                if self.kind.has_backward() {
                    self.saved(op).ffn = Some(saved);
                }
                if layer.experts.is_some() {
                    in_flight.layer(chunk, op.layer, |in_flight| in_flight.home = Some(output));
                } else {
                    in_flight.put(TransferKind::Activation, chunk, output);
                }
            }
            Component::Experts => {
                let weights = present(stage.layer(op.layer).experts.as_ref(), "the routed experts", op)?;
                let arrivals =
                    in_flight.take_from((chunk, op.layer), "the dispatched rows", |t| &mut t.arrivals)?;
                let (outputs, saved) = experts::forward(&self.arch, weights, &self.params.experts, arrivals);
                if self.kind.has_backward() {
                    self.saved(op).experts = Some(saved);
                }
                let outputs = outputs.to(self.arch.precision.combine);
                in_flight.layer(chunk, op.layer, |in_flight| in_flight.outputs = Some(outputs));
            }
            Component::Head => self.head_forward(at)?,
            Component::MtpJoin => {
                let weights = present(stage.mtp.as_ref(), "the MTP block", op)?;
                let hidden = present(self.end(chunk).hidden.take(), "the hidden state", op)?;
                let (x, saved) =
                    mtp::forward(&self.arch, weights, &self.params.dense, &batch.targets, hidden);
                if self.kind.has_backward() {
                    self.end(chunk).mtp_join = Some(saved);
                }
                in_flight.put(TransferKind::Activation, chunk, x);
            }
            Component::MtpHead => self.mtp_head_forward(at)?,
            Component::Dispatch | Component::Combine | Component::Chunk => return Err(misplaced(op)),
        }
        Ok(())
    }

    fn attention_forward(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let layer = stage.layer(op.layer);
        let x = in_flight.take(TransferKind::Activation, stage.activation_source(op.chunk, op.layer))?;
        let (output, saved) = attention::forward(&self.arch, &layer.attention, &self.params.dense, x, batch);
        if let Some(routing) = output.routing {
            expert_counts::count(&mut self.totals.expert_counts, op.layer, &routing);
            let normed = output.normed.to(self.arch.precision.dispatch);
            in_flight.layer(op.chunk, op.layer, |in_flight| in_flight.normed = Some((normed, routing)));
        }
        let train = self.kind.has_backward();
        let kept = self.saved(op);
        kept.ffn_input = Some((output.normed, output.residual));
        if train {
            kept.attention = Some(saved);
        }
        Ok(())
    }

    fn head_forward(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let head = self.main_head(op, stage)?;
        let x = in_flight.take(TransferKind::Activation, stage.activation_source(op.chunk, op.layer))?;
        let targets = Targets { ids: &batch.targets, weights: &batch.loss_weights };
        let normed = if self.kind.has_backward() {
            let (loss, normed, saved) = head::forward(head, &mut self.params.dense, x, &targets);
            self.totals.loss += loss.sum;
            self.totals.note_if_bad(op.chunk.micro_batch, loss.sum);
            self.end(op.chunk).head = Some(saved);
            normed
        } else {
            let (loss, normed) = head::evaluate(head, &self.params.dense, &x, &targets);
            self.totals.loss += loss.sum;
            normed
        };
        if stage.mtp.is_some() {
            self.end(op.chunk).hidden = Some(normed);
        }
        Ok(())
    }

    fn mtp_head_forward(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let head = self.mtp_head(op, stage)?;
        let x = in_flight.take(TransferKind::Activation, op.chunk)?;
        let targets = Targets { ids: &batch.mtp_targets, weights: &batch.mtp_loss_weights };
        if self.kind.has_backward() {
            let (loss, _, saved) = head::forward(head, &mut self.params.dense, x, &targets);
            self.totals.mtp_loss += loss.sum;
            self.totals.note_if_bad(op.chunk.micro_batch, loss.sum);
            self.end(op.chunk).mtp_head = Some(saved);
        } else {
            self.totals.mtp_loss += head::evaluate(head, &self.params.dense, &x, &targets).0.sum;
        }
        Ok(())
    }

    fn main_head(&self, op: ComputeOp, stage: &Stage) -> Result<LossHead, RankError> {
        let weights = present(stage.head.as_ref(), "the head", op)?;
        Ok(LossHead { norm: weights.norm, head: weights.head, eps: self.arch.eps() })
    }

    fn mtp_head(&self, op: ComputeOp, stage: &Stage) -> Result<LossHead, RankError> {
        let norm = present(stage.mtp.as_ref(), "the MTP block", op)?.norm;
        Ok(LossHead { norm, ..self.main_head(op, stage)? })
    }

    fn backward_input(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let chunk = op.chunk;
        match op.component {
            Component::MtpHead => {
                let head = self.mtp_head(op, stage)?;
                let saved = present(self.end(chunk).mtp_head.take(), "the saved MTP head", op)?;
                in_flight.put(
                    TransferKind::Gradient,
                    chunk,
                    head::backward(head, &mut self.params.dense, saved, None),
                );
            }
            Component::MtpJoin => {
                let weights = present(stage.mtp.as_ref(), "the MTP block", op)?;
                let saved = present(self.end(chunk).mtp_join.take(), "the saved MTP input", op)?;
                let dy = in_flight.take(TransferKind::Gradient, chunk)?;
                let (d_hidden, work) = mtp::backward_input(
                    weights,
                    &mut self.params.dense,
                    dy,
                    saved,
                    &batch.targets,
                    self.arch.eps(),
                );
                self.end(chunk).d_hidden = Some(d_hidden);
                self.work.insert((chunk, op.layer, op.component), work);
            }
            Component::Head => {
                let head = self.main_head(op, stage)?;
                let SavedEnd { head: saved, d_hidden, .. } = self.ends.remove(&chunk).unwrap_or_default();
                let saved = present(saved, "the saved head", op)?;
                let dx = head::backward(head, &mut self.params.dense, saved, d_hidden.as_ref());
                in_flight.put(TransferKind::Gradient, chunk, dx);
            }
            Component::SharedExpert => {
                let layer = stage.layer(op.layer);
                let kept = self.layers.entry((op.chunk, op.layer)).or_default();
                let saved = present(kept.ffn.take(), "the saved shared expert", op)?;
                let before = present(kept.attention.as_mut(), "the saved attention", op)?;
                let dense = &self.params.dense;
                let normed = before.normed(&self.arch, &layer.attention, dense);
                let dy = in_flight.share(TransferKind::Gradient, stage.gradient_source(chunk, op.layer))?;
                let (d_normed, work) = ffn::backward_input(&layer.ffn, dense, dy, &normed, saved);
                self.saved(op).d_normed = Some(d_normed);
                self.work.insert((chunk, op.layer, op.component), work);
            }
            Component::Experts => {
                let weights = present(stage.layer(op.layer).experts.as_ref(), "the routed experts", op)?;
                let saved = present(self.saved(op).experts.take(), "the saved experts", op)?;
                let dy =
                    in_flight.take_from((chunk, op.layer), "the outputs' gradient", |t| &mut t.d_outputs)?;
                let (d_rows, d_weights, work) =
                    experts::backward_input(weights, &self.params.experts, &dy, saved);
                let d_rows = d_rows.to(self.arch.precision.combine);
                in_flight
                    .layer(chunk, op.layer, |in_flight| in_flight.d_arrivals = Some((d_rows, d_weights)));
                self.work.insert((chunk, op.layer, op.component), work);
            }
            Component::Attention => self.attention_backward(at)?,
            Component::Embedding => {
                let table = present(stage.embedding, "the embedding", op)?;
                let dy = in_flight.take(TransferKind::Gradient, chunk)?;
                embedding::backward(&dy, &batch.ids, self.params.dense.grad_mut(table));
            }
            Component::Dispatch | Component::Combine | Component::Chunk => return Err(misplaced(op)),
        }
        Ok(())
    }

    fn attention_backward(&mut self, at: OpContext) -> Result<(), RankError> {
        let OpContext { op, stage, in_flight, batch } = at;
        let layer: &Layer = stage.layer(op.layer);
        let residual = in_flight.take(TransferKind::Gradient, stage.gradient_source(op.chunk, op.layer))?;
        let SavedLayer { attention: saved, d_normed, .. } =
            self.layers.remove(&(op.chunk, op.layer)).unwrap_or_default();
        let saved = present(saved, "the saved attention", op)?;
        let mut normed = present(d_normed, "the shared expert's gradient", op)?;
        let mut routing_weights = None;
        if layer.experts.is_some() {
            let from = (op.chunk, op.layer);
            let (routed, weights) =
                in_flight.take_from(from, "the experts' gradient", |t| &mut t.d_normed)?;
            add_into(&mut normed, &routed);
            routing_weights = Some(weights);
            in_flight.forget(op.chunk, op.layer);
        }
        let gradient = AttentionGradient { residual, normed, routing_weights };
        let done = attention::backward_input(
            &self.arch,
            &layer.attention,
            &mut self.params.dense,
            gradient,
            saved,
            batch,
        );
        self.totals.balance_loss += done.balance_loss;
        in_flight.put(TransferKind::Gradient, op.chunk, done.dx);
        self.work.insert((op.chunk, op.layer, op.component), done.work);
        Ok(())
    }

    fn backward_weight(&mut self, op: ComputeOp) -> Result<(), RankError> {
        let work = self.work.remove(&(op.chunk, op.layer, op.component));
        let params = if op.component == Component::Experts {
            &mut self.params.experts
        } else {
            &mut self.params.dense
        };
        present(work, "the deferred weight gradients", op)?.run(params);
        Ok(())
    }

    /// Activations and deferred work that were not consumed: none after a whole training step.
    pub fn num_left(&self) -> usize {
        self.layers.len() + self.ends.len() + self.work.len() + self.live.len()
    }
}

/// The stage with this index.
///
/// # Panics
/// If the rank does not hold it: the plan was made for another placement.
pub fn stage_of(stages: &[Stage], index: usize) -> &Stage {
    let found = stages.iter().find(|stage| stage.index == index);
    found.unwrap_or_else(|| panic!("this rank does not hold stage {index}"))
}

fn present<T>(value: Option<T>, what: &'static str, op: ComputeOp) -> Result<T, RankError> {
    value.ok_or(RankError::Missing(Missing::OfChunk { what, chunk: op.chunk, layer: op.layer }))
}

fn misplaced(op: ComputeOp) -> RankError {
    RankError::Missing(Missing::OfChunk {
        what: "a component that is not arithmetic",
        chunk: op.chunk,
        layer: op.layer,
    })
}
