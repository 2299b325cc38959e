//! The fabric inside one process: a frame is handed over as it is, nothing is copied.
//!
//! For tests it can hold frames back and keep a ledger of what was sent.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;

use super::delays::{Delays, Disturbance};
use super::endpoint::{Endpoint, Network};
use super::inbox::{Arrival, Inbox};
use super::{FabricError, Region, Tag};
use crate::trace::TraceContext;

/// What a network is made with.
#[derive(Clone, Copy, Debug)]
pub struct LocalOptions {
    /// How long a wait may last before it is an error.
    pub patience: Duration,
    /// Delays for tests.
    pub disturbance: Option<Disturbance>,
    /// Keep every sent frame's address and size for [`LocalNetwork::ledger`].
    pub keep_ledger: bool,
}

impl Default for LocalOptions {
    /// Five minutes of patience: a lost peer is told by an abort at once; the deadline is for what nobody noticed.
    fn default() -> Self {
        LocalOptions { patience: Duration::from_secs(300), disturbance: None, keep_ledger: false }
    }
}

/// One line of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sent {
    /// Address of the frame.
    pub tag: Tag,
    /// Rank it went to.
    pub to: usize,
    /// **Units**: payload bytes.
    pub bytes: usize,
}

/// All ranks of one process.
pub struct LocalNetwork {
    inboxes: DashMap<usize, Arc<Inbox>>,
    options: LocalOptions,
    delays: Option<Delays>,
    ledger: Mutex<Vec<Sent>>,
}

impl LocalNetwork {
    /// A network without ranks.
    pub fn new(options: LocalOptions) -> Arc<Self> {
        let delays = options.disturbance.map(Delays::new);
        Arc::new(LocalNetwork { inboxes: DashMap::new(), options, delays, ledger: Mutex::new(Vec::new()) })
    }

    /// Adds a rank and returns its end of the network.
    pub fn join(self: &Arc<Self>, rank: usize) -> Endpoint {
        let inbox = Arc::new(Inbox::default());
        self.inboxes.insert(rank, inbox.clone());
        Endpoint::new(rank, inbox, Network::Local(self.clone()))
    }

    /// Every frame sent so far, in order of address; empty unless the network keeps a ledger.
    pub fn ledger(&self) -> Vec<Sent> {
        let mut lines = self.ledger.lock().clone();
        lines.sort();
        lines
    }

    /// Frames that have arrived at any rank and were not taken: none, after a run that went well.
    pub fn num_waiting(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.len()).sum()
    }

    /// How long a wait may last.
    pub(super) fn patience(&self) -> Duration {
        self.options.patience
    }

    pub(super) fn send(
        &self,
        to: usize,
        tag: Tag,
        parts: Vec<Region>,
        trace: TraceContext,
    ) -> Result<(), FabricError> {
        let inbox = self.inboxes.get(&to).ok_or(FabricError::NoSuchRank { to })?;
        if self.options.keep_ledger {
            let bytes = parts.iter().map(Region::len).sum();
            self.ledger.lock().push(Sent { tag, to, bytes });
        }
        let arrival = Arrival { parts, trace, receipt: None };
        inbox.deliver_late(self.delays.as_ref(), to, tag, arrival)
    }
}
