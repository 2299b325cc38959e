//! Rate limits: token buckets, one per peer. Pure: the time is an argument.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

/// Peers that are remembered at once.
const MAX_PEERS: usize = 4_096;

/// What each peer may do: `burst` times at once, and `per_second` times a second for long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) burst: u32,
    pub(super) per_second: u32,
}

struct Bucket {
    left: f64,
    at: Instant,
}

/// A bucket for each peer. Bounded: the one that was idle longest makes room.
pub(super) struct Buckets {
    rate: Rate,
    by_peer: BTreeMap<IpAddr, Bucket>,
}

impl Buckets {
    pub(super) fn new(rate: Rate) -> Self {
        Buckets { rate, by_peer: BTreeMap::new() }
    }

    /// Whether `peer` may once more at `now`; if so, it is counted.
    pub(super) fn take(&mut self, peer: IpAddr, now: Instant) -> bool {
        let Rate { burst, per_second } = self.rate;
        if self.by_peer.len() >= MAX_PEERS && !self.by_peer.contains_key(&peer) {
            let idlest = self.by_peer.iter().min_by_key(|(_, bucket)| bucket.at).map(|(&peer, _)| peer);
            idlest.and_then(|peer| self.by_peer.remove(&peer));
        }
        let bucket = self.by_peer.entry(peer).or_insert(Bucket { left: burst.into(), at: now });
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + since * f64::from(per_second)).min(burst.into());
        bucket.at = now.max(bucket.at);
        let may = bucket.left >= 1.0;
        if may {
            bucket.left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peer(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_burst_then_the_rate_and_each_peer_for_itself() {
        let (mut buckets, start) = (Buckets::new(Rate { burst: 3, per_second: 2 }), Instant::now());
        let taken = |buckets: &mut Buckets, at: Duration| {
            (0..10).filter(|_| buckets.take(peer(1), start + at)).count()
        };
        assert_eq!(taken(&mut buckets, Duration::ZERO), 3);
        assert!(buckets.take(peer(2), start), "another peer is not to blame");
        assert_eq!(taken(&mut buckets, Duration::from_millis(499)), 0);
        assert_eq!(taken(&mut buckets, Duration::from_millis(500)), 1);
        assert_eq!(taken(&mut buckets, Duration::from_millis(1500)), 2);
        assert_eq!(taken(&mut buckets, Duration::from_secs(3600)), 3, "no more than the burst is saved up");
        assert_eq!(taken(&mut buckets, Duration::ZERO), 0, "a clock that goes back gives nothing");
        assert_eq!(taken(&mut buckets, Duration::from_secs(3600)), 0, "and nothing twice");
    }

    #[test]
    fn the_number_of_remembered_peers_is_bounded() {
        let (mut buckets, start) = (Buckets::new(Rate { burst: 1, per_second: 1 }), Instant::now());
        for number in 0..3 * MAX_PEERS as u32 {
            assert!(buckets.take(peer(number), start + Duration::from_micros(number.into())));
        }
        assert_eq!(buckets.by_peer.len(), MAX_PEERS);
        let newest = 3 * MAX_PEERS as u32 - 1;
        assert!(!buckets.take(peer(newest), start + Duration::from_secs(0)), "the newest is remembered");
    }
}
