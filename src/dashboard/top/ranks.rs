//! The ranks of a run as a table has them: their place on the axes, what they measured, their row of the timeline. Pure.

use std::collections::BTreeMap;

use contraflow_runtime::topology::Topology;

use super::answers::{Place, Row};
use super::strip::busy_and_idle;
use super::view::Run;

/// Most ranks of a table: what another process says of its layout is not trusted.
const MAX_RANKS: usize = 1 << 16;

/// A rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Rank<'a> {
    /// Within the job.
    pub number: usize,
    /// Its coordinate along the expert axis.
    pub expert: Option<usize>,
    /// Where it is; empty in one process.
    pub node: String,
    /// How long it works in a step. **Units**: seconds.
    pub busy: Option<f64>,
    /// How long it waits in a step. **Units**: seconds.
    pub waits: Option<f64>,
    /// Its share of what its process has in memory, which all ranks of the run in that process have alike. **Units**: bytes.
    pub memory: Option<u64>,
    /// What it needs by the plan. **Units**: bytes.
    pub planned: Option<u64>,
    /// Whether the orchestrator says that it holds the others up.
    pub is_slow: bool,
    /// Whether it works longest of all.
    pub is_slowest: bool,
    /// Its row of the timeline, or that of its place in the pipeline.
    pub row: Option<&'a Row>,
}

/// All of them, in order.
pub fn ranks(run: &Run) -> Vec<Rank<'_>> {
    let layout = run.overview.layout.as_ref();
    let topology =
        layout.map(|layout| Topology { pipeline: layout.pipeline, expert: layout.expert, data: layout.data });
    let world = |topology: &Topology| {
        let world = topology.pipeline.checked_mul(topology.expert)?.checked_mul(topology.data)?;
        (1..=MAX_RANKS).contains(&world).then_some(world)
    };
    let topology = topology.filter(|topology| world(topology).is_some());
    let places = run.job.as_ref().map(|job| &job.ranks);
    // A job without places has no ranks, whatever its recipe says.
    let number = places.map_or_else(
        || topology.map_or(0, |topology| topology.world()),
        |places| places.len().min(MAX_RANKS),
    );
    // On other axes, as elastic jobs are, a rank holds something else.
    let is_as_planned = topology.is_some_and(|topology| topology.world() == number);
    let of_process = run.overview.last("memory_bytes").map(|bytes| bytes as u64);
    let mut sharing: BTreeMap<&str, u64> = BTreeMap::new();
    for Place { worker, .. } in places.into_iter().flatten().take(number) {
        *sharing.entry(worker).or_default() += 1;
    }
    let mut all: Vec<Rank> = (0..number)
        .map(|place| {
            let placed = places.and_then(|places| places.get(place));
            let rank = placed.map_or(place, |placed| placed.rank);
            let at = topology
                .filter(|topology| rank < topology.world())
                .map(|topology| topology.coordinates(rank));
            let rows = run.pipeline.as_ref().map_or(&[][..], |pipeline| &pipeline.ranks);
            let is_own = topology.is_some_and(|topology| rows.len() == topology.world());
            let row = if is_own { rows.get(rank) } else { at.and_then(|at| rows.get(at.pipeline)) };
            // Times of a plan are no seconds.
            let timed = run.pipeline.as_ref().filter(|pipeline| is_own && &*pipeline.unit == "s");
            let recorded = timed.zip(row).map(|(pipeline, row)| busy_and_idle(row, pipeline.makespan));
            let measured = match placed {
                Some(placed) => {
                    Some((placed.busy_seconds, placed.waited_seconds)).filter(|(busy, _)| *busy > 0.0)
                }
                None => recorded,
            };
            let memory = match placed {
                Some(placed) => sharing.get(&*placed.worker).map(|ranks| placed.memory_bytes / ranks),
                None => of_process.map(|bytes| bytes / number as u64),
            };
            Rank {
                number: rank,
                expert: at.map(|at| at.expert),
                node: placed.map_or_else(String::new, |placed| placed.node.to_string()),
                busy: measured.map(|(busy, _)| busy),
                waits: measured.map(|(_, waits)| waits),
                memory: memory.filter(|bytes| *bytes > 0),
                planned: at
                    .and_then(|at| run.overview.planned_ranks.get(at.pipeline))
                    .filter(|_| is_as_planned)
                    .copied(),
                is_slow: placed.is_some_and(|placed| placed.slow),
                is_slowest: false,
                row,
            }
        })
        .collect();
    let busy = |rank: &Rank| rank.busy.unwrap_or(0.0);
    if all.len() > 1
        && let Some(slowest) = (0..all.len()).max_by(|a, b| busy(&all[*a]).total_cmp(&busy(&all[*b])))
    {
        all[slowest].is_slowest = busy(&all[slowest]) > 0.0;
    }
    all
}

/// Which columns a table of ranks has, and how many cells are left for a strip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// All that are always known.
    pub is_wide: bool,
    /// The node.
    pub has_nodes: bool,
    /// Memory beside its estimate.
    pub has_memory: bool,
    /// Cells of a strip.
    pub strip: usize,
}

