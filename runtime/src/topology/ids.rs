//! Ids of ranks and formations. Types of their own, so that no id is taken for another one or for a count; displayed as people
//! write them, stored as bare numbers. Numbers from the wire are checked in `control::wire`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::JobId;

/// Count of a job's formations: 1 is the first, 0 the time before it.
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

    /// The next formation's; saturates.
    #[must_use]
    pub const fn next(self) -> Self {
        Generation(self.0.saturating_add(1))
    }

    /// The previous formation's; saturates at 0.
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

/// Identifies a rank of a job. Code that computes with ranks uses [`Rank::index`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(u32);

impl Rank {
    /// The rank that does what only one rank may do.
    pub const ZERO: Rank = Rank(0);

    /// The rank of this number.
    pub const fn new(number: u32) -> Self {
        Rank(number)
    }

    /// The rank with this index; saturates.
    pub fn at(index: usize) -> Self {
        Rank(u32::try_from(index).unwrap_or(u32::MAX))
    }

    /// All ranks of a job of `world` ranks, in order.
    pub fn all(world: usize) -> impl DoubleEndedIterator<Item = Rank> {
        (0..world).map(Rank::at)
    }

    /// Its index among the ranks of its job.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// As it is sent.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Rank {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_people_write_them_and_kept_as_numbers() {
        let formation = FormationId::new(JobId::new(7, 5), Generation::FIRST.next());
        assert_eq!(formation.to_string(), "generation 2 of job-7");
        assert_eq!(Rank::new(3).to_string(), "3");
        let kept = serde_json::to_string(&(formation.job, formation.generation, Rank::new(3))).unwrap();
        assert_eq!(kept, format!("[{},2,3]", formation.job.bits()));
        let read: (JobId, Generation, Rank) = serde_json::from_str(&kept).unwrap();
        assert_eq!(read, (formation.job, formation.generation, Rank::new(3)));
    }

    #[test]
    fn formations_of_a_job_sort_by_their_generation_and_the_first_has_none_before_it() {
        let [one, other] = [1, 2].map(|number| JobId::new(number, 0));
        let mut all = [(other, 1), (one, 3), (one, 2)]
            .map(|(job, number)| FormationId::new(job, Generation::new(number)));
        all.sort();
        assert_eq!(all.map(|id| (id.job, id.generation.number())), [(one, 2), (one, 3), (other, 1)]);
        assert_eq!(Generation::FIRST.previous(), Generation::default());
        assert_eq!(Generation::default().previous(), Generation::default());
        assert_eq!(Generation::new(u32::MAX).next(), Generation::new(u32::MAX));
    }

    #[test]
    fn ranks_are_counted_from_zero() {
        assert_eq!(Rank::all(3).collect::<Vec<_>>(), [Rank::ZERO, Rank::new(1), Rank::new(2)]);
        assert!(
            Rank::all(9).enumerate().all(|(index, rank)| rank.index() == index && rank == Rank::at(index))
        );
    }
}
