//! A timeline as a page draws it: per pipeline rank the operations on their lanes, the bubbles between them, and what each operation
//! waited for. Pure; the same for a plan on the virtual clock, for a simulation and for what ranks recorded.

use std::borrow::Cow;
use std::collections::BTreeMap;

use contraflow_runtime::schedule::walk::partners;
use contraflow_runtime::schedule::{
    Action, Component, Lane, Op, OpId, Plan, Program, RecordedStep, Span, Timeline, UnitCosts, Work, clock,
};
use contraflow_runtime::simulator::{
    Cluster, Row, Shade, lane_name, shade_of, shade_of_action, simulate_recipe, write_trace,
};
use serde_json::{Value, json};

use super::shown::Shown;

/// More operations than these are shown as the actions that they belong to.
const MAX_OPERATIONS: usize = 40_000;

/// Pauses below this share of a step are none.
const PAUSE: f64 = 1e-6;

/// The cluster on which a step is simulated: rates of kernels and links that are published.
const CLUSTER: &str = "h800-2048";

/// A timeline and what it is of: a row for each pipeline rank, or for each rank that has recorded.
pub struct Timed {
    plan: Plan,
    /// Of each row.
    programs: Vec<Program>,
    /// When their operations ran.
    timeline: Timeline,
    /// Position of each row in the pipeline.
    pipelines: Vec<usize>,
    /// Unit of its times: `s`, or `F` for that of a forward pass.
    unit: &'static str,
    /// Where the times are from, in words.
    source: String,
}

/// A timeline of a run: `actions` of its plan in units of a forward pass, its `operations` as simulated, the latest step as `recorded`, or what
/// the plan makes of the operations of that step (`expected`).
///
/// # Errors
/// There is none of the kind, with the reason.
pub fn of_run(shown: &Shown, view: &str) -> Result<Timed, String> {
    let facts = &shown.facts;
    let recorded = || {
        let timelines = shown.read(|state| state.timelines.clone());
        let step = timelines.and_then(|timelines| timelines.latest());
        step.ok_or("pipeline: no step has been recorded, or the ranks are in another process")
    };
    match view {
        "actions" => {
            let plan = facts.plan.clone().ok_or("pipeline: the plan of this run is not known")?;
            let walked = clock(&plan, UnitCosts::SUM).map_err(|deadlock| deadlock.to_string())?;
            let source = "planned: a forward pass and each half of a backward pass take one unit".to_owned();
            Ok(Timed::walked(plan, walked, "F", source))
        }
        "operations" => {
            let recipe = facts.recipe.as_ref().ok_or("pipeline: the recipe of this run cannot be read")?;
            let cluster = Cluster::load(CLUSTER).map_err(|faults| faults.to_string())?;
            let run = simulate_recipe(recipe, &cluster).map_err(|faults| faults.join("; "))?;
            let source = format!("simulated on {CLUSTER}");
            Ok(Timed::walked(run.plan, (run.programs, run.timeline), "s", source))
        }
        "recorded" => Ok(Timed::recorded(recorded()?)),
        "expected" => {
            let step = recorded()?;
            let walked = step.planned().map_err(|deadlock| deadlock.to_string())?;
            let source = format!("what the plan makes of the operations of step {}", step.step);
            Ok(Timed::walked(Plan::clone(&step.plan), walked, "s", source))
        }
        _ => Err(format!("view: expected actions, operations, recorded or expected, got {view:?}")),
    }
}

impl Timed {
    fn walked(
        plan: Plan,
        (programs, timeline): (Vec<Program>, Timeline),
        unit: &'static str,
        source: String,
    ) -> Self {
        let pipelines = (0..programs.len()).collect();
        Timed { plan, programs, timeline, pipelines, unit, source }
    }

    fn recorded(step: RecordedStep) -> Self {
        let source = format!("recorded in step {}", step.step);
        let pipelines = step.ranks.iter().map(|rank| rank.pipeline).collect();
        let (programs, spans): (Vec<Program>, Vec<Vec<Span>>) =
            step.ranks.into_iter().map(|rank| (rank.program, rank.spans)).unzip();
        let timeline = Timeline::new(&programs, spans);
        Timed { plan: Plan::clone(&step.plan), programs, timeline, pipelines, unit: "s", source }
    }

