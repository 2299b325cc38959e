//! The id of a job: its number, by which users refer to it, and what distinguishes it from every other job of that number.
//!
//! Every orchestrator's state counts its jobs from 1, and a copy of a state that is put back counts on from where it was
//! made. Folders, connections and ranks of other jobs may still be there under the same number, so each start of an
//! orchestrator draws a nonce, and the jobs that it takes in carry it. Ids sort as their numbers do.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Bits of an id that are drawn.
const NONCE_BITS: u32 = 24;

/// Bits of an id that count: enough for thirty years of a thousand submissions a second.
const NUMBER_BITS: u32 = u64::BITS - NONCE_BITS;

/// A job of one state of one orchestrator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(u64);

impl JobId {
    /// The job of this number, taken in by an orchestrator that has drawn this nonce, of which the low 24 bits count.
    pub const fn new(number: u64, nonce: u32) -> Self {
        let nonce = nonce as u64 & ((1 << NONCE_BITS) - 1);
        JobId((number & ((1 << NUMBER_BITS) - 1)) << NONCE_BITS | nonce)
    }

    /// From what was sent or kept.
    pub const fn of(bits: u64) -> Self {
        JobId(bits)
    }

    /// As it is sent and kept.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Its place among the jobs of its state, from 1.
    pub const fn number(self) -> u64 {
        self.0 >> NONCE_BITS
    }

    /// What was drawn.
    pub const fn nonce(self) -> u64 {
        self.0 & ((1 << NONCE_BITS) - 1)
    }

    /// The number in what people write: `job-7`.
    pub fn parse_number(name: &str) -> Option<u64> {
        name.strip_prefix("job-")?.parse().ok()
    }

    /// All ids of jobs of this number; nothing for a number that no job has.
    pub fn all_of(number: u64) -> Option<RangeInclusive<JobId>> {
        let first = number.checked_mul(1 << NONCE_BITS)?;
        Some(JobId(first)..=JobId(first | ((1 << NONCE_BITS) - 1)))
    }
}

impl fmt::Display for JobId {
    /// As people write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job-{}", self.number())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ids_sort_as_their_numbers_and_differ_by_their_nonces(number in 0_u64..1 << 39, nonces in any::<[u32; 2]>()) {
            let [one, other] = nonces.map(|nonce| JobId::new(number, nonce));
            prop_assert_eq!(one == other, nonces[0] << 8 == nonces[1] << 8);
            prop_assert!(one < JobId::new(number + 1, nonces[1]));
            prop_assert_eq!((one.number(), JobId::of(one.bits())), (number, one));
            prop_assert_eq!(JobId::parse_number(&one.to_string()), Some(number));
            prop_assert!(JobId::all_of(number).unwrap().contains(&one));
            prop_assert!(!JobId::all_of(number + 1).unwrap().contains(&one));
        }
    }
}
