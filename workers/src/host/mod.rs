//! A worker process: a member of the cluster that hosts ranks of jobs, as many as it has slots.
//!
//! One loop owns everything: it takes commands of the orchestrator, events of the ranks and results of slow work, and never
//! waits for any of them. The stream to the orchestrator may break and come back; the ranks do not notice.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod absence;
mod bringing;
mod discard;
mod evidence;
mod flight;
mod formation;
mod job;
mod link;
mod log;
mod log_levels;
mod memory;
mod orders;
mod reading;
mod records;
mod route;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::Storage;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::encode_event;
use contraflow_runtime::fabric::Listener;
use contraflow_runtime::files::objects::{Location, Sources};
use contraflow_runtime::files::{self, Reloaded};
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::layout::MemoryLimit;
use contraflow_runtime::random::from_system;
use contraflow_runtime::topology::{FormationId, JobId};
use tokio::sync::{mpsc, watch};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use v1::from_worker::Message as Up;

use self::absence::Absence;
use self::bringing::Bringing;
use self::formation::Formation;
use self::job::{LoadedData, Prepared};
use self::link::{Link, LinkTarget};
use self::memory::Memory;
use self::records::RecordKeeper;
use self::route::Route;
use crate::error::RankError;

pub use self::link::{closed, describe};
pub use self::log_levels::LogLevels;

/// How long a data connection waits for its formation to be joined here: another worker may be earlier.
const JOIN_WAIT: Duration = Duration::from_secs(30);

/// How long a terminating worker waits for its ranks to move: supervisors often kill it after 30 s.
const LEAVE: Duration = Duration::from_secs(25);

/// How the line of a job's log begins that says where its folder is.
pub const FILES_LINE: &str = "the files of the job are in ";

/// Log lines that wait for an orchestrator, at most.
const MAX_LINES: usize = 10_000;

/// What a worker process is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The way to the orchestrator; read again while the worker runs.
    pub orchestrator: Arc<Reloaded<Endpoint>>,
    /// What the orchestrator is shown; none where it asks for nothing.
    pub token: Option<MetadataValue<Ascii>>,
    /// Shared by all workers.
    pub storage: PathBuf,
    /// What paths of recipes are relative to.
    pub data_root: Option<PathBuf>,
    /// What recipes may name in object stores.
    pub sources: Sources,
    /// Ranks it can host.
    pub slots: u32,
    /// Its node.
    pub node: String,
    /// Nodes that are near each other.
    pub block: String,
    /// Display name.
    pub name: String,
    /// Where data connections are accepted.
    pub listen: SocketAddr,
    /// Cores of this host that it may use.
    pub cores: usize,
    /// Measured peak of all of them together. **Units**: FLOP/s.
    pub peak_flops: u64,
    /// Log level of each job, for line filters.
    pub log_levels: LogLevels,
    /// Whether it is a member of a cluster; said at every turn of its clock, by which it is known to be alive.
    pub pulse: watch::Sender<bool>,
}

/// Something for the loop.
enum Input {
    /// An event of a rank.
    Rank { formation: FormationId, event: RankEvent },
    /// What a rank says of a step that is not finite, once the evidence is in the job's folder.
    EvidenceWritten { formation: FormationId, event: RankEvent },
    /// What an assignment names has been read.
    Prepared {
        formation: FormationId,
        assign: Box<v1::Assign>,
        result: Result<(Box<Prepared>, Recorders), RankError>,
    },
    /// Result of a commit or a publication, and what room there is after it.
    Committed { formation: FormationId, answer: v1::Committed, space: Option<v1::StorageSpace> },
    /// What room there is before a formation begins.
    Space(v1::StorageSpace),
    /// What the flight recorders of a formation tell.
    FlightRead(v1::FlightRead),
    /// The record of a job's steps is kept here: the next ones.
    RecordsWanted(v1::RecordsWanted),
    /// The folder of a job was removed, or not.
    Discarded(v1::Discarded),
    /// From the orchestrator, by the stream of this number.
    Down(u64, v1::ToWorker),
    /// The files of this worker have another certificate than before.
    Renewed(Box<Endpoint>),
    /// The stream of this number has ended.
    Broken { link: u64, why: String },
}

/// The state of the process.
struct Host {
    settings: Settings,
    id: u64,
    storage: Storage,
    listener: Listener,
    inputs: mpsc::UnboundedSender<Input>,
    route: Route,
    link: Option<Link>,
    /// Of the orchestrator, as the log tells it.
    absence: Absence,
    /// Streams that have been opened.
    num_links: u64,
    /// The state of the orchestrator whose member it was last; 0: none so far.
    state: u64,
    /// The highest incarnation seen of that state.
    incarnation: u64,
    /// The most facts seen in that state.
    facts: u64,
    /// What the process may use.
    limit: Option<MemoryLimit>,
    formations: BTreeMap<JobId, Formation>,
    /// Formations that begin with what is kept here, and have no rank here.
    bringing: BTreeMap<JobId, Bringing>,
    loaded: BTreeMap<JobId, LoadedData>,
    /// Formations of which something is being committed, and of which step; the weights have none.
    committing: BTreeSet<(FormationId, Option<u64>)>,
    /// What is to be removed once nothing is being committed there.
    discards: Vec<v1::Discard>,
    /// What is kept in memory of the state of jobs.
    memory: Memory,
    /// Of jobs whose rank 0 is here, or was when they were left.
    records: BTreeMap<JobId, RecordKeeper>,
    /// Log lines that wait for the orchestrator; the oldest are dropped.
    lines: VecDeque<v1::LogLine>,
    /// Set on termination: it exits when its ranks have moved, at the latest then.
    leaves_by: Option<Instant>,
}