    /// For a page.
    pub fn drawn(&self) -> Value {
        drawn(self)
    }

    /// For Perfetto.
    pub fn trace(&self) -> Vec<u8> {
        let rows: Vec<Row> = (0..self.programs.len())
            .map(|row| Row {
                name: format!("rank {row}"),
                pipeline: self.pipelines[row],
                program: &self.programs[row],
                spans: &self.timeline.spans[row],
            })
            .collect();
        let mut out = Vec::new();
        let microseconds = if self.unit == "s" { 1e6 } else { 1e3 };
        // Memory takes what is written to it.
        let _ = write_trace(&mut out, &self.plan, &rows, microseconds);
        out
    }

    /// The other end of every transfer. Of several ranks at a pipeline coordinate the k-th talk to each other.
    fn partners(&self) -> Vec<Vec<Option<(usize, OpId)>>> {
        let mut found: Vec<Vec<Option<(usize, OpId)>>> =
            self.programs.iter().map(|program| vec![None; program.ops.len()]).collect();
        let mut by_position: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        self.pipelines.iter().enumerate().for_each(|(row, &at)| by_position.entry(at).or_default().push(row));
        let groups = by_position.values().map(Vec::len).min().unwrap_or(0);
        for group in 0..groups {
            let rows: Vec<usize> = by_position.values().map(|rows| rows[group]).collect();
            let programs: Vec<Program> = rows.iter().map(|&row| self.programs[row].clone()).collect();
            for (at, ends) in partners(&programs).into_iter().enumerate() {
                found[rows[at]] =
                    ends.into_iter().map(|end| end.map(|(peer, op)| (rows[peer], op))).collect();
            }
        }
        found
    }
}

fn drawn(drawn: &Timed) -> Value {
    let Timed { plan, programs, timeline, unit, source, .. } = drawn;
    let operations: usize = programs.iter().map(|program| program.ops.len()).sum();
    let is_whole = operations <= MAX_OPERATIONS;
    let waits = Waits { drawn, partners: drawn.partners() };
    let ranks: Vec<Value> = (0..programs.len()).map(|rank| of_rank(&waits, rank, is_whole)).collect();
    let all = timeline.makespan * programs.len() as f64;
    let busy: f64 = timeline.compute_busy.iter().sum();
    let shades =
        Shade::ALL.map(|shade| json!({"name": shade.name(), "colour": shade.colour(), "ink": shade.ink()}));
    json!({
        "unit": unit, "source": source, "makespan": timeline.makespan, "schedule": plan.schedule,
        "bubble": if all > 0.0 { 1.0 - busy / all } else { 0.0 },
        "stages": plan.stages, "micro_batches": plan.micro_batches, "ranks": ranks, "shades": shades,
        "whole": is_whole,
    })
}

fn of_rank(waits: &Waits, rank: usize, is_whole: bool) -> Value {
    let Timed { plan, programs, timeline, .. } = waits.drawn;
    let (program, spans) = (&programs[rank], &timeline.spans[rank]);
    let mut lanes: BTreeMap<Lane, Vec<Value>> = BTreeMap::new();
    let mut idle = Vec::new();
    let (mut free, pause) = (0.0, PAUSE * timeline.makespan);
    let mut open: Option<(usize, Span, OpId)> = None;
    for (id, (op, span)) in program.ops.iter().zip(spans).enumerate() {
        let is_compute = op.lane == Lane::Compute;
        if span.duration() <= 0.0 || (!is_whole && !is_compute) {
            continue;
        }
        if is_compute {
            if span.start - free > pause {
                idle.push(json!([free, span.start]));
            }
            free = f64::max(free, span.end);
        }
        match (is_whole, op.action) {
            (false, Some(action)) => {
                // Pieces of one action that follow each other are one.
                match &mut open {
                    Some((same, whole, _)) if *same == action => whole.end = span.end,
                    _ => {
                        if let Some((_, whole, first)) = open.replace((action, *span, id)) {
                            lanes.entry(Lane::Compute).or_default().push(waits.shown(rank, first, whole));
                        }
                    }
                }
            }
            _ => lanes.entry(op.lane).or_default().push(waits.shown(rank, id, *span)),
        }
    }
    if let Some((_, whole, first)) = open {
        lanes.entry(Lane::Compute).or_default().push(waits.shown(rank, first, whole));
    }
    if timeline.makespan - free > pause {
        idle.push(json!([free, timeline.makespan]));
    }
    let lanes: Vec<Value> =
        lanes.into_iter().map(|(lane, ops)| json!({"name": lane_name(lane), "ops": ops})).collect();
    let stages = plan.placement.get(waits.drawn.pipelines[rank]);
    // Ranks of one pipeline coordinate work on micro-batches of their own: the k-th of each are one pipeline.
    let pipelines = &waits.drawn.pipelines;
    let group = pipelines[..rank].iter().filter(|&&other| other == pipelines[rank]).count();
    json!({"rank": rank, "group": group, "stages": stages, "lanes": lanes, "idle": idle})
}

