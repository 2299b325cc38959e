//! Frames held back for a seeded random time, which also reorders them: for tests and measurements.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Tag;
use crate::random::mix;

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
    delay_injection: DelayInjection,
    queue: Mutex<Sender<Delayed>>,
}

struct Delayed {
    due: Instant,
    deliver: Box<dyn FnOnce() + Send>,
}

impl Delays {
    /// With a thread that delivers; it ends when this is dropped.
    pub fn new(delay_injection: DelayInjection) -> Self {
        let (sender, receiver) = channel();
        std::thread::spawn(move || inject_delays(&receiver));
        Delays { delay_injection, queue: Mutex::new(sender) }
    }

    /// Has a frame to rank `to` delivered when it is due.
    pub fn hold(&self, to: usize, tag: &Tag, deliver: impl FnOnce() + Send + 'static) {
        let due = Instant::now() + delay_of(self.delay_injection, tag, to);
        let queue = self.queue.lock();
        // The thread ends only after this.
        drop(queue.send(Delayed { due, deliver: Box::new(deliver) }));
    }
}

fn delay_of(delay_injection: DelayInjection, tag: &Tag, to: usize) -> Duration {
    let words = [
        tag.step,
        u64::from(tag.stage),
        u64::from(tag.micro_batch),
        u64::from(tag.layer),
        tag.kind as u64,
        to as u64,
    ];
    let seed = delay_injection.seed ^ u64::from(tag.source);
    let mixed = words.into_iter().fold(seed, |mixed, word| mix(mixed ^ word));
    delay_injection.max_delay.mul_f64((mixed % 1024) as f64 / 1024.0)
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