/// Hosts ranks until `stop` completes and they have moved, or until `end` completes. `lines` are those of the log that name a
/// rank.
///
/// **Errors**: the storage or the address cannot be had, or the orchestrator refuses the worker.
pub async fn run(
    settings: Settings,
    mut lines: mpsc::UnboundedReceiver<v1::LogLine>,
    (stop, end): (impl Future<Output = ()>, impl Future<Output = ()>),
) -> Result<(), String> {
    let (sender, mut inputs) = mpsc::unbounded_channel();
    let listen = |error: std::io::Error| format!("--listen {}: {error}", settings.listen);
    let storage = |error: std::io::Error| format!("--storage {}: {error}", settings.storage.display());
    // What is fetched from a store lies elsewhere, under names that nobody chooses.
    settings.data_root.iter().filter(|root| !Location::is_path(root)).for_each(|root| files::confine(root));
    route::watch(settings.orchestrator.clone(), sender.clone());
    let mut host = Host {
        id: u64::from_le_bytes(from_system().map_err(|error| error.to_string())?),
        storage: Storage::open(&settings.storage).map_err(storage)?,
        listener: Listener::bind(settings.listen, JOIN_WAIT).map_err(listen)?,
        inputs: sender,
        route: Route::new(settings.orchestrator.known().as_ref().clone()),
        link: None,
        absence: Absence::default(),
        num_links: 0,
        state: 0,
        incarnation: 0,
        facts: 0,
        limit: MemoryLimit::of_process(),
        formations: BTreeMap::new(),
        bringing: BTreeMap::new(),
        loaded: BTreeMap::new(),
        committing: BTreeSet::new(),
        discards: Vec::new(),
        memory: Memory::default(),
        records: BTreeMap::new(),
        lines: VecDeque::new(),
        leaves_by: None,
        settings,
    };
    let (mut stop, mut end) = (std::pin::pin!(stop), std::pin::pin!(end));
    let mut clock = tokio::time::interval(Duration::from_millis(250));
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !host.may_end() {
        tokio::select! {
            () = &mut stop, if host.leaves_by.is_none() => host.begin_to_leave(),
            () = &mut end => break,
            _ = clock.tick() => host.tick(),
            Some(line) = lines.recv() => host.note_line(line),
            input = inputs.recv() => match input {
                Some(input) => host.take(input)?,
                None => break,
            },
        }
    }
    let all: Vec<FormationId> = host.formations.values().map(|formation| formation.id).collect();
    all.into_iter().for_each(|formation| host.leave(formation, "the worker is ending"));
    std::mem::take(&mut host.bringing).into_values().for_each(Bringing::end);
    while let Ok(line) = lines.try_recv() {
        host.note_line(line);
    }
    host.send_lines();
    if let Some(link) = host.link.take() {
        link.close().await;
    }
    Ok(())
}

impl Host {
    /// Beats, or tries to reach the orchestrator.
    fn tick(&mut self) {
        self.give_up_stuck();
        self.records.retain(|_, keeper| !keeper.is_over());
        match &mut self.link {
            Some(link) => {
                let progress = self.formations.values().flat_map(Formation::progress);
                link.beat(progress.collect());
                self.send_lines();
            }
            None => self.attach(),
        }
        let is_member = self.link.as_ref().is_some_and(Link::is_member);
        if is_member && self.route.is_due(Instant::now()) {
            self.attach();
        }
        self.settings.pulse.send_replace(is_member);
    }

    /// Sends the log lines that wait, if there is a way.
    fn send_lines(&mut self) {
        if let Some(link) = self.link.as_mut().filter(|link| link.is_member() && !self.lines.is_empty()) {
            let lines = self.lines.drain(..).collect();
            link.send(Up::Logs(v1::LogLines { lines }));
        }
    }

    /// Opens a stream to the orchestrator; one that is open ends.
    fn attach(&mut self) {
        let hello = self.hello();
        let target =
            LinkTarget { endpoint: self.route.current().clone(), token: self.settings.token.clone() };
        self.num_links += 1;
        self.link = Some(Link::open(self.num_links, target, hello, self.inputs.clone()));
    }

