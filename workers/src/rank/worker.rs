//! The worker actor: hosts the ranks of this process, passes commands to them, and reports when one of them dies.
//!
//! Knows ranks by number, nothing of what they do.

use std::collections::HashMap;

use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::Rank;
use contraflow_runtime::trace::TraceContext;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use super::build::Assignment;
use super::{EventSink, RankActor, RankMessage};

/// Messages of the worker actor.
pub enum WorkerMessage {
    /// Host a rank of a job.
    Host {
        /// The addressed rank.
        rank: Rank,
        /// The command.
        assignment: Box<Assignment>,
    },
    /// A command of the orchestrator to a rank.
    Command {
        /// The addressed rank.
        rank: Rank,
        /// The command.
        command: RankCommand,
        /// The span that says it.
        trace: TraceContext,
    },
}

/// The actor's state.
pub struct WorkerState {
    events: EventSink,
    ranks: HashMap<Rank, ActorRef<RankMessage>>,
    numbers: HashMap<ActorId, Rank>,
}

impl WorkerState {
    fn failed(&self, rank: Rank, action: &str, cause: String) {
        (self.events)(RankEvent::Failed {
            rank,
            action: action.to_owned(),
            cause,
            kind: ErrorKind::Bug,
            peer: None,
        });
    }
}

/// The worker actor.
pub struct Worker;

impl Actor for Worker {
    type Msg = WorkerMessage;
    type State = WorkerState;
    type Arguments = EventSink;

    async fn pre_start(
        &self,
        _myself: ActorRef<WorkerMessage>,
        events: EventSink,
    ) -> Result<WorkerState, ActorProcessingErr> {
        Ok(WorkerState { events, ranks: HashMap::new(), numbers: HashMap::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<WorkerMessage>,
        message: WorkerMessage,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMessage::Host { rank, assignment } => {
                let arguments = (rank, state.events.clone());
                let (actor, _) = Actor::spawn_linked(None, RankActor, arguments, myself.get_cell()).await?;
                state.numbers.insert(actor.get_id(), rank);
                actor.cast(RankMessage::Assign(assignment))?;
                state.ranks.insert(rank, actor);
            }
            WorkerMessage::Command { rank, command, trace } => {
                let ended = command == RankCommand::Shutdown;
                let actor = state.ranks.get(&rank);
                let is_sent =
                    actor.is_some_and(|actor| actor.cast(RankMessage::Command(command, trace)).is_ok());
                if ended {
                    state.ranks.remove(&rank);
                } else if !is_sent {
                    state.failed(rank, "hearing a command", "the rank is gone".into());
                }
            }
        }
        Ok(())
    }

    /// The default would stop the worker, and with it every other rank.
    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<WorkerMessage>,
        event: SupervisionEvent,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(cell, cause) = event
            && let Some(&rank) = state.numbers.get(&cell.get_id())
        {
            state.failed(rank, "in the rank actor itself", cause.to_string());
        }
        Ok(())
    }
}
