//! The layout of a job that has lost ranks for good and may continue with fewer.

use std::cmp::Reverse;

use contraflow_runtime::topology::Topology;

/// The largest layout for at most `available` and at least `min_ranks` ranks which `fits` the recipe. Fewer data ranks are
/// tried first; fewer expert ranks only where that is not enough, fewer pipeline ranks only where nothing else is. Of two
/// equally large ones the one with more pipeline ranks, then with more expert ranks.
pub fn shrink(
    topology: &Topology,
    available: usize,
    min_ranks: usize,
    fits: &mut dyn FnMut(&Topology) -> bool,
) -> Option<Topology> {
    let Topology { pipeline, expert, data } = *topology;
    let mut largest = |pipelines: std::ops::RangeInclusive<usize>,
                       experts: std::ops::RangeInclusive<usize>| {
        let all = pipelines.flat_map(|pipeline| experts.clone().map(move |expert| (pipeline, expert)));
        let all = all
            .flat_map(|(pipeline, expert)| (1..=data).map(move |data| Topology { pipeline, expert, data }));
        let mut all: Vec<Topology> =
            all.filter(|topology| (min_ranks.max(1)..=available).contains(&topology.world())).collect();
        // To see whether one fits takes long: the largest first.
        all.sort_by_key(|topology| Reverse((topology.world(), topology.pipeline, topology.expert)));
        all.into_iter().find(&mut *fits)
    };
    largest(pipeline..=pipeline, expert..=expert)
        .or_else(|| largest(pipeline..=pipeline, 1..=expert))
        .or_else(|| largest(1..=pipeline, 1..=expert))
}
