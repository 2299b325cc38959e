//! Streams between workers and orchestrators, and who can reach whom. A stream keeps its order and loses nothing in its
//! middle: it breaks, and what was on the way is lost. Different streams know nothing of each other.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use contraflow_runtime::checkpoint::{Pinned, Position};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::server::Input;
use super::{SimEvent, World};
use crate::core::facts::Formed;
use crate::core::{Attachment, Event, Hosted, Left, Progress, Registration};

/// Stands for the orchestrator where nodes are paired.
pub(super) const ORCHESTRATOR: usize = usize::MAX;

/// From a worker.
#[derive(Clone, Debug)]
pub(super) enum FromWorker {
    Hello { registration: Registration, hosted: Vec<Hosted>, left: Vec<Left>, state: u64, incarnation: u64 },
    Released(Left),
    Beat(Vec<Progress>),
    Event { formation: FormationId, event: RankEvent },
    Committed { formation: FormationId, position: Option<Position>, result: Result<(), String> },
}

/// To a worker.
#[derive(Clone, Debug)]
pub(super) enum ToWorker {
    Welcome { state: u64, incarnation: u64 },
    Refused,
    Assign { job: JobId, ranks: Vec<Rank>, formed: Rc<Formed>, is_reachable: bool, pinned: Pinned },
    Command { to: RankAddress, command: RankCommand },
    Release { formation: FormationId, keep: bool },
    Bring { formed: Rc<Formed>, job: JobId },
    Durable { job: JobId, step: u64 },
    Commit { formation: FormationId, position: Option<Position>, pinned: Pinned },
}

/// A stream.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) worker: u64,
    pub(super) server: usize,
    /// Nothing comes through any more.
    is_cut: bool,
    /// Ends that have not noticed yet: without any it is forgotten.
    unaware: u8,
    /// When the latest message arrives, each way.
    up_ms: u64,
    down_ms: u64,
}

/// All streams, and the partitions between them.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) links: BTreeMap<u64, Link>,
    newest: u64,
    /// Pairs of nodes, the lower first, that cannot reach each other.
    pub(super) cuts: BTreeSet<(usize, usize)>,
    /// Nodes that compute slowly.
    pub(super) slow: BTreeSet<usize>,
    /// Two nodes whose ranks do not reach each other.
    pub(super) apart: Option<(usize, usize)>,
}

impl Network {
    pub(super) fn is_cut(&self, one: usize, other: usize) -> bool {
        self.cuts.contains(&(one.min(other), one.max(other)))
    }

    /// One end knows that a stream is broken.
    fn noticed(&mut self, id: u64) {
        if let Some(link) = self.links.get_mut(&id) {
            link.unaware -= 1;
            if link.unaware == 0 {
                self.links.remove(&id);
            }
        }
    }
}

impl World {
    fn delay(&mut self) -> u64 {
        let most = if self.random.is_one_in(16) { self.plan.late_ms } else { self.plan.delay_ms };
        self.random.between(1, most + 1)
    }

    /// Opens a stream to an orchestrator; if there is none, that is noticed after a while.
    pub(super) fn open_link(&mut self, worker: u64, server: usize, hello: FromWorker) -> u64 {
        self.network.newest += 1;
        let id = self.network.newest;
        let node = self.workers.get(&worker).map_or(0, |worker| worker.node);
        let is_cut = self.network.is_cut(node, ORCHESTRATOR) || !self.servers[server].is_alive;
        let (up_ms, down_ms) = (self.now, self.now);
        let unaware = if is_cut { 1 } else { 2 };
        self.network.links.insert(id, Link { worker, server, is_cut, unaware, up_ms, down_ms });
        if is_cut {
            let after = self.random.between(1, 2_000);
            self.plan_in(after, SimEvent::WorkerNotices(id));
        } else {
            self.send_up(id, hello);
        }
        id
    }

    pub(super) fn send_up(&mut self, id: u64, up: FromWorker) {
        let delay = self.delay();
        let Some(link) = self.network.links.get_mut(&id).filter(|link| !link.is_cut) else { return };
        link.up_ms = link.up_ms.max(self.now + delay);
        let at = link.up_ms;
        self.plan_at(at, SimEvent::FromWorker(id, Box::new(up)));
    }

    pub(super) fn send_down(&mut self, id: u64, down: ToWorker) {
        let delay = self.delay();
        let Some(link) = self.network.links.get_mut(&id).filter(|link| !link.is_cut) else { return };
        link.down_ms = link.down_ms.max(self.now + delay);
        let at = link.down_ms;
        self.plan_at(at, SimEvent::ToWorker(id, Box::new(down)));
    }

