//! The lanes of a rank on a CPU: one thread per lane, each running its operations in program order, ordered by events.
//!
//! No compute operation blocks on the fabric; a lane that waits, waits for an event under a deadline. Knows operations and
//! events, not what comes after a program.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use contraflow_kernels::par::Threads;
use contraflow_runtime::fabric::{Endpoint, FrameKind};
use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::schedule::{Chunk, Component, Lane, Op, OpId, Pass, Program, TransferKind, Work};
use contraflow_runtime::trace::SPAN;

use tracing::Span;

use super::compute::{Compute, ComputeOp, stage_of};
use super::probe::{Probe, ProbePoint};
use super::transit::Transit;
use crate::comm::address::StepId;
use crate::comm::all_to_all::{Exchange, ExpertGroup};
use crate::comm::packets::{self, Unpack};
use crate::error::RankError;
use crate::model::Stage;
use crate::model::micro_batch::MicroBatch;

/// Which operations have completed.
#[derive(Default)]
struct Events {
    state: Mutex<EventState>,
    changed: Condvar,
}

#[derive(Default)]
struct EventState {
    done: Vec<bool>,
    aborted: Option<String>,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, op: OpId) {
        self.lock().done[op] = true;
        self.changed.notify_all();
    }

    fn abort(&self, reason: &str) {
        self.lock().aborted.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Waits until all of `ops` have completed; returns how long that took.
    fn wait(&self, ops: &[OpId], patience: Duration) -> Result<Duration, LaneError> {
        let started = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.aborted {
                return Err(LaneError::Aborted(reason.clone()));
            }
            let Some(&missing) = ops.iter().find(|&&op| !state.done[op]) else {
                return Ok(started.elapsed());
            };
            let left = patience.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(LaneError::Late { op: missing, waited: patience });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

enum LaneError {
    Aborted(String),
    Late { op: OpId, waited: Duration },
}

/// A program under way, shared by the lanes.
pub struct Running {
    /// Which step this is.
    pub id: StepId,
    /// What runs.
    pub program: Arc<Program>,
    /// The micro-batches, by number.
    pub batches: Vec<MicroBatch>,
    /// Tensors between operations.
    pub transit: Transit,
    /// The rank's model; the compute lane works on it, the pipeline takes it back at the end.
    pub compute: Mutex<Compute>,
    /// What stays the same over all programs.
    pub site: Site,
    span: Span,
    events: Events,
}

/// What [`Running`] is made of; the events are its own.
pub struct RunningParts {
    /// See [`Running::id`].
    pub id: StepId,
    /// See [`Running::program`].
    pub program: Arc<Program>,
    /// See [`Running::batches`].
    pub batches: Vec<MicroBatch>,
    /// See [`Running::compute`].
    pub compute: Compute,
    /// What its operations belong to.
    pub span: Span,
}

/// What stays the same over all programs of a rank.
#[derive(Clone)]
pub struct Site {
    /// The rank's end of the fabric.
    pub endpoint: Endpoint,
    /// The ranks that share the routed experts.
    pub group: ExpertGroup,
    /// The rank's stages.
    pub stages: Arc<Vec<Stage>>,
    /// World rank of each pipeline position in this rank's column.
    pub pipeline_peers: Vec<usize>,
    /// Width of the residual stream.
    pub hidden_size: usize,
}

impl Running {
    /// Begins a program.
    pub fn new(site: &Site, parts: RunningParts) -> Self {
        let RunningParts { id, program, batches, compute, span } = parts;
        let state = Mutex::new(EventState { done: vec![false; program.ops.len()], aborted: None });
        Running {
            id,
            batches,
            transit: Transit::default(),
            compute: Mutex::new(compute),
            site: site.clone(),
            span,
            events: Events { state, changed: Condvar::new() },
            program,
        }
    }

    /// Ends every present and future wait of the lanes.
    pub fn abort(&self, reason: &str) {
        self.events.abort(reason);
        self.site.endpoint.abort(reason);
    }

    fn execute(&self, op: &Op) -> Result<(), RankError> {
        match (op.work, op.lane) {
            (Work::Component { pass, chunk, layer, component }, _) => match component {
                Component::Dispatch | Component::Combine => self.exchange(pass, chunk, layer, component),
                _ => {
                    failpoint("compute.operation");
                    let mut compute = self.compute.lock().unwrap_or_else(PoisonError::into_inner);
                    let op = ComputeOp { pass, chunk, layer, component };
                    compute.run(op, &self.transit, &self.batches[chunk.micro_batch])
                }
            },
            (Work::Send { kind, chunk }, Lane::Send(peer)) => {
                let tag = self.id.tag(frame_kind(kind), chunk, 0, self.site.endpoint.rank());
                let tensor = self.transit.take(kind, chunk)?;
                Ok(self.site.endpoint.send(
                    self.site.pipeline_peers[peer],
                    tag,
                    vec![packets::tensor(tensor)],
                )?)
            }
            (Work::Receive { kind, chunk }, Lane::Receive(peer)) => {
                let tag = self.id.tag(frame_kind(kind), chunk, 0, self.site.pipeline_peers[peer]);
                let mut frame = Unpack::new(tag, self.site.endpoint.receive(tag)?);
                self.transit.put(kind, chunk, frame.rows(self.site.hidden_size)?);
                Ok(())
            }
            (work, lane) => {
                let message = format!("{work:?} cannot run on lane {lane:?}");
                Err(RankError::Panic { message })
            }
        }
    }

    fn exchange(
        &self,
        pass: Pass,
        chunk: Chunk,
        layer: usize,
        component: Component,
    ) -> Result<(), RankError> {
        let tag = self.id.tag(FrameKind::Dispatch, chunk, layer, self.site.endpoint.rank());
        let exchange = Exchange { endpoint: &self.site.endpoint, group: &self.site.group, tag };
        let transit = &self.transit;
        let here = (chunk, layer);
        let route = || transit.layer(chunk, layer, |t| t.route.clone());
        let missing = || crate::error::Missing { what: "the route", chunk, layer };
        match (component, pass) {
            (Component::Dispatch, Pass::Forward) => {
                let (normed, routing) = transit.take_from(here, "the routed rows", |t| &mut t.normed)?;
                let (arrivals, route) = exchange.dispatch(&normed, &routing)?;
                transit.layer(chunk, layer, |t| {
                    t.arrivals = Some(arrivals);
                    t.route = Some(Arc::new(route));
                });
            }
            (Component::Combine, Pass::Forward) => {
                let mut home = transit.take_from(here, "the shared expert's output", |t| &mut t.home)?;
                let outputs = transit.take_from(here, "the experts' outputs", |t| &mut t.outputs)?;
                exchange.combine(&outputs, &*route().ok_or_else(missing)?, &mut home)?;
                transit.put(TransferKind::Activation, chunk, home);
            }
            (Component::Combine, _) => {
                let source = stage_of(&self.site.stages, chunk.stage).gradient_source(chunk, layer);
                let dy = transit.share(TransferKind::Gradient, source)?;
                let d_outputs = exchange.combine_backward(&dy, &*route().ok_or_else(missing)?)?;
                transit.layer(chunk, layer, |t| t.d_outputs = Some(d_outputs));
            }
            (_, _) => {
                let (d_rows, d_pairs) =
                    transit.take_from(here, "the experts' gradients", |t| &mut t.d_arrivals)?;
                let d_normed =
                    exchange.dispatch_backward(&d_rows, &d_pairs, &*route().ok_or_else(missing)?)?;
                transit.layer(chunk, layer, |t| t.d_normed = Some(d_normed));
            }
        }
        Ok(())
    }
}

/// A span for an operation, where anybody wants to know so much: the debug level shows what passes between stages.
fn span_of(op: &Op) -> Span {
    match op.work {
        Work::Send { kind, chunk } => {
            let Chunk { stage, micro_batch } = chunk;
            tracing::debug_span!(target: SPAN, "send", ?kind, stage, micro_batch)
        }
        Work::Receive { kind, chunk } => {
            let Chunk { stage, micro_batch } = chunk;
            tracing::debug_span!(target: SPAN, "receive", ?kind, stage, micro_batch)
        }
        _ => tracing::trace_span!(target: SPAN, "operation", work = %op.work),
    }
}

fn frame_kind(kind: TransferKind) -> FrameKind {
    match kind {
        TransferKind::Activation => FrameKind::Activation,
        TransferKind::Gradient => FrameKind::Gradient,
    }
}

/// What a lane tells its pipeline actor.
pub enum LaneEvent {
    /// An operation has completed.
    Completed {
        /// Of which program.
        id: StepId,
        /// Which lane it was.
        lane: Lane,
        /// How long the lane waited for other lanes before it.
        waited: Duration,
    },
    /// An operation has failed; the lane goes on with the next program.
    Failed {
        /// Of which program.
        id: StepId,
        /// Action of the plan it belongs to, if it belongs to one.
        action: Option<usize>,
        /// The cause.
        error: Box<RankError>,
    },
}

struct Issue {
    running: Arc<Running>,
    op: OpId,
}

/// The lanes' threads. They end when this is dropped.
pub struct Lanes {
    queues: HashMap<Lane, Sender<Issue>>,
    threads: Arc<Threads>,
    probe: Probe,
    report: Arc<dyn Fn(LaneEvent) + Send + Sync>,
}

impl Lanes {
    /// No lane yet: each starts with its first operation. `threads` is what the compute lane may use; `report` is called
    /// from the lanes.
    pub fn new(threads: Arc<Threads>, probe: Probe, report: Arc<dyn Fn(LaneEvent) + Send + Sync>) -> Self {
        Lanes { queues: HashMap::new(), threads, probe, report }
    }

    /// Queues an operation on its lane.
    pub fn issue(&mut self, running: &Arc<Running>, op: OpId) {
        let lane = running.program.ops[op].lane;
        let queue = self.queues.entry(lane).or_insert_with(|| {
            let (sender, receiver) = channel();
            let worker = LaneThread { lane, probe: self.probe.clone(), report: self.report.clone() };
            let threads = self.threads.clone();
            let run = move || match lane {
                Lane::Compute => threads.run(move || worker.run(&receiver)),
                _ => worker.run(&receiver),
            };
            std::thread::spawn(run);
            sender
        });
        // A lane thread outlives its queue: it catches the panics of what it runs.
        let _ = queue.send(Issue { running: running.clone(), op });
    }
}

struct LaneThread {
    lane: Lane,
    probe: Probe,
    report: Arc<dyn Fn(LaneEvent) + Send + Sync>,
}

impl LaneThread {
    fn run(&self, queue: &Receiver<Issue>) {
        while let Ok(Issue { running, op }) = queue.recv() {
            let id = running.id;
            let action = running.program.ops[op].action;
            let event = match self.run_op(&running, op) {
                Ok(waited) => LaneEvent::Completed { id, lane: self.lane, waited },
                Err(error) => {
                    running.events.abort(&error.to_string());
                    LaneEvent::Failed { id, action, error: Box::new(error) }
                }
            };
            // The pipeline takes the program apart once the last operation is reported.
            drop(running);
            (self.report)(event);
        }
    }

    fn run_op(&self, running: &Running, op_id: OpId) -> Result<Duration, RankError> {
        let op = &running.program.ops[op_id];
        let waited =
            running.events.wait(&op.after, running.site.endpoint.patience()).map_err(
                |error| match error {
                    LaneError::Aborted(reason) => {
                        contraflow_runtime::fabric::FabricError::Aborted { reason }.into()
                    }
                    LaneError::Late { op, waited } => RankError::Late {
                        work: running.program.ops[op].work.to_string(),
                        waited_s: waited.as_secs(),
                    },
                },
            )?;
        let run = AssertUnwindSafe(|| {
            let (rank, step) = (running.site.endpoint.rank(), running.id.step);
            let _at_work = running.site.endpoint.work();
            self.probe.at(ProbePoint::Op { rank, step, op });
            let StepId { job, generation, step, .. } = running.id;
            let _program = running.span.enter();
            let _op = span_of(op).entered();
            let _span = tracing::trace_span!("op", job, generation, rank, step, action = op.action).entered();
            tracing::trace!("{:?} begins {}", self.lane, op.work);
            running.execute(op)
        });
        catch_unwind(run).unwrap_or_else(|payload| Err(RankError::from_panic(&*payload)))?;
        running.events.complete(op_id);
        Ok(waited)
    }
}
