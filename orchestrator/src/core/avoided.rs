//! Places that a job is not to use again while there are others: nodes that did not do their part, and workers that others do
//! not reach, as the job's ranks say. Pure.
//!
//! One rank that does not reach another proves nothing: the peer may be dead, which its lease shows. Formations that break again
//! although every worker is alive are evidence of the network.

use std::collections::{BTreeMap, BTreeSet};

/// Formations that may break because ranks do not reach one another before a place is avoided.
const TRIES: u32 = 2;

/// The places of one job.
#[derive(Clone, Debug, Default)]
pub(super) struct Avoided {
    /// Nodes, by label.
    pub(super) nodes: BTreeSet<String>,
    /// Workers.
    pub(super) workers: BTreeSet<u64>,
    /// Formations in a row that broke because ranks did not reach one another.
    tries: u32,
    /// Workers that did not reach one another in them, the lower id first.
    apart: BTreeSet<(u64, u64)>,
}

impl Avoided {
    /// A formation has made a step: its workers reach one another.
    pub(super) fn stepped(&mut self) {
        self.tries = 0;
        self.apart.clear();
    }

    /// A formation has broken; `apart` are workers of ranks, each with that of a rank it could not reach. Returns the worker to do
    /// without from now on: the one that most others do not reach.
    pub(super) fn broken(&mut self, apart: impl IntoIterator<Item = (u64, u64)>) -> Option<u64> {
        let apart = apart.into_iter().filter(|(from, to)| from != to);
        let apart: Vec<(u64, u64)> = apart.map(|(from, to)| (from.min(to), from.max(to))).collect();
        if apart.is_empty() {
            return None;
        }
        self.tries += 1;
        self.apart.extend(&apart);
        // One that is avoided was used again for want of others: by now there may be room elsewhere.
        let named = apart.iter().flat_map(|(one, other)| [*one, *other]);
        let again = named.filter(|worker| self.workers.contains(worker)).max();
        let suspect = again.or_else(|| self.suspect().filter(|_| self.tries >= TRIES));
        self.workers.extend(suspect);
        suspect
    }

    fn suspect(&self) -> Option<u64> {
        let mut peers: BTreeMap<u64, usize> = BTreeMap::new();
        for worker in self.apart.iter().flat_map(|(one, other)| [one, other]) {
            *peers.entry(*worker).or_default() += 1;
        }
        let candidates = peers.into_iter().filter(|(worker, _)| !self.workers.contains(worker));
        candidates.max_by_key(|&(worker, peers)| (peers, worker)).map(|(worker, _)| worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_that_most_others_do_not_reach_is_avoided_after_two_tries() {
        let mut avoided = Avoided::default();
        assert_eq!(avoided.broken([(3, 1), (1, 3), (1, 2)]), None);
        assert_eq!(avoided.broken([]), None, "nobody was accused");
        assert_eq!(avoided.broken([(2, 1)]), Some(1));
        assert_eq!(avoided.workers, BTreeSet::from([1]));
    }

    #[test]
    fn of_two_one_is_avoided_and_then_the_other_if_that_was_wrong() {
        let mut avoided = Avoided::default();
        assert_eq!(avoided.broken([(1, 2), (2, 1)]), None);
        assert_eq!(avoided.broken([(1, 2)]), Some(2));
        assert_eq!(avoided.broken([(1, 5)]), Some(1));
    }

    #[test]
    fn one_that_is_used_again_for_want_of_others_moves_as_soon_as_there_is_room() {
        let mut avoided = Avoided::default();
        assert_eq!((avoided.broken([(1, 2)]), avoided.broken([(1, 2)])), (None, Some(2)));
        assert_eq!(avoided.broken([(1, 2)]), Some(2), "there was no room, and there may be now");
        avoided.stepped();
        assert_eq!(avoided.broken([(2, 1)]), Some(2), "it needs not be shown twice again");
    }

    #[test]
    fn a_step_shows_that_all_reach_one_another() {
        let mut avoided = Avoided::default();
        assert_eq!(avoided.broken([(1, 2)]), None);
        avoided.stepped();
        assert_eq!(avoided.broken([(1, 2)]), None);
    }
}
