//! An orchestrator's process: the real core, what it keeps, and in which order. Follows `server::hub`: batches, facts kept
//! before words go out, steps put together. Its store outlives it.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use super::network::Down;
use super::{Happening, World};
use crate::core::facts::{Fact, Formed};
use crate::core::jobs::Jobs;
use crate::core::{Core, Effect, Event, TICK_MS, Word};
use crate::server::steps::Steps;

/// Messages that are taken at once.
const BATCH: usize = 1024;

/// Facts after which a snapshot takes their place.
const SNAPSHOT_EVERY: usize = 40;

/// The simulated time starts here. **Units**: milliseconds since 1970.
const EPOCH: u64 = 1_700_000_000_000;

/// What is durable.
#[derive(Default)]
pub(super) struct Store {
    pub(super) incarnation: u64,
    snapshot: Option<Vec<u8>>,
    facts: Vec<Vec<u8>>,
    /// By job, the steps that watchers are told.
    pub(super) steps: BTreeMap<u64, Vec<u64>>,
    /// The facts so far, folded as they came.
    pub(super) jobs: Jobs,
}

/// Something for the hub.
pub(super) enum Input {
    Event(Event),
    Linked { worker: u64, link: u64 },
    Unlinked { worker: u64, link: u64 },
}

/// What is being kept, and what is done afterwards.
#[derive(Default)]
pub(super) struct Batch {
    facts: Vec<Fact>,
    steps: BTreeMap<u64, Vec<u64>>,
    words: Vec<(u64, Word)>,
}

/// A process.
pub(super) struct Server {
    pub(super) core: Core,
    pub(super) is_alive: bool,
    pub(super) is_paused: bool,
    pub(super) held: Vec<Happening>,
    /// What its clock shows beyond the simulated time. **Units**: ms.
    pub(super) clock_ms: i64,
    pub(super) is_disk_slow: bool,
    links: BTreeMap<u64, u64>,
    inbox: VecDeque<Input>,
    batch: Option<Batch>,
    steps: BTreeMap<u64, Steps>,
    ticks: u64,
}

impl Store {
    fn append(&mut self, fact: &Fact) -> Result<(), String> {
        self.facts.push(serde_json::to_vec(fact).map_err(|error| error.to_string())?);
        self.jobs.apply(fact);
        if self.facts.len() > SNAPSHOT_EVERY {
            self.snapshot = Some(serde_json::to_vec(&self.jobs).map_err(|error| error.to_string())?);
            self.facts.clear();
        }
        Ok(())
    }

    /// What a start reads.
    fn replay(&self) -> Result<Jobs, String> {
        let words = |error: serde_json::Error| error.to_string();
        let mut jobs = match &self.snapshot {
            Some(snapshot) => serde_json::from_slice(snapshot).map_err(words)?,
            None => Jobs::default(),
        };
        for fact in &self.facts {
            jobs.apply(&serde_json::from_slice(fact).map_err(words)?);
        }
        Ok(jobs)
    }
}

impl World {
    /// The orchestrator whose word counts.
    pub(super) fn newest_server(&self) -> usize {
        self.servers.len() - 1
    }

    pub(super) fn start_server(&mut self) {
        self.store.incarnation += 1;
        let incarnation = self.store.incarnation;
        let jobs = match self.store.replay() {
            Ok(jobs) if jobs == self.store.jobs => jobs,
            Ok(_) => {
                return self.violate("the facts fold into another state than that they came from".into());
            }
            Err(words) => return self.violate(format!("what was kept cannot be read: {words}")),
        };
        let clock_ms = self.servers.last().map_or(0, |server| server.clock_ms);
        let mut steps = BTreeMap::new();
        for (&job, record) in &jobs.all {
            let last = self.store.steps.get(&job).and_then(|steps| steps.last()).copied().unwrap_or(0);
            let mut of_job = Steps::new(last, None, 0, record.has_ended());
            if let Some(formed) = record.running() {
                of_job.formed(formed.generation, formed.places.len(), 0);
            }
            steps.insert(job, of_job);
        }
        let now = (EPOCH + self.now).saturating_add_signed(clock_ms);
        self.servers.push(Server {
            core: Core::new(jobs, incarnation, now),
            is_alive: true,
            is_paused: false,
            held: Vec::new(),
            clock_ms,
            is_disk_slow: false,
            links: BTreeMap::new(),
            inbox: VecDeque::new(),
            batch: None,
            steps,
            ticks: 0,
        });
        self.note([1, incarnation, 0], || format!("orchestrator {incarnation} starts"));
        self.plan_in(TICK_MS, Happening::ServerTick(self.newest_server()));
    }

