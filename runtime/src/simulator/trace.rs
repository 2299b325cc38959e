//! Rows of operations as a trace that Perfetto and Chrome read: a process for each row, a thread for each lane, arrows from the
//! dispatch of tokens to the experts that work on them.
//!
//! Knows no file.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::rows::{Bar, Row, lane_name};
use crate::schedule::{Component, Lane, Op, Plan, Program, Work};

/// Writes the trace: a process for each row, in their order. `microseconds` are those of one unit of the rows' spans.
///
/// # Errors
/// Those of the writer.
pub fn write_trace(out: &mut impl Write, plan: &Plan, rows: &[Row], microseconds: f64) -> io::Result<()> {
    write!(out, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
    let mut separator = "\n";
    let mut event = |out: &mut dyn Write, event: Value| {
        write!(out, "{separator}{event}")?;
        separator = ",\n";
        io::Result::Ok(())
    };
    let mut arrows = 0_usize;
    for (process, row) in rows.iter().enumerate() {
        let (program, spans) = (row.program, row.spans);
        let meta = |name: &str, args: Value| json!({"ph": "M", "pid": process, "name": name, "args": args});
        event(out, meta("process_name", json!({"name": row.name})))?;
        event(out, meta("process_sort_index", json!({"sort_index": process})))?;
        let lanes: BTreeMap<Lane, usize> = lanes(program);
        for (lane, &thread) in &lanes {
            let args = json!({"name": lane_name(*lane)});
            event(
                out,
                json!({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": args}),
            )?;
        }
        for (id, Bar { shade, label, action, begin_us, duration_us, .. }) in row.bars(plan, microseconds) {
            let op = &program.ops[id];
            let thread = lanes[&op.lane];
            let mut whole = json!({
                "ph": "X", "pid": process, "tid": thread, "ts": begin_us, "dur": duration_us,
                "name": label, "cat": shade.name(),
            });
            if let Some(action) = action {
                whole["args"] = json!({"action": action});
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
                let arrow = |phase: &str, thread: usize, time: f64| json!({"ph": phase, "pid": process, "tid": thread, "ts": time, "id": arrows, "name": "rows", "cat": "rows", "bp": "e"});
                event(out, arrow("s", lanes[&program.ops[earlier].lane], from))?;
                event(out, arrow("f", thread, begin_us))?;
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

fn works_on_rows(op: &Op) -> bool {
    matches!(op.work, Work::Component { component: Component::Experts, .. })
}

fn brings_rows(op: &Op) -> bool {
    matches!(op.work, Work::Component { component: Component::Dispatch | Component::Combine, .. })
}
