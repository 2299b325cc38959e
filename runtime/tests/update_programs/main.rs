//! The update in the programs of a step: proved for every schedule and layout, and refused wherever two ranks would not meet.
#![allow(clippy::unwrap_used, missing_docs)]

mod cases;

use std::collections::{BTreeMap, BTreeSet};

use cases::{Case, Readers, assert_reports, cases, cases_with, error_text, first_half, mirrored};
use contraflow_runtime::schedule::{
    Bucket, Chunk, Component, Contents, Lane, Op, Pass, Program, ScheduleKind, Sharding, Span, StepPrograms,
    Timeline, TransferKind, Work, check_step, walk,
};
use proptest::prelude::*;

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

/// The parameters that an operation computes a gradient of, derived from the arithmetic of the model: (bucket's contents, stage).
fn gradients_of(work: Work, readers: Readers, embedding_stage: usize) -> Vec<(Contents, usize)> {
    let Work::Component { pass, chunk, component, .. } = work else { return Vec::new() };
    let dense = (Contents::Dense, chunk.stage);
    let embedding = (Contents::Embedding, embedding_stage);
    match (component, pass) {
        // Norms and gate with the input, matrices with the weight part.
        (Component::Attention, Pass::BackwardInput | Pass::BackwardWeight) => vec![dense],
        (Component::SharedExpert, Pass::BackwardWeight) => vec![dense],
        (Component::Experts, Pass::BackwardWeight) => vec![(Contents::Experts, chunk.stage)],
        // The loss makes the head's; its norm follows.
        (Component::Head | Component::MtpHead, Pass::Forward) if readers != Readers::Mtp => {
            vec![dense, embedding]
        }
        (Component::Head | Component::MtpHead, Pass::Forward | Pass::BackwardInput) => vec![dense],
        (Component::MtpJoin, Pass::BackwardInput) => vec![dense, embedding],
        (Component::MtpJoin, Pass::BackwardWeight) => vec![dense],
        (Component::Embedding, Pass::BackwardInput) => vec![embedding],
        _ => Vec::new(),
    }
}

/// When each operation of a rank ran, by what it does.
fn spans(program: &Program, timeline: &Timeline, rank: usize) -> BTreeMap<String, Span> {
    let spans = program.ops.iter().zip(&timeline.spans[rank]);
    spans.map(|(op, span)| (op.work.to_string(), *span)).collect()
}

#[test]
fn a_bucket_is_reduced_when_its_last_gradient_is_there_and_gathered_before_it_is_read() {
    for case in cases() {
        let step = case.step();
        let whole = step.whole();
        let timeline = walk(&whole, |rank, op| 1.0 + (rank + op.after.len()) as f64 * 0.25).unwrap();
        for (rank, program) in whole.iter().enumerate() {
            let ran = spans(program, &timeline, rank);
            let found = |works: Vec<Work>| {
                works.iter().filter_map(|work| ran.get(&work.to_string()).copied()).collect::<Vec<_>>()
            };
            for bucket in &program.buckets {
                let number = bucket.number;
                let what = format!("{}: bucket {number} on rank {rank}", case.what);
                let of_bucket = |op: &&Op| {
                    gradients_of(op.work, case.readers, 0).contains(&(bucket.contents, bucket.stages[0]))
                };
                let gradients: Vec<Span> =
                    found(program.ops.iter().filter(of_bucket).map(|op| op.work).collect());
                // With few micro-batches a mirror may have none of its stage.
                assert!(!gradients.is_empty() || case.plan.micro_batches == 1, "{what} has no gradient");
                let last = gradients.iter().map(|span| span.end).fold(0.0, f64::max);
                let reduced = found(vec![
                    Work::Pack { bucket: number },
                    Work::Reduce { bucket: number },
                    Work::GradNorm { bucket: number },
                    Work::Totals,
                    Work::Apply { bucket: number },
                ]);
                let gathered = found(vec![Work::Gather { bucket: number }, Work::Unpack { bucket: number }]);
                let is_shared = bucket.copies > 1;
                assert_eq!(
                    (reduced.len(), gathered.len()),
                    if is_shared { (5, 2) } else { (3, 0) },
                    "{what}"
                );
                assert!(last <= reduced[0].start, "{what} goes before its last gradient");
                let in_order = |spans: &[Span]| spans.windows(2).all(|pair| pair[0].end <= pair[1].start);
                assert!(in_order(&reduced) && in_order(&gathered), "{what}: {reduced:?} {gathered:?}");
                if is_shared && case.sharding.overlap {
                    // Whatever reads or differentiates it comes after what was gathered of the step before.
                    let reads = program
                        .ops
                        .iter()
                        .filter(|op| reads(op.work, case.readers, bucket.contents, &bucket.stages));
                    let reads = found(reads.map(|op| op.work).collect());
                    assert!(
                        reads.iter().all(|read| gathered[1].end <= read.start),
                        "{what} is read too early"
                    );
                } else if is_shared {
                    assert!(reduced[4].end <= gathered[0].start, "{what} is gathered before its update");
                }
            }
        }
    }
}

