//! A timeline as a trace that Perfetto and Chrome read: a process for each pipeline rank, a thread for each lane, arrows from the
//! dispatch of tokens to the experts that work on them.
//!
//! Knows no file.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::palette::{Shade, shade_of, shade_of_action};
use crate::schedule::{Action, Component, Lane, Op, Plan, Program, Timeline, Work};

/// Writes the trace. `microseconds` are those of one unit of the timeline.
///
/// # Errors
/// Those of the writer.
pub fn write_trace(
    out: &mut impl Write,
    plan: &Plan,
    programs: &[Program],
    timeline: &Timeline,
    microseconds: f64,
) -> io::Result<()> {
    write!(out, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
    let mut separator = "\n";
    let mut event = |out: &mut dyn Write, event: Value| {
        write!(out, "{separator}{event}")?;
        separator = ",\n";
        io::Result::Ok(())
    };
    let mut arrows = 0_usize;
    for (rank, program) in programs.iter().enumerate() {
        let spans = &timeline.spans[rank];
        let name =
            json!({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": format!("rank {rank}")}});
        event(out, name)?;
        let lanes: BTreeMap<Lane, usize> = lanes(program);
        for (lane, &thread) in &lanes {
            let args = json!({"name": lane_name(*lane)});
            event(out, json!({"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": args}))?;
        }
        for (op, span) in program.ops.iter().zip(spans).filter(|(_, span)| span.duration() > 0.0) {
            let thread = lanes[&op.lane];
            let (begin, duration) = (span.start * microseconds, span.duration() * microseconds);
            let action = op.action.map(|action| plan.actions[rank][action]);
            let mut whole = json!({
                "ph": "X", "pid": rank, "tid": thread, "ts": begin, "dur": duration,
                "name": op.work.to_string(), "cat": category(op, action).name(),
            });
            if let Some(action) = action {
                whole["args"] = json!({"action": action.to_string()});
            }
            event(out, whole)?;
            if !works_on_rows(op) {
                continue;
            }
            for &earlier in op.after.iter().filter(|&&earlier| brings_rows(&program.ops[earlier])) {
                arrows += 1;
                // An arrow begins inside of what it comes from.
                let from = spans[earlier].end * microseconds
                    - f64::min(0.01, spans[earlier].duration() * microseconds / 2.0);
                let arrow = |phase: &str, thread: usize, time: f64| json!({"ph": phase, "pid": rank, "tid": thread, "ts": time, "id": arrows, "name": "rows", "cat": "rows", "bp": "e"});
                event(out, arrow("s", lanes[&program.ops[earlier].lane], from))?;
                event(out, arrow("f", thread, begin))?;
            }
        }
    }
    writeln!(out, "\n]}}")
}

/// Threads in the order of lanes.
fn lanes(program: &Program) -> BTreeMap<Lane, usize> {
    let mut lanes: BTreeMap<Lane, usize> = program.ops.iter().map(|op| (op.lane, 0)).collect();
    lanes.values_mut().enumerate().for_each(|(index, thread)| *thread = index);
    lanes
}

fn lane_name(lane: Lane) -> String {
    match lane {
        Lane::Compute => "compute".to_owned(),
        Lane::Expert => "all-to-all".to_owned(),
        Lane::Send(peer) => format!("send to {peer}"),
        Lane::Receive(peer) => format!("receive from {peer}"),
        Lane::Collective => "collective".to_owned(),
    }
}

fn category(op: &Op, action: Option<Action>) -> Shade {
    shade_of(&op.work).or(action.map(|action| shade_of_action(&action))).unwrap_or(Shade::Optimizer)
}

fn works_on_rows(op: &Op) -> bool {
    matches!(op.work, Work::Component { component: Component::Experts, .. })
}

fn brings_rows(op: &Op) -> bool {
    matches!(op.work, Work::Component { component: Component::Dispatch | Component::Combine, .. })
}
