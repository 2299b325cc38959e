//! Events of the ranks of one formation that an orchestrator may have missed.
//!
//! Step reports wait until they are durable there; everything else is repeated whenever the stream reconnects: the
//! orchestrator's machine of a formation lives in its memory, and is rebuilt from the events. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{RankCommand, RankEvent};
use crate::topology::Rank;

/// Checkpoints whose shards are reported again: a rank writes one while the one before is being committed.
const SHARDS: usize = 2;

/// Step reports that wait for an orchestrator, at most: beyond it the oldest are lost to the metrics, not to the run.
const MAX_REPORTS: usize = 1_000_000;

/// Events of one formation's ranks.
#[derive(Debug, Default)]
pub struct Outbox {
    /// In the order in which they came; no step reports.
    events: Vec<RankEvent>,
    /// Step reports that may not be durable.
    reports: VecDeque<RankEvent>,
    /// Commands that have been passed on, by rank and kind.
    heard: BTreeSet<(Rank, &'static str)>,
}

impl Outbox {
    /// Takes note of what a rank says.
    pub fn note(&mut self, event: &RankEvent) {
        if let RankEvent::StepDone { .. } = event {
            if self.reports.len() == MAX_REPORTS {
                self.reports.pop_front();
            }
            self.reports.push_back(event.clone());
            return;
        }
        // It is tried again, and then said again.
        if let RankEvent::SaveFailed { .. } = event {
            return;
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

    /// Reports up to this step are durable. The last of each rank stays: it says how far the rank is.
    pub fn durable(&mut self, step: u64) {
        let mut last = BTreeMap::new();
        for event in &self.reports {
            if let RankEvent::StepDone { report } = event {
                last.insert(report.rank, report.step);
            }
        }
        self.reports.retain(|event| match event {
            RankEvent::StepDone { report } => {
                report.step > step || last.get(&report.rank) == Some(&report.step)
            }
            _ => true,
        });
    }

    /// Everything that is to be said again.
    pub fn repeat(&self) -> impl Iterator<Item = &RankEvent> {
        let (ready, other): (Vec<_>, Vec<_>) =
            self.events.iter().partition(|event| matches!(event, RankEvent::Ready { .. }));
        ready.into_iter().chain(&self.reports).chain(other)
    }

    /// Whether to pass a command on: commands that start work are delivered once, however often they are sent.
    pub fn is_new(&mut self, rank: Rank, command: &RankCommand) -> bool {
        let kind = match command {
            RankCommand::BeginStep { .. } => "begin",
            RankCommand::Stop { .. } => "stop",
            RankCommand::Validate => "validate",
            RankCommand::Export { .. } => "export",
            RankCommand::Abort { .. } | RankCommand::Shutdown => return true,
        };
        self.heard.insert((rank, kind))
    }
}

#[cfg(test)]
mod tests {
    use crate::checkpoint::Position;
    use contraflow_proto::StepReport;

    use super::*;

    fn done(step: u64) -> RankEvent {
        RankEvent::StepDone { report: StepReport { step, ..StepReport::default() } }
    }

    fn saved(step: u64) -> RankEvent {
        let position = Position { step, ..Position::default() };
        RankEvent::ShardSaved {
            rank: Rank::ZERO,
            position,
            watch: Default::default(),
            shard: Default::default(),
        }
    }

    #[test]
    fn reports_wait_until_they_are_durable_and_other_events_are_repeated() {
        let mut outbox = Outbox::default();
        for event in
            [RankEvent::Ready { rank: Rank::ZERO }, done(1), saved(1), done(2), saved(2), done(3), saved(3)]
        {
            outbox.note(&event);
        }
        outbox.durable(2);
        let repeated: Vec<_> = outbox.repeat().cloned().collect();
        assert_eq!(repeated, [RankEvent::Ready { rank: Rank::ZERO }, done(3), saved(2), saved(3)]);
    }

    #[test]
    fn the_last_report_of_a_rank_stays_also_when_it_is_durable() {
        let mut outbox = Outbox::default();
        for event in [done(1), done(2)] {
            outbox.note(&event);
        }
        outbox.durable(2);
        assert_eq!(outbox.repeat().cloned().collect::<Vec<_>>(), [done(2)]);
    }

    #[test]
    fn commands_that_start_work_are_delivered_once() {
        let mut outbox = Outbox::default();
        assert!(outbox.is_new(Rank::ZERO, &RankCommand::BeginStep { step: 1 }));
        assert!(outbox.is_new(Rank::new(1), &RankCommand::BeginStep { step: 1 }));
        assert!(!outbox.is_new(Rank::ZERO, &RankCommand::BeginStep { step: 1 }));
        assert!(outbox.is_new(Rank::ZERO, &RankCommand::Validate));
        let abort = RankCommand::Abort { reason: "why".into() };
        assert!(outbox.is_new(Rank::ZERO, &abort) && outbox.is_new(Rank::ZERO, &abort));
    }
}
