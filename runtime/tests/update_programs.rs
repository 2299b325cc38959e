//! The update in the programs of a step: proved for every schedule and layout, and refused wherever two ranks would not meet.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::schedule::{
    Bucket, Component, Contents, Lane, LayerKind, Mode, Op, Pass, Plan, Program, ScheduleKind, Sharding,
    StageLayout, StepPrograms, Work, buckets, check_step, lower, walk,
};
use contraflow_runtime::topology::Topology;
use proptest::prelude::*;

/// Eight layers, the first of them dense, head and multi-token prediction in the last stage.
fn layouts(stages: usize) -> Vec<StageLayout> {
    let first = |stage: usize| 8 * stage / stages;
    let layout = |stage: usize| StageLayout {
        first_layer: first(stage),
        layers: (first(stage)..first(stage + 1))
            .map(|layer| if layer < 3 { LayerKind::Dense } else { LayerKind::Moe })
            .collect(),
        embedding: stage == 0,
        head: stage + 1 == stages,
        mtp_layer: (stage + 1 == stages).then_some(8),
    };
    (0..stages).map(layout).collect()
}

/// Pipeline, expert and data ranks.
type Axes = (usize, usize, usize);

/// The layouts in which `tests/cluster/topology.rs` trains.
const AXES: [(ScheduleKind, &[Axes]); 3] = [
    (ScheduleKind::Dualpipe, &[(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::Dualpipev, &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
    (ScheduleKind::OneFOneB, &[(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]),
];

struct Case {
    what: String,
    plan: Plan,
    layouts: Vec<StageLayout>,
    topology: Topology,
    sharding: Sharding,
}

impl Case {
    fn new(kind: ScheduleKind, axes: Axes, micro_batches: usize) -> Case {
        let (pipeline, expert, data) = axes;
        let topology = Topology { pipeline, expert, data };
        let (plan, _) = kind.plan(pipeline, micro_batches, Mode::Train).unwrap();
        let layouts = layouts(plan.stages);
        let buckets = buckets(&plan.placement, &layouts, &topology);
        let what = format!("{kind}, {axes:?}, {micro_batches} micro-batches");
        Case { what, plan, layouts, topology, sharding: Sharding { buckets, replicated: true } }
    }

    fn step(&self) -> StepPrograms {
        StepPrograms::new(lower(&self.plan, Some(&self.layouts), self.topology.expert), &self.sharding)
    }
}

/// Every layout, with enough micro-batches for its schedule and with too few.
fn cases() -> Vec<Case> {
    let with = |(kind, axes): (ScheduleKind, &[Axes])| {
        let sizes = axes.iter().flat_map(|&axes| [1, 8, 16].map(|micro_batches| (axes, micro_batches)));
        sizes.map(move |(axes, micro_batches)| Case::new(kind, axes, micro_batches)).collect::<Vec<_>>()
    };
    AXES.into_iter().flat_map(with).collect()
}

/// Dualpipe on four pipeline ranks: every stage on two of them, the embedding on two.
fn mirrored() -> Case {
    Case::new(ScheduleKind::Dualpipe, (4, 2, 1), 8)
}

fn said(case: &Case, step: &StepPrograms) -> Vec<String> {
    let faults = check_step(&case.plan, step).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

/// Whether each piece of text is in one of the faults.
fn assert_says(faults: &[String], expected: &[&str]) {
    for text in expected {
        assert!(faults.iter().any(|fault| fault.contains(text)), "expected `{text}` in {faults:?}");
    }
}

#[test]
fn every_layout_has_a_sound_step() {
    for case in cases() {
        let step = case.step();
        check_step(&case.plan, &step).unwrap_or_else(|faults| panic!("{}: {}", case.what, faults[0]));
        let timeline = walk(&step.whole(), |_, op| if op.lane == Lane::Compute { 1.0 } else { 0.5 }).unwrap();
        for (program, spans) in step.whole().iter().zip(&timeline.spans) {
            assert_eq!(program.ops.len(), spans.len());
            assert!(spans.iter().all(|span| span.end <= timeline.makespan), "{}", case.what);
        }
    }
}

/// The parameters that an operation computes a gradient of, told by the arithmetic of the model: (bucket's contents, stage).
fn gradients_of(work: Work, embedding_stage: usize) -> Vec<(Contents, usize)> {
    let Work::Component { pass, chunk, component, .. } = work else { return Vec::new() };
    let dense = (Contents::Dense, chunk.stage);
    match (component, pass) {
        // Norms and gate with the input, matrices with the weight part.
        (Component::Attention, Pass::BackwardInput | Pass::BackwardWeight) => vec![dense],
        (Component::SharedExpert, Pass::BackwardWeight) => vec![dense],
        (Component::Experts, Pass::BackwardWeight) => vec![(Contents::Experts, chunk.stage)],
        // The loss makes the head's; its norm follows.
        (Component::Head | Component::MtpHead, Pass::Forward | Pass::BackwardInput) => vec![dense],
        (Component::MtpJoin, Pass::BackwardInput) => vec![dense, (Contents::Embedding, embedding_stage)],
        (Component::MtpJoin, Pass::BackwardWeight) => vec![dense],
        (Component::Embedding, Pass::BackwardInput) => vec![(Contents::Embedding, embedding_stage)],
        _ => Vec::new(),
    }
}

#[test]
fn a_bucket_is_reduced_when_its_last_gradient_is_there_and_gathered_when_it_is_updated() {
    for case in cases() {
        let step = case.step();
        let timeline = walk(&step.whole(), |rank, op| 1.0 + (rank + op.after.len()) as f64 * 0.25).unwrap();
        for (rank, (program, spans)) in step.whole().iter().zip(&timeline.spans).enumerate() {
            let span = |work: Work| {
                let found = program.ops.iter().position(|op| op.work == work);
                found.map(|id| spans[id])
            };
            for bucket in &program.buckets {
                let number = bucket.number;
                let ends = program.ops.iter().zip(spans).filter(|(op, _)| {
                    gradients_of(op.work, 0).contains(&(bucket.contents, bucket.stages[0]))
                });
                let last = ends.map(|(_, span)| span.end).fold(0.0, f64::max);
                let what = format!("{}: bucket {number} on rank {rank}", case.what);
                let order = [
                    span(Work::Pack { bucket: number }),
                    span(Work::Reduce { bucket: number }),
                    span(Work::GradNorm { bucket: number }),
                    span(Work::Totals),
                    span(Work::Apply { bucket: number }),
                    span(Work::Gather { bucket: number }),
                    span(Work::Unpack { bucket: number }),
                ];
                let present: Vec<_> = order.into_iter().flatten().collect();
                assert_eq!(present.len(), if bucket.copies > 1 { 7 } else { 3 }, "{what}");
                // With few micro-batches a mirror may have none of its stage.
                assert!(last > 0.0 || case.plan.micro_batches == 1, "{what} has no gradient");
                assert!(last <= present[0].start, "{what} goes before its last gradient");
                assert!(present.windows(2).all(|pair| pair[0].end <= pair[1].start), "{what}: {present:?}");
            }
        }
    }
}

#[test]
fn the_ranks_of_a_bucket_are_those_whose_stages_it_is_of() {
    let case = mirrored();
    let of = |contents, stage: usize| {
        let found = |bucket: &&Bucket| bucket.contents == contents && bucket.stages[0] == stage;
        case.sharding.buckets.iter().find(found).unwrap()
    };
    // Rank 0 holds stages 0 and 3, rank 1 stages 1 and 2, and so back.
    let embedding = of(Contents::Embedding, 0);
    assert_eq!(
        (&embedding.stages[..], &embedding.positions[..], embedding.copies),
        (&[0, 3][..], &[0, 3][..], 4)
    );
    assert_eq!(embedding.ranks(&case.topology, 1), [0, 1, 6, 7]);
    let experts = of(Contents::Experts, 2);
    assert_eq!((&experts.positions[..], experts.copies), (&[1, 2][..], 2));
    assert_eq!(experts.ranks(&case.topology, 1), [3, 5]);
    let numbers: Vec<usize> = case.sharding.buckets.iter().map(|bucket| bucket.number).collect();
    // Stage 0 has dense layers only.
    assert_eq!(numbers, [0, 1, 3, 5, 6, 8, 9, 11]);
    let one_way = Case::new(ScheduleKind::OneFOneB, (2, 1, 2), 4);
    let groups: Vec<_> =
        one_way.sharding.buckets.iter().map(|bucket| bucket.ranks(&one_way.topology, 0)).collect();
    // Dense of either stage, the embedding that both use, experts.
    assert_eq!(groups, [vec![0, 1], vec![0, 1, 2, 3], vec![0, 1], vec![2, 3], vec![2, 3]]);
}

/// Where a program does something.
fn place(program: &Program, work: Work) -> usize {
    program.ops.iter().position(|op| op.work == work).unwrap()
}

#[test]
fn two_ranks_that_reduce_two_buckets_in_different_orders_never_meet() {
    let case = mirrored();
    let (one, other) = (Work::Reduce { bucket: 0 }, Work::Reduce { bucket: 9 });
    for rank in [0, 3] {
        let mut step = case.step();
        let ops = &mut step.gradients[rank].ops;
        let (first, second) = (
            ops.iter().position(|op| op.work == one).unwrap(),
            ops.iter().position(|op| op.work == other).unwrap(),
        );
        // Both wait for what both waited for, so that only the order differs.
        let packs = [ops[first].after.clone(), ops[second].after.clone()].concat();
        (ops[first].work, ops[second].work) = (other, one);
        ops[second].after = packs.clone();
        ops[first].after = packs.into_iter().filter(|&earlier| earlier < first).collect();
        let deadlock = walk(&step.gradients, |_, _| 1.0).unwrap_err();
        let text = deadlock.to_string();
        let (own, peer) = if rank == 0 { (other, one) } else { (one, other) };
        assert!(text.contains(&format!("rank 0, Collective lane, update: {own} waits for rank 3")), "{text}");
        assert!(
            text.contains(&format!("rank 3, Collective lane, update: {peer} waits for rank 0")),
            "{text}"
        );
        let faults = said(&case, &step);
        assert_says(&faults, &["deadlock: reduce-scatter of bucket 9 waits for rank"]);
    }
}

#[test]
fn gathers_in_different_orders_are_refused_too() {
    let case = mirrored();
    let mut step = case.step();
    let ops = &mut step.update[2].ops;
    let places: Vec<usize> =
        (0..ops.len()).filter(|&id| matches!(ops[id].work, Work::Gather { .. })).collect();
    let (first, second) = (ops[places[0]].work, ops[places[1]].work);
    (ops[places[0]].work, ops[places[1]].work) = (second, first);
    assert!(walk(&step.update, |_, _| 1.0).is_err());
    assert_says(&said(&case, &step), &["deadlock: all-gather of bucket 3 waits for rank"]);
}

#[test]
fn a_deadlock_names_the_collective_and_who_is_missing() {
    let case = mirrored();
    let mut step = case.step();
    let totals = place(&step.gradients[2], Work::Totals);
    step.gradients[2].ops.remove(totals);
    let deadlock = walk(&step.gradients, |_, _| 1.0).unwrap_err();
    let text = deadlock.to_string();
    for rank in [0, 1, 3] {
        let expected =
            format!("rank {rank}, Collective lane, update: all-reduce of the step's totals waits for rank 2");
        assert!(text.contains(&expected), "{text}");
    }
    assert_says(&said(&case, &step), &["deadlock: all-reduce of the step's totals waits for rank 2"]);
    // Two that are late because they wait for each other, and one that has come.
    let mut step = case.step();
    for rank in [1, 2] {
        let ops = &mut step.gradients[rank].ops;
        let totals = place(&Program::of(ops.clone()), Work::Totals);
        let op = ops[totals].clone();
        let peer = 3 - rank;
        let wait = Op { lane: Lane::Receive(peer), work: ops[0].work, after: Vec::new(), action: None };
        ops[totals] = wait;
        ops.push(Op { after: vec![totals], ..op });
    }
    let text = walk(&step.gradients, |_, _| 1.0).unwrap_err().to_string();
    assert!(text.contains("all-reduce of the step's totals waits for ranks 1, 2"), "{text}");
}

#[test]
fn a_bucket_that_is_reduced_too_early_is_a_fault() {
    let case = mirrored();
    let mut step = case.step();
    let ops = &mut step.gradients[1].ops;
    let pack = ops.iter().position(|op| matches!(op.work, Work::Pack { .. })).unwrap();
    // It changes places with the last weight gradient.
    let work = ops[pack].work;
    ops.swap(pack - 1, pack);
    let number = work.bucket().unwrap();
    let faults = said(&case, &step);
    assert_says(&faults, &[&format!("packing of the gradients of bucket {number} does not wait for")]);

    let mut step = case.step();
    let ops = &mut step.gradients[1].ops;
    let reduce = ops.iter().position(|op| matches!(op.work, Work::Reduce { .. })).unwrap();
    ops[reduce].after.clear();
    let text = format!("{} does not wait for packing of the gradients", ops[reduce].work);
    assert_says(&said(&case, &step), &[&text]);

    let mut step = case.step();
    let ops = &mut step.update[1].ops;
    let gather = ops.iter().position(|op| matches!(op.work, Work::Gather { .. })).unwrap();
    ops[gather].after.clear();
    let text = format!("{} does not wait for AdamW on bucket", ops[gather].work);
    assert_says(&said(&case, &step), &[&text]);
}

#[test]
fn ranks_that_do_not_agree_on_who_holds_a_bucket_are_refused() {
    let case = mirrored();
    let mut step = case.step();
    step.gradients[0].buckets[0].positions = vec![0];
    assert_says(&said(&case, &step), &["ranks 0, 3 do not agree on who holds bucket 0"]);
    let mut step = case.step();
    step.gradients[0].buckets.remove(0);
    let faults = said(&case, &step);
    assert_says(&faults, &["reduce-scatter of bucket 0: the rank does not hold that bucket"]);
}

fn any_case() -> impl Strategy<Value = Case> {
    (0..3usize, prop::sample::select(vec![(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]), 1..12usize)
        .prop_map(|(kind, axes, micro_batches)| Case::new(ScheduleKind::ALL[kind], axes, micro_batches))
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Lost, doubled, on the wrong lane, waiting for what never ends.
    #[test]
    fn a_tampered_update_is_a_fault(
        case in any_case(),
        half: bool,
        rank: prop::sample::Index,
        op: prop::sample::Index,
        how in 0..4,
    ) {
        let mut step = case.step();
        let programs = if half { &mut step.gradients } else { &mut step.update };
        let rank = rank.index(programs.len());
        let ops = &mut programs[rank].ops;
        let of_update = |id: &usize| {
            !matches!(ops[*id].work, Work::Component { .. } | Work::Send { .. } | Work::Receive { .. })
        };
        let places: Vec<usize> = (0..ops.len()).filter(of_update).collect();
        let at = places[op.index(places.len())];
        match how {
            0 => {
                ops.remove(at);
                for op in ops.iter_mut() {
                    op.after.retain(|&earlier| earlier != at);
                    op.after.iter_mut().filter(|earlier| **earlier > at).for_each(|earlier| *earlier -= 1);
                }
            }
            1 => ops.push(ops[at].clone()),
            2 => ops[at].lane = Lane::Expert,
            _ => ops[at].after.push(usize::MAX),
        }
        prop_assert!(!said(&case, &step).is_empty());
    }
}

#[test]
fn members_with_one_coordinate_run_one_program() {
    // What is proved of pipeline ranks holds for all: neither expert nor data coordinate is in a program.
    let mut programs: BTreeMap<(usize, usize), BTreeSet<String>> = BTreeMap::new();
    for data in [2, 3] {
        let case = Case::new(ScheduleKind::Dualpipe, (2, 2, data), 8);
        for (rank, program) in case.step().whole().iter().enumerate() {
            let ops: Vec<String> = program.ops.iter().map(|op| op.work.to_string()).collect();
            programs.entry((2, rank)).or_default().insert(ops.join("\n"));
        }
    }
    assert!(programs.values().all(|texts| texts.len() == 1));
}
