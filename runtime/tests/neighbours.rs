//! Neighbours beside each other: sound in every schedule, of the memory that the check counts, with every sum in the order of the plan,
//! and only where they shorten the step.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, HashMap};

use contraflow_runtime::schedule::{
    Action, Chunk, Component, Lane, LayerKind, Mode, Neighbours, Op, Overlap, PairOrder, Pass, Plan, Program,
    ScheduleKind, Sharding, StageLayout, StepPrograms, Work, buckets, check, check_step, clock_by, lower,
    lower_with, pair_up, paired, text, walk,
};
use contraflow_runtime::topology::Topology;
use proptest::prelude::*;

/// What the last stage has beside its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Head,
    Mtp,
    Tied,
    TiedMtp,
}

/// Stages of these numbers of layers, the first `dense` layers of the model without experts.
fn stages(layers: &[usize], dense: usize, end: End) -> Vec<StageLayout> {
    let mut first_layer = 0;
    let last = layers.len() - 1;
    let kind = |layer: usize| if layer < dense { LayerKind::Dense } else { LayerKind::Moe };
    let stage = |(stage, &number): (usize, &usize)| {
        let range = first_layer..first_layer + number;
        first_layer += number;
        StageLayout {
            first_layer: range.start,
            layers: range.map(kind).collect(),
            embedding: stage == 0,
            head: stage == last,
            tied: stage == last && matches!(end, End::Tied | End::TiedMtp),
            mtp_layer: (stage == last && matches!(end, End::Mtp | End::TiedMtp)).then_some(100),
        }
    };
    layers.iter().enumerate().map(stage).collect()
}

/// A plan of any schedule, the fallbacks among them, with stages of any size.
fn planned() -> impl Strategy<Value = (Plan, Vec<StageLayout>)> {
    let kinds = ScheduleKind::ALL.into_iter().chain([ScheduleKind::Interleaved(3)]).collect::<Vec<_>>();
    let modes = [Mode::Train, Mode::Train, Mode::Train, Mode::ForwardOnly].to_vec();
    let ends = [End::Head, End::Mtp, End::Tied, End::TiedMtp].to_vec();
    let kind = prop::sample::select(kinds);
    let sizes = (1..7usize, 1..26usize, prop::sample::select(modes));
    (kind, sizes, prop::collection::vec(1..4usize, 24), 0..9usize, prop::sample::select(ends)).prop_map(
        |(kind, (pipeline, micro_batches, mode), layers, dense, end)| {
            let pipeline =
                if kind == ScheduleKind::Dualpipe { pipeline.next_multiple_of(2) } else { pipeline };
            let (plan, _) = kind.plan(pipeline, micro_batches, mode).unwrap();
            let stages = stages(&layers[..plan.stages], dense, end);
            (plan, stages)
        },
    )
}

/// Every set of kinds.
fn sets() -> impl Iterator<Item = Vec<Neighbours>> {
    let members = |bits: usize| {
        let kinds = Neighbours::ALL.into_iter().enumerate();
        kinds.filter(move |(place, _)| bits >> place & 1 == 1).map(|(_, kind)| kind).collect()
    };
    (0..1 << Neighbours::ALL.len()).map(members)
}

/// Whether ranks that take and give all at the ends of their actions come to the end of the plan.
fn comes_to_its_end(plan: &Plan) -> bool {
    clock_by(plan, |_| 1.0).is_ok()
}

/// What is added up in an order that decides about bits, by the arithmetic of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sum {
    /// The gradient of the embedding, and of a head that is tied to it.
    Table,
    Head,
    /// What a component adds to in a pass.
    Of(usize, Component, Option<usize>, u8),
    Loss,
    MtpLoss,
    BalanceLoss,
}

