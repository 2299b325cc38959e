//! An orchestrator's process: the real core, what it keeps, and in which order. Follows `server::hub`: batches, facts kept
//! before commands go out, steps assembled. Its store outlives it.

use contraflow_runtime::checkpoint::Pinned;
use contraflow_runtime::random::mix;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use contraflow_runtime::topology::{FormationId, JobId};

use super::mutation::Mutation;
use super::network::ToWorker;
use super::{SimEvent, World};
use crate::core::facts::{Fact, Formed};
use crate::core::{Core, Effect, Event, TICK_MS, WorkerCommand};
use crate::server::steps::Steps;

/// Messages that are taken at once.
const BATCH: usize = 1024;

/// The simulated time starts here. **Units**: milliseconds since 1970.
const EPOCH: u64 = 1_700_000_000_000;

/// Something for the hub.
pub(super) enum Input {
    Event(Box<Event>),
    Linked { worker: u64, link: u64 },
    Unlinked { worker: u64, link: u64 },
}

/// What is being kept, and what is done afterwards.
#[derive(Default)]
pub(super) struct SimBatch {
    facts: Vec<Fact>,
    steps: BTreeMap<JobId, Vec<u64>>,
    commands: Vec<(u64, WorkerCommand)>,
}

/// A process.
pub(super) struct Server {
    pub(super) core: Core,
    pub(super) is_alive: bool,
    pub(super) is_paused: bool,
    pub(super) held: Vec<SimEvent>,
    /// What its clock shows beyond the simulated time. **Units**: ms.
    pub(super) clock_ms: i64,
    pub(super) is_disk_slow: bool,
    /// Nothing is kept before its disk works again.
    pub(super) disk_fails: bool,
    links: BTreeMap<u64, u64>,
    inbox: VecDeque<Input>,
    batch: Option<SimBatch>,
    steps: BTreeMap<JobId, Steps>,
    ticks: u64,
}

impl World {
    /// The acting orchestrator.
    pub(super) fn newest_server(&self) -> usize {
        self.servers.len() - 1
    }

