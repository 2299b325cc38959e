//! What the cluster decides, as one pure state machine: an event and the time in, effects out, in their order.
//!
//! No clock, no I/O, no tokio: its owner persists each fact before executing anything that follows it in the list. What
//! outlives the process is a fold over facts ([`jobs`]); members, leases and the machines of running formations
//! (`formation`) are rebuilt from what the workers report when they attach again.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod attempts;
mod avoided;
mod breaking;
mod clock;
mod commits;
mod events;
pub mod facts;
mod flight;
mod foreign;
mod formation;
mod giving_way;
mod goodput;
mod growth;
pub mod jobs;
mod layouts;
mod lifecycle;
mod members;
mod membership;
mod peak;
mod removal;
mod schedule;
mod stall;
mod storage;
mod survivors;
#[cfg(test)]
mod tests;
mod times;

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::{FormationId, JobId, Rank, Topology};

use self::attempts::Blame;
use self::avoided::Avoided;
use self::clock::Clock;
pub use self::events::{Attachment, Effect, Event, Hosted, Left, Progress, Severity, Space, WorkerCommand};
use self::facts::Fact;
pub use self::flight::FLIGHT_LINE;
use self::flight::Inquiry;
use self::foreign::Foreign;
use self::formation::Formation;
use self::goodput::Usage;
use self::growth::Room;
use self::jobs::{Jobs, Phase};
use self::layouts::Layouts;
use self::members::Members;
pub use self::members::{Member, Registration};
use self::survivors::Survivors;
pub use self::times::Times;

/// How often a worker beats, by default.
pub const BEAT_MS: u64 = 500;
/// A worker that is silent for this long is lost, by default.
pub const LEASE_MS: u64 = 3 * BEAT_MS;
/// How long a started orchestrator waits for the workers of the jobs that it finds running, at least.
pub const ADOPTION_MS: u64 = 10_000;
/// How long ranks of a formation of another state may take until they train.
pub const FOREIGN_MS: u64 = 60_000;
/// How long a formation may take until the first of its ranks is ready, and until each further one is: data and checkpoints are
/// read, weights drawn.
pub const FORMING_MS: u64 = 600_000;
/// How long ranks may take to answer an abort.
pub const ABORT_MS: u64 = 5_000;
/// How long a job waits for a place for a lost rank before it continues with fewer, if it may.
pub const SHRINK_MS: u64 = 5_000;
/// Most ranks of a job: its formations are facts, which have a bound.
pub const MAX_RANKS: usize = 1 << 16;
/// How long the same slots have to be free until a job grows into them: workers often come together.
pub const GROW_MS: u64 = 1_000;
/// Ranks without progress for this long are reported.
pub const STALL_WARN_MS: u64 = 10_000;
/// Ranks that read from or write to storage for this long are reported.
pub const SLOW_STORAGE_MS: u64 = 30_000;
/// Ranks without progress for this long have stalled, unless they have been nearly as slow before.
pub const STALL_MS: u64 = 60_000;
/// A formation has stalled after this multiple of its longest pause so far.
pub const STALL_FACTOR: u64 = 10;
/// Finished jobs to retain, by default.
pub const RETAINED_JOBS: usize = 10_000;
/// What the specifications of all known jobs take at most; for more than that finished jobs are removed. **Units**: bytes.
pub const RETAINED_BYTES: u64 = 512 << 20;
/// How often the machine needs [`Event::Tick`].
pub const TICK_MS: u64 = 100;

/// The state of the cluster.
pub struct Core {
    /// Raised durably at each start of the orchestrator.
    incarnation: u64,
    /// Drawn when the state was made.
    state: u64,
    /// Drawn at each start of the orchestrator: part of the ids of the jobs that it takes in.
    nonce: u32,
    jobs: Jobs,
    members: Members,
    formations: BTreeMap<JobId, Formation>,
    /// Broken formations whose workers are asked what they keep.
    survivors: BTreeMap<JobId, Survivors>,
    /// Leases and deadlines run by it.
    clock: Clock,
    times: Times,
    /// Formations of which this state knows nothing.
    foreign: BTreeMap<FormationId, Foreign>,
    /// Lost formations whose flight recorders are to be read, and by job what those of the latest one have told.
    inquiries: BTreeMap<JobId, Inquiry>,
    findings: BTreeMap<JobId, String>,
    /// Until when jobs wait whose formations came to nothing.
    paused_until: BTreeMap<JobId, u64>,
    /// By job, nodes on which ranks of it came to nothing: it goes elsewhere while there is room.
    avoided: BTreeMap<JobId, Avoided>,
    /// On how many ranks jobs can be run, and what they need there.
    layouts: Layouts,
    /// Free slots that jobs may grow into.
    room: Option<Room>,
    /// What the slots were used for since this process began.
    usage: Usage,
    /// Why jobs in line wait.
    reasons: BTreeMap<JobId, String>,
    /// Finished jobs to retain.
    retained_jobs: usize,
    /// What the specifications of all known jobs take. **Units**: bytes.
    spec_bytes: u64,
    /// Something has changed that may give a job its ranks.
    is_open: bool,
    /// Jobs that have lost ranks, of which something has changed that may let them continue.
    may_recover: BTreeSet<JobId>,
    effects: Vec<Effect>,
}