/// What operations wait for.
struct Waits<'a> {
    drawn: &'a Timed,
    partners: Vec<Vec<Option<(usize, OpId)>>>,
}

impl Waits<'_> {
    fn action(&self, rank: usize, op: &Op) -> Option<Action> {
        let of_rank = self.drawn.plan.actions.get(self.drawn.pipelines[rank])?;
        op.action.and_then(|action| of_rank.get(action).copied())
    }

    /// An operation as a page has it: begin, end, number of its colour, name, micro-batches, and what it waited for.
    fn shown(&self, rank: usize, id: OpId, span: Span) -> Value {
        let op = &self.drawn.programs[rank].ops[id];
        let action = self.action(rank, op);
        let shade = shade_of(&op.work).or(action.as_ref().map(shade_of_action)).unwrap_or(Shade::Optimizer);
        let shade = Shade::ALL.iter().position(|other| *other == shade);
        let is_whole = matches!(op.work, Work::Component { component: Component::Chunk, .. });
        json!({
            "s": span.start, "e": span.end, "c": shade, "a": action.map(|action| action.to_string()),
            "n": if is_whole { Cow::Borrowed("") } else { Cow::Owned(op.work.to_string()) },
            "m": micro_batches(op, action), "w": self.waited_for(rank, id),
        })
    }

    /// What kept an operation from starting when its lane was free: the rank that did it, what it was, and since when the lane was free.
    fn waited_for(&self, rank: usize, id: OpId) -> Option<Value> {
        let Timed { programs, timeline, .. } = self.drawn;
        let (ops, spans) = (&programs[rank].ops, &timeline.spans[rank]);
        let op = &ops[id];
        let before = (0..id).rev().find(|&before| ops[before].lane == op.lane);
        let free = before.map_or(0.0, |before| spans[before].end);
        if spans[id].start - free <= PAUSE * timeline.makespan {
            return None;
        }
        let (mut at, mut what) = (rank, self.last_needed(rank, id)?);
        // A transfer is not what was waited for but how it came: the operation at its other end is.
        for _ in 0..4 {
            let op = &programs[at].ops[what];
            let is_transfer = matches!(op.lane, Lane::Send(_) | Lane::Receive(_));
            if !is_transfer {
                break;
            }
            if let (Lane::Receive(_), Some((peer, send))) = (op.lane, self.partners[at][what]) {
                (at, what) = (peer, send);
            }
            match self.last_needed(at, what) {
                Some(needed) => what = needed,
                None => break,
            }
        }
        let op = &programs[at].ops[what];
        let name = self.action(at, op).map_or_else(|| op.work.to_string(), |action| action.to_string());
        let work = op.work.to_string();
        Some(
            json!({"rank": at, "name": name, "work": work, "since": free, "end": timeline.spans[at][what].end}),
        )
    }

    /// Of what an operation needs, what ended last.
    fn last_needed(&self, rank: usize, id: OpId) -> Option<OpId> {
        let Timed { programs, timeline, .. } = self.drawn;
        let end = |needed: &&OpId| timeline.spans[rank][**needed].end;
        programs[rank].ops[id].after.iter().max_by(|a, b| end(a).total_cmp(&end(b))).copied()
    }
}