    pub(super) fn start_server(&mut self) {
        self.store.incarnation +=
            u64::from(!self.breaks(Mutation::KeepsIncarnation) || self.servers.is_empty());
        let incarnation = self.store.incarnation;
        let jobs = match self.store.replay() {
            Ok(jobs) if jobs == self.store.jobs => jobs,
            Ok(_) => {
                return self.violate("the facts fold into another state than that they came from".into());
            }
            Err(commands) => return self.violate(format!("what was kept cannot be read: {commands}")),
        };
        let retained_jobs =
            if self.breaks(Mutation::ForgetsNothing) { usize::MAX } else { self.plan.retained_jobs };
        let clock_ms = self.servers.last().map_or(0, |server| server.clock_ms);
        let mut steps = BTreeMap::new();
        for (&job, record) in &jobs.all {
            let last = self.store.steps.get(&job).and_then(|steps| steps.last()).copied().unwrap_or(0);
            let last = if self.breaks(Mutation::ForgetsSteps) { 0 } else { last };
            let mut of_job = Steps::new(last, None, 0, record.has_ended());
            if let Some(formed) = &record.formed {
                of_job.formed(&record.spec, formed);
            }
            steps.insert(job, of_job);
        }
        let now = (EPOCH + self.now).saturating_add_signed(clock_ms);
        let nonce = mix(self.store.state << 32 | incarnation) as u32;
        self.servers.push(Server {
            core: Core::new(jobs, incarnation, now, self.plan.times)
                .retaining(retained_jobs)
                .identified(self.store.state, nonce),
            is_alive: true,
            is_paused: false,
            held: Vec::new(),
            clock_ms,
            is_disk_slow: false,
            disk_fails: false,
            links: BTreeMap::new(),
            inbox: VecDeque::new(),
            batch: None,
            steps,
            ticks: 0,
        });
        self.checks.forget_delivered();
        self.note([1, incarnation, 0], || format!("orchestrator {incarnation} starts"));
        self.plan_in(TICK_MS, SimEvent::ServerTick(self.newest_server()));
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
            return self.servers[server].held.push(SimEvent::ServerTick(server));
        }
        self.plan_in(TICK_MS, SimEvent::ServerTick(server));
        if !self.withholds(server) {
            self.handle_event(server, Event::Tick);
        }
        self.servers[server].ticks += 1;
        if self.servers[server].ticks.is_multiple_of(8) {
            self.check_commands(server);
            self.check_line(server);
            self.check_growth(server);
            self.check_useless(server);
        }
    }

    pub(super) fn server_resumes(&mut self, server: usize) {
        self.servers[server].is_paused = false;
        // While it stood still it could not take slots from anybody.
        self.checks.useless = None;
        for held in std::mem::take(&mut self.servers[server].held) {
            self.happen(held);
        }
    }

    /// The process ends. What it was writing is kept whole or not at all.
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
        let is_kept = self.random.between(0, 3) > 0;
        if let Some(batch) = left.filter(|_| is_kept) {
            self.keep(server, &batch);
        }
        if self.breaks(Mutation::LosesAFact) {
            self.store.lose_last();
        }
        self.note([2, incarnation, u64::from(is_kept)], || {
            let kept = if is_kept { "kept" } else { "not kept" };
            format!("orchestrator {incarnation} dies, what it was writing is {kept}")
        });
        for link in self.links_of(|link| link.server == server) {
            self.break_link(link, 60);
        }
    }

    pub(super) fn handle_event(&mut self, server: usize, event: Event) {
        self.deliver_at(server, Input::Event(Box::new(event)));
    }

    pub(super) fn deliver_at(&mut self, server: usize, input: Input) {
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
            let mut batch = SimBatch::default();
            for input in inputs {
                match input {
                    Input::Event(event) => self.step_core(server, *event, &mut batch),
                    Input::Linked { worker, link } => {
                        batch.commands.retain(|(to, _)| *to != worker);
                        self.servers[server].links.insert(worker, link);
                    }
                    Input::Unlinked { worker, link } => {
                        if self.servers[server].links.get(&worker) == Some(&link) {
                            self.servers[server].links.remove(&worker);
                            self.step_core(server, Event::Detached { worker }, &mut batch);
                        }
                    }
                }
            }
            if batch.facts.is_empty() && batch.steps.is_empty() {
                self.apply_effects(server, batch);
            } else {
                let most = if self.servers[server].is_disk_slow { 1_200 } else { self.plan.sync_ms };
                let takes = self.random.between(0, most + 1);
                if self.breaks(Mutation::SpeaksFirst) {
                    let commands = std::mem::take(&mut batch.commands);
                    self.apply_effects(server, SimBatch { commands, ..SimBatch::default() });
                }
                self.servers[server].batch = Some(batch);
                self.plan_in(takes, SimEvent::ServerSynced(server));
            }
        }
    }

    pub(super) fn server_synced(&mut self, server: usize) {
        if self.servers[server].is_paused {
            return self.servers[server].held.push(SimEvent::ServerSynced(server));
        }
        let is_over = self.servers[server].core.incarnation() < self.store.incarnation;
        if is_over && !self.breaks(Mutation::WritesOn) {
            // The store is another one's: it cannot write any more.
            return self.kill_server(server);
        }
        let (disk_fails, goes_on) = (self.servers[server].disk_fails, self.breaks(Mutation::GoesOnUnkept));
        if disk_fails && !goes_on {
            // It tries again.
            let pause = self.random.between(20, 5_000);
            return self.plan_in(pause, SimEvent::ServerSynced(server));
        }
        if let Some(batch) = self.servers[server].batch.take() {
            if !disk_fails {
                self.keep(server, &batch);
            }
            self.apply_effects(server, batch);
            self.check_fold(server);
            self.check_retention();
            self.serve(server);
        }
    }

    /// Whether it has something to keep and cannot: workers wait, clients are refused.
    pub(super) fn withholds(&self, server: usize) -> bool {
        self.servers[server].disk_fails && self.servers[server].batch.is_some()
    }

    /// What a client asks for, unless it is refused.
    pub(super) fn ask_for(&mut self, server: usize, event: Event) {
        if !self.withholds(server) {
            self.handle_event(server, event);
        }
    }

    fn step_core(&mut self, server: usize, event: Event, batch: &mut SimBatch) {
        let acting = &self.servers[server];
        let now = (EPOCH + self.now).saturating_add_signed(acting.clock_ms);
        let stale = super::checks::stale_job(&acting.core, &event);
        let events = self.distort(&acting.core, event);
        events.iter().for_each(|event| self.note_reported(server, event));
        let core = &mut self.servers[server].core;
        let effects: Vec<Effect> = events.into_iter().flat_map(|event| core.step(event, now)).collect();
        if let Some(commands) = stale.and_then(|job| super::checks::has_effect(job, &effects)) {
            return self.violate(commands);
        }
        for effect in effects {
            match effect {
                Effect::Persist(fact) => {
                    self.apply_fact(server, &fact, batch);
                    batch.facts.push(fact);
                }
                Effect::Send { worker, command } => batch.commands.push((worker, command)),
                Effect::Record { job, report } => {
                    let steps = self.servers[server].steps.get_mut(&job);
                    if let Some(record) = steps.and_then(|steps| steps.record(*report)) {
                        batch.steps.entry(job).or_default().push(record.step);
                    }
                }
                Effect::Log { job, line, .. } => self.note([3, job.bits(), 0], || format!("{job}: {line}")),
            }
        }
    }

    fn apply_fact(&mut self, server: usize, fact: &Fact, batch: &mut SimBatch) {
        match fact {
            Fact::Submitted { job, .. } => {
                self.servers[server].steps.insert(*job, Steps::new(0, None, 0, false));
            }
            Fact::Formed { job, formed, .. } => {
                let acting = &mut self.servers[server];
                let record = acting.core.jobs().all.get(job);
                if let (Some(steps), Some(record)) = (acting.steps.get_mut(job), record) {
                    steps.formed(&record.spec, formed);
                    if self.mutation == Some(Mutation::TellsStepsAgain) {
                        steps.last = formed.resume_step;
                    }
                }
                self.check_slots(server);
                self.check_cost(server, *job, formed);
                self.check_reused(server, *job, formed);
            }
            // Its workers drop what they keep.
            Fact::Requeued { job, .. } => self.checks.reported.retain(|of, _| of.job != *job),
            Fact::RolledBack { job, .. } => {
                let acting = &mut self.servers[server];
                let to = acting.core.jobs().all.get(job).map_or(0, |record| record.last_checkpoint);
                if let Some(steps) = acting.steps.get_mut(job) {
                    steps.rolled_back(to);
                }
                if let Some(steps) = batch.steps.get_mut(job) {
                    steps.retain(|step| *step <= to);
                }
            }
            Fact::Forgotten { job } => {
                self.servers[server].steps.remove(job);
                batch.steps.remove(job);
            }
            _ => {}
        }
    }

    fn keep(&mut self, server: usize, batch: &SimBatch) {
        for (job, steps) in &batch.steps {
            for &step in steps {
                let reported = self.store.steps.entry(*job).or_default();
                let expected = reported.last().map_or(1, |last| last + 1);
                reported.push(step);
                if step != expected {
                    let by = self.servers[server].core.incarnation();
                    self.violate(format!("{job}: step {step} is told by {by} where {expected} is next"));
                }
            }
        }
        let keeps_steps = self.breaks(Mutation::ForgetsHalf);
        for fact in &batch.facts {
            self.note([4, fact.job().map_or(0, JobId::bits), 0], || {
                let commands = format!("{fact:?}");
                format!("kept: {}", commands.split(", recipe:").next().unwrap_or_default())
            });
            self.check_fact(fact);
            if let Err(commands) = self.store.append(fact, keeps_steps) {
                return self.violate(commands);
            }
        }
    }

    fn apply_effects(&mut self, server: usize, batch: SimBatch) {
        let mut assigned: BTreeMap<JobId, Option<(Rc<Formed>, bool)>> = BTreeMap::new();
        for (worker, command) in batch.commands {
            if command == WorkerCommand::Disconnect {
                if let Some(link) = self.servers[server].links.remove(&worker) {
                    self.break_link(link, 50);
                }
                continue;
            }
            let down = encode(&self.servers[server].core, command, &mut assigned);
            if self.breaks(Mutation::AssignsTwice) && matches!(down, Some(ToWorker::Assign { .. })) {
                let other = self.servers[server].links.keys().find(|other| **other != worker).copied();
                other.into_iter().for_each(|other| self.send(server, other, down.clone()));
            }
            self.send(server, worker, down);
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
                self.send(server, worker, Some(ToWorker::Durable { job, step }));
            }
        }
    }

    fn send(&mut self, server: usize, worker: u64, down: Option<ToWorker>) {
        let (Some(down), Some(&link)) = (down, self.servers[server].links.get(&worker)) else { return };
        let is_last = matches!(down, ToWorker::Refused);
        self.check_command(server, worker, &down);
        self.send_down(link, down);
        if is_last {
            self.servers[server].links.remove(&worker);
        }
    }

    /// Clients repeat a submission until they see their job.
    pub(super) fn submit(&mut self, job: usize) {
        let spec = Box::new(self.plan.jobs[job].spec.clone());
        if self.checks.is_submitted(job) {
            return;
        }
        self.plan_in(5_000, SimEvent::Submit(job));
        self.note([5, job as u64, 0], || format!("{} is submitted", spec.name));
        self.ask_for(self.newest_server(), Event::Submit(spec));
    }
}