    pub(super) fn server_starts(&mut self) {
        if !self.servers[self.newest_server()].is_alive {
            self.start_server();
        }
    }

    pub(super) fn server_tick(&mut self, server: usize) {
        if !self.servers[server].is_alive {
            return;
        }
        if self.servers[server].is_paused {
            return self.servers[server].held.push(Happening::ServerTick(server));
        }
        self.plan_in(TICK_MS, Happening::ServerTick(server));
        self.hear_at(server, Input::Event(Event::Tick));
        self.servers[server].ticks += 1;
        if self.servers[server].ticks.is_multiple_of(8) {
            self.check_words(server);
        }
    }

    pub(super) fn server_resumes(&mut self, server: usize) {
        self.servers[server].is_paused = false;
        for held in std::mem::take(&mut self.servers[server].held) {
            self.happen(held);
        }
    }

    /// The process ends. What it was writing is lost as a suffix: all of it, what follows the first write, or nothing.
    pub(super) fn kill_server(&mut self, server: usize) {
        let dying = &mut self.servers[server];
        if !std::mem::replace(&mut dying.is_alive, false) {
            return;
        }
        dying.inbox.clear();
        dying.held.clear();
        dying.is_paused = false;
        let incarnation = dying.core.incarnation();
        let left = dying.batch.take().filter(|_| incarnation == self.store.incarnation);
        let kept = self.random.between(0, 3);
        if let Some(batch) = left {
            self.keep(server, &batch, kept);
        }
        self.note([2, incarnation, kept], || {
            format!("orchestrator {incarnation} dies, {kept} writes of its last made")
        });
        for link in self.links_of(|link| link.server == server) {
            self.break_link(link, 60);
        }
    }

    pub(super) fn hear_at(&mut self, server: usize, input: Input) {
        if self.servers[server].is_alive {
            self.servers[server].inbox.push_back(input);
            self.serve(server);
        }
    }

    /// Takes what has come, unless something is being written.
    fn serve(&mut self, server: usize) {
        while self.servers[server].batch.is_none() && !self.servers[server].inbox.is_empty() {
            let waiting = self.servers[server].inbox.len().min(BATCH);
            let inputs: Vec<Input> = self.servers[server].inbox.drain(..waiting).collect();
            let mut batch = Batch::default();
            for input in inputs {
                match input {
                    Input::Event(event) => self.step_core(server, event, &mut batch),
                    Input::Linked { worker, link } => drop(self.servers[server].links.insert(worker, link)),
                    Input::Unlinked { worker, link } => {
                        if self.servers[server].links.get(&worker) == Some(&link) {
                            self.servers[server].links.remove(&worker);
                            self.step_core(server, Event::Detached { worker }, &mut batch);
                        }
                    }
                }
            }
            if batch.facts.is_empty() && batch.steps.is_empty() {
                self.carry_out(server, batch);
            } else {
                let most = if self.servers[server].is_disk_slow { 1_200 } else { self.plan.sync_ms };
                let takes = self.random.between(0, most + 1);
                self.servers[server].batch = Some(batch);
                self.plan_in(takes, Happening::ServerSynced(server));
            }
        }
    }

    pub(super) fn server_synced(&mut self, server: usize) {
        if self.servers[server].is_paused {
            return self.servers[server].held.push(Happening::ServerSynced(server));
        }
        if self.servers[server].core.incarnation() < self.store.incarnation {
            // The store is another one's: it cannot write any more.
            return self.kill_server(server);
        }
        if let Some(batch) = self.servers[server].batch.take() {
            self.keep(server, &batch, 2);
            self.carry_out(server, batch);
            self.check_fold(server);
            self.serve(server);
        }
    }

    fn step_core(&mut self, server: usize, event: Event, batch: &mut Batch) {
        let acting = &mut self.servers[server];
        let now = (EPOCH + self.now).saturating_add_signed(acting.clock_ms);
        let stale = super::checks::stale_job(&acting.core, &event);
        self.note_told(server, &event);
        let effects = self.servers[server].core.step(event, now);
        if let Some(words) = stale.and_then(|job| super::checks::has_effect(job, &effects)) {
            return self.violate(words);
        }
        for effect in effects {
            match effect {
                Effect::Keep(fact) => {
                    self.hear_fact(server, &fact);
                    batch.facts.push(fact);
                }
                Effect::Tell { worker, word } => batch.words.push((worker, word)),
                Effect::Record { job, report } => {
                    let steps = self.servers[server].steps.get_mut(&job);
                    if let Some((step, _)) = steps.and_then(|steps| steps.record(*report)) {
                        batch.steps.entry(job).or_default().push(step);
                    }
                }
                Effect::Log { job, line } => self.note([3, job, 0], || format!("job {job}: {line}")),
            }
        }
    }

