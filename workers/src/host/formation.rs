//! One formation of a job in this process: its ranks, their network, and what they have said.

use std::sync::Arc;
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::control::outbox::Outbox;
use contraflow_runtime::control::wire::{
    RankAddress, formation_numbers, generation_of, rank_numbers, ranks_of,
};
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::fabric::{self, Address, Endpoint, Listener, Progress, Transport, WiredNetwork};
use contraflow_runtime::flight::{Beats, Recorders};
use contraflow_runtime::topology::{FormationId, Rank, Topology};
use contraflow_runtime::trace::TraceContext;
use ractor::{Actor, ActorRef};
use tokio::sync::mpsc;

use super::Input;
use super::job::Prepared;
use crate::engine::probe::Probe;
use crate::engine::timelines::Timelines;
use crate::error::RankError;
use crate::rank::build::Assignment;
use crate::rank::worker::{Worker, WorkerMessage};
use crate::replica::{Circle, Recovered, ReplicaStore, Replicator};

/// Timeout of a wait between ranks: a lost peer ends it at once; this covers what went unnoticed.
const TIMEOUT: Duration = Duration::from_secs(300);

/// How long the last checkpoint of a job is tried to be written: storage that is full or away may come back.
const SAVE_TIMEOUT: Duration = Duration::from_secs(600);

/// A formation.
pub(super) struct Formation {
    pub(super) id: FormationId,
    pub(super) outbox: Outbox,
    /// The last step that an orchestrator has called durable.
    pub(super) durable: u64,
    /// The last answer to a commit.
    pub(super) committed: Option<v1::Committed>,
    pub(super) prepared: Option<Arc<Prepared>>,
    /// The task that reads what it needs, until that is done or given up.
    pub(super) reading: Option<u64>,
    ranks: Vec<Rank>,
    /// Of the whole formation.
    world: usize,
    running: Option<RunningRanks>,
}

/// What there is once the ranks have been started.
struct RunningRanks {
    network: Arc<WiredNetwork>,
    endpoints: Vec<Endpoint>,
    /// The actor is on its way: commands wait for it.
    worker: mpsc::UnboundedSender<WorkerMessage>,
    /// Its ranks' recorders say that the process is alive.
    _beats: Beats,
}

impl Formation {
    /// One that has been assigned.
    ///
    /// **Errors**: the rank is beyond this machine's range.
    pub(super) fn new(id: FormationId, assign: &v1::Assign) -> Result<Self, String> {
        Ok(Formation {
            id,
            outbox: Outbox::default(),
            durable: 0,
            committed: None,
            prepared: None,
            reading: None,
            ranks: ranks_of(&assign.ranks)?,
            world: world_of(&assign.workers, assign.bringers)?,
            running: None,
        })
    }

    /// As it is reported to an orchestrator.
    pub(super) fn hosted(&self) -> v1::Hosted {
        let (ranks, world) = (rank_numbers(&self.ranks), self.world as u64);
        let steps = self.prepared.as_ref().map_or(0, |prepared| prepared.recipe.training.steps as u64);
        let (job, generation) = formation_numbers(self.id);
        v1::Hosted { job, generation, ranks, world, steps, durable: self.durable }
    }

    /// How far its ranks are.
    pub(super) fn progress(&self) -> impl Iterator<Item = v1::Progress> {
        let (job, generation) = formation_numbers(self.id);
        let endpoints = self.running.iter().flat_map(|running| &running.endpoints);
        endpoints.map(move |endpoint| {
            let Progress { step, operations, is_at_work, uses_storage } = endpoint.activity().progress();
            let rank = endpoint.rank() as u64;
            v1::Progress { job, rank, generation, step, operations, is_at_work, uses_storage }
        })
    }

