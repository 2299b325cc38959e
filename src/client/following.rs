//! Streams that are read over breaks of the connection: the orchestrator may be started again, the right to a stream renewed.
//!
//! Knows no entries.

use std::time::{Duration, Instant};

use super::{AWAY, Common, TIMEOUT};
use crate::failure::Failure;
use crate::output::say;

/// How far a stream has been read, over breaks of the connection.
#[derive(Default)]
pub(super) struct Place {
    /// The first entry that is wanted.
    pub(super) next: u64,
    /// Since when the stream is open, if it is or was the last time.
    pub(super) opened: Option<Instant>,
    /// Since when the orchestrator is away, if it is.
    away: Option<Instant>,
}

impl Place {
    /// The stream cannot be read just now. Whether that is the beginning of an absence, and for how long it lasts.
    fn broke_off(&mut self, now: Instant) -> (bool, Duration) {
        // A stream that ends at once is no end of an absence.
        if self.opened.take().is_some_and(|opened| now - opened >= TIMEOUT) {
            self.away = None;
        }
        let begins = self.away.is_none();
        (begins, now - *self.away.get_or_insert(now))
    }

    /// An entry has come.
    pub(super) fn shows(&mut self, entry: u64) {
        (self.next, self.away) = (entry + 1, None);
    }
}

/// Why a stream was not read to its end.
pub(super) enum Broken {
    /// The connection, or what the orchestrator said.
    Link(Failure),
    /// What was read could not be written.
    Output(Failure),
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Broken::Link(failure)
    }
}

/// Reads a stream to its end, again from where it broke off: the orchestrator may be started again, and the right to the stream
/// may be renewed.
///
/// **Errors**: code 2 if there is no such job, or the client may not read it; code 1 if the orchestrator stays away.
pub(super) async fn go_on<T>(
    common: &Common,
    first: u64,
    mut read: impl AsyncFnMut(&mut Place) -> Result<T, Broken>,
) -> Result<T, Failure> {
    let mut place = Place { next: first, ..Place::default() };
    loop {
        let stamps = common.access.stamps();
        let failure = match read(&mut place).await {
            Ok(end) => return Ok(end),
            // The right to the stream has ended, and may have been renewed meanwhile.
            Err(Broken::Link(failure)) if failure.code == 2 && common.access.stamps() != stamps => continue,
            Err(Broken::Link(failure)) if failure.code != 2 => failure,
            Err(Broken::Link(failure) | Broken::Output(failure)) => return Err(failure),
        };
        match place.broke_off(Instant::now()) {
            (_, away) if away >= AWAY => return Err(failure),
            (true, _) => say(format_args!(
                "the orchestrator is away, waited for up to {} s: {}",
                AWAY.as_secs(),
                failure.message
            )),
            (false, _) => {}
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absence_is_said_once_and_ends_with_a_step_or_a_stream_that_lasts() {
        let (mut place, begin) = (Place::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(place.broke_off(at(0)), (true, Duration::ZERO));
        for seconds in 1..50 {
            // The stream opens and breaks off again.
            place.opened = (seconds % 2 == 0).then(|| at(seconds));
            assert_eq!(place.broke_off(at(seconds)), (false, Duration::from_secs(seconds)));
        }
        place.opened = Some(at(50));
        place.shows(7);
        assert_eq!((place.broke_off(at(51)), place.next), ((true, Duration::ZERO), 8));
        // The job made no step for an hour.
        place.opened = Some(at(60));
        assert_eq!(place.broke_off(at(3660)), (true, Duration::ZERO));
        assert_eq!(place.broke_off(at(3719)), (false, Duration::from_secs(59)));
    }
}
