//! What the runs of a study come to: figures of each arm, and how far they are from those of the first. Knows no question.

use super::TrainingRun;
use super::curve::{Gap, Statistic, gap};

/// The runs of a study that are there.
pub(in crate::bench) struct Runs {
    /// By arm, then by seed; the first arm is what the others are compared with.
    pub(super) by_arm: Vec<Vec<Option<TrainingRun>>>,
}

impl Runs {
    /// The runs of an arm.
    pub(in crate::bench) fn of(&self, arm: usize) -> impl Iterator<Item = &TrainingRun> {
        self.by_arm[arm].iter().flatten()
    }

    /// The runs of an arm, each with that of the first arm that has the same seed, where both are there.
    pub(super) fn pairs(&self, arm: usize) -> impl Iterator<Item = (&TrainingRun, &TrainingRun)> {
        let seeds = self.by_arm[arm].iter().zip(&self.by_arm[0]);
        seeds.filter_map(|(run, first)| Some((run.as_ref()?, first.as_ref()?)))
    }

    /// A figure of an arm, over its seeds.
    pub(in crate::bench) fn figure(
        &self,
        arm: usize,
        figure: impl Fn(&TrainingRun) -> f64,
    ) -> Option<Statistic> {
        Statistic::of(self.of(arm).map(figure))
    }

    /// By seed, a figure of an arm minus that of the first arm.
    pub(in crate::bench) fn difference(
        &self,
        arm: usize,
        figure: impl Fn(&TrainingRun) -> f64,
    ) -> Option<Statistic> {
        Statistic::of(self.pairs(arm).map(|(run, first)| figure(run) - figure(first)))
    }

    /// By seed, how far the loss of an arm is from that of the first at the end.
    pub(in crate::bench) fn gaps(&self, arm: usize) -> Vec<Gap> {
        self.pairs(arm).map(|(run, first)| gap(&run.loss, &first.loss)).collect()
    }
}
