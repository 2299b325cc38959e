//! Links that take time, as data: when a frame arrives where ranks are joined by links of a given speed. For measurements on one
//! machine of what a cluster would do.
//!
//! Each rank has a port to its own node and one to all others, each with a way out and a way in. A frame waits until the way out of
//! its sender and the way in of its receiver are free, keeps both for its bytes over the link's speed, and arrives a latency later;
//! frames that share a way follow each other in the order in which they were sent. Pure: the time comes from outside.

use std::collections::HashMap;
use std::time::Duration;

use super::{Phase, Tag};
use crate::random::mix;

/// A link of two ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpeed {
    /// **Units**: bytes/s, each way.
    pub bytes_per_s: f64,
    /// From the last byte sent to the frame's arrival.
    pub latency: Duration,
}

/// The links of all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    /// Ranks of a node, neighbours in number.
    pub ranks_per_node: usize,
    /// Between two ranks of a node.
    pub inside: LinkSpeed,
    /// Between ranks of two nodes.
    pub across: LinkSpeed,
    /// Pairs (from, to) with a speed of their own; they share the ports of their tier.
    pub pairs: Vec<(usize, usize, LinkSpeed)>,
    /// Frames of this phase alone take time; of all phases without it.
    pub only: Option<Phase>,
    /// A frame's latency is longer by up to this share of it, drawn from `seed` and its tag.
    pub jitter: f64,
    /// Of the draws.
    pub seed: u64,
}

impl Links {
    /// Even links of one speed, all ranks on one node.
    pub fn even(speed: LinkSpeed) -> Links {
        Links {
            ranks_per_node: usize::MAX,
            inside: speed,
            across: speed,
            pairs: Vec::new(),
            only: None,
            jitter: 0.0,
            seed: 0,
        }
    }

    /// Whether two ranks are on one node.
    fn is_inside(&self, from: usize, to: usize) -> bool {
        let node = |rank: usize| rank / self.ranks_per_node.max(1);
        node(from) == node(to)
    }

    fn speed(&self, from: usize, to: usize) -> LinkSpeed {
        let own = self.pairs.iter().find(|(a, b, _)| (*a, *b) == (from, to));
        let of_tier = if self.is_inside(from, to) { self.inside } else { self.across };
        own.map_or(of_tier, |(_, _, speed)| *speed)
    }
}

/// One way of a port: rank, whether to its own node, whether out.
type Way = (usize, bool, bool);

/// What is on the links.
#[derive(Debug)]
pub struct Traffic {
    links: Links,
    /// Until when a way is taken, since the clock began.
    taken: HashMap<Way, Duration>,
}

impl Traffic {
    /// Nothing yet.
    pub fn new(links: Links) -> Traffic {
        Traffic { links, taken: HashMap::new() }
    }

    /// When a frame of `bytes` arrives at rank `to` that is sent `now`; both since the clock began. A rank's frames to itself, and
    /// those of other phases than the one that takes time, are there at once.
    pub fn arrival(&mut self, now: Duration, tag: &Tag, to: usize, bytes: usize) -> Duration {
        let from = tag.source as usize;
        if from == to || self.links.only.is_some_and(|phase| phase != tag.phase) {
            return now;
        }
        let (speed, inside) = (self.links.speed(from, to), self.links.is_inside(from, to));
        let ways: [Way; 2] = [(from, inside, true), (to, inside, false)];
        let free =
            ways.iter().filter_map(|way| self.taken.get(way)).fold(now, |free, &taken| free.max(taken));
        let sent = free + Duration::from_secs_f64(bytes as f64 / speed.bytes_per_s);
        self.taken.extend(ways.map(|way| (way, sent)));
        let drawn = (number_of(self.links.seed, tag, to) % 1024) as f64 / 1024.0;
        sent + speed.latency.mul_f64(1.0 + self.links.jitter * drawn)
    }
}

/// A number of a frame that looks random: it follows from the seed and the frame's address.
pub(super) fn number_of(seed: u64, tag: &Tag, to: usize) -> u64 {
    let words = [
        tag.step,
        u64::from(tag.stage),
        u64::from(tag.micro_batch),
        u64::from(tag.layer),
        tag.kind as u64,
        to as u64,
    ];
    words.into_iter().fold(seed ^ u64::from(tag.source), |mixed, word| mix(mixed ^ word))
}