/// Micro-batches that an operation works on: of an action as a whole all of its chunks.
fn micro_batches(op: &Op, action: Option<Action>) -> Vec<usize> {
    match op.work {
        Work::Component { component: Component::Chunk, .. } => {
            let chunks_of = |action: Action| {
                let (first, second) = action.parts();
                let of = |part: Action| {
                    part.forwards().chain(part.backward_input()).chain(part.backward_weight()).next()
                };
                of(first).into_iter().chain(second.and_then(of))
            };
            action.into_iter().flat_map(chunks_of).map(|chunk| chunk.micro_batch).collect()
        }
        Work::Component { chunk, .. } | Work::Send { chunk, .. } | Work::Receive { chunk, .. } => {
            vec![chunk.micro_batch]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::schedule::{Mode, ScheduleKind, UnitCosts, clock};

    use super::*;

    fn dualpipe() -> (Plan, Value) {
        let (plan, _) = ScheduleKind::Dualpipe.plan(4, 10, Mode::Train).unwrap();
        let (programs, timeline) = clock(&plan, UnitCosts::SUM).unwrap();
        let source = "plan".to_owned();
        let value = Timed::walked(plan.clone(), (programs, timeline), "F", source).drawn();
        (plan, value)
    }

    fn compute(value: &Value, rank: usize) -> &Vec<Value> {
        value["ranks"][rank]["lanes"][0]["ops"].as_array().unwrap()
    }

    #[test]
    fn every_action_of_the_plan_stands_on_its_rank_once_and_in_order() {
        let (plan, value) = dualpipe();
        for (rank, actions) in plan.actions.iter().enumerate() {
            let shown: Vec<&str> = compute(&value, rank).iter().map(|op| op["a"].as_str().unwrap()).collect();
            let planned: Vec<String> = actions.iter().map(Action::to_string).collect();
            assert_eq!(shown, planned, "rank {rank}");
        }
    }

    #[test]
    fn busy_and_idle_time_of_a_rank_add_up_to_the_step_and_give_the_bubble() {
        let (plan, value) = dualpipe();
        let makespan = value["makespan"].as_f64().unwrap();
        let mut idle_of_all = 0.0;
        for rank in 0..plan.ranks() {
            let length = |span: &Value| span[1].as_f64().unwrap() - span[0].as_f64().unwrap();
            let idle: f64 = value["ranks"][rank]["idle"].as_array().unwrap().iter().map(length).sum();
            let busy: f64 = compute(&value, rank)
                .iter()
                .map(|op| op["e"].as_f64().unwrap() - op["s"].as_f64().unwrap())
                .sum();
            assert!((idle + busy - makespan).abs() < 1e-9, "rank {rank}: {idle} + {busy} of {makespan}");
            idle_of_all += idle;
        }
        let share = contraflow_runtime::schedule::simulate(&plan, UnitCosts::SUM).unwrap().share;
        assert!((value["bubble"].as_f64().unwrap() - share).abs() < 1e-12);
        assert!((idle_of_all / makespan / 4.0 - share).abs() < 1e-12);
    }

    #[test]
    fn an_operation_that_waited_names_the_rank_and_the_action_that_it_waited_for() {
        let (_, value) = dualpipe();
        // In DualPipe the second rank begins with what the first one has made of the first micro-batch.
        let first = &compute(&value, 1)[0];
        assert_eq!((&first["a"], &first["m"]), (&json!("F1.0"), &json!([0])));
        let waited = &first["w"];
        assert_eq!((&waited["rank"], &waited["name"]), (&json!(0), &json!("F0.0")), "{waited}");
        assert_eq!((&waited["since"], &waited["end"]), (&json!(0.0), &first["s"]));
        // The ends of the pipeline have their first micro-batches at hand.
        assert!(compute(&value, 0)[0]["w"].is_null() && compute(&value, 3)[0]["w"].is_null());
        // What waited for another rank started when that was done.
        for rank in 0..4 {
            for op in compute(&value, rank).iter().filter(|op| !op["w"].is_null()) {
                assert_eq!(op["w"]["end"], op["s"], "{op}");
            }
        }
    }
}
