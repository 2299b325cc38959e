//! Training steps over which the tests beside it run: schedules, layouts, and who reads the embedding.

use contraflow_runtime::schedule::{
    LayerKind, Mode, Plan, Program, ScheduleKind, Sharding, StageLayout, StepPrograms, buckets, check_step,
    lower, pair_up,
};
use contraflow_runtime::topology::Topology;

/// What may read the embedding beside the first stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Multi-token prediction.
    Mtp,
    /// A head that is tied to it.
    Head,
    /// Both, and with them the head of multi-token prediction.
    Both,
}

/// Eight layers, the first of them dense, the head and what `readers` says in the last stage.
fn layouts(stages: usize, readers: Readers) -> Vec<StageLayout> {
    let first = |stage: usize| 8 * stage / stages;
    let layout = |stage: usize| StageLayout {
        first_layer: first(stage),
        layers: (first(stage)..first(stage + 1))
            .map(|layer| if layer < 3 { LayerKind::Dense } else { LayerKind::Moe })
            .collect(),
        embedding: stage == 0,
        head: stage + 1 == stages,
        tied: stage + 1 == stages && readers != Readers::Mtp,
        mtp_layer: (stage + 1 == stages && readers != Readers::Head).then_some(8),
    };
    (0..stages).map(layout).collect()
}

/// Pipeline, expert and data ranks.
pub type Axes = (usize, usize, usize);

/// The layouts in which `tests/cluster/topology.rs` trains.
const AXES: [(ScheduleKind, &[Axes]); 5] = [
    (ScheduleKind::Dualpipe, &[(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::Dualpipev, &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::OneFOneB, &[(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::Zb1p, &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::Interleaved(2), &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
];

pub struct Case {
    pub what: String,
    pub plan: Plan,
    pub layouts: Vec<StageLayout>,
    pub topology: Topology,
    pub sharding: Sharding,
    pub readers: Readers,
}

impl Case {
    pub fn new(kind: ScheduleKind, axes: Axes, micro_batches: usize, overlap: bool) -> Case {
        Case::with_readers(kind, axes, micro_batches, overlap, Readers::Mtp)
    }

    pub fn with_readers(
        kind: ScheduleKind,
        axes: Axes,
        micro_batches: usize,
        overlap: bool,
        readers: Readers,
    ) -> Case {
        let (pipeline, expert, data) = axes;
        let topology = Topology { pipeline, expert, data };
        let (plan, _) = kind.plan(pipeline, micro_batches, Mode::Train).unwrap();
        let layouts = layouts(plan.stages, readers);
        let plan = if expert > 1 { pair_up(plan, &layouts) } else { plan };
        let buckets = buckets(&plan.placement, &layouts, &topology);
        let what = format!("{kind}, {axes:?}, {micro_batches} micro-batches, overlap {overlap}, {readers:?}");
        let sharding = Sharding { buckets, replicated: true, overlap };
        Case { what, plan, layouts, topology, sharding, readers }
    }

    pub fn step(&self) -> StepPrograms {
        StepPrograms::new(&lower(&self.plan, Some(&self.layouts), self.topology.expert), &self.sharding)
    }
}

/// Every layout, with enough micro-batches for its schedule and with too few.
pub fn cases_with(overlap: bool) -> Vec<Case> {
    let with = |(kind, axes): (ScheduleKind, &[Axes])| {
        let readers = [Readers::Mtp, Readers::Head, Readers::Both];
        let sizes = axes.iter().flat_map(|&axes| [1, 8, 16].map(|micro_batches| (axes, micro_batches)));
        let sizes = sizes.flat_map(|size| readers.map(|readers| (size, readers)));
        let case = |((axes, size), readers)| Case::with_readers(kind, axes, size, overlap, readers);
        sizes.map(case).collect::<Vec<_>>()
    };
    AXES.into_iter().flat_map(with).collect()
}

/// The same, with and without overlap.
pub fn cases() -> Vec<Case> {
    [true, false].into_iter().flat_map(cases_with).collect()
}

/// Dualpipe on four pipeline ranks: every stage on two of them, the embedding on two.
pub fn mirrored() -> Case {
    Case::new(ScheduleKind::Dualpipe, (4, 2, 1), 8, true)
}

/// The programs of a step's first half, by rank, where there is an update of the step before to be gathered.
pub fn first_half(step: &mut StepPrograms) -> &mut Vec<Program> {
    match step.overlap {
        true => &mut step.gathering,
        false => &mut step.gradients,
    }
}

pub fn error_text(case: &Case, step: &StepPrograms) -> Vec<String> {
    let faults = check_step(&case.plan, step).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

/// Whether each piece of text is in one of the faults.
pub fn assert_reports(faults: &[String], expected: &[&str]) {
    for text in expected {
        assert!(faults.iter().any(|fault| fault.contains(text)), "expected `{text}` in {faults:?}");
    }
}
