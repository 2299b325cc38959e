//! The lanes of a rank on a CPU: one thread per lane, each running its operations in program order, ordered by events.
//!
//! No compute operation blocks on the fabric; a lane that waits, waits for an event under a deadline. Knows programs and
//! events; not what an operation does, and not what comes after a program.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_runtime::fabric::{FabricError, wake_promptly};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::flight::Event;
use contraflow_runtime::schedule::{Lane, OpId};

use super::events::WaitError;
use super::operations::span_of;
use super::probe::ProbePoint;
use super::running::RunningProgram;
use crate::comm::address::StepId;
use crate::error::RankError;

/// Events of a lane for its pipeline actor.
pub enum LaneEvent {
    /// An operation has completed.
    Completed {
        /// Of which step.
        id: StepId,
        /// Which one of the program under way.
        op: OpId,
        /// When it began, with all that it waited for done.
        began: Instant,
        /// When it ended.
        ended: Instant,
    },
    /// An operation has failed; the lane continues with the next program.
    Failed {
        /// Of which step.
        id: StepId,
        /// Which one of the program under way.
        op: OpId,
        /// The cause.
        error: Box<RankError>,
    },
}

/// Takes the events; called from the lanes.
pub type ReportLane = Arc<dyn Fn(LaneEvent) + Send + Sync>;

struct Issue {
    running: Arc<RunningProgram>,
    op: OpId,
}

/// The lanes' threads. They end when this is dropped.
pub struct Lanes {
    queues: HashMap<Lane, Sender<Issue>>,
    threads: Arc<Threads>,
    report: ReportLane,
}

impl Lanes {
    /// No lane yet: each starts with its first operation. `threads` is what the compute lane may use.
    pub fn new(threads: Arc<Threads>, report: ReportLane) -> Self {
        Lanes { queues: HashMap::new(), threads, report }
    }

    /// Queues an operation on its lane.
    pub fn issue(&mut self, running: &Arc<RunningProgram>, op: OpId) {
        let lane = running.program.ops[op].lane;
        let queue = self.queues.entry(lane).or_insert_with(|| {
            let (sender, receiver) = channel();
            let worker = LaneThread { lane, report: self.report.clone() };
            let threads = self.threads.clone();
            let run = move || match lane {
                Lane::Compute => threads.run(move || worker.run(&receiver)),
                _ => {
                    wake_promptly();
                    worker.run(&receiver);
                }
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
    report: ReportLane,
}

impl LaneThread {
    fn run(&self, queue: &Receiver<Issue>) {
        while let Ok(Issue { running, op }) = queue.recv() {
            let id = running.id;
            let event = match self.run_op(&running, op) {
                Ok((began, ended)) => LaneEvent::Completed { id, op, began, ended },
                Err(error) => {
                    running.events.abort(&error.to_string());
                    LaneEvent::Failed { id, op, error: Box::new(error) }
                }
            };
            // The pipeline takes the program apart once the last operation is reported.
            drop(running);
            (self.report)(event);
        }
    }

    /// Waits for what the operation needs, and runs it; returns when it began and ended.
    fn run_op(&self, running: &RunningProgram, op_id: OpId) -> Result<(Instant, Instant), RankError> {
        let op = &running.program.ops[op_id];
        let why_late = |error| match error {
            WaitError::Aborted(reason) => FabricError::Aborted { reason }.into(),
            WaitError::Late { op, waited } => {
                RankError::Late { work: running.program.ops[op].work.to_string(), waited_s: waited.as_secs() }
            }
        };
        running.events.wait(&op.after, running.context.endpoint.timeout()).map_err(why_late)?;
        if op.lane != Lane::Compute {
            running.events.begin_exchange(op_id);
        }
        let began = Instant::now();
        let (work, step) = (op.work, running.id.step);
        let note = |event, at| {
            if let Some(flight) = &running.context.flight {
                flight.note(event, at);
            }
        };
        note(Event::Began(work, step), began);
        let done = RankError::catch(|| {
            let (rank, step) = (running.context.endpoint.rank(), running.id.step);
            let _at_work = running.context.endpoint.work();
            running.context.probe.at(ProbePoint::Op { rank, step, op });
            let StepId { formation, step, .. } = running.id;
            let (job, generation) = (formation.job.bits(), formation.generation.number());
            let _program = running.span.enter();
            let _op = span_of(op).entered();
            let _span = tracing::trace_span!("op", job, generation, rank, step, action = op.action).entered();
            tracing::trace!("{:?} begins {}", self.lane, op.work);
            running.execute(op)
        });
        let ended = Instant::now();
        // What ends because others are gone has not ended: that is what it waited for.
        match &done {
            Ok(()) => note(Event::Ended(work, step), ended),
            Err(error) if error.kind() != ErrorKind::Lost => note(Event::Failed(work, step), ended),
            Err(_) => {}
        }
        done?;
        running.events.complete(op_id);
        Ok((began, ended))
    }
}