    /// Starts its ranks.
    ///
    /// **Errors**: the network cannot be formed; the assignment is malformed.
    pub(super) fn start(
        &mut self,
        assign: &v1::Assign,
        (prepared, recorders, store): (Prepared, Recorders, &Arc<ReplicaStore>),
        listener: &Listener,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> Result<(), RankError> {
        let id = self.id;
        let wrong = |message| RankError::Content { path: "the assignment".into(), message };
        let local = self.ranks.iter().map(|rank| rank.index()).collect();
        let places = (&assign.fabric[..], &assign.workers[..]);
        let formation = fabric_formation(id, places, &assign.secret, local).map_err(wrong)?;
        let on_fault = move |fault: fabric::PeerLost| {
            let (job, generation) = formation_numbers(id);
            tracing::warn!(job, generation, "ranks {:?}: {}", fault.ranks, fault.reason);
        };
        let network = WiredNetwork::form(listener, formation, Arc::new(on_fault))?;
        let places = (&assign.workers[..], assign.bringers);
        let memory = assign.memory.as_ref().map(|memory| recovered(memory, places, store));
        let memory = memory.transpose().map_err(wrong)?;
        let in_memory = prepared.recipe.checkpoint.in_memory;
        let mut endpoints = Vec::new();
        let timelines = Timelines::new(self.ranks.len());
        let (worker, commands) = mpsc::unbounded_channel();
        for &rank in &self.ranks {
            let endpoint = network.join(rank.index())?;
            endpoints.push(endpoint.clone());
            let replicator = replicator((id, assign, in_memory), &endpoint, store).map_err(wrong)?;
            let assignment = Box::new(Assignment {
                formation: id,
                recipe: prepared.recipe.clone(),
                endpoint,
                datasets: prepared.datasets.clone(),
                resume: prepared.resume.clone(),
                recovered: memory.clone(),
                replicator,
                checkpoints: Some(prepared.folder.clone()),
                save_timeout: SAVE_TIMEOUT,
                trace: TraceContext::parse(&assign.traceparent),
                timelines: timelines.clone(),
                flight: recorders.of(rank.index()),
                probe: Probe::default(),
            });
            // The receiver is in this function.
            drop(worker.send(WorkerMessage::Host { rank, assignment }));
        }
        let events = Arc::new(move |event| drop(inputs.send(Input::Rank { formation: id, event })));
        tokio::spawn(pass_on(events, commands));
        self.prepared = Some(Arc::new(prepared));
        self.running = Some(RunningRanks { network, endpoints, worker, _beats: Beats::of(recorders) });
        Ok(())
    }

    /// Passes a command on, if it is of this formation and not a repetition.
    pub(super) fn command(&mut self, to: RankAddress, command: RankCommand, trace: TraceContext) {
        let Some(running) = self.running.as_ref().filter(|_| to.formation == self.id) else {
            return;
        };
        if self.ranks.contains(&to.rank) && self.outbox.is_new(to.rank, &command) {
            drop(running.worker.send(WorkerMessage::Command { rank: to.rank, command, trace }));
        }
    }

    /// Reports that its ranks could not be started.
    pub(super) fn fail(&self, error: &RankError, inputs: &mpsc::UnboundedSender<Input>) {
        for &rank in &self.ranks {
            let (action, cause) = ("joining the formation".to_owned(), error.to_string());
            let event = RankEvent::Failed { rank, action, cause, kind: error.kind(), peer: error.peer() };
            drop(inputs.send(Input::Rank { formation: self.id, event }));
        }
    }

    /// Ends its ranks: what they are about is given up, their waits end, their connections close.
    pub(super) fn leave(self, reason: &str) {
        let Some(RunningRanks { network, endpoints, worker, .. }) = self.running else { return };
        endpoints.iter().for_each(|endpoint| endpoint.abort(reason));
        for rank in self.ranks {
            let abort = RankCommand::Abort { reason: reason.to_owned() };
            for command in [abort, RankCommand::Shutdown] {
                let trace = TraceContext::default();
                drop(worker.send(WorkerMessage::Command { rank, command, trace }));
            }
        }
        // Goodbyes take a moment.
        tokio::task::spawn_blocking(move || network.close());
    }
}

/// How many of the places of a formation are ranks.
///
/// **Errors**: none, or more others than there are places.
pub(super) fn world_of(workers: &[u64], bringers: u64) -> Result<usize, String> {
    let bringers = usize::try_from(bringers).ok().filter(|bringers| *bringers < workers.len());
    let bringers = bringers.ok_or_else(|| format!("bringers: expected fewer than {}", workers.len()))?;
    Ok(workers.len() - bringers)
}

/// The network of a formation, as seen by the process of these places.
///
/// **Errors**: an invalid address, a place without one, or a secret of another length.
pub(super) fn fabric_formation(
    id: FormationId,
    (fabric, workers): (&[v1::FabricAddress], &[u64]),
    secret: &[u8],
    local: Vec<usize>,
) -> Result<fabric::Formation, String> {
    Ok(fabric::Formation {
        id,
        secret: secret.try_into().map_err(|_| "expected a secret of 32 bytes".to_owned())?,
        ranks: addresses(fabric, workers)?,
        local,
        timeout: TIMEOUT,
        transport: Transport::Auto,
        delay_injection: None,
        links: None,
    })
}

/// By place, where its worker accepts data connections.
///
/// **Errors**: an invalid address, or a place without one.
fn addresses(fabric: &[v1::FabricAddress], workers: &[u64]) -> Result<Vec<Address>, String> {
    let of_worker = fabric.iter().cloned().map(Address::try_from);
    let of_worker: Vec<Address> =
        of_worker.collect::<Result<_, _>>().map_err(|words| format!("fabric.{words}"))?;
    let of_rank = |&worker: &u64| {
        let address = usize::try_from(worker).ok().and_then(|worker| of_worker.get(worker)).cloned();
        address.ok_or_else(|| {
            format!("workers: expected a place in fabric, which has {}, got {worker}", of_worker.len())
        })
    };
    workers.iter().map(of_rank).collect()
}

/// Ranks as the fabric counts them.
///
/// **Errors**: no rank has such a number.
fn indices_of(numbers: &[u64]) -> Result<Vec<usize>, String> {
    Ok(ranks_of(numbers)?.into_iter().map(Rank::index).collect())
}

/// What keeps the state of a rank in memory, unless the recipe wants none: with the holder of its replica and whose replica it holds,
/// if not all ranks are on one worker.
///
/// **Errors**: not every rank holds one replica.
fn replicator(
    (formation, assign, is_wanted): (FormationId, &v1::Assign, bool),
    endpoint: &Endpoint,
    store: &Arc<ReplicaStore>,
) -> Result<Option<Replicator>, String> {
    let kept =
        |circle| Some(Replicator { endpoint: endpoint.clone(), store: store.clone(), formation, circle });
    if assign.buddies.is_empty() {
        return Ok(is_wanted.then(|| kept(None)).flatten());
    }
    let rank = endpoint.rank();
    let buddies = indices_of(&assign.buddies)?;
    let source = buddies.iter().position(|&buddy| buddy == rank);
    let (Some(&buddy), Some(source)) = (buddies.get(rank), source) else {
        return Err(format!(
            "buddies: expected one for rank {rank} and one that it is, got {:?}",
            assign.buddies
        ));
    };
    Ok(kept(Some(Circle { buddy, source })))
}

/// Where the state is that a formation begins with, as it came; `places` are its workers, the last ones no ranks.
///
/// **Errors**: the generation or a number is none.
pub(super) fn recovered(
    memory: &v1::InMemory,
    (workers, bringers): (&[u64], u64),
    store: &Arc<ReplicaStore>,
) -> Result<Recovered, String> {
    let generation = generation_of(memory.generation).map_err(|words| format!("memory.{words}"))?;
    Ok(Recovered {
        generation,
        step: memory.step,
        holders: indices_of(&memory.holders)?,
        axes: memory.axes.as_ref().map(axes_of).transpose()?,
        world: world_of(workers, bringers)?,
        store: store.clone(),
    })
}

/// Axes as they came.
///
/// **Errors**: one of them is no size, or there are more ranks than any job has.
fn axes_of(axes: &v1::Axes) -> Result<Topology, String> {
    let size = |axis: u64| u32::try_from(axis).ok().filter(|axis| *axis > 0).map(|axis| axis as usize);
    let sizes = (size(axes.pipeline), size(axes.expert), size(axes.data));
    let (Some(pipeline), Some(expert), Some(data)) = sizes else {
        return Err(format!("memory.axes: expected sizes from 1 on, got {axes:?}"));
    };
    Ok(Topology { pipeline, expert, data })
}

/// Starts the worker actor, hands it what has been sent, and ends it with the sender.
async fn pass_on(events: crate::rank::EventSink, mut messages: mpsc::UnboundedReceiver<WorkerMessage>) {
    let worker: ActorRef<WorkerMessage> = match Actor::spawn(None, Worker, events).await {
        Ok((worker, _)) => worker,
        Err(error) => return tracing::error!("a worker actor cannot be started: {error}"),
    };
    while let Some(message) = messages.recv().await {
        if worker.cast(message).is_err() {
            return;
        }
    }
    worker.drain().ok();
}
