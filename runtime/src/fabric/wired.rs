//! One formation of a job as one process sees it: its own ranks, and the links to the processes that host the others.
//!
//! A link goes one way and is made when it is first needed, to send or to wait: so a rank that waits for a peer learns of its
//! end at once, and a rank of a large job has links only to those it talks to. Whatever goes wrong on a link ends as one
//! [`PeerLost`] of the peer; knows nothing of what is done about it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::arrived::BufferPool;
use super::delays::Delays;
use super::endpoint::{Endpoint, Network};
use super::formation::{Formation, PeerLost, Site, Transport};
use super::handshake::{Carrier, Hello, welcome};
use super::inbox::{Arrival, Inbox};
use super::incoming::InLink;
use super::listener::Listener;
use super::outgoing::OutLink;
use super::prompt::wake_promptly;
use super::stream::{Address, Stream};
use super::wire::{MAX_FRAME_BYTES, MAX_PARTS, VERSION};
use super::{FabricError, Region, Tag};
use crate::random::from_system;
use crate::topology::{FormationId, Rank};
use crate::trace::TraceContext;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long a network that closes in peace waits until its last frames are taken.
const LINGER: Duration = Duration::from_secs(5);
/// How long an aborting network waits for its goodbyes to arrive.
const SHORT_LINGER: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    Here,
    /// Has said goodbye.
    Left,
    Lost,
}

struct Peer {
    outgoing: Option<Arc<OutLink>>,
    incoming: Option<Arc<InLink>>,
    presence: Presence,
}

/// Threads of a network that have not ended.
#[derive(Default)]
struct Running {
    all: usize,
    /// Those among them that write frames.
    writers: usize,
}

/// One process's part of a formation.
pub struct WiredNetwork {
    formation: Formation,
    sites: Vec<Site>,
    /// By rank.
    site_of: Vec<usize>,
    inboxes: HashMap<usize, Arc<Inbox>>,
    /// By rank of this process, how long links have taken for what it sent. **Units**: ns.
    link_nanos: HashMap<usize, AtomicU64>,
    delays: Option<Delays>,
    /// By site.
    peers: Mutex<Vec<Peer>>,
    buffers: Arc<BufferPool>,
    on_fault: Arc<dyn Fn(PeerLost) + Send + Sync>,
    closed: AtomicBool,
    running: Mutex<Running>,
    ended: Condvar,
    listener: Listener,
}

impl WiredNetwork {
    /// Joins a formation: from now on its other processes are let in. `on_fault` is called from the network's threads and must
    /// not block. The network lives until [`WiredNetwork::close`].
    ///
    /// **Errors**: [`FabricError::Formation`] if the formation cannot be, or has been joined already.
    pub fn form(
        listener: &Listener,
        formation: Formation,
        on_fault: Arc<dyn Fn(PeerLost) + Send + Sync>,
    ) -> Result<Arc<WiredNetwork>, FabricError> {
        let (sites, site_of) = formation.sites()?;
        let peer = |_: &Site| Peer { outgoing: None, incoming: None, presence: Presence::Here };
        let network = Arc::new(WiredNetwork {
            peers: Mutex::new(sites.iter().map(peer).collect()),
            inboxes: formation.local.iter().map(|&rank| (rank, Arc::default())).collect(),
            link_nanos: formation.local.iter().map(|&rank| (rank, AtomicU64::new(0))).collect(),
            delays: Delays::new(formation.delay_injection, formation.links.clone()),
            formation,
            sites,
            site_of,
            buffers: Arc::default(),
            on_fault,
            closed: AtomicBool::new(false),
            running: Mutex::default(),
            ended: Condvar::new(),
            listener: listener.clone(),
        });
        listener.admit(&network)?;
        Ok(network)
    }

    /// One of this process's ranks.
    ///
    /// **Errors**: [`FabricError::NoSuchRank`] if it is elsewhere.
    pub fn join(self: &Arc<Self>, rank: usize) -> Result<Endpoint, FabricError> {
        let inbox = self.inboxes.get(&rank).ok_or(FabricError::NoSuchRank { to: rank })?;
        Ok(Endpoint::new(rank, inbox.clone(), Network::Wired(self.clone())))
    }