impl Core {
    /// A state built from what was stored, with the times by which workers are judged.
    pub fn new(jobs: Jobs, incarnation: u64, now: u64, times: Times) -> Self {
        let broken_ms = jobs.all.values().map(|record| record.broken_ms).max();
        let clock = Clock::new(now, broken_ms.unwrap_or_default());
        let now = clock.now();
        let mut core = Core {
            incarnation,
            state: 0,
            nonce: 0,
            retained_jobs: RETAINED_JOBS,
            spec_bytes: jobs.all.values().map(|record| record.spec.bytes()).sum(),
            jobs,
            members: Members::default(),
            formations: BTreeMap::new(),
            survivors: BTreeMap::new(),
            foreign: BTreeMap::new(),
            inquiries: BTreeMap::new(),
            findings: BTreeMap::new(),
            paused_until: BTreeMap::new(),
            avoided: BTreeMap::new(),
            layouts: Layouts::default(),
            room: None,
            clock,
            times,
            usage: Usage::default(),
            reasons: BTreeMap::new(),
            is_open: true,
            may_recover: BTreeSet::new(),
            effects: Vec::new(),
        };
        for (&job, record) in &core.jobs.all {
            // Those that do not come back are lost, also to jobs that have lost their formations.
            schedule::survivors(record).for_each(|worker| core.members.expect(worker, now, times));
            if let Some(formed) = record.running() {
                let bring = formed.bringers().filter(|_| !record.attempts.has_stepped);
                bring.for_each(|(_, worker)| core.members.expect(worker, now, times));
                core.formations.insert(job, Formation::of(record).found(core.clock.wall_ms()));
            }
        }
        core.usage = Usage::from(&core);
        let all: Vec<JobId> = core.jobs.all.keys().copied().collect();
        all.into_iter().for_each(|job| core.expect_survivors(job, now));
        core
    }

    /// The same state, retaining this many finished jobs: those that ended last.
    pub fn retaining(mut self, jobs: usize) -> Self {
        self.retained_jobs = jobs;
        self
    }

    /// By which times workers are judged.
    pub fn times(&self) -> Times {
        self.times
    }

    /// The same state by what was drawn when it was made, and what was drawn now for the ids of jobs that it takes in.
    pub fn identified(self, state: u64, nonce: u32) -> Self {
        Core { state, nonce, ..self }
    }

    /// Which state it is.
    pub fn state(&self) -> u64 {
        self.state
    }