fn sums(work: Work, stages: &[StageLayout], keeps_gradients: bool) -> Vec<Sum> {
    use Component::{Attention, Embedding, Head, MtpHead, MtpJoin};
    let Work::Component { pass, chunk, layer, component } = work else { return Vec::new() };
    let of = |pass: u8| Sum::Of(chunk.stage, component, Some(layer), pass);
    let head = if stages[chunk.stage].tied { Sum::Table } else { Sum::Head };
    match (pass, component) {
        (Pass::Forward, Head) if keeps_gradients => vec![Sum::Loss, head],
        (Pass::Forward, MtpHead) if keeps_gradients => vec![Sum::MtpLoss, head],
        (Pass::Forward, Head) => vec![Sum::Loss],
        (Pass::Forward, MtpHead) => vec![Sum::MtpLoss],
        (Pass::Forward, _) => Vec::new(),
        (Pass::BackwardInput, Embedding) => vec![Sum::Table],
        (Pass::BackwardInput, MtpJoin) => vec![Sum::Table, of(1)],
        (Pass::BackwardInput, Attention) => vec![Sum::BalanceLoss, of(1)],
        (Pass::BackwardInput, _) => vec![of(1)],
        (Pass::BackwardWeight, _) => vec![of(2)],
    }
}

/// By sum, the operations that add to it, in order.
fn orders(program: &Program, stages: &[StageLayout], keeps_gradients: bool) -> BTreeMap<Sum, Vec<Work>> {
    let mut orders: BTreeMap<Sum, Vec<Work>> = BTreeMap::new();
    for op in &program.ops {
        for sum in sums(op.work, stages, keeps_gradients) {
            orders.entry(sum).or_default().push(op.work);
        }
    }
    orders
}

/// Whether nothing of a rank waits until what it has sent is gone: only who receives it does.
fn waits_for_no_send(program: &Program) -> bool {
    let mut needed = program.ops.iter().flat_map(|op| &op.after);
    needed.all(|&needed| !matches!(program.ops[needed].lane, Lane::Send(_)))
}

