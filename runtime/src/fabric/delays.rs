//! When frames that are held back may be taken: after a seeded random time, which also reorders them, or after as long as an emulated
//! link takes. For tests and measurements. Knows no inbox: who waits for a frame waits until then.

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
}

impl Delays {
    /// `None` if nothing is held back.
    pub fn new(delay_injection: Option<DelayInjection>, links: Option<Links>) -> Option<Self> {
        if delay_injection.is_none() && links.is_none() {
            return None;
        }
        let traffic = links.map(|links| (Instant::now(), Mutex::new(Traffic::new(links))));
        Some(Delays { delay_injection, traffic })
    }

    /// When a frame of that many bytes, which is sent to rank `to` now, is there.
    pub fn due(&self, to: usize, tag: &Tag, bytes: usize) -> Instant {
        let by_link = self
            .traffic
            .as_ref()
            .map(|(began, traffic)| *began + traffic.lock().arrival(began.elapsed(), tag, to, bytes));
        let injected = self.delay_injection.map_or(Duration::ZERO, |injection| delay_of(injection, tag, to));
        by_link.unwrap_or_else(Instant::now) + injected
    }
}

fn delay_of(delay_injection: DelayInjection, tag: &Tag, to: usize) -> Duration {
    let drawn = number_of(delay_injection.seed, tag, to);
    delay_injection.max_delay.mul_f64((drawn % 1024) as f64 / 1024.0)
}