/// A command as it goes to a worker; `None` if it is obsolete. `assigned`: what is sent about each job.
fn encode(
    core: &Core,
    command: WorkerCommand,
    assigned: &mut BTreeMap<JobId, Option<(Rc<Formed>, bool)>>,
) -> Option<ToWorker> {
    Some(match command {
        WorkerCommand::Welcome => ToWorker::Welcome { state: core.state(), incarnation: core.incarnation() },
        WorkerCommand::Reject { .. } => ToWorker::Refused,
        // Files of jobs that have ended are not simulated, nor what ranks record: nobody waits for that.
        WorkerCommand::Disconnect | WorkerCommand::Discard { .. } | WorkerCommand::ReadFlight { .. } => {
            return None;
        }
        WorkerCommand::Assign { formation: FormationId { job, generation }, ranks } => {
            let formed = assigned.entry(job).or_insert_with(|| assignment(core, job)).clone();
            let (formed, is_reachable) = formed.filter(|(formed, _)| formed.generation == generation)?;
            let pinned = core.jobs().all.get(&job)?.pinned();
            ToWorker::Assign { job, ranks, formed, is_reachable, pinned }
        }
        WorkerCommand::Rank { to, command } => ToWorker::Command { to, command },
        WorkerCommand::Release { formation, keep, .. } => ToWorker::Release { formation, keep },
        WorkerCommand::CommitCheckpoint { formation, position, pinned, .. } => {
            ToWorker::Commit { formation, position: Some(position), pinned }
        }
        WorkerCommand::Bring { formation: FormationId { job, generation }, .. } => {
            let formed = assigned.entry(job).or_insert_with(|| assignment(core, job)).clone();
            let (formed, _) = formed.filter(|(formed, _)| formed.generation == generation)?;
            ToWorker::Bring { formed, job }
        }
        WorkerCommand::PublishWeights { formation, .. } => {
            ToWorker::Commit { formation, position: None, pinned: Pinned::default() }
        }
    })
}

/// What every worker of a formation is sent; `None` if it has ended or a member is gone.
fn assignment(core: &Core, job: JobId) -> Option<(Rc<Formed>, bool)> {
    let formed = core.jobs().all.get(&job)?.running()?;
    let mut is_reachable = true;
    for worker in formed.workers() {
        is_reachable &= core.member(worker).filter(|member| member.is_known())?.registration.fabric.is_some();
    }
    Some((Rc::new(formed.clone()), is_reachable))
}
