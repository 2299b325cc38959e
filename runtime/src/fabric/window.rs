//! Credits: how much of a lane may be on its way before its receiver has taken something.
//!
//! Pure: both ends' bookkeeping, without sockets. Each lane has a window of its own, so one that is not read blocks no
//! other; a frame larger than the window goes when nothing of its lane is on its way. So every lane is at least what the proof
//! of a plan assumes: a rendezvous, in order.

use std::collections::{HashMap, VecDeque};

use super::wire::LaneKey;

/// What a lane may have on its way.
///
/// **Units**: bytes.
pub const WINDOW: u64 = 16 << 20;

/// A frame counts for more than its payload, so that empty ones are not free.
const FRAME_COST: u64 = 128;

/// What a frame counts against its lane's window.
///
/// **Units**: bytes.
pub fn cost(payload_bytes: u64) -> u64 {
    payload_bytes + FRAME_COST
}

fn fits(outstanding: u64, cost: u64) -> bool {
    outstanding == 0 || outstanding + cost <= WINDOW
}

struct SendLane<T> {
    waiting: VecDeque<(T, u64)>,
    outstanding: u64,
    /// Whether it is among those that may send.
    is_ready: bool,
}

impl<T> Default for SendLane<T> {
    fn default() -> Self {
        SendLane { waiting: VecDeque::new(), outstanding: 0, is_ready: false }
    }
}

/// The sender's side of all lanes of a link: what waits, and what may go next.
pub struct SendWindows<T> {
    lanes: HashMap<LaneKey, SendLane<T>>,
    ready: VecDeque<LaneKey>,
    num_waiting: usize,
}

impl<T> Default for SendWindows<T> {
    fn default() -> Self {
        SendWindows { lanes: HashMap::new(), ready: VecDeque::new(), num_waiting: 0 }
    }
}

impl<T> SendWindows<T> {
    /// Queues a frame behind those of its lane.
    pub fn push(&mut self, key: LaneKey, frame: T, cost: u64) {
        self.lanes.entry(key).or_default().waiting.push_back((frame, cost));
        self.num_waiting += 1;
        self.make_ready(key);
    }

    /// The next frame that may go; lanes take turns.
    pub fn next(&mut self) -> Option<T> {
        let key = self.ready.pop_front()?;
        let lane = self.lanes.get_mut(&key)?;
        lane.is_ready = false;
        let (frame, cost) = lane.waiting.pop_front()?;
        lane.outstanding += cost;
        self.num_waiting -= 1;
        self.make_ready(key);
        Some(frame)
    }

    /// Forgets the frames that have not gone, and returns them; credit for those that have may still come.
    pub fn forget_waiting(&mut self) -> Vec<T> {
        self.ready.clear();
        self.num_waiting = 0;
        let forget = |lane: &mut SendLane<T>| {
            lane.is_ready = false;
            std::mem::take(&mut lane.waiting)
        };
        self.lanes.values_mut().flat_map(forget).map(|(frame, _)| frame).collect()
    }

    /// The receiver has taken so much of a lane.
    ///
    /// **Errors**: if more than was in flight is acknowledged.
    pub fn credit(&mut self, key: LaneKey, bytes: u64) -> Result<(), String> {
        let lane = self.lanes.get_mut(&key).filter(|lane| lane.outstanding >= bytes);
        let lane = lane.ok_or_else(|| format!("got {bytes} bytes of credit for more than was sent"))?;
        lane.outstanding -= bytes;
        self.make_ready(key);
        Ok(())
    }

    /// Frames that have not gone.
    pub fn num_waiting(&self) -> usize {
        self.num_waiting
    }

    fn make_ready(&mut self, key: LaneKey) {
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let goes = lane.waiting.front().is_some_and(|&(_, cost)| fits(lane.outstanding, cost));
        if goes && !lane.is_ready {
            lane.is_ready = true;
            self.ready.push_back(key);
        }
    }
}

#[derive(Default)]
struct Held {
    /// Arrived and not taken.
    held: u64,
    /// Taken and not credited.
    due: u64,
}

/// The receiver's side of all lanes of a link: what has come and when consumption has to be signalled to the sender.
#[derive(Default)]
pub struct ReceiveWindows {
    lanes: HashMap<LaneKey, Held>,
}

impl ReceiveWindows {
    /// A frame has come.
    ///
    /// **Errors**: if its sender had no credit for it.
    pub fn arrived(&mut self, key: LaneKey, cost: u64) -> Result<(), String> {
        let lane = self.lanes.entry(key).or_default();
        if !fits(lane.held + lane.due, cost) {
            return Err(format!("a frame of {cost} bytes came without credit"));
        }
        lane.held += cost;
        Ok(())
    }

