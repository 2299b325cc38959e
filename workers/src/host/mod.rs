//! A worker process: a member of the cluster that hosts ranks of jobs, as many as it has slots.
//!
//! One loop owns everything: it takes words of the orchestrator, events of the ranks and results of slow work, and never
//! waits for any of them. The stream to the orchestrator may break and come back; the ranks do not notice.

mod formation;
mod job;
mod link;
mod memory;
mod outbox;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::{decode_command, encode_event, json};
use contraflow_runtime::fabric::Listener;
use contraflow_runtime::trace::TraceContext;
use tokio::sync::mpsc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use v1::from_worker::Message as Up;
use v1::to_worker::Message as Down;

use self::formation::Formation;
use self::job::{Loaded, Prepared, Roots, export_dir};
use self::link::{Link, Way};
use self::memory::Memory;

pub use self::link::words_of;

/// How long a data connection waits for its formation to be joined here: another worker may be earlier.
const JOIN_WAIT: Duration = Duration::from_secs(30);

/// How long a worker that is told to end waits for its ranks to move: who tells it so often kills it after 30 s.
const LEAVE: Duration = Duration::from_secs(25);

/// Log lines that wait for an orchestrator, at most.
const MAX_LINES: usize = 10_000;

/// File in the storage that tells whether two workers share it.
const STORAGE_MARK: &str = ".contraflow-storage";

/// What a worker process is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The way to the orchestrator.
    pub orchestrator: Endpoint,
    /// What the orchestrator is shown; none where it asks for nothing.
    pub token: Option<MetadataValue<Ascii>>,
    /// Shared by all workers.
    pub storage: PathBuf,
    /// What paths of recipes are relative to.
    pub data_root: Option<PathBuf>,
    /// Ranks it can host.
    pub slots: usize,
    /// Its node.
    pub node: String,
    /// Nodes that are near each other.
    pub block: String,
    /// For people.
    pub name: String,
    /// Where data connections are accepted.
    pub listen: SocketAddr,
}

/// Something for the loop.
enum Input {
    /// A rank has something to say.
    Rank { job: u64, generation: u32, event: RankEvent },
    /// What an assignment names has been read.
    Prepared { assign: Box<v1::Assign>, result: Result<Box<Prepared>, String> },
    /// Parts of a formation that was left have been written down, or not: job, generation, what is to be said.
    WrittenDown { job: u64, generation: u32, events: Vec<RankEvent> },
    /// Something has been put in place, or not.
    Committed(v1::Committed),
    /// From the orchestrator, by the stream of this number.
    Down(u64, v1::ToWorker),
    /// The stream of this number has ended.
    Broken { link: u64, why: String },
}

/// The state of the process.
struct Host {
    settings: Settings,
    id: u64,
    mark: String,
    listener: Listener,
    inputs: mpsc::UnboundedSender<Input>,
    link: Option<Link>,
    /// Streams that have been opened.
    num_links: u64,
    /// The highest that has been heard of.
    incarnation: u64,
    formations: BTreeMap<u64, Formation>,
    loaded: BTreeMap<u64, Loaded>,
    /// What is kept in memory of the state of jobs.
    memory: Memory,
    /// Log lines that wait for the orchestrator; the oldest give way.
    lines: VecDeque<v1::LogLine>,
    /// Set once it is told to end: it does when its ranks have moved, at the latest then.
    leaves_by: Option<Instant>,
}