/// The most chunks between the first operation of their forward and the last of their input gradient, in the order of the compute lane.
fn live_chunks(program: &Program) -> usize {
    let mut lives: HashMap<Chunk, (usize, usize)> = HashMap::new();
    for (at, op) in program.ops.iter().enumerate().filter(|(_, op)| op.lane == Lane::Compute) {
        let Work::Component { pass, chunk, .. } = op.work else { continue };
        let life = lives.entry(chunk).or_insert((at, at));
        if pass == Pass::BackwardInput {
            life.1 = at;
        }
    }
    let alive = |at: usize| lives.values().filter(|(first, last)| (*first..=*last).contains(&at)).count();
    (0..program.ops.len()).map(alive).max().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_paired_is_sound_in_every_lowering_and_reads_back((plan, stages) in planned()) {
        let candidates = sets().map(|kinds| paired(&plan, &kinds, &stages)).filter(comes_to_its_end);
        for candidate in candidates.chain([pair_up(plan.clone(), &stages)]) {
            for (layouts, expert) in [(None, 1), (Some(&stages[..]), 1), (Some(&stages[..]), 2)] {
                for overlap in [Overlap::DEFAULT, Overlap::Off] {
                    let programs = lower_with(&candidate, layouts, expert, overlap);
                    prop_assert!(overlap == Overlap::Off || programs.iter().all(waits_for_no_send));
                    let checked = check(&candidate, &programs);
                    prop_assert!(checked.is_ok(), "{}: {}", text::write(&candidate), checked.unwrap_err()[0]);
                }
            }
            prop_assert_eq!(text::parse(&text::write(&candidate)), Ok(candidate));
        }
    }

    #[test]
    fn every_sum_has_the_order_of_the_plan((plan, stages) in planned(), order in 0..16usize) {
        let keeps_gradients = !plan.is_forward_only();
        let orders_of = |plan: &Plan, overlap| {
            let programs = lower_with(plan, Some(&stages), 2, overlap);
            programs.iter().map(|program| orders(program, &stages, keeps_gradients)).collect::<Vec<_>>()
        };
        let expected = orders_of(&plan, Overlap::Off);
        let overlap = Overlap::Pairs(PairOrder::all().nth(order).unwrap());
        prop_assert!(orders_of(&plan, overlap) == expected, "of the plan itself");
        for kinds in sets() {
            let candidate = paired(&plan, &kinds, &stages);
            for overlap in [overlap, Overlap::Off] {
                prop_assert!(orders_of(&candidate, overlap) == expected, "{kinds:?}: {}", text::write(&candidate));
            }
        }
    }

    #[test]
    fn programs_keep_alive_what_the_check_counts(
        (plan, _) in planned(),
        layers in prop::collection::vec(1..4usize, 24),
    ) {
        // Where every stage has an exchange, passes of a pair do run beside each other.
        let stages = stages(&layers[..plan.stages], 0, End::Head);
        for kinds in sets() {
            let candidate = paired(&plan, &kinds, &stages);
            if plan.is_forward_only() || !comes_to_its_end(&candidate) {
                continue;
            }
            let programs = lower(&candidate, Some(&stages), 2);
            let report = check(&candidate, &programs).unwrap();
            let live: Vec<usize> = programs.iter().map(live_chunks).collect();
            prop_assert_eq!(live, report.peak_activations, "{:?}: {}", kinds, text::write(&candidate));
        }
    }

    #[test]
    fn no_step_becomes_longer_and_ranks_do_what_they_did((plan, stages) in planned()) {
        let after = pair_up(plan.clone(), &stages);
        for (before, after) in plan.actions.iter().zip(&after.actions) {
            let parts = |list: &[Action]| {
                let parts = list.iter().flat_map(|action| {
                    let (first, second) = action.parts();
                    [Some(first), second].into_iter().flatten()
                });
                let mut parts: Vec<String> = parts.map(|part| part.to_string()).collect();
                parts.sort_unstable();
                parts
            };
            prop_assert_eq!(parts(before), parts(after));
        }
        // As long as computations, half of it, and with transfers that take time.
        for (exchange, transfer, most) in [(9.0 / 4.0, 0.0, 1.0), (9.0 / 8.0, 0.0, 1.0), (9.0 / 4.0, 1.0, 1.01)] {
            let cost = |_: usize, op: &Op| match op.lane {
                Lane::Compute => 1.0,
                Lane::Expert => exchange,
                _ => transfer,
            };
            let end = |plan: &Plan| walk(&lower(plan, Some(&stages), 2), cost).unwrap().makespan;
            let (now, before) = (end(&after), end(&plan));
            prop_assert!(now <= most * before, "{now}, {before} before: {}", text::write(&after));
        }
    }
}

#[test]
fn a_step_with_its_update_is_sound() {
    for kind in ScheduleKind::ALL {
        for pipeline in [1, 2, 4] {
            if kind.validate(pipeline).is_err() {
                continue;
            }
            for micro_batches in [1, 5, 16] {
                let (plan, _) = kind.plan(pipeline, micro_batches, Mode::Train).unwrap();
                let stages = stages(&[1, 2, 3, 1, 2, 3, 1, 2][..plan.stages], 2, End::Mtp);
                let topology = Topology { pipeline, expert: 2, data: 2 };
                for kinds in sets() {
                    let candidate = paired(&plan, &kinds, &stages);
                    if !comes_to_its_end(&candidate) {
                        continue;
                    }
                    for overlap in [true, false] {
                        let passes = lower_with(&candidate, Some(&stages), 2, Overlap::of(overlap));
                        let buckets = buckets(&candidate.placement, &stages, &topology);
                        let sharding = Sharding { buckets, replicated: true, overlap };
                        let step = StepPrograms::new(&passes, &sharding);
                        check_step(&candidate, &step)
                            .unwrap_or_else(|faults| panic!("{}: {}", text::write(&candidate), faults[0]));
                    }
                }
            }
        }
    }
}

/// Eight mixture layers a rank.
fn of_layers(plan: &Plan) -> Vec<StageLayout> {
    stages(&vec![8 * plan.ranks() / plan.stages; plan.stages], 0, End::Head)
}