#[cfg(test)]
mod tests {
    use super::super::FrameKind;
    use super::*;
    use crate::topology::{FormationId, Generation, JobId};

    const MS: Duration = Duration::from_millis(1);
    /// **Units**: bytes that a link inside of a node carries in a millisecond; one across a tenth.
    const KB: usize = 1000;

    fn tag(source: u32, step: u64) -> Tag {
        Tag {
            formation: FormationId::new(JobId::new(1, 0), Generation::FIRST),
            phase: Phase::Train,
            step,
            kind: FrameKind::Dispatch,
            stage: 0,
            micro_batch: 0,
            layer: 0,
            hop: 0,
            source,
        }
    }

    /// Two nodes of two ranks.
    fn links() -> Links {
        let inside = LinkSpeed { bytes_per_s: 1e6, latency: Duration::ZERO };
        let across = LinkSpeed { bytes_per_s: 1e5, latency: 2 * MS };
        Links { ranks_per_node: 2, across, ..Links::even(inside) }
    }

    /// When frames (sent at ms, from, to, KB) arrive, in ms.
    fn arrivals(links: Links, frames: &[(u32, u32, usize, usize)]) -> Vec<f64> {
        let mut traffic = Traffic::new(links);
        let arrival = |&(at, from, to, kb): &(u32, u32, usize, usize)| {
            let arrival = traffic.arrival(at * MS, &tag(from, u64::from(at)), to, kb * KB);
            (arrival.as_secs_f64() * 1e6).round() / 1e3
        };
        frames.iter().map(arrival).collect()
    }

    #[test]
    fn a_frame_takes_its_bytes_over_the_speed_of_its_tier_and_the_latency() {
        let frames = [(5, 0, 1, 3), (5, 0, 2, 3), (7, 3, 3, 9)];
        assert_eq!(arrivals(links(), &frames), [8.0, 5.0 + 30.0 + 2.0, 7.0]);
        let update = Links { only: Some(Phase::Update), ..links() };
        assert_eq!(arrivals(update, &frames), [5.0, 5.0, 7.0]);
    }

    #[test]
    fn frames_that_share_a_way_follow_each_other_and_others_do_not_wait() {
        // Both from rank 0; the third meets the second at rank 3's way in, the fourth goes the other way.
        let frames = [(0, 0, 2, 1), (1, 0, 3, 1), (2, 1, 3, 1), (2, 3, 0, 1), (2, 1, 0, 1)];
        assert_eq!(arrivals(links(), &frames), [12.0, 22.0, 32.0, 14.0, 3.0]);
        // A link that was idle meanwhile starts at once, and a latency holds up nothing behind it.
        assert_eq!(arrivals(links(), &[(0, 0, 2, 1), (10, 0, 2, 1), (50, 0, 2, 1)]), [12.0, 22.0, 62.0]);
    }

    #[test]
    fn a_pair_may_have_a_speed_of_its_own_on_the_same_port() {
        let slow = LinkSpeed { bytes_per_s: 1e5, latency: MS };
        let links = Links { pairs: vec![(0, 1, slow)], ..links() };
        assert_eq!(arrivals(links, &[(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 1, 1)]), [11.0, 1.0, 21.0]);
    }

    #[test]
    fn latencies_scatter_by_seed_and_are_the_same_again() {
        let scattered = |seed| {
            let links = Links { jitter: 0.5, seed, ..links() };
            let frames: Vec<_> = (0..40).map(|at| (100 * at, 0, 2, 0)).collect();
            let late =
                arrivals(links, &frames).into_iter().zip(0..).map(|(at, sent)| at - 100.0 * f64::from(sent));
            late.collect::<Vec<f64>>()
        };
        let first = scattered(1);
        assert!(first.iter().all(|late| (2.0..3.0).contains(late)), "{first:?}");
        let mean = first.iter().sum::<f64>() / 40.0;
        assert!((mean - 2.5).abs() < 0.2, "{mean}");
        assert_eq!(first, scattered(1));
        assert_ne!(first, scattered(2));
    }
}
