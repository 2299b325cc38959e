//! What the ranks of a formation have said and are told: kept, so that a new stream hears it once more. Follows the workers'
//! `host::outbox`; knows no stream.

use std::collections::{BTreeSet, VecDeque};

use contraflow_runtime::control::{RankCommand, RankEvent};

/// Checkpoints of which a shard is told again.
const SHARDS: usize = 2;

/// What ranks have said.
#[derive(Default)]
pub(super) struct Outbox {
    events: Vec<RankEvent>,
    reports: VecDeque<RankEvent>,
    heard: BTreeSet<(usize, u8)>,
}

impl Outbox {
    /// Keeps what a rank says.
    pub(super) fn note(&mut self, event: &RankEvent) {
        if let RankEvent::StepDone { .. } = event {
            return self.reports.push_back(event.clone());
        }
        self.events.push(event.clone());
        if let RankEvent::ShardSaved { rank, .. } = event {
            let of_rank = |event: &RankEvent| matches!(event, RankEvent::ShardSaved { rank: other, .. } if other == rank);
            if self.events.iter().filter(|event| of_rank(event)).count() > SHARDS {
                let oldest = self.events.iter().position(of_rank);
                oldest.map(|oldest| self.events.remove(oldest));
            }
        }
    }

    /// The last report of each rank stays: a worker's ranks report together.
    pub(super) fn durable(&mut self, durable: u64, ranks: usize) {
        let is_kept =
            |event: &RankEvent| matches!(event, RankEvent::StepDone { report } if report.step <= durable);
        while self.reports.len() > ranks && self.reports.front().is_some_and(is_kept) {
            self.reports.pop_front();
        }
    }

    /// What a new stream hears first.
    pub(super) fn repeat(&self) -> Vec<RankEvent> {
        let is_ready = |event: &&RankEvent| matches!(event, RankEvent::Ready { .. });
        let (ready, other): (Vec<&RankEvent>, Vec<&RankEvent>) = self.events.iter().partition(is_ready);
        ready.into_iter().chain(&self.reports).chain(other).cloned().collect()
    }

    /// Whether a rank has not been told this before.
    pub(super) fn is_new(&mut self, rank: usize, command: &RankCommand) -> bool {
        let kind = match command {
            RankCommand::BeginStep { .. } => 0,
            RankCommand::Stop => 1,
            RankCommand::Validate => 2,
            RankCommand::Export { .. } => 3,
            RankCommand::Abort { .. } | RankCommand::Shutdown => return true,
        };
        self.heard.insert((rank, kind))
    }
}