    fn hear_fact(&mut self, server: usize, fact: &Fact) {
        match fact {
            Fact::Submitted { job, .. } => {
                self.servers[server].steps.insert(*job, Steps::new(0, None, 0, false));
            }
            Fact::Formed { job, formed } => {
                if let Some(steps) = self.servers[server].steps.get_mut(job) {
                    steps.formed(formed.generation, formed.places.len(), 0);
                }
                self.check_slots(server);
                self.check_cost(server, *job, formed);
            }
            _ => {}
        }
    }

    /// Makes so many of a batch's writes: its facts, then its steps.
    fn keep(&mut self, server: usize, batch: &Batch, writes: u64) {
        if writes > 0 {
            for fact in &batch.facts {
                self.note([4, fact.job().unwrap_or(0), 0], || {
                    let words = format!("{fact:?}");
                    format!("kept: {}", words.split(", recipe:").next().unwrap_or_default())
                });
                self.check_fact(fact);
                if let Err(words) = self.store.append(fact) {
                    return self.violate(words);
                }
            }
        }
        for (job, steps) in batch.steps.iter().filter(|_| writes > 1) {
            for &step in steps {
                let told = self.store.steps.entry(*job).or_default();
                let expected = told.last().map_or(1, |last| last + 1);
                told.push(step);
                if step != expected {
                    let by = self.servers[server].core.incarnation();
                    self.violate(format!("job {job}: step {step} is told by {by} where {expected} is next"));
                }
            }
        }
    }

    fn carry_out(&mut self, server: usize, batch: Batch) {
        let mut assigned: BTreeMap<u64, Option<(Rc<Formed>, bool)>> = BTreeMap::new();
        for (worker, word) in batch.words {
            let core = &self.servers[server].core;
            let down = match word {
                Word::Welcome => Some(Down::Welcome { incarnation: core.incarnation() }),
                Word::Refused { .. } => Some(Down::Refused),
                Word::Cut => {
                    if let Some(link) = self.servers[server].links.remove(&worker) {
                        self.break_link(link, 50);
                    }
                    None
                }
                Word::Assign { job, generation, ranks } => {
                    let formed = assigned.entry(job).or_insert_with(|| assignment(core, job)).clone();
                    let formed = formed.filter(|(formed, _)| formed.generation == generation);
                    formed.map(|(formed, is_reachable)| Down::Assign { job, ranks, formed, is_reachable })
                }
                Word::Command { to, command } => Some(Down::Command { to, command }),
                Word::Release { job, generation, keep, .. } => Some(Down::Release { job, generation, keep }),
                Word::CommitCheckpoint { job, generation, position, .. } => {
                    Some(Down::Commit { job, generation, step: Some(position.step) })
                }
                Word::PlaceWeights { job, generation, .. } => {
                    Some(Down::Commit { job, generation, step: None })
                }
            };
            self.tell(server, worker, down);
        }
        for (&job, steps) in &batch.steps {
            let Some(formed) = self.servers[server].core.jobs().all.get(&job).and_then(|job| job.running())
            else {
                continue;
            };
            let mut workers = formed.places.clone();
            workers.sort_unstable();
            workers.dedup();
            let step = steps.last().copied().unwrap_or(0);
            for worker in workers {
                self.tell(server, worker, Some(Down::Durable { job, step }));
            }
        }
    }

    fn tell(&mut self, server: usize, worker: u64, down: Option<Down>) {
        let (Some(down), Some(&link)) = (down, self.servers[server].links.get(&worker)) else { return };
        let is_last = matches!(down, Down::Refused);
        self.check_word(server, &down);
        self.send_down(link, down);
        if is_last {
            self.servers[server].links.remove(&worker);
        }
    }

    /// Whoever submits asks again until he sees his job.
    pub(super) fn submit(&mut self, job: usize) {
        let spec = Box::new(self.plan.jobs[job].spec.clone());
        if self.store.jobs.all.values().any(|record| record.spec.name == spec.name) {
            return;
        }
        self.plan_in(5_000, Happening::Submit(job));
        self.note([5, job as u64, 0], || format!("{} is submitted", spec.name));
        self.hear_at(self.newest_server(), Input::Event(Event::Submit(spec)));
    }
}

/// What every worker of a formation is told; nothing if it is over by now or a member is gone.
fn assignment(core: &Core, job: u64) -> Option<(Rc<Formed>, bool)> {
    let formed = core.jobs().all.get(&job)?.running()?;
    let mut is_reachable = true;
    for &worker in &formed.places {
        is_reachable &= !core.member(worker).filter(|member| member.is_known())?.who.fabric.is_empty();
    }
    Some((Rc::new(formed.clone()), is_reachable))
}
