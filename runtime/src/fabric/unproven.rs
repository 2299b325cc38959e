//! Bounds of the connections that have proven nothing yet, so that a crowd of them keeps no rank from its peers.
//!
//! Anyone who reaches a data port can connect and be silent, or name a formation that does not exist. The two kinds are
//! bounded apart, by peer and in all. Where one is too many the oldest of the peer that has most makes room: who belongs to
//! a formation proves it within a round trip, so it is seldom the oldest and never of the peer with most. Pure but for what
//! it hands out; knows no sockets.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

/// Whom a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A host, by address.
    V4([u8; 4]),
    /// A network of 64 bits: a host may have all of its addresses.
    V6([u8; 8]),
    /// A user of this host.
    User(u32),
}

impl From<IpAddr> for Peer {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Peer::V4(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Peer::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

/// How many connections of one kind there may be.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one peer.
    pub of_peer: usize,
    /// Of all peers.
    pub in_all: usize,
}

/// The connections of one kind, and what ends each.
#[derive(Debug)]
pub struct Unproven<T> {
    bounds: Bounds,
    next: u64,
    /// The oldest first.
    by_peer: HashMap<Peer, VecDeque<(u64, T)>>,
}

/// A connection's place, until it is given back.
#[derive(Debug)]
pub struct Place {
    peer: Peer,
    number: u64,
}

impl<T> Unproven<T> {
    /// None yet.
    pub fn new(bounds: Bounds) -> Self {
        Unproven { bounds, next: 0, by_peer: HashMap::new() }
    }

    /// A further connection: its place, and the one that has to end for it.
    pub fn enter(&mut self, peer: Peer, connection: T) -> (Place, Option<T>) {
        let number = self.next;
        self.next += 1;
        self.by_peer.entry(peer).or_default().push_back((number, connection));
        let crowded = if self.by_peer[&peer].len() > self.bounds.of_peer {
            Some(peer)
        } else if self.len() > self.bounds.in_all {
            let most = self.by_peer.iter().max_by_key(|(_, connections)| connections.len());
            most.map(|(&peer, _)| peer)
        } else {
            None
        };
        (Place { peer, number }, crowded.and_then(|peer| self.take_oldest(peer)))
    }

    /// A further connection, if there is room for it.
    pub fn try_enter(&mut self, peer: Peer, connection: T) -> Option<Place> {
        let of_peer = self.by_peer.get(&peer).map_or(0, VecDeque::len);
        let has_room = of_peer < self.bounds.of_peer && self.len() < self.bounds.in_all;
        has_room.then(|| self.enter(peer, connection).0)
    }

    /// A connection has gone on, or ended. Gives it back, unless it had to end before.
    pub fn leave(&mut self, Place { peer, number }: &Place) -> Option<T> {
        let connections = self.by_peer.get_mut(peer)?;
        let index = connections.iter().position(|(other, _)| other == number)?;
        let connection = connections.remove(index).map(|(_, connection)| connection);
        self.forget_if_empty(*peer);
        connection
    }

    fn len(&self) -> usize {
        self.by_peer.values().map(VecDeque::len).sum()
    }

    fn take_oldest(&mut self, peer: Peer) -> Option<T> {
        let oldest = self.by_peer.get_mut(&peer)?.pop_front();
        self.forget_if_empty(peer);
        oldest.map(|(_, connection)| connection)
    }

    fn forget_if_empty(&mut self, peer: Peer) {
        if self.by_peer.get(&peer).is_some_and(VecDeque::is_empty) {
            self.by_peer.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Peer = Peer::V4([10, 0, 0, 1]);
    const CROWD: Peer = Peer::V4([10, 0, 0, 2]);

    #[test]
    fn a_crowd_makes_room_for_itself_and_others_stay() {
        let mut unproven = Unproven::new(Bounds { of_peer: 4, in_all: 6 });
        let (place, ended) = unproven.enter(HOST, 0);
        assert_eq!(ended, None);
        let ended: Vec<Option<i32>> = (1..=100).map(|number| unproven.enter(CROWD, number).1).collect();
        assert!(ended[..4].iter().all(Option::is_none));
        assert!(ended[4..].iter().zip(1..).all(|(ended, oldest)| *ended == Some(oldest)));
        assert_eq!(unproven.leave(&place), Some(0), "the other peer was not touched");
        assert_eq!(unproven.leave(&place), None);
    }

    #[test]
    fn many_peers_together_are_bounded_at_the_expense_of_the_largest() {
        let mut unproven = Unproven::new(Bounds { of_peer: 4, in_all: 6 });
        let (place, _) = unproven.enter(HOST, 0);
        let crowd: Vec<Place> = (1..=3).map(|number| unproven.enter(CROWD, number).0).collect();
        let others: Vec<Option<i32>> =
            (4..=6).map(|number| unproven.enter(Peer::User(number), number as i32).1).collect();
        assert_eq!(others, [None, None, Some(1)]);
        assert_eq!(
            crowd.iter().map(|place| unproven.leave(place)).collect::<Vec<_>>(),
            [None, Some(2), Some(3)]
        );
        assert_eq!(unproven.leave(&place), Some(0));
        assert_eq!(unproven.by_peer.len(), 3, "peers without a connection are forgotten");
    }

    #[test]
    fn without_room_a_connection_is_not_taken_in_and_none_ends_for_it() {
        let mut unproven = Unproven::new(Bounds { of_peer: 2, in_all: 3 });
        let places = [HOST, CROWD, CROWD].map(|peer| unproven.try_enter(peer, ()).unwrap());
        assert!(unproven.try_enter(CROWD, ()).is_none() && unproven.try_enter(HOST, ()).is_none());
        assert!(places.iter().all(|place| unproven.leave(place).is_some()));
        assert!(unproven.try_enter(CROWD, ()).is_some());
    }

    #[test]
    fn a_network_of_64_bits_is_one_peer() {
        let peer = |address: &str| Peer::from(address.parse::<IpAddr>().unwrap());
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::ffff:1"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:10.0.0.1"), HOST);
    }
}
