//! The optimizer actor: owns the moments and makes one update at a time, on a thread of its own.
//!
//! Collectives wait for other ranks, so an update runs beside the actor and comes back as a message. What an update is
//! stands in `update`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use contraflow_runtime::trace::SPAN;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::update::{GlobalTotals, OptimizerState, SaveWhen, UpdateOrder};
use crate::checkpoint::Snapshot;
use crate::engine::compute::Totals;
use crate::engine::probe::{Probe, ProbePoint};
use crate::error::RankError;
use crate::model::params::RankParams;

/// What the optimizer hears.
pub enum OptimizerMessage {
    /// Make an update; the answer is [`UpdateDone`].
    Update {
        /// Which step, with which rates.
        order: UpdateOrder,
        /// The parameters with their gradients, handed over for the update.
        params: Box<RankParams>,
        /// The rank's sums over the step.
        totals: Box<Totals>,
        /// What the update belongs to.
        span: tracing::Span,
    },
    /// The update has ended: the optimizer's state comes back from the thread that made it.
    Finished(Box<OptimizerState>),
}

/// An update that has ended.
pub struct UpdateDone {
    /// What was asked for.
    pub order: UpdateOrder,
    /// The parameters, back again.
    pub params: RankParams,
    /// What every rank knows now, or why nothing was updated.
    pub result: Result<GlobalTotals, RankError>,
    /// The state after the update, where it is to be written to storage.
    pub saved: Option<Snapshot>,
    /// The state after the update, where it is to be kept in memory.
    pub kept: Option<Snapshot>,
}

/// Takes the answers.
pub type ReportUpdate = Arc<dyn Fn(UpdateDone) + Send + Sync>;

/// The optimizer actor.
pub struct Optimizer;

/// The actor's state.
pub struct OptimizerActorState {
    report: ReportUpdate,
    probe: Probe,
    /// Out while an update runs.
    state: Option<Box<OptimizerState>>,
}

impl Actor for Optimizer {
    type Msg = OptimizerMessage;
    type State = OptimizerActorState;
    type Arguments = (ReportUpdate, OptimizerState, Probe);

    async fn pre_start(
        &self,
        _myself: ActorRef<OptimizerMessage>,
        (report, state, probe): Self::Arguments,
    ) -> Result<OptimizerActorState, ActorProcessingErr> {
        Ok(OptimizerActorState { report, probe, state: Some(Box::new(state)) })
    }

    async fn handle(
        &self,
        myself: ActorRef<OptimizerMessage>,
        message: OptimizerMessage,
        actor: &mut OptimizerActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            OptimizerMessage::Update { order, mut params, totals, span } => {
                let mut state = actor.state.take().ok_or("an update is under way already")?;
                let (rank_id, step) = (state.endpoint.rank(), order.id.step);
                actor.probe.at(ProbePoint::Actor { rank: rank_id, step, name: "optimizer" });
                let (report, probe) = (actor.report.clone(), actor.probe.clone());
                let span = tracing::info_span!(target: SPAN, parent: &span, "update", rank = rank_id, step);
                // Collectives wait for other ranks: not on the actor's own thread, which has to stay awake.
                tokio::task::spawn_blocking(move || {
                    let update = AssertUnwindSafe(|| {
                        let _update = span.entered();
                        let _at_work = state.endpoint.work();
                        probe.at(ProbePoint::Gradients { rank: rank_id, step, params: &mut params });
                        let global = state.update(&order, &mut params, &totals)?;
                        let saves = match order.save {
                            SaveWhen::Never => false,
                            SaveWhen::AtStop => global.stop,
                            SaveWhen::Now => true,
                        };
                        let keeps = order.keep && !global.stop;
                        let snapshot = (saves || keeps).then(|| state.snapshot(&params));
                        let saved = snapshot.clone().filter(|_| saves);
                        Ok((global, saved, snapshot.filter(|_| keeps)))
                    });
                    let result =
                        catch_unwind(update).unwrap_or_else(|panic| Err(RankError::from_panic(&*panic)));
                    let (result, saved, kept) = match result {
                        Ok((global, saved, kept)) => (Ok(global), saved, kept),
                        Err(error) => (Err(error), None, None),
                    };
                    // If the actors are gone the job has ended and nobody asks any more.
                    drop(myself.cast(OptimizerMessage::Finished(state)));
                    let done = UpdateDone { order, params: *params, result, saved, kept };
                    report(done);
                });
            }
            OptimizerMessage::Finished(state) => actor.state = Some(state),
        }
        Ok(())
    }
}
