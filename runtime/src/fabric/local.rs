//! The fabric inside one process: a frame is handed over as it is, nothing is copied.
//!
//! For tests and measurements it can hold frames back, as links of a cluster would, and log the frames that were sent.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;

use super::delays::{DelayInjection, Delays};
use super::endpoint::{Endpoint, Network};
use super::inbox::{Arrival, Inbox};
use super::links::Links;
use super::{FabricError, Region, Tag};
use crate::trace::TraceContext;

/// What a network is made with.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// How long a wait may last before it is an error.
    pub timeout: Duration,
    /// Delays for tests.
    pub delay_injection: Option<DelayInjection>,
    /// How fast frames travel; without it they are there at once.
    pub links: Option<Links>,
    /// Keep every sent frame's address and size for [`LocalNetwork::frame_log`].
    pub log_frames: bool,
}

impl Default for LocalOptions {
    /// Five minutes: a lost peer aborts waits at once; the timeout covers what went unnoticed.
    fn default() -> Self {
        LocalOptions {
            timeout: Duration::from_secs(300),
            delay_injection: None,
            links: None,
            log_frames: false,
        }
    }
}

/// One line of the frame log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SentFrame {
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
    frame_log: Mutex<Vec<SentFrame>>,
}

impl LocalNetwork {
    /// A network without ranks.
    pub fn new(options: LocalOptions) -> Arc<Self> {
        let delays = Delays::new(options.delay_injection, options.links.clone());
        Arc::new(LocalNetwork { inboxes: DashMap::new(), options, delays, frame_log: Mutex::new(Vec::new()) })
    }

    /// Adds a rank and returns its end of the network.
    pub fn join(self: &Arc<Self>, rank: usize) -> Endpoint {
        let inbox = Arc::new(Inbox::default());
        self.inboxes.insert(rank, inbox.clone());
        Endpoint::new(rank, inbox, Network::Local(self.clone()))
    }

    /// Every frame sent so far, in order of address; empty unless the network logs frames.
    pub fn frame_log(&self) -> Vec<SentFrame> {
        let mut lines = self.frame_log.lock().clone();
        lines.sort();
        lines
    }

    /// Frames that have arrived at any rank and were not received: none after a successful run.
    pub fn num_waiting(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.len()).sum()
    }

    /// How long a wait may last.
    pub(super) fn timeout(&self) -> Duration {
        self.options.timeout
    }

    pub(super) fn send(
        &self,
        to: usize,
        tag: Tag,
        parts: Vec<Region>,
        trace: TraceContext,
    ) -> Result<(), FabricError> {
        let inbox = self.inboxes.get(&to).ok_or(FabricError::NoSuchRank { to })?;
        let bytes = parts.iter().map(Region::len).sum();
        if self.options.log_frames {
            self.frame_log.lock().push(SentFrame { tag, to, bytes });
        }
        let due = self.delays.as_ref().map(|delays| delays.due(to, &tag, bytes));
        inbox.deliver(tag, Arrival { parts, trace, receipt: None, due })
    }
}
