//! How often an operator is told that the orchestrator is out of reach, and for how long it was. Pure: the time comes in.

use std::time::{Duration, Instant};

/// Between two lines about one absence.
const PAUSE: Duration = Duration::from_secs(60);

/// An absence of the orchestrator, if it is away.
#[derive(Debug, Default)]
pub struct Absence(Option<Away>);

#[derive(Debug)]
struct Away {
    since: Instant,
    told: Instant,
}

impl Absence {
    /// It could not be reached; whether to say so.
    pub fn note(&mut self, now: Instant) -> bool {
        match &mut self.0 {
            None => self.0 = Some(Away { since: now, told: now }),
            Some(away) if now >= away.told + PAUSE => away.told = now,
            Some(_) => return false,
        }
        true
    }

    /// It is there again; for how long it was away.
    pub fn end(&mut self, now: Instant) -> Option<Duration> {
        self.0.take().map(|away| now - away.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_once_then_once_a_minute_and_at_the_end() {
        let (mut absence, begin) = (Absence::default(), Instant::now());
        assert_eq!(absence.end(begin), None);
        let told = (0..400).filter(|&quarter| absence.note(begin + Duration::from_millis(250 * quarter)));
        assert_eq!(told.collect::<Vec<_>>(), [0, 240]);
        assert_eq!(absence.end(begin + Duration::from_secs(100)), Some(Duration::from_secs(100)));
        assert!(absence.note(begin + Duration::from_secs(101)), "another one");
    }
}
