//! Places for connections: how many there are in all, how many one address may take, and how many are kept back for workers, so
//! that no crowd of clients keeps out a worker that comes back. Pure but for the lock.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Connections at once where there are files enough.
const MAX_CONNECTIONS: usize = 8_192;

/// Files that the orchestrator needs for anything else: its state, its clock, its logs.
const OTHER_FILES: u64 = 64;

/// How many connections there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    all: usize,
    /// Of those, kept back for workers.
    reserve: usize,
    /// Of one address that has not attached as workers, without the reserve.
    per_peer: usize,
}

impl Limits {
    /// Of a process that may have so many files open; `None`: as many as it likes.
    pub(super) fn of(files: Option<u64>) -> Self {
        let for_connections = files.map_or(u64::MAX, |files| files.saturating_sub(OTHER_FILES).max(8));
        let all = usize::try_from(for_connections).unwrap_or(usize::MAX).min(MAX_CONNECTIONS);
        let reserve = all / 4;
        Limits { all, reserve, per_peer: (all - reserve) / 2 }
    }
}

/// Who has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// Anybody.
    Client,
    /// Somebody who is to attach as a worker at once: for others there was no place.
    Candidate,
    Worker,
}

#[derive(Debug, Default)]
struct Taken {
    clients: usize,
    candidates: usize,
    workers: usize,
    by_peer: BTreeMap<IpAddr, usize>,
}

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    limits: Limits,
    taken: Mutex<Taken>,
}

/// One of them; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    peer: IpAddr,
    holder: Mutex<Holder>,
}

impl Places {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Places { limits, taken: Mutex::default() })
    }

    /// A place for a connection from `peer`.
    ///
    /// **Errors**: there is none, and why.
    pub(super) fn take(self: &Arc<Self>, peer: IpAddr) -> Result<Place, String> {
        let Limits { all, reserve, per_peer } = self.limits;
        let mut taken = self.taken.lock();
        if taken.clients + taken.candidates + taken.workers >= all {
            return Err(format!("{all} others are connected"));
        }
        let of_peer = taken.by_peer.get(&peer).copied().unwrap_or_default();
        let is_client = taken.clients < all - reserve && of_peer < per_peer;
        let is_candidate = taken.candidates < reserve && of_peer < per_peer + reserve.div_ceil(2);
        let holder = match (is_client, is_candidate) {
            (true, _) => Holder::Client,
            (_, true) => Holder::Candidate,
            _ => {
                return Err(format!(
                    "{of_peer} others from its address are connected, {} in all",
                    taken.clients
                ));
            }
        };
        if is_client {
            taken.clients += 1
        } else {
            taken.candidates += 1
        }
        *taken.by_peer.entry(peer).or_default() += 1;
        Ok(Place { places: self.clone(), peer, holder: Mutex::new(holder) })
    }
}

impl Taken {
    /// A connection that is no worker's is gone, or has become one.
    fn give_back(&mut self, peer: IpAddr, holder: Holder) {
        match holder {
            Holder::Client => self.clients -= 1,
            Holder::Candidate => self.candidates -= 1,
            Holder::Worker => return self.workers -= 1,
        }
        if let Some(count) = self.by_peer.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&peer);
            }
        }
    }
}

impl Place {
    /// Whether only a worker may keep it.
    pub(super) fn is_for_workers(&self) -> bool {
        *self.holder.lock() == Holder::Candidate
    }

    /// The connection is a worker's.
    pub(super) fn attached(&self) {
        let mut holder = self.holder.lock();
        if *holder != Holder::Worker {
            let mut taken = self.places.taken.lock();
            taken.give_back(self.peer, *holder);
            taken.workers += 1;
            *holder = Holder::Worker;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.lock().give_back(self.peer, *self.holder.get_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number])
    }

    fn take(places: &Arc<Places>, number: u8, count: usize) -> Vec<Place> {
        (0..count).map_while(|_| places.take(peer(number)).ok()).collect()
    }

    #[test]
    fn places_follow_the_files_that_a_process_may_have() {
        for (files, limits) in [
            (Some(1_024), Limits { all: 960, reserve: 240, per_peer: 360 }),
            (Some(10), Limits { all: 8, reserve: 2, per_peer: 3 }),
            (Some(1 << 20), Limits { all: 8_192, reserve: 2_048, per_peer: 3_072 }),
            (None, Limits { all: 8_192, reserve: 2_048, per_peer: 3_072 }),
        ] {
            assert_eq!(Limits::of(files), limits);
        }
    }

    #[test]
    fn one_address_takes_its_share_and_workers_always_get_in() {
        let places = Places::new(Limits { all: 40, reserve: 10, per_peer: 15 });
        let crowd = take(&places, 1, 100);
        // Its share, and half of what is kept for workers.
        assert_eq!(crowd.len(), 20);
        assert_eq!(crowd.iter().filter(|place| place.is_for_workers()).count(), 5);
        let others = take(&places, 2, 100);
        assert_eq!(others.len(), 20);
        assert_eq!(places.take(peer(3)).unwrap_err(), "40 others are connected");
        drop(crowd);
        let worker = places.take(peer(3)).unwrap();
        assert!(!worker.is_for_workers());
        let crowd = take(&places, 1, 100);
        assert_eq!(crowd.len(), 19);
        assert_eq!(places.take(peer(1)).unwrap_err(), "40 others are connected");
    }

    #[test]
    fn a_worker_counts_for_no_address_and_makes_room_for_the_next_one() {
        let places = Places::new(Limits { all: 40, reserve: 10, per_peer: 15 });
        let mut workers = Vec::new();
        for _ in 0..40 {
            let worker = places.take(peer(1)).unwrap();
            worker.attached();
            worker.attached();
            assert!(!worker.is_for_workers());
            workers.push(worker);
        }
        assert!(places.take(peer(1)).is_err());
        drop(workers);
        let taken = places.taken.lock();
        assert_eq!((taken.clients, taken.candidates, taken.workers, taken.by_peer.len()), (0, 0, 0, 0));
    }
}
