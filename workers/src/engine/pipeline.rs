//! The pipeline actor, the DualPipe scheduler of a rank: it issues the rank's program to the lanes, in order, ahead of
//! completion within a bound, and gives the model back when the program has ended.
//!
//! Completion events serve progress and abort; what runs next is in the program. Knows no schedule by name.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use contraflow_kernels::par::Threads;
use contraflow_runtime::fabric::Phase;
use contraflow_runtime::schedule::{Lane, OpId, Plan, Program};
use contraflow_runtime::trace::SPAN;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::compute::{Compute, Totals};
use super::lanes::{LaneEvent, Lanes, Running, RunningParts, Site};
use super::probe::{Probe, ProbePoint};
use crate::comm::address::StepId;
use crate::data::sequences::Sequences;
use crate::error::RankError;
use crate::model::Architecture;
use crate::model::micro_batch::{LossScales, MicroBatch};
use crate::model::params::RankParams;

/// Operations issued and not yet completed; it bounds what an abort has to wait for and what lies in the lanes' queues.
const IN_FLIGHT: usize = 64;

/// What the pipeline hears.
pub enum PipelineMessage {
    /// Run a program.
    BeginStep(Box<PipelineOrder>),
    /// A lane has something to say.
    Lane(LaneEvent),
    /// End every wait of the running program at once.
    Abort {
        /// Why.
        reason: String,
    },
}

/// A program and what it works on.
pub struct PipelineOrder {
    /// Which step.
    pub id: StepId,
    /// The plan it was made from, for words about an action.
    pub plan: Arc<Plan>,
    /// What to run.
    pub program: Arc<Program>,
    /// The micro-batches, by number.
    pub batches: Vec<Sequences>,
    /// Divisors and factors of the losses.
    pub scales: LossScales,
    /// The parameters, handed over for the program.
    pub params: RankParams,
    /// What the program belongs to.
    pub span: tracing::Span,
}

/// What a program that has ended leaves.
pub struct PlanDone {
    /// Which step.
    pub id: StepId,
    /// The parameters, with gradients after training.
    pub params: RankParams,
    /// Sums over the program.
    pub totals: Totals,
    /// Wall time of the program.
    pub elapsed: Duration,
    /// How much of it the compute lane was blocked.
    pub bubble: Duration,
}

/// What the pipeline tells its owner.
pub enum PipelineEvent {
    /// A program has ended.
    Done(Box<PlanDone>),
    /// An operation could not do its part.
    Failed {
        /// Action of the plan it belongs to.
        action: String,
        /// The cause.
        error: RankError,
    },
    /// Every wait of the running program has ended.
    Aborted,
}

/// What the actor is made with.
pub struct PipelineSetup {
    /// Takes the events.
    pub report: Arc<dyn Fn(PipelineEvent) + Send + Sync>,
    /// Position in the pipeline.
    pub pipeline: usize,
    /// The architecture of the model.
    pub arch: Arc<Architecture>,
    /// What the lanes need.
    pub site: Site,
    /// What the compute lane may use.
    pub threads: Arc<Threads>,
    /// For tests.
    pub probe: Probe,
}

/// The program under way.
struct Current {
    running: Arc<Running>,
    plan: Arc<Plan>,
    next: OpId,
    completed: usize,
    began: Instant,
    bubble: Duration,
}

/// The actor's state.
pub struct PipelineState {
    setup: PipelineSetup,
    lanes: Lanes,
    current: Option<Current>,
}

impl PipelineState {
    fn new(setup: PipelineSetup, report: Arc<dyn Fn(LaneEvent) + Send + Sync>) -> Self {
        let lanes = Lanes::new(setup.threads.clone(), setup.probe.clone(), report);
        PipelineState { setup, lanes, current: None }
    }

