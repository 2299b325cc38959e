//! How long each rank of a formation works in a step and how long it waits for others, and which one holds the others up: a rank
//! is compared with those that do the same work. Pure; knows no worker and no clock.

use std::collections::VecDeque;

use contraflow_proto::StepReport;
use contraflow_runtime::topology::Topology;

/// Steps that a rank is judged by: one that takes long says nothing.
const WINDOW: usize = 8;

/// A rank is slow from this multiple of what its peers need, and is not any more below the second one.
const SLOW: (f64, f64) = (2.0, 1.5);

/// How much more than others a rank may work that has its stage for itself: stages differ, by embedding and heads.
const OTHER_STAGE: f64 = 2.0;

/// Work that differs by less than this much in a step is not worth a line. **Units**: seconds.
const WORTH_A_LINE: f64 = 0.05;

/// One rank's time in a step, the median of the latest ones. **Units**: seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankTime {
    /// In which it worked.
    pub busy: f64,
    /// In which it waited for others.
    pub waited: f64,
    /// In which its connections carried what it sent; meanwhile it worked or waited.
    pub link: f64,
    /// Whether it holds the others up.
    pub is_slow: bool,
}

/// A rank has become slow, or is not any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Which one.
    pub rank: usize,
    /// Its time.
    pub time: RankTime,
    /// In which others that do the same work.
    pub typical: f64,
}

/// The ranks of one formation.
#[derive(Debug)]
pub struct Pace {
    topology: Topology,
    latest: Vec<VecDeque<RankTime>>,
    is_slow: Vec<bool>,
}

impl Pace {
    /// Of a formation that has made no step.
    pub fn new(topology: Topology) -> Self {
        let world = topology.world();
        Pace { topology, latest: vec![VecDeque::new(); world], is_slow: vec![false; world] }
    }

    /// Takes a rank's step in.
    pub fn take(&mut self, report: &StepReport) {
        let Some(latest) = self.latest.get_mut(report.rank as usize) else { return };
        if latest.len() == WINDOW {
            latest.pop_front();
        }
        let StepReport { seconds, bubble_seconds: waited, link_seconds: link, .. } = *report;
        latest.push_back(RankTime { busy: seconds - waited, waited, link, is_slow: false });
    }

    /// A rank's time; zeros as long as nothing is known of it.
    pub fn time_of(&self, rank: usize) -> RankTime {
        let Some(latest) = self.latest.get(rank).filter(|latest| !latest.is_empty()) else {
            return RankTime::default();
        };
        let of = |part: fn(&RankTime) -> f64| lower_median(latest.iter().map(part).collect());
        RankTime {
            busy: of(|step| step.busy),
            waited: of(|step| step.waited),
            link: of(|step| step.link),
            is_slow: self.is_slow[rank],
        }
    }

    /// Judges all ranks after a step that all of them have made; those whose verdict has changed.
    pub fn judge(&mut self) -> Vec<Change> {
        if self.latest.iter().any(|latest| latest.len() < WINDOW) {
            return Vec::new();
        }
        let busy: Vec<f64> = self.topology.ranks().map(|rank| self.time_of(rank).busy).collect();
        let mut changes = Vec::new();
        for rank in self.topology.ranks() {
            let peers = self.topology.dp_group(self.topology.coordinates(rank).pipeline);
            let (typical, allowed) = match peers.len() {
                1 => (lower_median(busy.clone()), OTHER_STAGE),
                _ => (lower_median(peers.iter().map(|&peer| busy[peer]).collect()), 1.0),
            };
            let factor = allowed * if self.is_slow[rank] { SLOW.1 } else { SLOW.0 };
            let is_slow = busy[rank] > factor * typical && busy[rank] - typical > WORTH_A_LINE;
            if std::mem::replace(&mut self.is_slow[rank], is_slow) != is_slow {
                changes.push(Change { rank, time: self.time_of(rank), typical });
            }
        }
        changes
    }
}

/// The middle value, the lower one of two: of a pair, the faster one is what may be expected.
fn lower_median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps in which each rank works this long, in a step of 5 s.
    fn make(pace: &mut Pace, steps: usize, busy: &[f64]) -> Vec<(usize, bool)> {
        let mut changes = Vec::new();
        for _ in 0..steps {
            for (rank, busy) in (0..).zip(busy) {
                let link_seconds = f64::from(rank);
                let times = StepReport {
                    seconds: 5.0,
                    bubble_seconds: 5.0 - busy,
                    link_seconds,
                    ..StepReport::default()
                };
                pace.take(&StepReport { rank, ..times });
            }
            changes.extend(pace.judge().iter().map(|change| (change.rank, change.time.is_slow)));
        }
        changes
    }

    #[test]
    fn the_rank_that_works_longest_of_its_stage_is_named_once_and_again_when_it_has_caught_up() {
        // Ranks 0 and 1 have the first stage, 2 and 3 the second one, which is more work.
        let mut pace = Pace::new(Topology { pipeline: 2, expert: 2, data: 1 });
        assert_eq!(make(&mut pace, 20, &[0.5, 0.5, 1.5, 1.5]), []);
        assert_eq!(make(&mut pace, 20, &[0.5, 0.5, 1.5, 4.5]), [(3, true)]);
        let time = RankTime { busy: 4.5, waited: 0.5, link: 3.0, is_slow: true };
        assert_eq!((pace.time_of(3), pace.time_of(0).is_slow), (time, false));
        assert_eq!(make(&mut pace, 20, &[0.5, 0.5, 1.5, 2.5]), [], "still more than one and a half");
        assert_eq!(make(&mut pace, 20, &[0.5, 0.5, 1.5, 2.0]), [(3, false)]);
    }

    #[test]
    fn a_single_slow_step_and_a_small_difference_are_no_verdict() {
        let mut pace = Pace::new(Topology { pipeline: 1, expert: 2, data: 1 });
        assert_eq!(make(&mut pace, 8, &[0.5, 0.5]), []);
        assert_eq!(make(&mut pace, 3, &[0.5, 5.0]), []);
        assert_eq!(make(&mut pace, 20, &[0.01, 0.05]), []);
    }

    #[test]
    fn a_rank_with_a_stage_of_its_own_is_compared_with_other_stages() {
        let mut pace = Pace::new(Topology { pipeline: 4, expert: 1, data: 1 });
        assert_eq!(make(&mut pace, 20, &[0.5, 0.5, 0.5, 1.5]), [], "a head");
        assert_eq!(make(&mut pace, 20, &[0.5, 2.5, 0.5, 1.5]), [(1, true)]);
        assert_eq!(pace.time_of(9), RankTime::default());
    }
}
