//! What a rank records of a task is its program, operation by operation, and takes the time that the rank reports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow_runtime::schedule::{Chunk, Component, Idle, Lane, Op, Pass, Program, Span, Timeline, Work};
use contraflow_runtime::simulator::StepTimeline;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::Plans;
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use contraflow_workers::engine::step::ProgramKind;

use crate::lab::{FOUR_RANKS, Lab, Layout, Setup, layout};

/// A recorded task.
struct Record {
    programs: Vec<Arc<Program>>,
    timeline: Timeline,
    idle: Idle,
    seconds: f64,
}

/// By rank and step; the validation is step 0.
type Records = BTreeMap<(usize, u64), Record>;

/// Runs a layout in which every operation of a rank that `is_slow` takes a while longer.
fn record(lab: &Lab, layout: Layout, pause: Duration, is_slow: fn(usize, &Op) -> bool) -> Records {
    let records: Arc<Mutex<Records>> = Arc::default();
    let noted = records.clone();
    let probe = Probe::new(move |point| match point {
        ProbePoint::Recorded { rank, step, recording, seconds } => {
            let record = Record {
                programs: recording.programs.clone(),
                timeline: recording.timeline.clone(),
                idle: recording.idle,
                seconds,
            };
            noted.lock().unwrap().insert((rank, step), record);
        }
        ProbePoint::Op { rank, op, .. } if is_slow(rank, op) => std::thread::sleep(pause),
        _ => {}
    });
    let finished = lab.run(Setup { probe, ..lab.setup(layout, &["training.steps=3"]) });
    assert_eq!(finished.losses().len(), 3);
    std::mem::take(&mut records.lock().unwrap())
}

/// An operation of the compute lane for the plan's first action.
fn is_first_compute(_: usize, op: &Op) -> bool {
    op.lane == Lane::Compute && op.action == Some(0)
}

/// Every operation began when what it waits for had ended, and no lane did two at once.
fn assert_in_order(program: &Program, spans: &[Span]) {
    assert_eq!(program.ops.len(), spans.len());
    let mut tails: BTreeMap<Lane, f64> = BTreeMap::new();
    for (op, span) in program.ops.iter().zip(spans) {
        assert!(0.0 < span.start && span.start <= span.end, "{}: {span:?}", op.work);
        assert!(op.after.iter().all(|&earlier| spans[earlier].end <= span.start), "{}", op.work);
        let before = tails.insert(op.lane, span.end).unwrap_or_default();
        assert!(before <= span.start, "{} begins before its lane is free", op.work);
    }
}

#[test]
fn a_recorded_task_has_exactly_the_operations_of_its_programs() {
    let lab = Lab::new();
    for layout in [FOUR_RANKS, layout("1f1b", (2, 1, 2)), layout("dualpipev", (1, 1, 1))] {
        let recipe = lab.recipe(layout, &["training.steps=3"]);
        let topology = recipe.topology();
        let mut plans = Plans::new(&recipe).unwrap();
        let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
        let training = plans.get(micro_batches, TaskKind::Train).unwrap();
        let records = record(&lab, layout, Duration::ZERO, |_, _| false);
        assert!(records.keys().filter(|(_, step)| *step > 0).count() == 3 * topology.world(), "{layout:?}");
        for ((rank, step), Record { programs, timeline, idle, seconds }) in records {
            let pipeline = topology.coordinates(rank).pipeline;
            let is_shared = topology.world() > 1;
            if step > 0 {
                // The second step gathers what the first one has updated; for the last one it is not done.
                let parts: &[ProgramKind] = match (step, is_shared) {
                    (1, _) | (_, false) => &[ProgramKind::Passes, ProgramKind::Update],
                    (2, true) => &[ProgramKind::Gathering, ProgramKind::Update],
                    _ => &[ProgramKind::Gathering, ProgramKind::Update, ProgramKind::Gather],
                };
                let parts: Vec<_> = parts.iter().map(|&part| training.program(pipeline, part)).collect();
                assert_eq!(programs, parts, "{layout:?}, rank {rank}, step {step}");
            } else {
                assert_eq!(programs.len(), 1, "an evaluation has no update");
                assert!(
                    programs[0].ops.iter().all(|op| op.work.bucket().is_none() && op.work != Work::Totals)
                );
            }
            assert_eq!(timeline.spans.len(), programs.len());
            programs.iter().zip(&timeline.spans).for_each(|(program, spans)| assert_in_order(program, spans));
            // One program after the other.
            let end = |spans: &[Span]| spans.iter().map(|span| span.end).fold(0.0, f64::max);
            let start = |spans: &[Span]| spans.iter().map(|span| span.start).fold(f64::MAX, f64::min);
            assert!(timeline.spans.windows(2).all(|pair| end(&pair[0]) <= start(&pair[1])));
            let all = idle.passes + idle.update + timeline.compute_busy.iter().sum::<f64>();
            assert!(idle.passes >= 0.0 && idle.update >= 0.0 && all <= seconds, "{idle:?} of {seconds} s");
            assert!(timeline.makespan <= seconds);
        }
    }
}

