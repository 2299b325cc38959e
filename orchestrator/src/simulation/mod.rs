//! A cluster in one thread and without a clock: the real [`Core`](crate::core::Core) and its facts, with workers, ranks, links
//! and a storage made of plain values, and faults drawn from a seed.
//!
//! The same seed gives the same run, to the last message. After every event `checks` looks for what must never be; once the
//! faults have stopped every job has to end. What is simulated follows `server::hub` and the `host` of the workers line by
//! line: a change there belongs here too. Knows no file and no socket.

mod checks;
mod commits;
mod endings;
mod failures;
mod faults;
mod growth;
mod line;
mod lost_state;
mod memory;
mod mutation;
mod network;
mod places;
mod plan;
mod random;
mod ranks;
mod server;
mod storage;
mod store;
mod worker;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use contraflow_runtime::checkpoint::{Pinned, Position};
use contraflow_runtime::random::mix;
use contraflow_runtime::topology::{FormationId, Rank};

use self::checks::Checks;
pub use self::mutation::Mutation;
use self::network::{FromWorker, Network, ToWorker};
use self::plan::Plan;
pub use self::plan::SimFault;
use self::random::Random;
use self::ranks::Gang;
use self::server::Server;
use self::storage::Storage;
use self::store::SimStore;
use self::worker::Worker;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// A digest of everything that happened, in order.
    pub trace: u64,
    /// The violated invariant.
    pub violation: Option<String>,
    /// Events that were simulated.
    pub events: u64,
    /// Simulated time. **Units**: ms.
    pub ended_ms: u64,
    /// Steps that ranks have made together, those made again included.
    pub steps: u64,
    /// Formations of all jobs.
    pub formations: u64,
    /// Faults by kind.
    pub faults: BTreeMap<SimFault, u64>,
    /// How the jobs have ended that are still known, in words.
    pub outcomes: Vec<String>,
    /// What happened, line by line, if that was asked for.
    pub lines: Vec<String>,
}

/// Runs one seed; with `verbose`, [`Report::lines`] describes what happened.
pub fn run(seed: u64, verbose: bool) -> Report {
    let mut random = Random::new(seed);
    let plan = Plan::draw(&mut random);
    World::new(plan, random, verbose).run()
}

/// Runs one seed with a rule broken.
pub fn run_broken(seed: u64, rule: Mutation) -> Report {
    let mut random = Random::new(seed);
    let plan = Plan::draw(&mut random);
    World { mutation: Some(rule), ..World::new(plan, random, false) }.run()
}

/// Runs one job; again and again nothing passes between the orchestrator and its workers for a while, and no stream is closed. With
/// `verbose`, [`Report::lines`] describes what happened.
pub fn run_muted(seed: u64, verbose: bool) -> Report {
    let mut random = Random::new(seed);
    let plan = Plan::muted(&mut random);
    World::new(plan, random, verbose).run()
}

/// Runs one job of this many ranks (eight per worker, rounded down) and steps, with faults all along.
pub fn run_large(ranks: usize, steps: u64, seed: u64) -> Report {
    World::new(Plan::large(ranks, steps), Random::new(seed), false).run()
}

/// Something that is going to happen. Workers, servers and links by number.
#[derive(Clone, Debug)]
enum SimEvent {
    ServerTick(usize),
    ServerSynced(usize),
    ServerResumes(usize),
    ServerKeeps(usize),
    ServerStarts,
    FromWorker(u64, Box<FromWorker>),
    ToWorker(u64, Box<ToWorker>),
    ServerNotices(u64),
    WorkerNotices(u64),
    WorkerTick(u64),
    WorkerThaws(u64),
    WorkerStarts(usize),
    Own(u64, Own),
    StepMade(FormationId),
    Submit(usize),
    Heals(usize, usize),
    Quickens(usize),
    Writes(usize),
    Meet(usize, usize),
    Faulty(usize),
    Calm,
}

/// Something that happens inside a worker, in a formation.
#[derive(Clone, Debug)]
struct Own {
    formation: FormationId,
    what: RankTask,
}

#[derive(Clone, Debug)]
enum RankTask {
    Prepared,
    Built,
    StepDone,
    Saved(Box<(storage::Trained, Vec<Rank>)>),
    PeerLost,
    /// Parts of another worker's ranks arrive.
    StoresReplicas(Box<memory::Parts>),
    /// A worker has taken in the parts that it was sent.
    Acknowledged(u64),
    Validated(Rank),
    Exported(Rank),
    /// A commit reaches the storage: of a checkpoint, or the weights, and which checkpoint is known to stand.
    Commits(Option<Position>, Pinned),
}

/// What happens when, ordered by time, then by the order in which it was planned.
struct Planned(u64, u64, SimEvent);

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// Everything there is.
struct World {
    now: u64,
    planned: BinaryHeap<Reverse<Planned>>,
    sequence: u64,
    random: Random,
    plan: Plan,
    is_calm: bool,
    store: SimStore,
    servers: Vec<Server>,
    workers: BTreeMap<u64, Worker>,
    newest_worker: u64,
    network: Network,
    gangs: BTreeMap<FormationId, Gang>,
    storage: Storage,
    checks: Checks,
    mutation: Option<Mutation>,
    report: Report,
    verbose: bool,
}

