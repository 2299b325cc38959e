//! The worker link: one stream a worker, events up, commands down.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::control::text::printable;
use contraflow_runtime::control::wire::{
    RankAddress, decode_event, formation_of, generation_of, job_of, rank_of, ranks_of,
};
use contraflow_runtime::fabric::Address;
use contraflow_runtime::files::objects::Sources;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use v1::control_service_server::ControlService;
use v1::from_worker::Message;

use super::acceptor::Peer;
use super::auth::Session;
use super::hub::{HubMessage, LogRecord};
use super::worker_link::{Shown, WorkerLink};
use super::{Handle, bounds, records};
use crate::core::{Attachment, Event, Hosted, Left, Progress, Registration, Space};
use crate::recovery::ReplicaShard;

/// Messages that a worker may leave unread before it is disconnected.
const MAX_UNREAD: usize = 4_096;

/// How long a worker may take to introduce itself.
const HELLO: Duration = Duration::from_secs(5);

/// How long a worker's data port may take to answer.
const PROBE: Duration = Duration::from_secs(2);

/// Most ranks of one worker.
const MAX_SLOTS: u32 = 1_024;

/// How long the last message of a stream waits for its reader.
const LEAVE: Duration = Duration::from_secs(5);

/// Counts the streams of this process.
static LINKS: AtomicU64 = AtomicU64::new(0);

/// The service.
pub(super) struct ControlApi {
    pub(super) hub: Handle,
}

#[tonic::async_trait]
impl ControlService for ControlApi {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::ToWorker, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let session = Session::of(&request);
        let peer = request.extensions().get::<Peer>().cloned();
        let mut up = request.into_inner();
        let first = tokio::time::timeout(HELLO, up.next()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("expected Hello within 5 s"))?;
        let mut first = first.and_then(Result::ok).unwrap_or_default();
        bounds::from_worker(&mut first).map_err(Status::invalid_argument)?;
        let Some(Message::Hello(hello)) = first.message else {
            return Err(Status::invalid_argument("expected Hello as the first message of a worker"));
        };
        let version = env!("CARGO_PKG_VERSION");
        if hello.version != version {
            return Err(Status::failed_precondition(format!(
                "version of the worker: expected {version}, as the orchestrator, got {}",
                hello.version
            )));
        }
        sound(&hello)?;
        let (worker, mut attachment) = attachment(hello).map_err(Status::invalid_argument)?;
        probe(&mut attachment.registration).await;
        let link = LINKS.fetch_add(1, Ordering::Relaxed);
        let (down, reason) = mpsc::channel(MAX_UNREAD);
        // The stream ends when the hub lets go of it.
        let last_words = down.downgrade();
        let Registration { name, node, .. } = &attachment.registration;
        session.note("attach", name, &Ok(())).await;
        let named = format!("worker {} on node {}", printable(name), printable(node));
        tracing::info!("{named} joins");
        let shown = |expires| Shown { worker: printable(name).into_owned(), user: session.user(), expires };
        let opened = WorkerLink { number: link, down, shown: session.expires().map(shown) };
        self.hub.send(HubMessage::Linked { worker, link: opened }).await?;
        self.hub.send(HubMessage::Event(Event::Attached(Box::new(attachment)))).await?;
        if let Some(peer) = peer {
            peer.place.attached();
        }
        let hub = self.hub.clone();
        tokio::spawn(async move {
            let (refused, expelled) = tokio::select! {
                ended = hear(&hub, worker, up) => (ended.err(), None),
                refused = session.withdrawn() => {
                    let why = refused.message().to_owned();
                    (Some(refused), Some(why))
                }
            };
            let down = last_words.upgrade();
            tracing::info!("the stream of {named} has ended");
            // If the hub is gone the orchestrator is ending.
            drop(hub.send(HubMessage::Unlinked { worker, link, expelled }).await);
            if let (Some(down), Some(refused)) = (down, refused) {
                tracing::warn!("the stream of {named} is refused: {}", refused.message());
                // Who does not read does not get it.
                drop(tokio::time::timeout(LEAVE, down.send(Err(refused))).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(reason))))
    }
}