/// Whether an operation reads weights, derived from the arithmetic of the model.
fn reads(work: Work, readers: Readers, contents: Contents, stages: &[usize]) -> bool {
    let Work::Component { chunk, component, .. } = work else { return false };
    let of_contents = match component {
        Component::Embedding => contents == Contents::Embedding,
        Component::MtpJoin => contents != Contents::Experts,
        Component::Experts => contents == Contents::Experts,
        Component::Head | Component::MtpHead => {
            let is_tied = readers != Readers::Mtp;
            contents == Contents::Dense || (is_tied && contents == Contents::Embedding)
        }
        Component::Attention | Component::SharedExpert => contents == Contents::Dense,
        Component::Dispatch | Component::Combine | Component::Chunk => false,
    };
    of_contents && stages.contains(&chunk.stage)
}

/// On a clock on which arithmetic takes 1, a collective 3 and all other communication nothing: how long a step takes, and how
/// long each rank waits for its update.
fn simulate(case: &Case) -> (f64, Vec<f64>) {
    let cost = |_: usize, op: &Op| match op.lane {
        Lane::Compute if op.action.is_some() => 1.0,
        Lane::Collective if op.work != Work::AwaitReplica => 3.0,
        _ => 0.0,
    };
    let whole = case.step().whole();
    let timeline = walk(&whole, cost).unwrap();
    let idle = (0..whole.len()).map(|rank| timeline.idle(&whole, rank..rank + 1, 0.0).update);
    (timeline.makespan, idle.collect())
}

/// ZB1P leaves no gap at the end of the passes, where all ranks are done at once. There a collective that is under way, which nothing
/// interrupts, may hold up the one that the step waits for: by at most its own length.
#[test]
fn overlap_never_makes_a_step_longer() {
    for (overlapped, sequential) in cases_with(true).iter().zip(&cases_with(false)) {
        let ((short, _), (long, _)) = (simulate(overlapped), simulate(sequential));
        let under_way = if overlapped.plan.schedule == "zb1p" { 3.0 } else { 0.0 };
        assert!(short <= long + under_way, "{}: {short}, without overlap {long}", overlapped.what);
    }
}

/// The first rank waits for the two buckets that its first stage needs at once, for the reduction of those two, which are
/// finished last, and for the totals; without overlap for four buckets each way.
#[test]
fn overlap_hides_what_is_not_needed_at_once_and_not_finished_last() {
    let exposed = |overlap| simulate(&Case::new(ScheduleKind::Dualpipe, (4, 2, 1), 16, overlap)).1;
    let (overlapped, sequential) = (exposed(true), exposed(false));
    let first_rank = 2.0 * 3.0 + 2.0 * 3.0 + 3.0;
    assert!((first_rank..first_rank + 2.0).contains(&overlapped[0]), "{overlapped:?}");
    assert!(sequential[0] >= first_rank + 4.0 * 3.0, "{sequential:?}");
    assert!(overlapped.iter().zip(&sequential).all(|(short, long)| *short < 0.6 * long));
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
    let one_way = Case::new(ScheduleKind::OneFOneB, (2, 1, 2), 4, true);
    let groups: Vec<_> =
        one_way.sharding.buckets.iter().map(|bucket| bucket.ranks(&one_way.topology, 0)).collect();
    // Dense of either stage, the embedding that both use, experts.
    assert_eq!(groups, [vec![0, 1], vec![0, 1, 2, 3], vec![0, 1], vec![2, 3], vec![2, 3]]);
}

