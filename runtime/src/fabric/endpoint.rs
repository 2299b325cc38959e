//! One rank's end of the fabric, whatever carries its frames: the one thing that lanes and collectives see of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::activity::{Activity, AtWork, StorageUse, Wait};
use super::inbox::Inbox;
use super::local::LocalNetwork;
use super::observer::Traffic;
use super::wired::WiredNetwork;
use super::{FabricError, Phase, Region, Tag};
use crate::topology::Generation;
use crate::trace::{self, Links};

/// What carries the frames.
#[derive(Clone)]
pub(super) enum Network {
    Local(Arc<LocalNetwork>),
    Wired(Arc<WiredNetwork>),
}

/// One rank's end of the network.
#[derive(Clone)]
pub struct Endpoint {
    rank: usize,
    inbox: Arc<Inbox>,
    network: Network,
    sent_bytes: Arc<AtomicU64>,
    links: Arc<Links>,
    activity: Arc<Activity>,
}

impl Endpoint {
    pub(super) fn new(rank: usize, inbox: Arc<Inbox>, network: Network) -> Self {
        let (sent_bytes, links, activity) = Default::default();
        Endpoint { rank, inbox, network, sent_bytes, links, activity }
    }

    /// The rank this end belongs to.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Hands a frame to another rank (or to this one), in the name of the running span. Never blocks.
    ///
    /// **Errors**: [`FabricError::NoSuchRank`], [`FabricError::Duplicate`], [`FabricError::Lost`].
    pub fn send(&self, to: usize, tag: Tag, parts: Vec<Region>) -> Result<(), FabricError> {
        // Copies of the state go when there is time for them: they belong to no step.
        if tag.phase != Phase::Replicate {
            let bytes: usize = parts.iter().map(Region::len).sum();
            self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        self.activity.tell(Traffic::Sent { to, tag: &tag });
        match &self.network {
            Network::Local(network) => network.send(to, tag, parts, trace::current()),
            Network::Wired(network) => network.send(to, tag, parts, trace::current()),
        }
    }

    /// Waits for the frame with this tag, and links the running span to the one that sent it.
    ///
    /// **Errors**: [`FabricError::Timeout`] after the network's timeout; at once [`FabricError::Aborted`] on an abort and
    /// [`FabricError::Lost`] if the sender is, [`FabricError::Duplicate`] once two frames have come under one tag.
    pub fn receive(&self, tag: Tag) -> Result<Vec<Region>, FabricError> {
        if let Network::Wired(network) = &self.network {
            network.watch(tag.source as usize);
        }
        self.activity.tell(Traffic::Awaited(&tag));
        let waits = Wait::begin(&self.activity);
        let (parts, sender) = self.inbox.receive(tag, self.timeout())?;
        drop(waits);
        self.activity.tell(Traffic::Received(&tag));
        self.links.took(tag.source, sender);
        Ok(parts)
    }

    /// What the rank is about.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// The rank is at work, except while it waits for frames, until the end of what is returned.
    pub fn work(&self) -> AtWork {
        AtWork::begin(self.activity.clone())
    }

    /// The rank reads from storage or writes to it, until the end of what is returned.
    pub fn use_storage(&self) -> StorageUse {
        StorageUse::begin(self.activity.clone())
    }

    /// How long a wait on this network may last.
    pub fn timeout(&self) -> Duration {
        match &self.network {
            Network::Local(network) => network.timeout(),
            Network::Wired(network) => network.timeout(),
        }
    }

    /// Ends every present and future wait of this rank.
    pub fn abort(&self, reason: &str) {
        self.activity.set_aborted(true);
        self.inbox.abort(reason);
    }

    /// What the rank has sent since it joined, but for copies of its state that others keep.
    ///
    /// **Units**: payload bytes.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// How long connections to other processes have taken to carry what the rank has sent, but for copies of its state that others
    /// keep; nothing within a process.
    pub fn link_time(&self) -> Duration {
        match &self.network {
            Network::Local(_) => Duration::ZERO,
            Network::Wired(network) => network.link_time(self.rank),
        }
    }

    /// Frames that arrived and were not taken: none, between steps.
    pub fn num_waiting(&self) -> usize {
        self.inbox.len()
    }

    /// Starts a new generation: frames of earlier ones are dropped, waits work again.
    pub fn enter_generation(&self, generation: Generation) {
        self.activity.set_aborted(false);
        self.inbox.enter_generation(generation);
    }
}