impl Columns {
    /// In so many cells; `has_nodes`, `has_memory`: whether there is something to show.
    pub fn fitting(width: usize, has_nodes: bool, has_memory: bool) -> Self {
        const NARROW: usize = 5 + 9 + 9;
        const WIDE: usize = NARROW + 8 + 7 + 9;
        const NODE: usize = 11;
        const MEMORY: usize = 24;
        const STRIP: usize = 20;
        let is_wide = width >= WIDE + STRIP;
        let wide = WIDE + if has_nodes { NODE } else { 0 };
        let has_memory = has_memory && width >= wide + MEMORY + STRIP;
        let taken = match (is_wide, has_memory) {
            (false, _) => NARROW,
            (true, false) => wide,
            (true, true) => wide + MEMORY,
        };
        Columns { is_wide, has_nodes: has_nodes && is_wide, has_memory, strip: width.saturating_sub(taken) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dashboard::top::answers::{Figure, Job, Lane, Layout, Op, Pipeline};

    fn run(rows: usize) -> Run {
        let row = |number: usize| Row {
            stages: Some(vec![number as u64]),
            lanes: vec![Lane {
                name: "compute".into(),
                ops: vec![Op { s: 0.0, e: 1.0 + (number % 3) as f64, c: Some(0) }],
            }],
        };
        let mut run = Run::default();
        run.overview.layout = Some(Layout { pipeline: 2, expert: 2, data: 1, ..Layout::default() });
        let ranks = (0..rows).map(row).collect();
        run.pipeline = Some(Pipeline { makespan: 4.0, unit: "s".into(), ranks, ..Pipeline::default() });
        run
    }

    #[test]
    fn ranks_of_one_process_have_the_times_of_their_own_rows_and_the_longest_is_marked() {
        let run = run(4);
        let all = ranks(&run);
        let busy: Vec<_> =
            all.iter().map(|rank| (rank.expert, rank.busy, rank.waits, rank.is_slowest)).collect();
        let expected = [(0, 1.0, false), (1, 2.0, false), (0, 3.0, true), (1, 1.0, false)];
        assert_eq!(
            busy,
            expected.map(|(expert, busy, slowest)| (Some(expert), Some(busy), Some(4.0 - busy), slowest))
        );
    }

    #[test]
    fn ranks_of_a_cluster_have_what_it_measured_and_the_row_of_their_place_in_the_pipeline() {
        let mut run = run(2);
        let place = |rank, busy_seconds| Place {
            rank,
            busy_seconds,
            node: "n".into(),
            slow: rank == 3,
            ..Place::default()
        };
        let places = vec![place(0, 0.5), place(1, 0.0), place(2, 0.25), place(3, 0.25)];
        run.job = Some(Job { ranks: places, ..Job::default() });
        let all = ranks(&run);
        let stages: Vec<_> = all.iter().map(|rank| rank.row.unwrap().stages.clone().unwrap()).collect();
        assert_eq!(stages, [[0], [0], [1], [1]]);
        assert_eq!(
            all.iter().map(|rank| rank.busy).collect::<Vec<_>>(),
            [Some(0.5), None, Some(0.25), Some(0.25)]
        );
        assert_eq!(
            all.iter().map(|rank| (rank.is_slow, rank.is_slowest)).collect::<Vec<_>>(),
            [(false, true), (false, false), (false, false), (true, false)]
        );
    }

    #[test]
    fn a_layout_that_cannot_be_is_none() {
        for (pipeline, expert, data) in [(0, 1, 1), (usize::MAX, 2, 1), (1 << 10, 1 << 10, 1)] {
            let mut run = run(2);
            run.overview.layout = Some(Layout { pipeline, expert, data, ..Layout::default() });
            assert_eq!(ranks(&run), []);
        }
    }

    #[test]
    fn memory_is_a_ranks_share_of_its_process_and_stands_beside_what_the_plan_says_of_its_place() {
        let mut run = run(4);
        run.overview.planned_ranks = vec![300, 200];
        let of = |run: &Run| ranks(run).iter().map(|rank| (rank.memory, rank.planned)).collect::<Vec<_>>();
        assert_eq!(of(&run), [300, 300, 200, 200].map(|planned| (None, Some(planned))));
        run.overview.figures = vec![Figure { key: "memory_bytes".into(), last: Some(1_000.0) }];
        assert_eq!(of(&run), [300, 300, 200, 200].map(|planned| (Some(250), Some(planned))));
        // Two ranks share a worker.
        let place = |rank, worker: &str, memory_bytes| Place {
            rank,
            worker: worker.into(),
            memory_bytes,
            ..Place::default()
        };
        let ranks = vec![place(0, "a", 500), place(1, "a", 500), place(2, "b", 220), place(3, "c", 0)];
        run.job = Some(Job { ranks, ..Job::default() });
        let memory = [Some(250), Some(250), Some(220), None];
        assert_eq!(of(&run).into_iter().map(|(memory, _)| memory).collect::<Vec<_>>(), memory);
    }

    #[test]
    fn a_narrow_terminal_leaves_out_memory_first_and_never_more_than_there_is_is_taken() {
        let of = |width| Columns::fitting(width, true, true);
        assert_eq!((of(200).has_memory, of(200).has_nodes, of(200).is_wide), (true, true, true));
        assert_eq!((of(101).has_memory, of(101).has_nodes, of(101).is_wide), (false, true, true));
        assert_eq!((of(60).has_memory, of(60).has_nodes, of(60).is_wide), (false, false, false));
        assert!((0..300).all(|width| of(width).strip <= width));
        assert!((102..300).all(|width| of(width).strip >= 20));
    }
}
