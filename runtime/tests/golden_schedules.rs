//! Generated plans against recorded ones: the same compute order on every rank, the same messages.
#![allow(clippy::unwrap_used, missing_docs)]

mod golden_files;

use contraflow_runtime::schedule::{
    Action, Chunk, Message, Mode, Plan, ScheduleKind, TransferKind, check, lower, messages,
};
use serde::Deserialize;
use serde_json::Value;

const FORMAT: &str = "pp-schedule-golden/1";

#[derive(Deserialize)]
struct Golden {
    algorithm: ScheduleKind,
    mode: String,
    ranks: usize,
    stages: usize,
    microbatches: usize,
    placement: Vec<Vec<usize>>,
    rank_ops: Vec<Vec<Value>>,
}

#[test]
fn plans_equal_the_golden_schedules() {
    let mut compared = 0;
    for file in golden_files::all("schedules") {
        let text = std::fs::read_to_string(&file).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        if value.get("format").and_then(Value::as_str) != Some(FORMAT) {
            println!("skipped, not a schedule: {}", file.display());
            continue;
        }
        compare(&Golden::deserialize(value).unwrap(), &file.display().to_string());
        compared += 1;
    }
    assert!(compared >= 1, "no golden schedule");
    println!("{compared} golden schedules compared");
}

fn compare(golden: &Golden, file: &str) {
    let mode = match golden.mode.as_str() {
        "train" => Mode::Train,
        "forward_only" => Mode::ForwardOnly,
        other => panic!("{file}: unknown mode {other}"),
    };
    let (plan, fallback) = golden.algorithm.plan(golden.ranks, golden.microbatches, mode).unwrap();
    assert_eq!(fallback, None, "{file}");
    assert_eq!(plan.stages, golden.stages, "{file}");
    assert_eq!(plan.placement, golden.placement, "{file}");
    for (rank, ops) in golden.rank_ops.iter().enumerate() {
        let expected: Vec<String> =
            ops.iter().filter_map(|op| compute(op, &golden.placement[rank])).collect();
        let made: Vec<String> = plan.actions[rank].iter().map(Action::to_string).collect();
        assert_eq!(made, expected, "{file}: rank {rank}");
    }
    compare_messages(golden, &plan, file);
    let checked = check(&plan, &lower(&plan, None, 1)).unwrap_or_else(|faults| panic!("{file}: {faults:?}"));
    if mode == Mode::Train {
        // Live chunks: one more than there are stages to pass on the way there and back.
        let peak = golden.stages + 1;
        assert_eq!(checked.peak_activations, vec![peak; golden.ranks], "{file}");
        assert_eq!(checked.peak_activations_until_weight, vec![peak; golden.ranks], "{file}");
    }
}

/// A recorded compute operation in our notation.
fn compute(op: &Value, lanes: &[usize]) -> Option<String> {
    let words: Vec<&str> = op.as_str()?.split(' ').collect();
    let number = |index: usize| words[index].parse::<usize>().unwrap();
    let chunk = |index: usize| Chunk { stage: lanes[number(index)], micro_batch: number(index + 1) };
    Some(match words[0] {
        "FB" => format!("F{}&B{}", chunk(1), chunk(3)),
        letter => format!("{letter}{}", chunk(1)),
    })
}

/// Every message is recorded twice, as a send and as a receive; both lists must be ours.
fn compare_messages(golden: &Golden, plan: &Plan, file: &str) {
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    for (rank, ops) in golden.rank_ops.iter().enumerate() {
        for op in ops.iter().filter_map(Value::as_array).flatten() {
            let words: Vec<&str> = op.as_str().unwrap().split(' ').collect();
            let number = |index: usize| words[index].parse::<usize>().unwrap();
            let (sends, letter) = words[0].split_at(1);
            let kind = if letter == "A" { TransferKind::Activation } else { TransferKind::Gradient };
            let (micro_batch, stage, peer) = (number(1), number(2), number(3));
            match sends {
                "S" => sent.push(Message { kind, micro_batch, stage, from: rank, to: peer }),
                _ => received.push(Message { kind, micro_batch, stage, from: peer, to: rank }),
            }
        }
    }
    let mut made = messages(plan);
    made.sort_unstable();
    sent.sort_unstable();
    received.sort_unstable();
    assert_eq!(made, sent, "{file}");
    assert_eq!(made, received, "{file}");
}