    /// Raised durably at each start of the orchestrator.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What outlives the process.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Who is in the cluster.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().map(|(_, member)| member)
    }

    /// One of them.
    pub fn member(&self, worker: u64) -> Option<&Member> {
        self.members.get(worker)
    }

    /// Whether a member takes no new ranks.
    pub fn is_draining(&self, member: &Member) -> bool {
        member.is_leaving || self.jobs.drained.contains(&member.registration.node)
    }

    /// Ranks a worker hosts.
    pub fn used(&self, worker: u64) -> usize {
        let running = self.jobs.all.values().filter_map(|job| job.running());
        let known = running.flat_map(|formed| formed.places.iter().copied());
        known.chain(self.held_by_foreign()).filter(|place| *place == worker).count()
    }

    /// Whether nobody is heard who should be: nothing is concluded from that, and nobody is placed.
    pub fn is_cut_off(&self) -> bool {
        self.clock.is_cut_off(self.times) && self.members.any_heard()
    }

    /// For how long a member has not been heard. **Units**: ms.
    pub fn silent_ms(&self, member: &Member) -> u64 {
        self.clock.since(member.heard_ms)
    }

    /// What a job waits for; empty if for nothing.
    pub fn waiting_for(&self, job: JobId) -> String {
        let Some(record) = self.jobs.all.get(&job) else { return String::new() };
        if self.is_cut_off() && !record.has_ended() {
            return "the orchestrator hears no worker: its network or theirs is cut".into();
        }
        match (&record.phase, self.formations.get(&job)) {
            (Phase::Ended(_), _) => String::new(),
            (Phase::Formed, Some(formation)) => formation.waiting_for(self.clock.now()),
            _ => self.why_without_place(job) + &self.drained_nodes(),
        }
    }

    /// Whether the ranks of a job are all ready: they train, validate or write their weights.
    pub fn is_running(&self, job: JobId) -> bool {
        self.formations.get(&job).is_some_and(|formation| !formation.is_starting())
    }

    /// Whether the ranks of a job train.
    pub fn is_training(&self, job: JobId) -> bool {
        self.formations.get(&job).is_some_and(Formation::is_training)
    }

    /// Takes an event and says what is to be done.
    pub fn step(&mut self, event: Event, now: u64) -> Vec<Effect> {
        self.clock.advance(now, self.members.any_heard(), self.times);
        let now = self.clock.now();
        if event.is_from_worker() {
            self.heard(now);
        }
        match event {
            Event::Submit(spec) => self.submit(spec),
            Event::Cancel { job, reason } => self.cancel(job, &reason),
            Event::Retry { job } => self.retry(job),
            Event::Scale { job, ranks } => self.scale(job, ranks, now),
            Event::Remove { job } => self.remove(job),
            Event::Removed { job, result, .. } => self.removed(job, result),
            Event::Space { worker, formation, space } => self.space(worker, formation, space),
            Event::Drain { node } => self.drain(node, now),
            Event::Undrain { node } => self.undrain(node),
            Event::Attached(attachment) => self.attached(*attachment, now),
            Event::Left { worker, left } => {
                self.members.renew(worker, now, self.times);
                self.left(worker, left);
            }
            Event::LeaveRequested { worker } => self.request_leave(worker, now),
            Event::Detached { worker } => self.detached(worker, now),
            Event::Expelled { worker, why } => self.expelled(worker, &why, now),
            Event::Beat { worker, progress } => self.beat(worker, &progress, now),
            Event::Rank { worker, from, event } => {
                self.members.renew(worker, now, self.times);
                self.rank_event(worker, from, *event, now);
            }
            Event::FlightRead { worker, formation, says } => self.flight_read(worker, formation, &says),
            Event::Committed { worker, formation, position, result } => {
                self.members.renew(worker, now, self.times);
                self.committed((worker, formation), position, result, now);
            }
            Event::Tick => self.tick(now),
        }
        // Nobody is placed on workers that nobody hears.
        while !self.is_cut_off() && (self.is_open || !self.may_recover.is_empty()) {
            let changed = std::mem::take(&mut self.may_recover);
            let is_open = std::mem::take(&mut self.is_open);
            self.schedule((!is_open).then_some(changed), now);
        }
        self.forget();
        std::mem::take(&mut self.effects)
    }

    /// A worker is heard. After a time in which nobody was, all have some time to come back, as after a start of the orchestrator.
    fn heard(&mut self, now: u64) {
        if self.clock.hear() >= self.times.lease_ms() {
            self.members.expect_back(now, self.times);
        }
    }

    fn persist(&mut self, fact: Fact) {
        match &fact {
            Fact::Submitted { spec, .. } => self.spec_bytes += spec.bytes(),
            Fact::Forgotten { job } => {
                self.usage.forget(self.account(*job));
                let bytes = self.jobs.all.get(job).map_or(0, |record| record.spec.bytes());
                self.spec_bytes = self.spec_bytes.saturating_sub(bytes);
                self.findings.remove(job);
            }
            _ => {}
        }
        self.jobs.apply(&fact);
        let gives_no_room = matches!(
            fact,
            Fact::CheckpointCommitted { .. }
                | Fact::CheckpointDamaged { .. }
                | Fact::Stepped { .. }
                | Fact::Formed { .. }
                | Fact::StorageIdentified { .. }
                | Fact::Forgotten { .. }
        );
        self.is_open |= !gives_no_room;
        self.effects.push(Effect::Persist(fact));
    }

    fn send(&mut self, worker: u64, command: WorkerCommand) {
        self.effects.push(Effect::Send { worker, command });
    }

    fn log(&mut self, job: JobId, line: String) {
        self.log_as(Severity::Info, job, line);
    }

    /// Ends the latest formation of a job on every worker that is still alive. `keep`: whether their replicas of its state
    /// are kept.
    fn release(&mut self, job: JobId, reason: &str, keep: bool) {
        self.formations.remove(&job);
        self.survivors.remove(&job);
        self.paused_until.remove(&job);
        let Some(formed) = self.jobs.all.get(&job).and_then(|record| record.formed.as_ref()) else { return };
        let formation = formed.id(job);
        for worker in formed.workers() {
            self.send(worker, WorkerCommand::Release { formation, reason: reason.to_owned(), keep });
        }
    }

    fn running(&self) -> impl Iterator<Item = (JobId, &facts::Formed)> {
        self.jobs.all.iter().filter_map(|(&job, record)| Some((job, record.running()?)))
    }

    fn beat(&mut self, worker: u64, progress: &[Progress], now: u64) {
        self.members.renew(worker, now, self.times);
        for progress in progress {
            let is_current = self.is_current(worker, &progress.rank);
            match self.formations.get_mut(&progress.rank.formation.job).filter(|_| is_current) {
                Some(formation) => formation.progress(progress, now),
                None => self.foreign_progress(worker, progress, now),
            }
        }
    }

    /// Whether a rank belongs to the running formation: the one place where stale messages are dropped.
    fn is_current(&self, worker: u64, from: &RankAddress) -> bool {
        self.formed(from.formation).is_some_and(|formed| formed.place_of(from.rank) == Some(worker))
    }

    /// A formation that runs.
    fn formed(&self, formation: FormationId) -> Option<&facts::Formed> {
        let formed = self.jobs.all.get(&formation.job)?.running()?;
        (formed.generation == formation.generation).then_some(formed)
    }

    fn rank_event(&mut self, worker: u64, from: RankAddress, event: RankEvent, now: u64) {
        if !self.is_current(worker, &from) {
            if !self.foreign_event(worker, &from, &event, now) {
                self.report_of_left(worker, from.formation, event);
            }
            return;
        }
        let job = from.formation.job;
        if let RankEvent::Failed { rank, action, cause, kind, .. } = &event
            && matches!(kind, ErrorKind::Node | ErrorKind::Storage)
        {
            let blame = if *kind == ErrorKind::Storage { Blame::Storage } else { Blame::Job };
            return self.node_failed(job, *rank, (&format!("rank {rank}, {action}: {cause}"), blame), now);
        }
        if let RankEvent::Failed { rank, action, cause, kind: ErrorKind::Damaged, .. } = &event
            && self.falls_back(job, &format!("rank {rank}, {action}: {cause}"), now)
        {
            return;
        }
        if let RankEvent::StateMoved { rank, moved } = &event {
            return self.moved(job, *rank, *moved);
        }
        self.stepped(job, &event);
        self.let_bringers_go(job);
        let Some(formation) = self.formations.get_mut(&job) else { return };
        let effects = formation.event(event, now);
        self.apply_effects(job, effects, now);
    }

    fn tick(&mut self, now: u64) {
        let expired = self.members.expire(self.clock.heard_ms(), now);
        for member in &expired {
            self.send(member.registration.worker, WorkerCommand::Disconnect);
        }
        self.lost(&expired, now);
        // Time alone may let a job continue with fewer ranks.
        self.is_open |= self.jobs.all.values().any(|record| record.phase == Phase::Broken);
        // And grow into slots that have been free for long enough.
        self.is_open |= self.room.is_some();
        let jobs: Vec<JobId> = self.formations.keys().copied().collect();
        for job in jobs {
            let gone = self.missed(job, now);
            if !gone.is_empty() {
                self.lost(&gone, now);
                continue;
            }
            let Some(formation) = self.formations.get_mut(&job) else { continue };
            if let Some(why) = formation.is_broken(now, self.times) {
                self.unreachable(job, &why, now);
            } else if let Some(why) = formation.is_forming_late(now) {
                self.break_formation(job, Vec::new(), why, Blame::Job, now);
            } else if let Some((rank, why)) = formation.bad_place(now) {
                self.node_failed(job, rank, (&why, Blame::Job), now);
            } else if let Some(stall) = formation.stalled(now) {
                self.rank_stalled(job, stall, now);
            } else {
                let effects = formation.tick(now);
                self.apply_effects(job, effects, now);
            }
        }
        self.tick_foreign(now);
        self.tick_inquiries(now);
        self.count_idle();
    }
}

/// Changes of a recipe that give it these axes.
pub(crate) fn axes_overrides(axes: &Topology) -> Vec<String> {
    let Topology { pipeline, expert, data } = axes;
    vec![
        format!("parallel.pipeline={pipeline}"),
        format!("parallel.expert={expert}"),
        format!("parallel.data={data}"),
    ]
}

/// A list of ranks as text.
fn list(ranks: &[Rank]) -> String {
    ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ")
}