#[test]
fn a_tied_head_makes_the_last_stage_hold_the_embedding() {
    let ranks = |kind, axes, readers| {
        let case = Case::with_readers(kind, axes, 8, true, readers);
        let embedding = case.sharding.buckets.iter().find(|bucket| bucket.contents == Contents::Embedding);
        embedding.unwrap().ranks(&case.topology, 0)
    };
    for readers in [Readers::Head, Readers::Both] {
        // Rank 0 of DualPipe has the first and the last stage, and so has its mirror.
        assert_eq!(ranks(ScheduleKind::Dualpipe, (4, 1, 1), readers), [0, 3]);
        assert_eq!(ranks(ScheduleKind::Dualpipev, (4, 1, 1), readers), [0]);
        assert_eq!(ranks(ScheduleKind::OneFOneB, (4, 1, 1), readers), [0, 3]);
        assert_eq!(ranks(ScheduleKind::OneFOneB, (1, 1, 1), readers), [0]);
    }
    let case = Case::with_readers(ScheduleKind::OneFOneB, (4, 1, 1), 8, true, Readers::Head);
    let mut step = case.step();
    // The last rank has no other use for the table than its head: the gradient is packed behind it, and not before.
    let ops = &mut first_half(&mut step)[3].ops;
    let pack = ops.iter().position(|op| op.work == Work::Pack { bucket: 1 }).unwrap();
    let last = ops[pack - 1].work;
    assert!(matches!(last, Work::Component { component: Component::Head, .. }), "{last}");
    ops.swap(pack - 1, pack);
    let text = format!("packing of the gradients of bucket 1 does not wait for {last}");
    assert_reports(&error_text(&case, &step), &[&text]);
}

/// Where a program does something.
fn place(program: &Program, work: Work) -> usize {
    program.ops.iter().position(|op| op.work == work).unwrap()
}

/// Two collectives of a rank change places; each waits for what both waited for, so that only their order differs.
fn change_places(program: &mut Program, one: Work, other: Work) {
    let (first, second) = (place(program, one), place(program, other));
    let ops = &mut program.ops;
    let after = [ops[first].after.clone(), ops[second].after.clone()].concat();
    (ops[first].work, ops[second].work) = (other, one);
    ops[first].after = after.iter().copied().filter(|&earlier| earlier < first).collect();
    ops[second].after = after;
}

#[test]
fn two_ranks_that_reduce_two_buckets_in_different_orders_never_meet() {
    for overlap in [true, false] {
        let case = Case { sharding: Sharding { overlap, ..mirrored().sharding }, ..mirrored() };
        let (one, other) = (Work::Reduce { bucket: 0 }, Work::Reduce { bucket: 9 });
        for rank in [0, 3] {
            let mut step = case.step();
            let programs = first_half(&mut step);
            let in_order = place(&programs[rank], one) < place(&programs[rank], other);
            let (first, second) = if in_order { (one, other) } else { (other, one) };
            change_places(&mut programs[rank], first, second);
            let text = walk(programs, |_, _| 1.0).unwrap_err().to_string();
            let (own, peer) = if rank == 0 { (second, first) } else { (first, second) };
            let waits = |rank: usize, work: Work, peer: usize| {
                format!("rank {rank}, Collective lane, update: {work} waits for rank {peer}")
            };
            assert!(text.contains(&waits(0, own, 3)) && text.contains(&waits(3, peer, 0)), "{text}");
            assert_reports(
                &error_text(&case, &step),
                &["deadlock: reduce-scatter of bucket 9 waits for rank"],
            );
        }
    }
}

#[test]
fn gathers_in_different_orders_are_refused_too() {
    let case = mirrored();
    let (one, other) = (Work::Gather { bucket: 3 }, Work::Gather { bucket: 6 });
    for alone in [true, false] {
        let mut step = case.step();
        let programs = if alone { &mut step.gather } else { &mut step.gathering };
        change_places(&mut programs[2], one, other);
        assert!(walk(programs, |_, _| 1.0).is_err());
        assert_reports(&error_text(&case, &step), &["deadlock: all-gather of bucket 3 waits for rank"]);
    }
}

#[test]
fn a_deadlock_names_the_collective_and_who_is_missing() {
    let case = mirrored();
    let mut step = case.step();
    let programs = first_half(&mut step);
    let totals = place(&programs[2], Work::Totals);
    programs[2].ops.remove(totals);
    let deadlock = walk(programs, |_, _| 1.0).unwrap_err();
    let text = deadlock.to_string();
    for rank in [0, 1, 3] {
        let expected =
            format!("rank {rank}, Collective lane, update: all-reduce of the step's totals waits for rank 2");
        assert!(text.contains(&expected), "{text}");
    }
    assert_reports(
        &error_text(&case, &step),
        &["deadlock: all-reduce of the step's totals waits for rank 2"],
    );
    // Two that are late because they wait for each other, and one that has come.
    let mut step = case.step();
    for rank in [1, 2] {
        let ops = &mut first_half(&mut step)[rank].ops;
        let totals = place(&Program::of(ops.clone()), Work::Totals);
        let op = ops[totals].clone();
        let peer = 3 - rank;
        let work = Work::Receive { kind: TransferKind::Gradient, chunk: Chunk { stage: 0, micro_batch: 99 } };
        let wait = Op { lane: Lane::Receive(peer), work, after: Vec::new(), action: None };
        ops[totals] = wait;
        ops.push(Op { after: vec![totals], ..op });
    }
    let text = walk(first_half(&mut step), |_, _| 1.0).unwrap_err().to_string();
    assert!(text.contains("all-reduce of the step's totals waits for ranks 1, 2"), "{text}");
}

