//! Who is in the cluster: leases, and when they run out. Knows no job.

use std::collections::BTreeMap;

use contraflow_runtime::fabric::Address;
use contraflow_runtime::files::objects::Sources;
use contraflow_runtime::schedule::size;

use super::Times;

/// How a worker introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Drawn at the start of its process.
    pub worker: u64,
    /// Display name.
    pub name: String,
    /// Ranks it can host.
    pub slots: usize,
    /// Its node.
    pub node: String,
    /// Nodes that are near each other.
    pub block: String,
    /// Where its data connections are accepted, for other workers.
    pub fabric: Option<Address>,
    /// Cores of its host that it may use; 0: unknown.
    pub cores: usize,
    /// Measured peak of them all together. **Units**: FLOP/s.
    pub peak_flops: u64,
    /// Memory that it may use at most, in bytes; 0: not known.
    pub memory_bytes: u64,
    /// What limits it, for people.
    pub memory_limit: String,
    /// What it reads of object stores.
    pub sources: Sources,
    /// Whether its data port has not answered the orchestrator.
    pub is_unreachable: bool,
}

impl Registration {
    /// What memory it has.
    pub fn memory(&self) -> String {
        let Registration { name, node, memory_bytes, memory_limit, .. } = self;
        format!("worker {name} on node {node} has {} ({memory_limit})", size(*memory_bytes))
    }
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// As it registered; before that, what an earlier orchestrator knew of it.
    pub registration: Registration,
    /// Whether its stream is open.
    pub is_attached: bool,
    /// Whether it has asked to leave.
    pub is_leaving: bool,
    /// When it was last seen.
    pub heard_ms: u64,
    /// When it stops being a member unless a heartbeat arrives.
    pub until_ms: u64,
    /// Until when it may come back, its stream open or not: the orchestrator was cut off or paused.
    pub expected_until_ms: u64,
    /// Whether it was not heard for a lease before its stream ended: that says nothing of its process.
    pub fell_silent: bool,
    /// When it was heard again after a longer silence than a lease, if it was.
    pub returned_ms: Option<u64>,
}

impl Member {
    /// Whether it has introduced itself to this orchestrator: where it is to be reached is known.
    pub fn is_known(&self) -> bool {
        self.registration.slots > 0
    }

    /// Whether its process has ended, by all that is known: its stream did, and it was not cut off before.
    pub fn has_ended(&self) -> bool {
        self.is_known() && !self.is_attached && !self.fell_silent
    }

    /// Whether it stood still or was cut off until a moment ago, and after `since_ms`: what others have said of it since then proves
    /// nothing.
    pub fn has_just_returned(&self, since_ms: u64, now: u64, times: Times) -> bool {
        let is_recent = |returned: u64| now < returned + times.adoption_ms();
        self.returned_ms.is_some_and(|returned| returned >= since_ms && is_recent(returned))
    }

    fn is_silent(&self, silent_ms: u64, times: Times) -> bool {
        self.expected_until_ms > 0 || silent_ms >= times.lease_ms()
    }

    /// How many ranks that need so much memory it has room for, beside those that need `used_bytes`; no limit where either is
    /// not known.
    pub fn room_for(&self, rank_bytes: u64, used_bytes: u64) -> usize {
        let room = match self.registration.memory_bytes {
            0 => None,
            bytes => bytes.saturating_sub(used_bytes).checked_div(rank_bytes),
        };
        room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX))
    }
}

/// All members, by worker.
#[derive(Clone, Debug, Default)]
pub struct Members {
    all: BTreeMap<u64, Member>,
}

impl Members {
    /// A worker that hosts ranks of a job and may still be there: an earlier orchestrator placed them.
    pub fn expect(&mut self, worker: u64, now: u64, times: Times) {
        // Its name and node come with it.
        let (name, node) = (format!("{worker:016x}"), "unknown".to_owned());
        let registration = Registration { worker, name, node, ..Registration::default() };
        let member = Member {
            registration,
            is_attached: false,
            is_leaving: false,
            heard_ms: now,
            until_ms: now + times.adoption_ms(),
            expected_until_ms: 0,
            fell_silent: false,
            returned_ms: None,
        };
        self.all.entry(worker).or_insert(member);
    }

    /// A worker has attached, for the first time or again.
    pub fn attach(&mut self, registration: Registration, now: u64, times: Times) {
        let worker = registration.worker;
        let before = self.all.get(&worker).filter(|before| before.is_known());
        let silent_ms = |before: &Member| now.saturating_sub(before.heard_ms);
        let was_silent = before.is_some_and(|before| before.is_silent(silent_ms(before), times));
        let returned_before = before.and_then(|before| before.returned_ms);
        let member = Member {
            registration,
            is_attached: true,
            is_leaving: false,
            heard_ms: now,
            until_ms: now + times.lease_ms(),
            expected_until_ms: 0,
            fell_silent: false,
            returned_ms: if was_silent { Some(now) } else { returned_before },
        };
        self.all.insert(worker, member);
    }

    /// A worker's stream has ended after a silence of so long: it has little time to come back.
    pub fn detach(&mut self, worker: u64, silent_ms: u64, now: u64, times: Times) {
        if let Some(member) = self.all.get_mut(&worker) {
            member.fell_silent = member.is_silent(silent_ms, times);
            member.is_attached = false;
            member.until_ms = member.until_ms.min(now + times.return_ms()).max(member.expected_until_ms);
        }
    }

    /// The orchestrator was cut off or paused: everybody may still be there.
    pub fn expect_back(&mut self, now: u64, times: Times) {
        for member in self.all.values_mut() {
            member.expected_until_ms = now + times.adoption_ms();
            member.until_ms = member.until_ms.max(now + times.adoption_ms());
        }
    }

    /// Whether some member has been heard since the orchestrator started.
    pub fn any_heard(&self) -> bool {
        self.all.values().any(Member::is_known)
    }

    /// A worker asks to leave; returns its name, if it is a member.
    pub fn request_leave(&mut self, worker: u64) -> Option<String> {
        let member = self.all.get_mut(&worker)?;
        member.is_leaving = true;
        Some(member.registration.name.clone())
    }

    /// A sign of life.
    pub fn renew(&mut self, worker: u64, now: u64, times: Times) {
        if let Some(member) = self.all.get_mut(&worker).filter(|member| member.is_attached) {
            if member.is_silent(now.saturating_sub(member.heard_ms), times) {
                member.returned_ms = Some(now);
            }
            member.heard_ms = now;
            member.until_ms = now + times.lease_ms();
            member.expected_until_ms = 0;
        }
    }

    /// Removes those whose lease has expired. `heard_ms`: when somebody was heard last. If that was before a lease ran out, all may
    /// have fallen silent at once, this one a moment before the others.
    pub fn expire(&mut self, heard_ms: u64, now: u64) -> Vec<Member> {
        let has_expired =
            |member: &Member| member.until_ms < now && (!member.is_attached || heard_ms >= member.until_ms);
        let gone: Vec<u64> =
            self.all.iter().filter(|(_, member)| has_expired(member)).map(|(&worker, _)| worker).collect();
        gone.iter().filter_map(|worker| self.all.remove(worker)).collect()
    }

    /// Takes one out.
    pub fn remove(&mut self, worker: u64) -> Option<Member> {
        self.all.remove(&worker)
    }

    /// One of them.
    pub fn get(&self, worker: u64) -> Option<&Member> {
        self.all.get(&worker)
    }

    /// All of them, by worker.
    pub fn iter(&self) -> impl Iterator<Item = (&u64, &Member)> {
        self.all.iter()
    }
}
