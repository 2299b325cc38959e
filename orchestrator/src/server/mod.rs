//! The orchestrator as a process: the hub around the core, and the gRPC services in front of it.
//!
//! Knows transport and storage; the decisions are in [`crate::core`].
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod acceptor;
pub mod access;
mod admission;
mod audit;
mod auth;
pub mod bounds;
mod census;
mod cluster_api;
mod encode;
mod expiry;
mod front;
mod hub;
mod jobs_api;
mod link;
mod lists;
mod log_dedup;
mod outdated;
mod places;
mod rate;
mod records;
mod security;
mod snapshot;
pub(crate) mod steps;
mod submission;
mod withdrawal;
mod worker_link;
mod x509;

pub use self::auth::Visitor;
pub use self::census::Census;
pub use self::expiry::NOTICE;
pub use self::front::{Calls, Front};
pub use self::security::{Security, certificate_info, files, fingerprint_of};
pub use self::x509::CertificateInfo;

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contraflow_proto::v1;
use contraflow_runtime::control::text::tidy;
use contraflow_runtime::faults::Faults;
use contraflow_runtime::random::from_system;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use v1::cluster_service_server::ClusterServiceServer;
use v1::control_service_server::ControlServiceServer;
use v1::job_service_server::JobServiceServer;

use self::audit::Audit;
use self::auth::{AuthLayer, AuthService};
use self::hub::{Hub, HubMessage, Mailboxes, Senders};
use self::places::Limits;
use crate::core::{Event, RETAINED_JOBS, TICK_MS, Times};
use crate::store::Store;
use crate::webhook::Webhook;

/// Largest message that is taken from a client: a recipe, a model's configuration and some.
const MAX_MESSAGE: usize = 4 << 20;

/// All headers of a call together: a token and a trace context, and some. **Units**: bytes.
const MAX_HEADERS: u32 = 8 << 10;

/// A refusal travels in a header, where each space and line end takes three bytes. **Units**: bytes.
const MAX_REFUSAL: usize = 4 << 10;

/// One fault of a refusal. **Units**: bytes.
const MAX_FAULT: usize = 512;

/// Calls of one connection that are under way at once.
const MAX_STREAMS: u32 = 256;

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The jobs that ended last, this many of them, stay known.
    pub retained_jobs: usize,
    /// When workers count as silent, away or lost.
    pub times: Times,
    /// What the folder of a job in the storage may hold at most, if there is a limit. **Units**: bytes.
    pub job_quota: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { retained_jobs: RETAINED_JOBS, times: Times::default(), job_quota: None }
    }
}

/// An orchestrator that has its state and its port.
pub struct Orchestrator {
    listener: TcpListener,
    security: Option<Security>,
    limits: Limits,
    audit: Audit,
    job_quota: Option<u64>,
    hub: Hub,
    mail: Mailboxes,
    handle: Handle,
}

/// The way to the hub.
#[derive(Clone)]
pub(crate) struct Handle {
    senders: Senders,
}

impl Handle {
    /// Hands a message over.
    ///
    /// **Errors**: `UNAVAILABLE` if the hub has ended.
    async fn send(&self, message: HubMessage) -> Result<(), tonic::Status> {
        let is_sent = self.senders.send(message).await;
        is_sent.then_some(()).ok_or_else(|| tonic::Status::unavailable("the orchestrator is ending"))
    }

    /// Changes something that the core decides on; returns when that is durable.
    ///
    /// **Errors**: `UNAVAILABLE` if it cannot be kept, or the hub has ended.
    async fn change(&self, event: Event) -> Result<(), tonic::Status> {
        let (reply, answer) = oneshot::channel();
        self.send(HubMessage::Change { event: Box::new(event), reply }).await?;
        answer.await.map_err(|_| tonic::Status::unavailable("the orchestrator is ending"))?
    }

    /// Looks something up in the hub's state.
    ///
    /// **Errors**: `UNAVAILABLE` if the hub has ended.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Hub) -> T + Send + 'static,
    ) -> Result<T, tonic::Status> {
        let (reply, answer) = oneshot::channel();
        let ask = Box::new(move |hub: &Hub| drop(reply.send(question(hub))));
        self.send(HubMessage::Ask(ask)).await?;
        answer.await.map_err(|_| tonic::Status::unavailable("the orchestrator is ending"))
    }
}