/// What lies between the end of the last operation and the report: the event of the lane for the pipeline, and that of the
/// pipeline to the rank.
#[test]
fn the_makespan_of_a_recorded_step_is_the_time_that_the_rank_reports() {
    let lab = Lab::new();
    let records = record(&lab, FOUR_RANKS, Duration::from_millis(20), is_first_compute);
    let steps = || records.iter().filter(|((_, step), _)| *step > 0).map(|(_, record)| record);
    let (makespan, seconds) = steps().fold((0.0, 0.0), |(makespan, seconds), record| {
        (makespan + record.timeline.makespan, seconds + record.seconds)
    });
    assert!(seconds > 12.0 * 0.1, "the pauses are not in it: {seconds} s in 12 steps");
    assert!(makespan <= seconds && makespan >= 0.99 * seconds, "{makespan} of {seconds} s");
}

/// Two ranks in a pipeline: the second one waits for the first activation of a step while it is held back on its way, and for
/// no longer computation of its own.
#[test]
fn a_message_that_is_late_is_in_the_bubble_and_a_long_operation_is_not() {
    let lab = Lab::new();
    let (pipeline, pause) = (layout("1f1b", (2, 1, 1)), Duration::from_millis(200));
    let is_sending = |rank: usize, op: &Op| {
        rank == 0 && matches!(op.work, Work::Send { chunk: Chunk { micro_batch: 0, .. }, .. })
    };
    let is_computing = |rank: usize, op: &Op| {
        let Work::Component { pass: Pass::Forward, component: Component::Head, chunk, .. } = op.work else {
            return false;
        };
        rank == 1 && chunk.micro_batch == 0
    };
    let second = |is_slow| {
        let records = record(&lab, pipeline, pause, is_slow);
        let second = records.into_iter().filter(|((rank, step), _)| (*rank, *step > 0) == (1, true));
        second.map(|(_, record)| (record.idle.passes, record.timeline.compute_busy[0])).collect::<Vec<_>>()
    };
    let (late, long) = (second(is_sending), second(is_computing));
    let pause = pause.as_secs_f64();
    assert!(late.len() == 3 && late.iter().all(|(bubble, _)| *bubble >= pause), "{late:?}");
    assert!(long.len() == 3 && long.iter().all(|(_, busy)| *busy >= pause), "{long:?}");
    // A machine under load may hold up one step's messages as long.
    let least = long.iter().map(|(bubble, _)| *bubble).fold(f64::MAX, f64::min);
    assert!(least < pause, "{long:?}");
}

/// Nothing is asked for and nothing looks in: what every run keeps of its last step.
#[test]
fn the_latest_step_of_all_ranks_is_kept_on_one_clock() {
    let lab = Lab::new();
    let finished = lab.run(lab.setup(FOUR_RANKS, &["training.steps=6"]));
    assert_eq!(finished.losses().len(), 6);
    let step = finished.timelines.latest().unwrap();
    assert_eq!((step.step, step.ranks.len()), (6, 4));
    // A frame arrives after it was sent, and a sum of all is there when the last one has come to it.
    let mut sent = BTreeMap::new();
    let mut totals = Vec::new();
    let sent_by = |rank: usize, peer: usize| (rank % 2, peer, rank / 2);
    for rank in &step.ranks {
        assert_in_order(&rank.program, &rank.spans);
        for (op, span) in rank.program.ops.iter().zip(&rank.spans) {
            match (op.work, op.lane) {
                (Work::Send { kind, chunk }, Lane::Send(peer)) => {
                    sent.insert((sent_by(rank.rank, peer), kind, chunk), span.start);
                }
                (Work::Totals, _) => totals.push(*span),
                _ => {}
            }
        }
    }
    let mut received = 0;
    for rank in &step.ranks {
        for (op, span) in rank.program.ops.iter().zip(&rank.spans) {
            if let (Work::Receive { kind, chunk }, Lane::Receive(peer)) = (op.work, op.lane) {
                let column = rank.rank % 2;
                let from = peer * 2 + column;
                assert!(sent[&(sent_by(from, rank.pipeline), kind, chunk)] <= span.end, "{}", op.work);
                received += 1;
            }
        }
    }
    assert!(received > 0 && received == sent.len());
    let last = totals.iter().map(|span| span.start).fold(0.0, f64::max);
    assert!(totals.len() == 4 && totals.iter().all(|span| last <= span.end), "{totals:?}");

    let timeline = StepTimeline::of(&step);
    assert_eq!((timeline.measured.len(), timeline.planned.len()), (4, 2));
    let json = serde_json::to_string(&timeline).unwrap();
    let again: StepTimeline = serde_json::from_str(&json).unwrap();
    assert_eq!(again, timeline);
    // No rank does more of anything than its plan: as many operations, less those that take no time.
    let counts = timeline.measured.iter().map(|row| row.bars.len());
    let ops = step.ranks.iter().map(|rank| rank.program.ops.len());
    assert!(counts.zip(ops).all(|(bars, ops)| bars <= ops && 10 * bars > 9 * ops));
}