    /// Who it is, and what it hosts.
    fn hello(&self) -> v1::Hello {
        v1::Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            worker: self.id,
            name: self.settings.name.clone(),
            slots: self.settings.slots,
            node: self.settings.node.clone(),
            block: self.settings.block.clone(),
            fabric: Some(self.listener.address().into()),
            hosted: self.formations.values().map(Formation::hosted).collect(),
            state: self.state,
            incarnation: self.incarnation,
            facts: self.facts,
            memory_bytes: self.limit.as_ref().map_or(0, |limit| limit.bytes),
            memory_limit: self.limit.as_ref().map_or_else(String::new, |limit| limit.by.to_string()),
            storage_id: self.storage.mark().to_owned(),
            left: self.memory.of_left(|job| self.formations.contains_key(&job)),
            cores: self.settings.cores as u64,
            peak_flops: self.settings.peak_flops,
            sources: self.settings.sources.texts(),
        }
    }

    /// Asks for its ranks to be moved.
    fn begin_to_leave(&mut self) {
        self.leaves_by = Some(Instant::now() + LEAVE);
        if !self.formations.is_empty() {
            tracing::info!(
                "leaving: waiting up to {LEAVE:?} for its ranks to move; a second signal quits now"
            );
        }
        self.send(Up::LeaveRequest(v1::Empty {}));
    }

    /// Whether it is terminating, and nothing holds it any more.
    fn may_end(&self) -> bool {
        let is_free = self.formations.is_empty() && self.bringing.is_empty();
        self.leaves_by.is_some_and(|by| is_free || by <= Instant::now())
    }

    fn note_line(&mut self, line: v1::LogLine) {
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn send(&mut self, message: Up) {
        if let Some(link) = &mut self.link {
            link.send(message);
        }
    }

    /// A formation, if it is still here.
    fn running(&self, id: FormationId) -> Option<&Formation> {
        self.formations.get(&id.job).filter(|formation| formation.id == id)
    }

    fn running_mut(&mut self, id: FormationId) -> Option<&mut Formation> {
        self.formations.get_mut(&id.job).filter(|formation| formation.id == id)
    }

    /// Where the evidence of an event goes, if this worker has to write it.
    fn evidence_dir(&self, formation: FormationId, event: &RankEvent) -> Option<PathBuf> {
        let prepared = self.running(formation)?.prepared.as_ref().filter(|_| evidence::is_in(event))?;
        Some(prepared.dir().to_owned())
    }

    fn take(&mut self, input: Input) -> Result<(), String> {
        match input {
            Input::Rank { formation, event } => match self.evidence_dir(formation, &event) {
                Some(dir) => {
                    let inputs = self.inputs.clone();
                    tokio::task::spawn_blocking(move || {
                        let event = evidence::write(&dir, formation.job, event);
                        drop(inputs.send(Input::EvidenceWritten { formation, event }));
                    });
                }
                None => self.rank_event(formation, &event),
            },
            Input::EvidenceWritten { formation, event } => self.rank_event(formation, &event),
            Input::Prepared { formation, assign, result } => self.prepared(formation, &assign, result),
            Input::Discarded(answer) => self.send(Up::Discarded(answer)),
            Input::Space(space) => self.send(Up::Space(space)),
            Input::FlightRead(read) => self.send(Up::FlightRead(read)),
            Input::RecordsWanted(wanted) => self.send(Up::RecordsWanted(wanted)),
            Input::Committed { formation, answer, space } => {
                self.committing.remove(&(formation, answer.position.map(|position| position.step)));
                for discard in std::mem::take(&mut self.discards) {
                    self.discard(discard)?;
                }
                if let Some(formation) = self.running_mut(formation) {
                    formation.committed = Some(answer.clone());
                }
                self.send(Up::Committed(answer));
                if let Some(space) = space {
                    self.send(Up::Space(space));
                }
            }
            // Messages of a stream that was given up are dropped.
            Input::Down(link, _) | Input::Broken { link, .. } if !self.is_current(link) => {}
            Input::Down(_, v1::ToWorker { message, facts }) => {
                message.map_or(Ok(()), |message| self.handle(message))?;
                self.facts = self.facts.max(facts);
            }
            Input::Renewed(endpoint) => {
                tracing::info!("the certificate was renewed: shown to the orchestrator from now on");
                self.route.renewed(*endpoint, self.link.as_ref().is_some_and(Link::is_member));
                self.attach();
            }
            Input::Broken { why, .. } => {
                self.route.failed();
                if self.absence.note(Instant::now()) {
                    tracing::warn!(
                        "the orchestrator is out of reach, tried again several times a second: {why}"
                    );
                }
                self.link = None;
            }
        }
        Ok(())
    }

    /// Passes on what a rank of a formation that is still here has to say.
    fn rank_event(&mut self, formation: FormationId, event: &RankEvent) {
        if let Some(running) = self.running_mut(formation) {
            log::event(formation.job, event);
            running.outbox.note(event);
            self.send(Up::Event(encode_event(formation, event)));
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.number == number)
    }
}