#[test]
fn what_comes_too_early_is_a_fault() {
    let case = mirrored();
    let is = |wanted: fn(&Work) -> bool| move |op: &Op| wanted(&op.work);
    let tampered = |half: fn(&mut StepPrograms) -> &mut Vec<Program>,
                    tamper: &dyn Fn(&mut Vec<Op>) -> String| {
        let mut step = case.step();
        let expected = tamper(&mut half(&mut step)[1].ops);
        assert_reports(&error_text(&case, &step), &[&expected]);
    };
    // A bucket that is packed before its last weight gradient.
    tampered(first_half, &|ops| {
        let pack = ops.iter().position(is(|work| matches!(work, Work::Pack { .. }))).unwrap();
        let text = format!("{} does not wait for {}", ops[pack].work, ops[pack - 1].work);
        ops.swap(pack - 1, pack);
        text
    });
    tampered(first_half, &|ops| {
        let reduce = ops.iter().position(is(|work| matches!(work, Work::Reduce { .. }))).unwrap();
        ops[reduce].after.clear();
        format!("{} does not wait for packing of the gradients", ops[reduce].work)
    });
    // Weights that are read before they are gathered.
    tampered(first_half, &|ops| {
        let unpack = ops.iter().position(is(|work| matches!(work, Work::Unpack { .. }))).unwrap();
        ops[unpack].after.clear();
        format!("{} does not wait for all-gather of bucket", ops[unpack].work)
    });
    tampered(first_half, &|ops| {
        let unpack = ops.iter().position(is(|work| matches!(work, Work::Unpack { .. }))).unwrap();
        let read = (unpack + 1..ops.len()).find(|&id| ops[id].lane == Lane::Compute).unwrap();
        let text = format!("{} does not wait for {}", ops[read].work, ops[unpack].work);
        ops.swap(unpack, read);
        text
    });
}

#[test]
fn ranks_that_do_not_agree_on_who_holds_a_bucket_are_refused() {
    let case = mirrored();
    let mut step = case.step();
    first_half(&mut step)[0].buckets[0].positions = vec![0];
    assert_reports(&error_text(&case, &step), &["ranks 0, 3 do not agree on who holds bucket 0"]);
    let mut step = case.step();
    first_half(&mut step)[0].buckets.remove(0);
    let faults = error_text(&case, &step);
    assert_reports(&faults, &["reduce-scatter of bucket 0: the rank does not hold that bucket"]);
}

fn any_case() -> impl Strategy<Value = Case> {
    let axes = prop::sample::select(vec![(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]);
    (0..ScheduleKind::ALL.len(), axes, 1..12usize, any::<bool>()).prop_map(
        |(kind, axes, micro_batches, overlap)| {
            Case::new(ScheduleKind::ALL[kind], axes, micro_batches, overlap)
        },
    )
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
        part in 0..4,
        rank: prop::sample::Index,
        op: prop::sample::Index,
        how in 0..4,
    ) {
        let mut step = case.step();
        let programs = match part {
            0 => first_half(&mut step),
            1 => &mut step.gradients,
            2 => &mut step.update,
            _ => &mut step.gather,
        };
        let rank = rank.index(programs.len());
        let ops = &mut programs[rank].ops;
        let of_update = |id: &usize| {
            !matches!(ops[*id].work, Work::Component { .. } | Work::Send { .. } | Work::Receive { .. })
        };
        let places: Vec<usize> = (0..ops.len()).filter(of_update).collect();
        prop_assume!(!places.is_empty());
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
        prop_assert!(!error_text(&case, &step).is_empty());
    }
}

#[test]
fn members_with_one_coordinate_run_one_program() {
    // What is proved of pipeline ranks holds for all: neither expert nor data coordinate is in a program.
    let mut programs: BTreeMap<(usize, usize), BTreeSet<String>> = BTreeMap::new();
    for data in [2, 3] {
        let case = Case::new(ScheduleKind::Dualpipe, (2, 2, data), 8, true);
        for (rank, program) in case.step().whole().iter().enumerate() {
            let ops: Vec<String> = program.ops.iter().map(|op| op.work.to_string()).collect();
            programs.entry((2, rank)).or_default().insert(ops.join("\n"));
        }
    }
    assert!(programs.values().all(|texts| texts.len() == 1));
}