impl Orchestrator {
    /// Opens the state in `dir` and binds `address`.
    ///
    /// **Errors**: the state is in use, damaged or of another format, or the address cannot be had.
    pub async fn open(dir: &Path, address: SocketAddr, settings: &Settings) -> Result<Self, String> {
        let listener =
            TcpListener::bind(address).await.map_err(|error| format!("--listen {address}: {error}"))?;
        let (store, replay) = Store::open(dir).map_err(|error| error.to_string())?;
        let key = cluster_key(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let hub = Hub::new(store, replay, key, settings)?;
        let (senders, mail) = Mailboxes::open();
        let handle = Handle { senders };
        let (limits, audit) = (Limits::of(None), Audit::in_folder(dir));
        let job_quota = settings.job_quota;
        Ok(Orchestrator { listener, security: None, limits, audit, job_quota, hub, mail, handle })
    }

    /// Requires clients to authenticate; without it, every client that can connect has full access.
    pub fn secured(mut self, security: Security) -> Self {
        self.security = Some(security);
        self
    }

    /// Takes no more connections than leave it some of the files that the process may have open.
    pub fn with_files(mut self, files: u64) -> Self {
        self.limits = Limits::of(Some(files));
        self
    }

    /// Tells an address what happens to jobs.
    pub fn telling(mut self, webhook: Webhook) -> Self {
        self.hub = self.hub.telling(webhook.start());
        self
    }

    /// Where it listens.
    ///
    /// **Errors**: what the system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Raised at each start.
    pub fn incarnation(&self) -> u64 {
        self.hub.core().incarnation()
    }

    /// Serves until `stop` completes.
    ///
    /// **Errors**: the state is damaged, or older than what a worker has seen.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), String> {
        self.serve_with(stop, |_| ()).await
    }

    /// The same, and hands over the services within this process before it serves.
    ///
    /// **Errors**: as [`Orchestrator::serve`].
    pub async fn serve_with(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
        front: impl FnOnce(Front),
    ) -> Result<(), String> {
        let Orchestrator { listener, security, limits, audit, job_quota, hub, mail, handle } = self;
        let security = security.map(Arc::new);
        let ticks = tokio::spawn(tick(handle.clone()));
        let notices = security.clone().map(|security| tokio::spawn(security.tell_endings(handle.clone())));
        let (stopped, is_stopped) = oneshot::channel();
        let hub = tokio::spawn(async move {
            let result = hub.run(mail).await;
            // Without its memory the orchestrator must not answer.
            let _ = stopped.send(());
            result
        });
        let failed = |error: tonic_reflection::server::Error| error.to_string();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(contraflow_proto::DESCRIPTORS)
            .build_v1()
            .map_err(failed)?;
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<JobServiceServer<jobs_api::JobsApi>>().await;
        let jobs = JobServiceServer::new(jobs_api::JobsApi { hub: handle.clone(), job_quota });
        let control = ControlServiceServer::new(link::ControlApi { hub: handle.clone() });
        let cluster = cluster_api::ClusterApi { hub: handle.clone(), security: security.clone() };
        let auth = AuthLayer::new(security, audit);
        let routes = Routes::new(health_service)
            .add_service(reflection)
            .add_service(jobs.max_decoding_message_size(MAX_MESSAGE))
            .add_service(ClusterServiceServer::new(cluster))
            .add_service(control.max_decoding_message_size(MAX_MESSAGE));
        front(Front { routes: routes.clone(), auth: auth.clone(), hub: handle.clone() });
        let connections = acceptor::open(listener, auth.clone(), limits);
        let serve = Server::builder()
            .layer(tower::layer::layer_fn(move |inner| AuthService { auth: auth.clone(), inner }))
            .max_concurrent_streams(Some(MAX_STREAMS))
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_max_header_list_size(MAX_HEADERS)
            .add_routes(routes)
            .serve_with_incoming(connections);
        // Streams of workers never end by themselves: they are cut, and the workers wait for the next orchestrator.
        let served = tokio::select! {
            served = serve => served.map_err(|error| error.to_string()),
            () = stop => Ok(()),
            _ = is_stopped => Ok(()),
        };
        ticks.abort();
        notices.iter().for_each(tokio::task::JoinHandle::abort);
        drop(handle);
        hub.abort();
        match hub.await {
            Ok(result) => result.and(served),
            Err(_) => served,
        }
    }
}

/// A request that is refused for what is in it, fault by fault, as many as a header has room for.
fn refused(faults: &Faults) -> Status {
    let mut words = String::new();
    let mut more = faults.more;
    for fault in &faults.list {
        let mut line = fault.to_string();
        tidy(&mut line, MAX_FAULT);
        if words.len() + line.len() > MAX_REFUSAL {
            more += 1;
        } else {
            words.push_str(if words.is_empty() { "" } else { "\n" });
            words.push_str(&line);
        }
    }
    if more > 0 {
        words += &format!("\nand {more} more");
    }
    Status::invalid_argument(words)
}

/// The time of day. **Units**: seconds since 1970.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn tick(hub: Handle) {
    let mut interval = tokio::time::interval(Duration::from_millis(TICK_MS));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if hub.send(HubMessage::Event(Event::Tick)).await.is_err() {
            return;
        }
    }
}

/// The key from which the secrets of formations follow: drawn at the first start, readable by the owner alone.
fn cluster_key(dir: &Path) -> io::Result<[u8; 32]> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = dir.join("cluster.key");
    let mut key = [0; 32];
    match std::fs::File::open(&path) {
        Ok(mut file) => file.read_exact(&mut key)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            key = from_system()?;
            let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&key)?;
            file.sync_all()?;
        }
        Err(error) => return Err(error),
    }
    Ok(key)
}