/// Takes a worker's messages until its stream ends.
///
/// **Errors**: `INVALID_ARGUMENT`; one of them is out of bounds.
async fn hear(hub: &Handle, worker: u64, mut up: Streaming<v1::FromWorker>) -> Result<(), Status> {
    while let Some(Ok(mut message)) = up.next().await {
        bounds::from_worker(&mut message).map_err(Status::invalid_argument)?;
        if handle_message(hub, worker, message).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// **Errors**: `INVALID_ARGUMENT`; what a worker has to have is not there.
fn sound(hello: &v1::Hello) -> Result<(), Status> {
    if !(1..=MAX_SLOTS).contains(&hello.slots) {
        let words = format!("slots: expected 1 to {MAX_SLOTS}, got {}", hello.slots);
        return Err(Status::invalid_argument(words));
    }
    match hello.fabric {
        Some(_) => Ok(()),
        None => Err(Status::invalid_argument("fabric: expected an address, got none")),
    }
}

/// **Errors**: the address is none, or a number out of range.
fn attachment(hello: v1::Hello) -> Result<(u64, Attachment), String> {
    let v1::Hello { worker, name, node, block, peak_flops, memory_bytes, memory_limit, .. } = hello;
    let fabric = hello.fabric.map(Address::try_from).transpose();
    let sources =
        Sources::parse(&hello.sources).map_err(|faults| format!("sources: {}", faults.join("; ")))?;
    let registration = Registration {
        worker,
        name,
        slots: hello.slots as usize,
        node,
        block,
        fabric: fabric.map_err(|reason| format!("fabric.{reason}"))?,
        cores: count_of("cores", hello.cores)?,
        peak_flops,
        memory_bytes,
        memory_limit,
        sources,
        is_unreachable: false,
    };
    let v1::Hello { hosted, left, state, incarnation, storage_id, facts, .. } = hello;
    let hosted = hosted.into_iter().map(hosted_of).collect::<Result<_, _>>()?;
    let left = left.into_iter().map(left_of).collect::<Result<_, _>>()?;
    Ok((worker, Attachment { registration, hosted, left, state, incarnation, facts, storage_id }))
}

/// Notes whether the worker's data port answers. One that does not may still be reached by other workers, over a network of theirs.
async fn probe(registration: &mut Registration) {
    let Registration { name, node, fabric: Some(address), is_unreachable, .. } = registration else { return };
    let connected = tokio::time::timeout(PROBE, TcpStream::connect(address.tcp)).await;
    let fault = match connected {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", PROBE.as_secs()),
    };
    *is_unreachable = true;
    let (name, node) = (printable(name), printable(node));
    tracing::warn!("worker {name} on node {node}: its data port {} does not answer: {fault}", address.tcp);
}

/// **Errors**: more than anything here is counted to.
fn count_of(field: &str, number: u64) -> Result<usize, String> {
    usize::try_from(number).map_err(|error| format!("{field}: {number}: {error}"))
}

fn hosted_of(hosted: v1::Hosted) -> Result<Hosted, String> {
    let v1::Hosted { job, generation, ranks, world, steps, durable } = hosted;
    let formation = formation_of(job, generation)?;
    Ok(Hosted { formation, ranks: ranks_of(&ranks)?, world: count_of("world", world)?, steps, durable })
}

fn left_of(released: v1::Released) -> Result<Left, String> {
    let v1::Released { job, generation, replicas } = released;
    let shard = |v1::ReplicaShard { generation, step, rank }| {
        Ok(ReplicaShard { generation: generation_of(generation)?, step, rank: rank_of(rank)? })
    };
    let formation = formation_of(job, generation)?;
    Ok(Left { formation, replicas: replicas.into_iter().map(shard).collect::<Result<_, String>>()? })
}

fn progress_of(progress: v1::Progress) -> Result<Progress, String> {
    let v1::Progress { job, rank, generation, step, operations, is_at_work, uses_storage } = progress;
    let rank = RankAddress { formation: formation_of(job, generation)?, rank: rank_of(rank)? };
    Ok(Progress { rank, step, operations, is_at_work, uses_storage })
}

/// A message as an event of the core; `None` if it is empty.
///
/// **Errors**: an invalid message.
fn event_of(worker: u64, message: Message) -> Result<Option<Event>, String> {
    Ok(Some(match message {
        Message::Beat(beat) => {
            let progress = beat.progress.into_iter().map(progress_of).collect::<Result<_, _>>()?;
            Event::Beat { worker, progress }
        }
        Message::Event(event) => {
            let (from, event) = decode_event(event)?;
            Event::Rank { worker, from, event: Box::new(event) }
        }
        Message::Committed(done) => Event::Committed {
            worker,
            formation: formation_of(done.job, done.generation)?,
            position: done.position.map(Into::into),
            result: if done.error.is_empty() { Ok(()) } else { Err(done.error) },
        },
        Message::Discarded(v1::Discarded { job, error }) => {
            let result = if error.is_empty() { Ok(()) } else { Err(error) };
            Event::Removed { worker, job: job_of(job)?, result }
        }
        Message::Space(v1::StorageSpace { job, generation, free_bytes, checkpoint_bytes }) => {
            let space = Space { free: free_bytes, checkpoint: checkpoint_bytes };
            Event::Space { worker, formation: formation_of(job, generation)?, space }
        }
        Message::FlightRead(v1::FlightRead { job, generation, says }) => {
            Event::FlightRead { worker, formation: formation_of(job, generation)?, says }
        }
        Message::LeaveRequest(_) => Event::LeaveRequested { worker },
        Message::Released(released) => Event::Left { worker, left: left_of(released)? },
        Message::Hello(_) | Message::Logs(_) | Message::RecordsWanted(_) => return Ok(None),
    }))
}

async fn handle_message(hub: &Handle, worker: u64, message: v1::FromWorker) -> Result<(), Status> {
    match message.message {
        None => Ok(()),
        Some(Message::Logs(logs)) => keep_lines(hub, worker, logs).await,
        Some(Message::RecordsWanted(wanted)) => records::answer(hub, worker, wanted).await,
        Some(message) => match event_of(worker, message) {
            Ok(Some(event)) => hub.send(HubMessage::Event(event)).await,
            Ok(None) => Ok(()),
            Err(reason) => {
                tracing::warn!(worker, "an invalid message: {}", printable(&reason));
                Ok(())
            }
        },
    }
}

async fn keep_lines(hub: &Handle, worker: u64, logs: v1::LogLines) -> Result<(), Status> {
    for line in logs.lines {
        let v1::LogLine { job, rank, unix_ms, level, message } = line;
        let job = match job_of(job) {
            Ok(job) => job,
            Err(reason) => {
                tracing::warn!(worker, "a log line that makes no sense: {reason}");
                continue;
            }
        };
        let lines = vec![LogRecord { unix_ms, level, ranks: vec![rank], message }];
        hub.send(HubMessage::Lines { worker, job, lines }).await?;
    }
    Ok(())
}
