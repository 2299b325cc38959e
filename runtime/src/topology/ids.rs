//! Which formation of a job is meant. Ids are types of their own, so that none is taken for another or for a count: displayed as
//! people write them, kept as bare numbers. What a number from outside may be is checked where it comes in (`control::wire`).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::JobId;

/// How often a job has been formed: 1 is its first formation, 0 stands for the time before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(u32);

impl Generation {
    /// Of a job's first formation.
    pub const FIRST: Generation = Generation(1);

    /// The formation of this count.
    pub const fn new(number: u32) -> Self {
        Generation(number)
    }

    /// As it is sent.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Of the formation after it. Four billion formations are not made: the last has none after it but itself.
    #[must_use]
    pub const fn next(self) -> Self {
        Generation(self.0.saturating_add(1))
    }

    /// Of the formation before it; of the first, 0.
    #[must_use]
    pub const fn previous(self) -> Self {
        Generation(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One formation of one job: what a generation fences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FormationId {
    /// The job that is formed.
    pub job: JobId,
    /// Which of its formations.
    pub generation: Generation,
}

impl FormationId {
    /// The formation of a job in a generation.
    pub const fn new(job: JobId, generation: Generation) -> Self {
        FormationId { job, generation }
    }
}

impl fmt::Display for FormationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {} of {}", self.generation, self.job)
    }
}