    /// A stream breaks: what is on its way is lost. Each end notices within `within_ms`; a power loss is silent.
    pub(super) fn break_link(&mut self, id: u64, within_ms: u64) {
        let Some(link) = self.network.links.get_mut(&id).filter(|link| !link.is_cut) else { return };
        link.is_cut = true;
        let (server, worker) = (self.random.between(1, within_ms + 1), self.random.between(1, within_ms + 1));
        self.plan_in(server, SimEvent::ServerNotices(id));
        self.plan_in(worker, SimEvent::WorkerNotices(id));
    }

    /// What a stream carries from now on arrives late.
    pub(super) fn stall_link(&mut self, id: u64, ms: u64) {
        if let Some(link) = self.network.links.get_mut(&id) {
            let until = self.now + ms;
            // What is on its way later still keeps its place.
            (link.up_ms, link.down_ms) = (link.up_ms.max(until), link.down_ms.max(until));
        }
    }

    /// Streams between a worker and any orchestrator, or all of an orchestrator.
    pub(super) fn links_of(&self, is_meant: impl Fn(&Link) -> bool) -> Vec<u64> {
        let links = self.network.links.iter().filter(|(_, link)| !link.is_cut && is_meant(link));
        links.map(|(&id, _)| id).collect()
    }

    pub(super) fn deliver_up(&mut self, id: u64, up: FromWorker) {
        let Some(link) = self.network.links.get(&id).filter(|link| !link.is_cut) else { return };
        let Link { worker, server, .. } = *link;
        if self.servers[server].is_paused {
            return self.servers[server].held.push(SimEvent::FromWorker(id, Box::new(up)));
        }
        let event = match up {
            FromWorker::Hello { registration, hosted, left, state, incarnation } => {
                self.deliver_at(server, Input::Linked { worker, link: id });
                let storage_id = "mark".into();
                let attachment =
                    Attachment { registration, hosted, left, state, incarnation, facts: 0, storage_id };
                Event::Attached(Box::new(attachment))
            }
            FromWorker::Released(left) => Event::Left { worker, left },
            FromWorker::Beat(progress) => Event::Beat { worker, progress },
            FromWorker::Event { formation, event } => {
                let from = RankAddress { formation, rank: event.rank() };
                if self.sequence.is_multiple_of(16) {
                    // The same in the name of a worker that does not host this rank: it must not count.
                    let event = Box::new(event.clone());
                    self.handle_event(server, Event::Rank { worker: worker + 1, from, event });
                }
                Event::Rank { worker, from, event: Box::new(event) }
            }
            FromWorker::Committed { formation, position, result } => {
                if self.sequence.is_multiple_of(4) {
                    // The same in the name of another worker, one step ahead: it must not count.
                    let position = position.map(|position| Position { step: position.step + 1, ..position });
                    let (worker, result) = (worker + 1, Ok(()));
                    self.handle_event(server, Event::Committed { worker, formation, position, result });
                }
                Event::Committed { worker, formation, position, result }
            }
        };
        self.handle_event(server, event);
    }

    pub(super) fn deliver_down(&mut self, id: u64, down: Box<ToWorker>) {
        let Some(link) = self.network.links.get(&id).filter(|link| !link.is_cut) else { return };
        let worker = link.worker;
        let Some(host) = self.workers.get_mut(&worker) else { return };
        if host.is_frozen {
            return host.held.push(SimEvent::ToWorker(id, down));
        }
        self.deliver_to_worker(worker, id, *down);
    }

    pub(super) fn server_notices(&mut self, id: u64) {
        let Some(Link { worker, server, .. }) = self.network.links.get(&id).cloned() else { return };
        if self.servers[server].is_paused {
            return self.servers[server].held.push(SimEvent::ServerNotices(id));
        }
        self.deliver_at(server, Input::Unlinked { worker, link: id });
        self.network.noticed(id);
    }

    pub(super) fn worker_notices(&mut self, id: u64) {
        let Some(link) = self.network.links.get(&id) else { return };
        let host = self.workers.get_mut(&link.worker);
        if let Some(host) = host {
            if host.is_frozen {
                return host.held.push(SimEvent::WorkerNotices(id));
            }
            if host.link.is_some_and(|(link, _)| link == id) {
                host.link = None;
            }
        }
        self.network.noticed(id);
    }
}
