//! The ranks of a run as a table has them: their place on the axes, what they measured, their row of the timeline. Pure.

use contraflow_runtime::topology::Topology;

use super::answers::Row;
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
            Rank {
                number: rank,
                expert: at.map(|at| at.expert),
                node: placed.map_or_else(String::new, |placed| placed.node.to_string()),
                busy: measured.map(|(busy, _)| busy),
                waits: measured.map(|(_, waits)| waits),
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

/// Whether there is room for all columns, and how many cells are left for a strip.
pub fn width_of_strip(width: usize, has_nodes: bool) -> (bool, usize) {
    const NARROW: usize = 5 + 9 + 9;
    const WIDE: usize = NARROW + 8 + 7 + 9;
    let is_wide = width >= WIDE + 20;
    let columns = if is_wide { WIDE + if has_nodes { 11 } else { 0 } } else { NARROW };
    (is_wide, width.saturating_sub(columns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dashboard::top::answers::{Job, Lane, Layout, Op, Pipeline, Place};

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
}