/// Hosts ranks until `stop` is over and they have moved, or until `end` is over. `lines` are those of the log that name a
/// rank.
///
/// **Errors**: in words; the storage or the address cannot be had, or the orchestrator refuses the worker.
pub async fn run(
    settings: Settings,
    mut lines: mpsc::UnboundedReceiver<v1::LogLine>,
    (stop, end): (impl Future<Output = ()>, impl Future<Output = ()>),
) -> Result<(), String> {
    let (sender, mut inputs) = mpsc::unbounded_channel();
    let listen = |error: std::io::Error| format!("--listen {}: {error}", settings.listen);
    let mut host = Host {
        id: random_number().map_err(|error| error.to_string())?,
        mark: storage_mark(&settings.storage)?,
        listener: Listener::bind(settings.listen, JOIN_WAIT).map_err(listen)?,
        inputs: sender,
        link: None,
        num_links: 0,
        incarnation: 0,
        formations: BTreeMap::new(),
        loaded: BTreeMap::new(),
        memory: Memory::default(),
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
    let jobs: Vec<u64> = host.formations.keys().copied().collect();
    jobs.into_iter().for_each(|job| host.leave(job, u32::MAX, "the worker is ending"));
    Ok(())
}

impl Host {
    /// Beats, or tries to reach the orchestrator.
    fn tick(&mut self) {
        match &mut self.link {
            Some(link) => {
                let progress = self.formations.iter().flat_map(|(&job, formation)| formation.progress(job));
                link.beat(progress.collect());
                if !self.lines.is_empty() && link.is_member() {
                    let lines = self.lines.drain(..).collect();
                    link.say(Up::Logs(v1::LogLines { lines }));
                }
            }
            None => {
                let hello = v1::Hello {
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    worker: self.id,
                    name: self.settings.name.clone(),
                    slots: self.settings.slots as u32,
                    node: self.settings.node.clone(),
                    block: self.settings.block.clone(),
                    fabric: json(&self.listener.address()),
                    hosted: self.formations.iter().map(|(&job, formation)| formation.hosted(job)).collect(),
                    incarnation: self.incarnation,
                    storage_mark: self.mark.clone(),
                    left: self.memory.of_left(|job| self.formations.contains_key(&job)),
                };
                let Settings { orchestrator, token, .. } = &self.settings;
                let way = Way { endpoint: orchestrator.clone(), token: token.clone() };
                self.num_links += 1;
                self.link = Some(Link::open(self.num_links, way, hello, self.inputs.clone()));
            }
        }
    }

    /// Asks for its ranks to be moved.
    fn begin_to_leave(&mut self) {
        self.leaves_by = Some(Instant::now() + LEAVE);
        if !self.formations.is_empty() {
            tracing::info!("leaving: waits up to {LEAVE:?} for its ranks to move; once more to end at once");
        }
        self.say(Up::Leaving(v1::Empty {}));
    }

    /// Whether it has been told to end, and nothing holds it any more.
    fn may_end(&self) -> bool {
        self.leaves_by.is_some_and(|by| self.formations.is_empty() || by <= Instant::now())
    }

    fn note_line(&mut self, line: v1::LogLine) {
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn say(&mut self, message: Up) {
        if let Some(link) = &mut self.link {
            link.say(message);
        }
    }

    fn take(&mut self, input: Input) -> Result<(), String> {
        match input {
            Input::Rank { job, generation, event } => {
                let current =
                    self.formations.get_mut(&job).filter(|formation| formation.generation == generation);
                if let Some(formation) = current {
                    tell(job, &event);
                    formation.outbox.note(&event);
                    self.say(Up::Event(encode_event(job, generation, &event)));
                }
            }
            Input::Prepared { assign, result } => self.prepared(&assign, result),
            Input::WrittenDown { job, generation, events } => {
                for event in events {
                    self.say(Up::Event(encode_event(job, generation, &event)));
                }
            }
            Input::Committed(committed) => {
                let formation = self.formations.get_mut(&committed.job);
                if let Some(formation) =
                    formation.filter(|formation| formation.generation == committed.generation)
                {
                    formation.committed = Some(committed.clone());
                }
                self.say(Up::Committed(committed));
            }
            // What a stream has said before it was given up is not heard any more.
            Input::Down(link, _) | Input::Broken { link, .. } if !self.is_current(link) => {}
            Input::Down(_, v1::ToWorker { message }) => {
                return message.map_or(Ok(()), |message| self.hear(message));
            }
            Input::Broken { why, .. } => {
                tracing::warn!("the orchestrator is out of reach: {why}");
                self.link = None;
            }
        }
        Ok(())
    }

    fn is_current(&self, number: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.number == number)
    }

    fn hear(&mut self, message: Down) -> Result<(), String> {
        match message {
            Down::Welcome(welcome) => self.welcome(&welcome)?,
            Down::Assign(assign) => self.assign(assign),
            Down::Command(command) => {
                let dir = export_dir(&self.settings.storage, command.job);
                let trace = TraceContext::parse(&command.traceparent);
                match decode_command(command, &dir) {
                    Ok((to, command)) => {
                        if let Some(formation) = self.formations.get_mut(&to.job) {
                            formation.command(to, command, trace);
                        }
                    }
                    Err(words) => tracing::warn!("a command that makes no sense: {words}"),
                }
            }
            Down::Release(release) => self.release(&release),
            Down::Durable(v1::Durable { job, step }) => {
                if let Some(formation) = self.formations.get_mut(&job) {
                    formation.outbox.durable(step);
                }
                self.memory.durable(job, step);
            }
            Down::Commit(commit) => self.commit(commit),
            Down::WriteDown(order) => self.write_down(order),
            Down::Refused(why) => return Err(why),
        }
        Ok(())
    }

    fn welcome(&mut self, welcome: &v1::Welcome) -> Result<(), String> {
        if welcome.incarnation < self.incarnation {
            // Another orchestrator has taken over; this one has not noticed.
            self.link = None;
            return Ok(());
        }
        self.incarnation = welcome.incarnation;
        tracing::info!(incarnation = welcome.incarnation, "a member of the cluster");
        let Some(link) = &mut self.link else { return Ok(()) };
        link.welcomed(welcome.beat_ms);
        if self.leaves_by.is_some() {
            link.say(Up::Leaving(v1::Empty {}));
        }
        for (&job, formation) in &self.formations {
            for event in formation.outbox.repeat() {
                link.say(Up::Event(encode_event(job, formation.generation, event)));
            }
            if let Some(committed) = &formation.committed {
                link.say(Up::Committed(committed.clone()));
            }
        }
        Ok(())
    }

    /// Joins a formation; one that it is in already is left as it is.
    fn assign(&mut self, assign: v1::Assign) {
        let job = assign.job;
        if let Some(formation) = self.formations.get(&job) {
            if formation.generation >= assign.generation {
                return;
            }
            self.leave(job, assign.generation - 1, "another formation takes its place");
        }
        self.memory.enter(&assign);
        self.formations.insert(job, Formation::new(&assign));
        // Data of jobs that have left makes room; that of this one may be here from its formation before.
        self.loaded.retain(|job, _| self.formations.contains_key(job));
        let roots = Roots { storage: self.settings.storage.clone(), data: self.settings.data_root.clone() };
        let loaded = self.loaded.get(&job).cloned();
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let prepare = std::panic::AssertUnwindSafe(|| Prepared::new(&assign, &roots, loaded));
            let result = std::panic::catch_unwind(prepare)
                .unwrap_or_else(|panic| Err(crate::error::RankError::from_panic(&*panic).to_string()));
            drop(inputs.send(Input::Prepared { assign: Box::new(assign), result: result.map(Box::new) }));
        });
    }

    fn prepared(&mut self, assign: &v1::Assign, result: Result<Box<Prepared>, String>) {
        let job = assign.job;
        let formation =
            self.formations.get_mut(&job).filter(|formation| formation.generation == assign.generation);
        let Some(formation) = formation else { return };
        let started = result.and_then(|prepared| {
            self.loaded.insert(job, prepared.loaded());
            let kept = self.memory.of(job);
            formation.start(assign, (*prepared, &kept), &self.listener, self.inputs.clone())
        });
        if let Err(cause) = started {
            formation.fail(cause, &self.inputs, job);
        }
    }

    fn commit(&self, commit: v1::Commit) {
        let v1::Commit { job, generation, what } = commit;
        let formation = self.formations.get(&job).filter(|formation| formation.generation == generation);
        let prepared = match formation {
            Some(formation) => formation.prepared.clone(),
            None => self.memory.of_next(job, generation),
        };
        let (Some(prepared), Some(what)) = (prepared, what) else {
            return;
        };
        let step = match &what {
            v1::commit::What::Checkpoint(checkpoint) => {
                checkpoint.position.map_or(0, |position| position.step)
            }
            v1::commit::What::Weights(_) => 0,
        };
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let error = prepared.commit(what).err().unwrap_or_default();
            drop(inputs.send(Input::Committed(v1::Committed { job, generation, step, error })));
        });
    }

    /// Writes down what is kept of a formation that was left.
    fn write_down(&mut self, order: v1::WriteDown) {
        let v1::WriteDown { job, generation, .. } = order;
        let Some(prepared) = self.memory.of_next(job, generation) else { return };
        let (kept, inputs) = (self.memory.of(job), self.inputs.clone());
        tokio::task::spawn_blocking(move || {
            let events = memory::write_down(&prepared, &kept, &order);
            drop(inputs.send(Input::WrittenDown { job, generation, events }));
        });
    }

    /// Leaves a formation on the orchestrator's word, and says what is kept of it or lets that go.
    fn release(&mut self, release: &v1::Release) {
        let &v1::Release { job, generation, keep, .. } = release;
        self.leave(job, generation, &release.reason);
        if self.formations.contains_key(&job) {
            // Of a later generation: what is kept is its.
            return;
        }
        if keep {
            let kept = self.memory.inventory(job);
            self.say(Up::Released(v1::Released { job, generation, kept }));
        } else {
            self.memory.let_go(job, generation);
        }
    }

    /// Leaves a job's formation, if it is of this generation or an earlier one.
    fn leave(&mut self, job: u64, generation: u32, reason: &str) {
        if self.formations.get(&job).is_none_or(|formation| formation.generation > generation) {
            return;
        }
        if let Some(formation) = self.formations.remove(&job) {
            tracing::info!(job, generation = formation.generation, "left: {reason}");
            self.memory.note_left(job, formation.generation, formation.prepared.clone());
            formation.leave(reason);
        }
    }
}

