//! What an operation of a program does: the one place that knows which tensors it takes, where it puts what it makes, and
//! what passes through [`crate::comm`] meanwhile.
//!
//! Arithmetic is in [`super::compute`], the operations of the update are in [`super::update_ops`]; which operation runs when
//! is the program's business.

use std::sync::Arc;

use contraflow_runtime::fabric::FrameKind;
use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::schedule::{Chunk, Component, Lane, Op, Pass, TransferKind, Work};
use contraflow_runtime::trace::SPAN;
use tracing::Span;

use super::compute::{ComputeOp, stage_of};
use super::running::RunningProgram;
use crate::comm::all_to_all::AllToAll;
use crate::comm::packets::{self, Unpack};
use crate::error::{Missing, RankError};

impl RunningProgram {
    /// Runs one operation; its lane has waited for what it needs.
    ///
    /// **Errors**: those of the fabric; an operation without its input, or on a lane that cannot run it.
    pub(super) fn execute(&self, op: &Op) -> Result<(), RankError> {
        match (op.work, op.lane) {
            (Work::Component { pass, chunk, layer, component }, _) => match component {
                Component::Dispatch | Component::Combine => self.all_to_all(pass, chunk, layer, component),
                _ => {
                    failpoint("compute.operation");
                    let op = ComputeOp { pass, chunk, layer, component };
                    self.compute().run(op, &self.in_flight, &self.batches[chunk.micro_batch])
                }
            },
            (Work::Send { kind, chunk }, Lane::Send(peer)) => {
                let tag = self.id.tag(frame_kind(kind), chunk, 0, self.context.endpoint.rank());
                let tensor = packets::tensor(self.in_flight.take(kind, chunk)?);
                Ok(self.context.endpoint.send(self.context.pipeline_peers[peer], tag, vec![tensor])?)
            }
            (Work::Receive { kind, chunk }, Lane::Receive(peer)) => {
                let tag = self.id.tag(frame_kind(kind), chunk, 0, self.context.pipeline_peers[peer]);
                let mut frame = Unpack::new(tag, self.context.endpoint.receive(tag)?);
                self.in_flight.put(
                    kind,
                    chunk,
                    frame.rows(self.context.hidden_size, self.context.precision.activations)?,
                );
                Ok(())
            }
            (work @ (Work::Send { .. } | Work::Receive { .. }), lane) => {
                Err(RankError::Panic { message: format!("{work} cannot run on lane {lane:?}") })
            }
            (work, _) => self.run_update(work),
        }
    }

    fn all_to_all(
        &self,
        pass: Pass,
        chunk: Chunk,
        layer: usize,
        component: Component,
    ) -> Result<(), RankError> {
        let tag = self.id.tag(FrameKind::Dispatch, chunk, layer, self.context.endpoint.rank());
        let all_to_all = AllToAll { endpoint: &self.context.endpoint, group: &self.context.group, tag };
        let in_flight = &self.in_flight;
        let here = (chunk, layer);
        let route = || in_flight.layer(chunk, layer, |t| t.route.clone());
        let missing = || Missing::OfChunk { what: "the route", chunk, layer };
        match (component, pass) {
            (Component::Dispatch, Pass::Forward) => {
                let (normed, routing) = in_flight.take_from(here, "the routed rows", |t| &mut t.normed)?;
                let (arrivals, route) = all_to_all.dispatch(&normed, &routing)?;
                in_flight.layer(chunk, layer, |t| {
                    t.arrivals = Some(arrivals);
                    t.route = Some(Arc::new(route));
                });
            }
            (Component::Combine, Pass::Forward) => {
                let mut home = in_flight.take_from(here, "the shared expert's output", |t| &mut t.home)?;
                let outputs = in_flight.take_from(here, "the experts' outputs", |t| &mut t.outputs)?;
                all_to_all.combine(&outputs, &*route().ok_or_else(missing)?, &mut home)?;
                in_flight.put(TransferKind::Activation, chunk, home);
            }
            (Component::Combine, _) => {
                let source = stage_of(&self.context.stages, chunk.stage).gradient_source(chunk, layer);
                let dy = in_flight.share(TransferKind::Gradient, source)?;
                let d_outputs = all_to_all.combine_backward(
                    &dy.to(self.context.precision.dispatch),
                    &*route().ok_or_else(missing)?,
                )?;
                in_flight.layer(chunk, layer, |t| t.d_outputs = Some(d_outputs));
            }
            (_, _) => {
                let (d_rows, d_pairs) =
                    in_flight.take_from(here, "the experts' gradients", |t| &mut t.d_arrivals)?;
                let d_normed =
                    all_to_all.dispatch_backward(&d_rows, &d_pairs, &*route().ok_or_else(missing)?)?;
                in_flight.layer(chunk, layer, |t| t.d_normed = Some(d_normed));
            }
        }
        Ok(())
    }
}

/// A span for an operation, where anybody wants to know so much: the debug level shows what passes between ranks, and the
/// totals, for which all ranks wait, are part of every trace.
pub(super) fn span_of(op: &Op) -> Span {
    match op.work {
        Work::Send { kind, chunk } => {
            let Chunk { stage, micro_batch } = chunk;
            tracing::debug_span!(target: SPAN, "send", ?kind, stage, micro_batch)
        }
        Work::Receive { kind, chunk } => {
            let Chunk { stage, micro_batch } = chunk;
            tracing::debug_span!(target: SPAN, "receive", ?kind, stage, micro_batch)
        }
        Work::Reduce { bucket } => tracing::debug_span!(target: SPAN, "reduce", bucket),
        Work::Gather { bucket } => tracing::debug_span!(target: SPAN, "gather", bucket),
        Work::Totals => tracing::info_span!(target: SPAN, "totals"),
        _ => tracing::trace_span!(target: SPAN, "operation", work = %op.work),
    }
}

fn frame_kind(kind: TransferKind) -> FrameKind {
    match kind {
        TransferKind::Activation => FrameKind::Activation,
        TransferKind::Gradient => FrameKind::Gradient,
    }
}