    /// A frame has been taken; returns the credit to give back now, if any. Credit is saved up to a quarter of the window, but
    /// never while the lane is empty: its sender may wait for all of it.
    pub fn taken(&mut self, key: LaneKey, cost: u64) -> Option<u64> {
        let lane = self.lanes.get_mut(&key)?;
        lane.held -= cost;
        lane.due += cost;
        (lane.held == 0 || lane.due >= WINDOW / 4).then(|| std::mem::take(&mut lane.due))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::FrameKind;
    use proptest::prelude::*;

    fn lane(to: u32) -> LaneKey {
        LaneKey { source: 0, to, kind: FrameKind::Dispatch }
    }

    #[test]
    fn a_lane_without_a_reader_stops_at_its_window_and_blocks_no_other() {
        let mut windows = SendWindows::default();
        for number in 0..20 {
            windows.push(lane(1), (1, number), WINDOW / 4);
        }
        windows.push(lane(2), (2, 0), WINDOW);
        let gone: Vec<_> = std::iter::from_fn(|| windows.next()).collect();
        assert_eq!(gone.iter().filter(|(to, _)| *to == 1).count(), 4);
        assert!(gone.contains(&(2, 0)));
        windows.credit(lane(1), WINDOW / 4).unwrap();
        assert_eq!(windows.next(), Some((1, 4)));
        assert_eq!(windows.next(), None);
        assert!(windows.credit(lane(2), WINDOW + 1).is_err());
    }

    #[test]
    fn a_frame_larger_than_the_window_goes_when_its_lane_is_empty() {
        let mut windows = SendWindows::default();
        windows.push(lane(1), "small", 10);
        windows.push(lane(1), "large", 3 * WINDOW);
        assert_eq!(windows.next(), Some("small"));
        assert_eq!(windows.next(), None);
        windows.credit(lane(1), 10).unwrap();
        assert_eq!(windows.next(), Some("large"));
        let mut other = ReceiveWindows::default();
        other.arrived(lane(1), 3 * WINDOW).unwrap();
        assert!(other.arrived(lane(1), 1).is_err());
    }

    #[test]
    fn credit_still_comes_for_what_went_before_the_rest_was_forgotten() {
        let mut windows = SendWindows::default();
        (0..3).for_each(|number| windows.push(lane(1), number, WINDOW));
        assert_eq!(windows.next(), Some(0));
        assert_eq!(windows.forget_waiting(), [1, 2]);
        assert_eq!(windows.num_waiting(), 0);
        windows.credit(lane(1), WINDOW).unwrap();
        assert_eq!(windows.next(), None);
        windows.push(lane(1), 3, WINDOW);
        assert_eq!(windows.next(), Some(3));
    }

    proptest! {
        /// Whatever the sizes and the order in which lanes are read: everything comes, in order within each lane, and no
        /// sender ever exceeds what its receiver allows.
        #[test]
        fn everything_comes_in_order(sizes in proptest::collection::vec((0_u32..3, 1_u64..2 * WINDOW), 1..60),
                                     order in proptest::collection::vec(0_u32..3, 1..40)) {
            let (mut send, mut receive) = (SendWindows::default(), ReceiveWindows::default());
            let mut sent: HashMap<u32, Vec<usize>> = HashMap::new();
            for (number, &(to, size)) in sizes.iter().enumerate() {
                send.push(lane(to), (number, to, size), size);
                sent.entry(to).or_default().push(number);
            }
            let mut here: HashMap<u32, VecDeque<(usize, u64)>> = HashMap::new();
            let mut got: HashMap<u32, Vec<usize>> = HashMap::new();
            let mut turns = order.iter().cycle();
            for _ in 0..sizes.len() * 40 * 4 {
                while let Some((number, to, size)) = send.next() {
                    receive.arrived(lane(to), size).unwrap();
                    here.entry(to).or_default().push_back((number, size));
                }
                let mut to = *turns.next().unwrap();
                if !order.iter().any(|&turn| here.get(&turn).is_some_and(|list| !list.is_empty())) {
                    to = here.iter().find(|(_, list)| !list.is_empty()).map_or(to, |(&to, _)| to);
                }
                if let Some((number, size)) = here.entry(to).or_default().pop_front() {
                    got.entry(to).or_default().push(number);
                    if let Some(bytes) = receive.taken(lane(to), size) {
                        send.credit(lane(to), bytes).unwrap();
                    }
                }
            }
            prop_assert_eq!(send.num_waiting(), 0);
            prop_assert_eq!(got, sent);
        }
    }
}