/// What a rank says, as a line of its log.
fn tell(job: u64, event: &RankEvent) {
    let rank = event.rank() as u64;
    match event {
        RankEvent::Ready { .. } => tracing::info!(job, rank, "has its model and waits for the others"),
        RankEvent::Stopped { step, .. } => tracing::info!(job, rank, "stopped after step {step}"),
        RankEvent::ShardSaved { position, .. } => {
            tracing::info!(job, rank, "its part of the checkpoint of step {} is on disk", position.step);
        }
        RankEvent::Validated { .. } => tracing::info!(job, rank, "has run the validation sequences"),
        RankEvent::Exported { .. } => tracing::info!(job, rank, "its weights are on disk"),
        RankEvent::Diverged { divergence, .. } => tracing::warn!(job, rank, "{}", divergence.why),
        RankEvent::Failed { action, cause, .. } => tracing::error!(job, rank, "{action}: {cause}"),
        RankEvent::StepDone { report } => {
            if let Some(warning) = &report.warning {
                tracing::warn!(job, rank, "step {}: {warning}", report.step);
            }
        }
        RankEvent::Aborted { .. } => {}
    }
}

fn random_number() -> std::io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The mark of the storage; the first worker that sees it makes one.
fn storage_mark(storage: &Path) -> Result<String, String> {
    let path = storage.join(STORAGE_MARK);
    let words = |error: std::io::Error| format!("--storage: {}: {error}", path.display());
    std::fs::create_dir_all(storage).map_err(words)?;
    if !path.exists() {
        // Under its name at once and whole: whoever is second finds that of the first.
        let mark = format!("{:016x}", random_number().map_err(words)?);
        let fresh = storage.join(format!("{STORAGE_MARK}.{mark}"));
        std::fs::write(&fresh, &mark).map_err(words)?;
        let linked = std::fs::hard_link(&fresh, &path);
        std::fs::remove_file(&fresh).map_err(words)?;
        match linked {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(words(error)),
            _ => {}
        }
    }
    std::fs::read_to_string(&path).map_err(words)
}
