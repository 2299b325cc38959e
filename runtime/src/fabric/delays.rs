//! Frames held back: for a seeded random time, which also reorders them, or for as long as an emulated link takes. For tests and
//! measurements.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Tag;
use super::links::{Links, Traffic, number_of};

/// Random delays for tests: a frame is held back for up to `max_delay`, drawn from `seed` and its tag.
#[derive(Clone, Copy, Debug)]
pub struct DelayInjection {
    /// Seed of the delays.
    pub seed: u64,
    /// Longest delay of a frame.
    pub max_delay: Duration,
}

/// Holds back what comes for the ranks of one process.
pub struct Delays {
    delay_injection: Option<DelayInjection>,
    /// Since when there are links, and what is on them.
    traffic: Option<(Instant, Mutex<Traffic>)>,
    queue: Mutex<Sender<Delayed>>,
}

struct Delayed {
    due: Instant,
    deliver: Box<dyn FnOnce() + Send>,
}

impl Delays {
    /// With a thread that delivers; it ends when this is dropped. `None` if nothing is held back.
    pub fn new(delay_injection: Option<DelayInjection>, links: Option<Links>) -> Option<Self> {
        if delay_injection.is_none() && links.is_none() {
            return None;
        }
        let (sender, receiver) = channel();
        std::thread::spawn(move || inject_delays(&receiver));
        let traffic = links.map(|links| (Instant::now(), Mutex::new(Traffic::new(links))));
        Some(Delays { delay_injection, traffic, queue: Mutex::new(sender) })
    }

    /// Has a frame of that many bytes to rank `to` delivered when it is due.
    pub fn hold(&self, to: usize, tag: &Tag, bytes: usize, deliver: impl FnOnce() + Send + 'static) {
        let mut due = Instant::now();
        if let Some((began, traffic)) = &self.traffic {
            due = *began + traffic.lock().arrival(began.elapsed(), tag, to, bytes);
        }
        due += self.delay_injection.map_or(Duration::ZERO, |injection| delay_of(injection, tag, to));
        let queue = self.queue.lock();
        // The thread ends only after this.
        drop(queue.send(Delayed { due, deliver: Box::new(deliver) }));
    }
}

fn delay_of(delay_injection: DelayInjection, tag: &Tag, to: usize) -> Duration {
    let drawn = number_of(delay_injection.seed, tag, to);
    delay_injection.max_delay.mul_f64((drawn % 1024) as f64 / 1024.0)
}

/// Delivers each frame when it is due; ends when all senders are gone.
fn inject_delays(queue: &Receiver<Delayed>) {
    let mut waiting: BinaryHeap<Reverse<(Instant, u64)>> = BinaryHeap::new();
    let mut frames = HashMap::new();
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
            if let Some(Delayed { deliver, .. }) = frames.remove(&number) {
                deliver();
            }
        }
    }
}