    fn begin(&mut self, order: PipelineOrder) {
        let rank = self.setup.site.endpoint.rank();
        self.setup.probe.at(ProbePoint::Actor { rank, step: order.id.step, name: "pipeline" });
        let PipelineOrder { id, plan, program, batches, scales, params, span } = order;
        let arch = &self.setup.arch;
        let batches =
            batches.into_iter().map(|sequences| MicroBatch::new(arch, sequences, &scales)).collect();
        let RankParams { dense, experts } = params;
        let train = id.phase == Phase::Train;
        let compute = Compute::new(arch.clone(), self.setup.site.stages.clone(), dense, experts, train);
        let span = tracing::info_span!(target: SPAN, parent: &span, "program", rank, step = id.step);
        let parts = RunningParts { id, program, batches, compute, span };
        let running = Arc::new(Running::new(&self.setup.site, parts));
        let began = Instant::now();
        self.current = Some(Current { running, plan, next: 0, completed: 0, began, bubble: Duration::ZERO });
        self.issue();
    }

    /// Issues operations up to the bound.
    fn issue(&mut self) {
        let Some(current) = &mut self.current else { return };
        let end = current.running.program.ops.len().min(current.completed + IN_FLIGHT);
        while current.next < end {
            self.lanes.issue(&current.running, current.next);
            current.next += 1;
        }
    }

    /// Takes note of a completed operation; returns what is left once it was the last.
    fn completed(&mut self, id: StepId, lane: Lane, waited: Duration) -> Option<PlanDone> {
        let current = self.current.as_mut().filter(|current| current.running.id == id)?;
        current.completed += 1;
        if lane == Lane::Compute {
            current.bubble += waited;
        }
        if current.completed < current.running.program.ops.len() {
            self.issue();
            return None;
        }
        let Current { running, began, bubble, .. } = self.current.take()?;
        let running = Arc::into_inner(running).expect("every lane lets go of a program before it reports");
        let compute = running.compute.into_inner().unwrap_or_else(PoisonError::into_inner);
        let left = compute.num_left() + running.transit.num_left();
        debug_assert!(
            id.phase != Phase::Train || left == 0,
            "{left} tensors are left over after step {}",
            id.step
        );
        let Compute { dense, experts, totals, .. } = compute;
        let params = RankParams { dense, experts };
        Some(PlanDone { id, params, totals, elapsed: began.elapsed(), bubble })
    }

    /// An action of the running plan in words.
    fn describe(&self, action: Option<usize>) -> String {
        let list = self.current.as_ref().and_then(|current| current.plan.actions.get(self.setup.pipeline));
        list.and_then(|list| list.get(action?))
            .map_or_else(|| "no action".into(), |action| format!("action {action}"))
    }

    fn abort(&mut self, reason: &str) {
        match self.current.take() {
            Some(current) => current.running.abort(reason),
            None => self.setup.site.endpoint.abort(reason),
        }
    }
}

/// The pipeline actor.
pub struct Pipeline;

impl Actor for Pipeline {
    type Msg = PipelineMessage;
    type State = PipelineState;
    type Arguments = PipelineSetup;

    async fn pre_start(
        &self,
        myself: ActorRef<PipelineMessage>,
        setup: PipelineSetup,
    ) -> Result<PipelineState, ActorProcessingErr> {
        // A lane that reports to a pipeline which is gone has nobody to tell.
        let report = move |event| drop(myself.cast(PipelineMessage::Lane(event)));
        Ok(PipelineState::new(setup, Arc::new(report)))
    }

    async fn handle(
        &self,
        _myself: ActorRef<PipelineMessage>,
        message: PipelineMessage,
        state: &mut PipelineState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PipelineMessage::BeginStep(order) => state.begin(*order),
            PipelineMessage::Lane(LaneEvent::Completed { id, lane, waited }) => {
                if let Some(done) = state.completed(id, lane, waited) {
                    (state.setup.report)(PipelineEvent::Done(Box::new(done)));
                }
            }
            PipelineMessage::Lane(LaneEvent::Failed { action, error, .. }) => {
                let action = state.describe(action);
                (state.setup.report)(PipelineEvent::Failed { action, error: *error });
            }
            PipelineMessage::Abort { reason } => {
                state.abort(&reason);
                (state.setup.report)(PipelineEvent::Aborted);
            }
        }
        Ok(())
    }
}
