//! The fabric inside one process: a frame is handed over as it is, nothing is copied.
//!
//! For tests it can hold frames back for a seeded random time, which also reorders them, and keep a ledger of what was sent.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use parking_lot::Mutex;

use super::endpoint::{Endpoint, Network};
use super::inbox::{Arrival, Inbox};
use super::{FabricError, Region, Tag};
use crate::random::mix;
use crate::trace::TraceContext;

/// Random delays for tests: a frame is held back for up to `max_delay`, drawn from `seed` and its tag.
#[derive(Clone, Copy, Debug)]
pub struct Disturbance {
    /// Seed of the delays.
    pub seed: u64,
    /// Longest delay of a frame.
    pub max_delay: Duration,
}

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
    delayed: Option<Mutex<Sender<Delayed>>>,
    ledger: Mutex<Vec<Sent>>,
}

struct Delayed {
    due: Instant,
    inbox: Arc<Inbox>,
    tag: Tag,
    arrival: Arrival,
}

impl LocalNetwork {
    /// A network without ranks.
    pub fn new(options: LocalOptions) -> Arc<Self> {
        let delayed = options.disturbance.map(|_| {
            let (sender, receiver) = channel();
            std::thread::spawn(move || hold_back(&receiver));
            Mutex::new(sender)
        });
        Arc::new(LocalNetwork { inboxes: DashMap::new(), options, delayed, ledger: Mutex::new(Vec::new()) })
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
        let inbox = self.inboxes.get(&to).ok_or(FabricError::NoSuchRank { to })?.clone();
        if self.options.keep_ledger {
            let bytes = parts.iter().map(Region::len).sum();
            self.ledger.lock().push(Sent { tag, to, bytes });
        }
        let arrival = Arrival { parts, trace, receipt: None };
        match (&self.delayed, self.options.disturbance) {
            (Some(queue), Some(disturbance)) => {
                let due = Instant::now() + delay_of(disturbance, &tag, to);
                let queue = queue.lock();
                queue.send(Delayed { due, inbox, tag, arrival }).map_err(|_| FabricError::NoSuchRank { to })
            }
            _ => inbox.deliver(tag, arrival),
        }
    }
}

fn delay_of(disturbance: Disturbance, tag: &Tag, to: usize) -> Duration {
    let words = [
        tag.step,
        u64::from(tag.stage),
        u64::from(tag.micro_batch),
        u64::from(tag.layer),
        tag.kind as u64,
        to as u64,
    ];
    let seed = disturbance.seed ^ u64::from(tag.source);
    let mixed = words.into_iter().fold(seed, |mixed, word| mix(mixed ^ word));
    disturbance.max_delay.mul_f64((mixed % 1024) as f64 / 1024.0)
}

/// Delivers each frame when it is due; ends when the network is gone.
fn hold_back(queue: &Receiver<Delayed>) {
    let mut waiting: BinaryHeap<Reverse<(Instant, u64)>> = BinaryHeap::new();
    let mut frames = std::collections::HashMap::new();
    for number in 0.. {
        let next_due = waiting.peek().map(|Reverse((due, _))| due.saturating_duration_since(Instant::now()));
        match queue.recv_timeout(next_due.unwrap_or(Duration::from_secs(3600))) {
            Ok(frame) => {
                waiting.push(Reverse((frame.due, number)));
                frames.insert(number, frame);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Some(&Reverse((due, number))) = waiting.peek() {
            if due > Instant::now() {
                break;
            }
            waiting.pop();
            if let Some(Delayed { inbox, tag, arrival, .. }) = frames.remove(&number)
                && let Err(error) = inbox.deliver(tag, arrival)
            {
                inbox.abort(&error.to_string());
            }
        }
    }
}