fn pairs(plan: &Plan) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for action in plan.actions.iter().flatten() {
        let name = match action {
            Action::ForwardBackward { .. } => "F&B",
            Action::ForwardForward { .. } => "F&F",
            Action::InputWeight { .. } => "I&W",
            _ => continue,
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

#[test]
fn what_is_paired_is_what_the_order_of_a_schedule_allows() {
    let paired_up = |kind: ScheduleKind, pipeline, micro_batches, mode| {
        let (plan, _) = kind.plan(pipeline, micro_batches, mode).unwrap();
        let stages = of_layers(&plan);
        let after = pair_up(plan.clone(), &stages);
        (plan, after)
    };
    let train = |kind, pipeline, micro_batches| paired_up(kind, pipeline, micro_batches, Mode::Train);
    // Alone on a pipeline, every backward pass but the last one has the next forward pass beside it.
    for kind in [ScheduleKind::OneFOneB, ScheduleKind::Zb1p] {
        let (_, after) = train(kind, 1, 8);
        assert_eq!(pairs(&after), BTreeMap::from([("F&B", 7)]), "{kind}");
    }
    // On several ranks each forward pass of 1F1B waits for the rank before it, and each backward pass for the one behind it, in turns.
    let (plan, after) = train(ScheduleKind::OneFOneB, 4, 16);
    assert_eq!(plan, after);
    // Its weight parts wait for nothing; the first rank has none.
    let (_, after) = train(ScheduleKind::Zb1p, 4, 16);
    let counts: Vec<usize> = after.actions.iter().map(|list| count(list, "&W")).collect();
    assert_eq!(counts[0], 0);
    assert!(counts[1..].iter().all(|&count| count >= 10), "{counts:?}");
    // Its warm-up is twice as long as it need be.
    let (_, after) = train(ScheduleKind::Interleaved(2), 4, 16);
    let counts: Vec<usize> = after.actions.iter().map(|list| count(list, "&B")).collect();
    assert!(counts.iter().all(|&count| count >= 16), "{counts:?}");
    // The published order stays as it was published.
    for kind in [ScheduleKind::Dualpipe, ScheduleKind::Dualpipev] {
        for (pipeline, micro_batches) in [(2, 8), (8, 120)] {
            let (plan, after) = train(kind, pipeline, micro_batches);
            assert_eq!(plan, after, "{kind}");
        }
    }
    // An evaluation is nothing but lone forwards.
    for kind in [ScheduleKind::OneFOneB, ScheduleKind::Zb1p] {
        let (_, after) = paired_up(kind, 4, 16, Mode::ForwardOnly);
        assert_eq!(pairs(&after), BTreeMap::from([("F&F", 4 * 16 / 2)]), "{kind}");
    }
}

/// What docs/simulator.md says of the pairs that DualPipe could have besides its own.
#[test]
fn another_pair_is_worth_something_to_dualpipe_in_short_steps_alone() {
    let gain = |pipeline, micro_batches| {
        let (plan, _) = ScheduleKind::Dualpipe.plan(pipeline, micro_batches, Mode::Train).unwrap();
        let stages = of_layers(&plan);
        let cost = |_: usize, op: &Op| match op.lane {
            Lane::Compute => 1.0,
            Lane::Expert => 9.0 / 4.0,
            _ => 0.0,
        };
        let end = |plan: &Plan| walk(&lower(plan, Some(&stages), 2), cost).unwrap().makespan;
        let gain = 1.0 - end(&paired(&plan, &[Neighbours::ForwardBackward], &stages)) / end(&plan);
        println!("{pipeline} ranks, {micro_batches} micro-batches: {:.2} %", 100.0 * gain);
        gain
    };
    assert!((0.03..0.05).contains(&gain(2, 8)));
    assert!(gain(8, 20) < 0.01);
}

fn count(list: &[Action], part: &str) -> usize {
    list.iter().filter(|action| action.to_string().contains(part)).count()
}