    /// Leaves the formation: what has been sent is given time to arrive, unless a rank of this process has given up, then all
    /// sockets close and all threads end. No fault is reported from now on, here or at the peers.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        self.listener.dismiss(self.id());
        let lost = self.lock_peers().iter().any(|peer| peer.presence == Presence::Lost);
        let in_peace = !lost && !self.inboxes.values().any(|inbox| inbox.is_aborted());
        let deadline =
            Instant::now() + if in_peace { LINGER } else { SHORT_LINGER }.min(self.formation.timeout);
        let peers = self.lock_peers();
        let outgoing: Vec<_> = peers.iter().filter_map(|peer| peer.outgoing.clone()).collect();
        drop(peers);
        outgoing.iter().for_each(|link| link.close(in_peace));
        self.wait_until(deadline, |running| running.writers == 0);
        let peers = self.lock_peers();
        let incoming: Vec<_> = peers.iter().filter_map(|peer| peer.incoming.clone()).collect();
        drop(peers);
        incoming.iter().for_each(|link| link.leave());
        self.wait_until(deadline, |running| running.all == 0);
        outgoing.iter().for_each(|link| link.cut());
        incoming.iter().for_each(|link| link.cut());
    }

    fn wait_until(&self, deadline: Instant, is_over: impl Fn(&Running) -> bool) {
        let mut running = self.running.lock();
        while !is_over(&running) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.ended.wait_for(&mut running, left);
        }
    }

    fn lock_peers(&self) -> MutexGuard<'_, Vec<Peer>> {
        // Every change is the setting of one field.
        self.peers.lock()
    }

    /// See [`Formation::timeout`].
    pub fn timeout(&self) -> Duration {
        self.formation.timeout
    }

    /// A frame of a rank of this process has gone to another process, which took so long.
    pub(super) fn carried(&self, source: usize, took: Duration) {
        if let Some(carried) = self.link_nanos.get(&source) {
            carried.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// How long frames of a rank of this process have taken.
    pub(super) fn link_time(&self, rank: usize) -> Duration {
        Duration::from_nanos(self.link_nanos.get(&rank).map_or(0, |carried| carried.load(Ordering::Relaxed)))
    }

    /// Hands a frame over, or to the link that goes to its rank. Never blocks.
    ///
    /// **Errors**: [`FabricError::NoSuchRank`], [`FabricError::Duplicate`], [`FabricError::Lost`]; [`FabricError::Content`] for
    /// a frame that is too large.
    pub(super) fn send(
        self: &Arc<Self>,
        to: usize,
        tag: Tag,
        parts: Vec<Region>,
        trace: TraceContext,
    ) -> Result<(), FabricError> {
        if let Some(inbox) = self.inboxes.get(&to) {
            return inbox.deliver(tag, Arrival { parts, trace, receipt: None, due: None });
        }
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        if parts.len() > MAX_PARTS || bytes > MAX_FRAME_BYTES {
            let expected = format!("at most {MAX_PARTS} parts and {MAX_FRAME_BYTES} bytes");
            let got = format!("{} parts and {bytes} bytes", parts.len());
            return Err(FabricError::Content { tag, expected, got });
        }
        let nobody = FabricError::NoSuchRank { to };
        let (Some(&site), Ok(number)) = (self.site_of.get(to), u32::try_from(to)) else { return Err(nobody) };
        let link = self.link_to(site).ok_or_else(|| FabricError::Lost {
            rank: to,
            reason: "its process has left or is lost".into(),
        })?;
        link.push(number, tag, parts, trace);
        Ok(())
    }

    /// Called before a wait for this rank: makes a link, on which its end would be noticed.
    pub(super) fn watch(self: &Arc<Self>, rank: usize) {
        if let Some(&site) = self.site_of.get(rank)
            && !self.inboxes.contains_key(&rank)
        {
            self.link_to(site);
        }
    }

    /// The link to a process, made if there is none; `None` if nothing can go there any more.
    fn link_to(self: &Arc<Self>, site: usize) -> Option<Arc<OutLink>> {
        let mut peers = self.lock_peers();
        let peer = &mut peers[site];
        if peer.presence != Presence::Here || self.closed.load(Ordering::SeqCst) {
            return None;
        }
        let link = peer.outgoing.get_or_insert_with(|| {
            let link = Arc::new(OutLink::new(site));
            let (its, network) = (link.clone(), self.clone());
            self.spawn(true, move || its.run(&network));
            link
        });
        Some(link.clone())
    }

    /// Runs a thread that the network waits for when it closes.
    pub(super) fn spawn(self: &Arc<Self>, is_writer: bool, run: impl FnOnce() + Send + 'static) {
        let count = self.count(is_writer);
        std::thread::spawn(move || {
            wake_promptly();
            run();
            drop(count);
        });
    }

    /// Counts a thread that works for the network until the guard is dropped.
    fn count(self: &Arc<Self>, is_writer: bool) -> Counted {
        let mut running = self.running.lock();
        running.all += 1;
        running.writers += usize::from(is_writer);
        Counted { network: self.clone(), is_writer }
    }

    /// Takes a connection in whose other end has proven itself, and reads from it to its end.
    ///
    /// **Errors**: the connection, and why it is refused.
    pub(super) fn take_in(self: &Arc<Self>, hello: &Hello, stream: Stream) -> Result<(), (Stream, String)> {
        let site = match self.site_with_reply(hello) {
            Ok(site) => site,
            Err(reason) => return Err((stream, reason)),
        };
        let mut peers = self.lock_peers();
        if self.closed.load(Ordering::SeqCst) || peers[site].presence != Presence::Here {
            return Err((stream, "the formation has ended".into()));
        }
        if peers[site].incoming.is_some() {
            return Err((stream, format!("rank {} is connected already", hello.from)));
        }
        // One byte into an empty buffer: cannot block.
        let ready = stream.set_timeout(self.formation.timeout).and_then(|()| welcome(&mut &stream));
        if let Err(error) = ready {
            return Err((stream, error.to_string()));
        }
        let link = Arc::new(InLink::new(site, stream));
        peers[site].incoming = Some(link.clone());
        let count = self.count(false);
        drop(peers);
        wake_promptly();
        link.run(hello.carrier, self);
        drop(count);
        Ok(())
    }

    fn site_with_reply(&self, hello: &Hello) -> Result<usize, String> {
        let own = self.formation.local[0];
        if hello.to.index() != own {
            return Err(format!("this process hosts rank {own}, not rank {}", hello.to));
        }
        let site = self.site_of.get(hello.from.index()).copied();
        let site = site.filter(|&site| self.sites[site].ranks[0] == hello.from.index());
        site.ok_or_else(|| format!("rank {} belongs to no process of this formation", hello.from))
    }

    /// Where frames for `to` from `source` go, if the process `site` may send them.
    ///
    /// **Errors**: a message.
    pub(super) fn inbox_for(&self, to: u32, source: u32, site: usize) -> Result<&Arc<Inbox>, String> {
        if self.site_of.get(source as usize) != Some(&site) {
            let ranks = &self.sites[site].ranks;
            return Err(format!("a frame of rank {source} came from the process of ranks {ranks:?}"));
        }
        self.inboxes.get(&(to as usize)).ok_or_else(|| format!("a frame for rank {to} came here"))
    }

    /// Delays of what comes by links, if there are any.
    pub(super) fn delays(&self) -> Option<&Delays> {
        self.delays.as_ref()
    }

    /// Receive buffers.
    pub(super) fn buffers(&self) -> &Arc<BufferPool> {
        &self.buffers
    }

    pub(super) fn secret(&self) -> &[u8; 32] {
        &self.formation.secret
    }

    /// How to get to a process: its address, and what carries frames there within the host; `None` for TCP.
    pub(super) fn route(&self, site: usize) -> (&Address, Option<Carrier>) {
        let address = &self.sites[site].address;
        let is_near = address.host == self.sites[self.site_of[self.formation.local[0]]].address.host;
        let carrier = match self.formation.transport {
            Transport::Tcp => None,
            _ if !is_near => None,
            Transport::Socket => Some(Carrier::Socket),
            Transport::Auto | Transport::SharedMemory => Some(Carrier::SharedMemory),
        };
        (address, carrier)
    }

    /// What this process says first to another.
    ///
    /// **Errors**: if there is no randomness.
    pub(super) fn hello(&self, site: usize, carrier: Carrier) -> Result<Hello, String> {
        Ok(Hello {
            version: VERSION,
            carrier,
            formation: self.id(),
            from: Rank::at(self.formation.local[0]),
            to: Rank::at(self.sites[site].ranks[0]),
            nonce: from_system().map_err(|error| error.to_string())?,
        })
    }

    pub(super) fn id(&self) -> FormationId {
        self.formation.id
    }

    /// A link to or from a process has come to a bad end. The first time, all waits for its ranks are ended.
    pub(super) fn fault(&self, site: usize, reason: &str) {
        if self.part(site, Presence::Lost, reason) {
            let ranks = self.sites[site].ranks.clone();
            tracing::warn!(?ranks, reason, "a peer is lost");
            (self.on_fault)(PeerLost { ranks, reason: reason.to_owned() });
        }
    }

    /// A process has sent all that it will ever send.
    pub(super) fn left(&self, site: usize) {
        self.part(site, Presence::Left, "its process has left the formation");
    }

    /// A process takes nothing any more. If it never had a link to here, it will send nothing either.
    pub(super) fn left_without_sending(&self, site: usize) {
        let never_sent = self.lock_peers()[site].incoming.is_none();
        if never_sent {
            self.left(site);
        }
    }

    /// Whether the process was here until now and the network is open.
    fn part(&self, site: usize, presence: Presence, reason: &str) -> bool {
        let mut peers = self.lock_peers();
        let peer = &mut peers[site];
        if peer.presence != Presence::Here || self.closed.load(Ordering::SeqCst) {
            return false;
        }
        peer.presence = presence;
        // Nothing more comes from there or goes there, so its sockets close.
        let (outgoing, incoming) = (peer.outgoing.take(), peer.incoming.take());
        drop(peers);
        for inbox in self.inboxes.values() {
            self.sites[site].ranks.iter().for_each(|&rank| inbox.lose(rank, reason));
        }
        outgoing.inspect(|link| link.cut());
        incoming.inspect(|link| link.cut());
        true
    }
}

/// Counts a thread until it ends.
struct Counted {
    network: Arc<WiredNetwork>,
    is_writer: bool,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut running = self.network.running.lock();
        running.all -= 1;
        running.writers -= usize::from(self.is_writer);
        drop(running);
        self.network.ended.notify_all();
    }
}
