//! The layout of a job that may have fewer ranks than its recipe names, or more.

use std::cmp::Reverse;
use std::ops::RangeInclusive;

use contraflow_runtime::topology::Topology;

/// The layout for at most `available` and at least `least` ranks, of those that `fits` the recipe, whose own is `base`. As many data
/// ranks as there is room for; where data ranks alone cannot use it, more expert ranks, then more pipeline ranks: what a rank holds
/// of the model changes as little as can be. Where there is no room for `base`: fewer data ranks first, fewer expert ranks only where
/// that is not enough, fewer pipeline ranks only where nothing else is.
pub fn layout(
    base: &Topology,
    available: usize,
    least: usize,
    fits: &mut dyn FnMut(&Topology) -> bool,
) -> Option<Topology> {
    if available < base.world() {
        return shrink(base, available, least, fits);
    }
    let mut best = *base;
    for (axis, with) in AXES {
        let others = best.world() / axis(&best);
        let larger = (axis(&best) + 1..=available / others).rev().map(|ranks| with(best, ranks));
        best = larger.into_iter().find(&mut *fits).unwrap_or(best);
    }
    Some(best).filter(|best| best.world() >= least)
}

/// The largest of these layouts for at most `available` and at least `least` ranks; of equally large ones the one that changes least of
/// what a rank of `base` holds: the number of data ranks first, then of expert ranks, then of pipeline ranks.
pub fn named(base: &Topology, layouts: &[Topology], available: usize, least: usize) -> Option<Topology> {
    let fit = layouts.iter().filter(|axes| (least.max(1)..=available).contains(&axes.world()));
    let is_kept = |axes: &Topology| (axes.pipeline == base.pipeline, axes.expert == base.expert);
    fit.max_by_key(|axes| (axes.world(), is_kept(axes), axes.pipeline, axes.expert)).copied()
}

/// An axis, and a layout with another number of ranks along it.
type Axis = (fn(&Topology) -> usize, fn(Topology, usize) -> Topology);

/// In the order in which a job grows.
const AXES: [Axis; 3] = [
    (|axes| axes.data, |axes, data| Topology { data, ..axes }),
    (|axes| axes.expert, |axes, expert| Topology { expert, ..axes }),
    (|axes| axes.pipeline, |axes, pipeline| Topology { pipeline, ..axes }),
];

/// The largest layout for at most `available` and at least `min_ranks` ranks which `fits` the recipe. Fewer data ranks are
/// tried first; fewer expert ranks only where that is not enough, fewer pipeline ranks only where nothing else is. Of two
/// equally large ones the one with more pipeline ranks, then with more expert ranks.
fn shrink(
    topology: &Topology,
    available: usize,
    min_ranks: usize,
    fits: &mut dyn FnMut(&Topology) -> bool,
) -> Option<Topology> {
    let Topology { pipeline, expert, data } = *topology;
    let mut largest = |pipelines: RangeInclusive<usize>, experts: RangeInclusive<usize>| {
        let mut all: Vec<Topology> = layouts(pipelines, experts, data)
            .filter(|topology| (min_ranks.max(1)..=available).contains(&topology.world()))
            .collect();
        // To see whether one fits takes long: the largest first.
        all.sort_by_key(|topology| Reverse((topology.world(), topology.pipeline, topology.expert)));
        all.into_iter().find(&mut *fits)
    };
    largest(pipeline..=pipeline, expert..=expert)
        .or_else(|| largest(pipeline..=pipeline, 1..=expert))
        .or_else(|| largest(1..=pipeline, 1..=expert))
}

/// The fewest ranks from `least` on that a job can be run on, with no more along any axis than `base` has; nothing if only `base` is
/// left, or not even that.
pub fn fewest(base: &Topology, least: usize, fits: &mut dyn FnMut(&Topology) -> bool) -> Option<usize> {
    let range = least.max(1)..base.world();
    let all = layouts(1..=base.pipeline, 1..=base.expert, base.data);
    let mut all: Vec<Topology> = all.filter(|topology| range.contains(&topology.world())).collect();
    all.sort_by_key(Topology::world);
    all.into_iter().find(|topology| fits(topology)).map(|topology| topology.world())
}

/// All layouts of so many ranks along each axis.
fn layouts(
    pipelines: RangeInclusive<usize>,
    experts: RangeInclusive<usize>,
    data: usize,
) -> impl Iterator<Item = Topology> {
    let columns = pipelines.flat_map(move |pipeline| experts.clone().map(move |expert| (pipeline, expert)));
    columns
        .flat_map(move |(pipeline, expert)| (1..=data).map(move |data| Topology { pipeline, expert, data }))
}
