//! After which times a worker counts as silent, away or lost: all follow from two that the operator may set. Knows no worker.

/// How often workers beat, and how long one may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    beat_ms: u64,
    lease_ms: u64,
}

impl Default for Times {
    fn default() -> Self {
        Times { beat_ms: super::BEAT_MS, lease_ms: super::LEASE_MS }
    }
}

impl Times {
    /// A beat every `beat_ms`; a worker that is silent for `lease_ms` is lost, after three beats if nothing is given.
    ///
    /// **Errors**: a beat that is no multiple of what the core ticks by or longer than what stalls are judged by, a lease of less than
    /// three beats, or one that a connection without an answer does not last.
    pub fn new(beat_ms: u64, lease_ms: Option<u64>) -> Result<Self, String> {
        if !(100..=5_000).contains(&beat_ms) {
            return Err(format!("--beat-ms: expected 100 to 5000, got {beat_ms}"));
        }
        let lease_ms = lease_ms.unwrap_or(3 * beat_ms);
        if !(3 * beat_ms..=30_000).contains(&lease_ms) {
            let least = 3 * beat_ms;
            return Err(format!("--lease-ms: expected {least} (three beats) to 30000, got {lease_ms}"));
        }
        Ok(Times { beat_ms, lease_ms })
    }

    /// How often a worker beats.
    pub fn beat_ms(self) -> u64 {
        self.beat_ms
    }

    /// A worker that is silent for this long is lost.
    pub fn lease_ms(self) -> u64 {
        self.lease_ms
    }

    /// A worker whose stream has ended is lost unless it is back by then.
    pub fn return_ms(self) -> u64 {
        self.beat_ms + self.beat_ms.min(200)
    }

    /// If nobody is heard for so long although several beats are due, the orchestrator itself is cut off.
    pub fn silence_ms(self) -> u64 {
        2 * self.beat_ms
    }

    /// How long ranks that say they have lost a peer are believed before some worker's lease must have expired: after that the same
    /// members re-form.
    pub fn verdict_ms(self) -> u64 {
        self.lease_ms + 1_000
    }

    /// How long workers may take to leave a broken formation and say what they keep of its state.
    pub fn left_ms(self) -> u64 {
        2 * self.lease_ms
    }

    /// How long a started orchestrator waits for the workers of the jobs that it finds running.
    pub fn adoption_ms(self) -> u64 {
        super::ADOPTION_MS.max(2 * self.lease_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::Times;

    #[test]
    fn what_follows_from_the_defaults_is_what_the_documents_say() {
        let times = Times::default();
        assert_eq!(times, Times::new(500, None).unwrap());
        assert_eq!((times.beat_ms(), times.lease_ms(), times.return_ms()), (500, 1_500, 700));
        assert_eq!((times.silence_ms(), times.verdict_ms()), (1_000, 2_500));
        assert_eq!((times.left_ms(), times.adoption_ms()), (3_000, 10_000));
    }

    #[test]
    fn times_that_contradict_each_other_are_refused_by_the_option() {
        let refused = |beat, lease| Times::new(beat, lease).unwrap_err();
        assert_eq!(refused(99, None), "--beat-ms: expected 100 to 5000, got 99");
        assert_eq!(refused(5_001, Some(20_000)), "--beat-ms: expected 100 to 5000, got 5001");
        assert_eq!(refused(500, Some(1_499)), "--lease-ms: expected 1500 (three beats) to 30000, got 1499");
        assert_eq!(refused(500, Some(30_001)), "--lease-ms: expected 1500 (three beats) to 30000, got 30001");
        // Who is lost has always had the time that others have to come back.
        for (beat, lease) in [(100, 300), (5_000, 15_000), (500, 30_000), (5_000, 30_000)] {
            let times = Times::new(beat, Some(lease)).unwrap();
            assert!(times.return_ms() < times.lease_ms() && times.silence_ms() < times.lease_ms());
            assert!(times.lease_ms() < times.adoption_ms() && times.lease_ms() < times.verdict_ms());
        }
    }
}