impl World {
    fn new(plan: Plan, random: Random, verbose: bool) -> Self {
        let report = Report {
            trace: 0,
            violation: None,
            events: 0,
            ended_ms: 0,
            steps: 0,
            formations: 0,
            faults: BTreeMap::new(),
            outcomes: Vec::new(),
            lines: Vec::new(),
        };
        World {
            now: 0,
            planned: BinaryHeap::new(),
            sequence: 0,
            random,
            plan,
            is_calm: false,
            store: SimStore::of(1),
            servers: Vec::new(),
            workers: BTreeMap::new(),
            newest_worker: 0,
            network: Network::default(),
            gangs: BTreeMap::new(),
            storage: Storage::default(),
            checks: Checks::default(),
            mutation: None,
            report,
            verbose,
        }
    }

    fn run(mut self) -> Report {
        self.begin();
        while self.report.violation.is_none() && !self.is_over() {
            let Some(Reverse(Planned(at, _, happening))) = self.planned.pop() else { break };
            self.now = at;
            self.report.events += 1;
            self.happen(happening);
            self.check_liveness();
        }
        self.report.ended_ms = self.now;
        let ended = self.store.jobs.all.iter().filter(|(_, record)| record.has_ended());
        self.report.outcomes = ended.map(|(job, record)| format!("{job}: {}", record.why)).collect();
        self.report
    }

    fn begin(&mut self) {
        self.start_server();
        for node in 0..self.plan.nodes.len() {
            let at = self.random.between(0, 2_000);
            self.plan_in(at, SimEvent::WorkerStarts(node));
        }
        for job in 0..self.plan.jobs.len() {
            self.plan_in(self.plan.jobs[job].at_ms, SimEvent::Submit(job));
        }
        for fault in 0..self.plan.faults.len() {
            self.plan_fault(fault);
        }
        self.plan_in(self.plan.calm_ms, SimEvent::Calm);
        if self.verbose {
            let without_recipe = |words: String, job: &plan::SimJob| {
                words.replace(&format!("{:?}", job.spec.recipe), &format!("{:?}", job.spec.topology()))
            };
            let words = self.plan.jobs.iter().fold(format!("{:?}", self.plan), without_recipe);
            self.report.lines.push(words);
        }
    }

    fn plan_in(&mut self, ms: u64, happening: SimEvent) {
        self.plan_at(self.now + ms, happening);
    }

    fn plan_at(&mut self, at: u64, happening: SimEvent) {
        self.sequence += 1;
        self.planned.push(Reverse(Planned(at, self.sequence, happening)));
    }

    /// Records an event: numbers for the digest, text for people.
    fn note(&mut self, numbers: [u64; 3], words: impl FnOnce() -> String) {
        for number in [self.now, numbers[0], numbers[1], numbers[2]] {
            self.report.trace = mix(self.report.trace.rotate_left(7) ^ number);
        }
        if self.verbose {
            self.report.lines.push(format!("{:>8} {}", self.now, words()));
        }
    }

    /// Something that must not be.
    fn violate(&mut self, words: String) {
        self.note([99, 0, 0], || format!("VIOLATION: {words}"));
        self.report.violation.get_or_insert(words);
    }

    fn happen(&mut self, happening: SimEvent) {
        match happening {
            SimEvent::ServerTick(server) => self.server_tick(server),
            SimEvent::ServerSynced(server) => self.server_synced(server),
            SimEvent::ServerResumes(server) => self.server_resumes(server),
            SimEvent::ServerKeeps(server) => self.servers[server].disk_fails = false,
            SimEvent::ServerStarts => self.server_starts(),
            SimEvent::FromWorker(link, up) => self.deliver_up(link, *up),
            SimEvent::ToWorker(link, down) => self.deliver_down(link, down),
            SimEvent::ServerNotices(link) => self.server_notices(link),
            SimEvent::WorkerNotices(link) => self.worker_notices(link),
            SimEvent::WorkerTick(worker) => self.worker_tick(worker),
            SimEvent::WorkerThaws(worker) => self.thaw(worker),
            SimEvent::WorkerStarts(node) => self.start_worker(node),
            SimEvent::Own(worker, own) => self.inside(worker, own),
            SimEvent::StepMade(formation) => self.step_made(formation),
            SimEvent::Submit(job) => self.submit(job),
            SimEvent::Heals(one, other) => drop(self.network.cuts.remove(&(one, other))),
            SimEvent::Quickens(node) => drop(self.network.slow.remove(&node)),
            SimEvent::Writes(node) => drop(self.storage.full.remove(&node)),
            SimEvent::Meet(one, other) => drop(self.network.apart.take_if(|pair| *pair == (one, other))),
            SimEvent::Faulty(fault) => self.faulty(fault),
            SimEvent::Calm => self.calm_down(),
        }
    }
}
