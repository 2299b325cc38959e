//! What pictures show: rows of a rank's operations, from a walk or from a recording, and the same as plain data.
//!
//! Knows neither how a picture is drawn nor who reads the data.

use serde::{Deserialize, Serialize};

use super::palette::{Shade, shade_of, shade_of_action};
use crate::schedule::{Action, Lane, Op, Plan, Program, RecordedRank, RecordedStep, Span, Timeline};

/// A row of a picture.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// Whose: `rank 3`, or `plan 1` of what the plan makes of the pipeline rank 1.
    pub name: String,
    /// Position in the pipeline.
    pub pipeline: usize,
    /// What was run.
    pub program: &'a Program,
    /// When, by operation.
    pub spans: &'a [Span],
}

/// The rows of a walk, one for each pipeline rank, named `name` and its number.
pub fn rows<'a>(name: &str, programs: &'a [Program], timeline: &'a Timeline) -> Vec<Row<'a>> {
    let row = |(pipeline, (program, spans)): (usize, (&'a Program, &'a Vec<Span>))| Row {
        name: format!("{name} {pipeline}"),
        pipeline,
        program,
        spans,
    };
    programs.iter().zip(&timeline.spans).enumerate().map(row).collect()
}

/// The rows of a step that ranks have recorded, one for each of them.
pub fn recorded_rows(step: &RecordedStep) -> Vec<Row<'_>> {
    let ranks = step.ranks.iter();
    ranks
        .map(|RecordedRank { rank, pipeline, program, spans }| Row {
            name: format!("rank {rank}"),
            pipeline: *pipeline,
            program,
            spans,
        })
        .collect()
}

/// A step as plain data: what was measured, and what the plan makes of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTimeline {
    /// Number of the step.
    pub step: u64,
    /// Name of the schedule that ran.
    pub schedule: String,
    /// End of the last operation. **Units**: microseconds since the first rank began the step.
    pub end_us: f64,
    /// By rank, as recorded.
    pub measured: Vec<RowTimeline>,
    /// By pipeline rank: the walk of [`RecordedStep::planned`].
    pub planned: Vec<RowTimeline>,
}

/// A row of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowTimeline {
    /// See [`Row::name`].
    pub name: String,
    /// Position in the pipeline.
    pub pipeline: usize,
    /// The operations that took any time, in the order of the program.
    pub bars: Vec<Bar>,
}

/// An operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Name of its lane: `compute`, `all-to-all`, `send to 1`, `receive from 1`, `collective`.
    pub lane: String,
    /// What it has the colour of.
    pub shade: Shade,
    /// What it does, in words.
    pub label: String,
    /// The action of the plan that it belongs to, in the text form of plans.
    pub action: Option<String>,
    /// Begin. **Units**: microseconds since the first rank began the step.
    pub begin_us: f64,
    /// **Units**: microseconds.
    pub duration_us: f64,
}

impl StepTimeline {
    /// Of a recorded step. A step whose programs do not fit together has no planned rows.
    pub fn of(recorded: &RecordedStep) -> StepTimeline {
        let plan = &recorded.plan;
        let timeline = |rows: Vec<Row>| {
            let of_row = |row: Row| RowTimeline {
                bars: row.bars(plan, 1e6).map(|(_, bar)| bar).collect(),
                name: row.name,
                pipeline: row.pipeline,
            };
            rows.into_iter().map(of_row).collect::<Vec<_>>()
        };
        let planned = recorded.planned().ok();
        let ends = recorded.ranks.iter().flat_map(|rank| rank.spans.iter().map(|span| span.end * 1e6));
        StepTimeline {
            step: recorded.step,
            schedule: plan.schedule.clone(),
            end_us: ends.fold(0.0, f64::max),
            measured: timeline(recorded_rows(recorded)),
            planned: planned
                .map_or(Vec::new(), |(programs, walked)| timeline(rows("plan", &programs, &walked))),
        }
    }
}

/// What is drawn of a row: an action as a whole, or an operation that stands for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// Its colour.
    pub shade: Shade,
    /// When it ran.
    pub span: Span,
    /// The micro-batch of an action.
    pub micro_batch: Option<usize>,
    /// The compute lane, or that of the all-to-alls.
    pub lane: Lane,
}

impl<'a> Row<'a> {
    /// Its actions, and what stands for itself on the compute lane and the lane of all-to-alls.
    pub fn blocks(&self, plan: &Plan) -> Vec<Block> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut current: Option<(usize, usize)> = None;
        for (op, &span) in self.program.ops.iter().zip(self.spans) {
            match (shade_of(&op.work), op.lane, op.action) {
                (None, Lane::Compute, Some(action)) => match current.filter(|&(of, _)| of == action) {
                    Some((_, at)) => blocks[at].span.end = blocks[at].span.end.max(span.end),
                    None => {
                        current = Some((action, blocks.len()));
                        let action = &plan.actions[self.pipeline][action];
                        let (shade, micro_batch) = (shade_of_action(action), micro_batch(action));
                        blocks.push(Block { shade, span, micro_batch, lane: op.lane });
                    }
                },
                (Some(shade), lane @ (Lane::Compute | Lane::Expert), _) => {
                    blocks.push(Block { shade, span, micro_batch: None, lane });
                }
                _ => {}
            }
        }
        blocks
    }

    /// The operations that took any time, with their places in the program. `microseconds` are those of one unit of the spans.
    pub fn bars<'b>(
        &'b self,
        plan: &'b Plan,
        microseconds: f64,
    ) -> impl Iterator<Item = (usize, Bar)> + use<'a, 'b> {
        let (pipeline, program) = (self.pipeline, self.program);
        let lasting =
            program.ops.iter().zip(self.spans).enumerate().filter(|(_, (_, span))| span.duration() > 0.0);
        lasting.map(move |(id, (op, span))| (id, bar(plan, pipeline, op, span, microseconds)))
    }
}

fn bar(plan: &Plan, pipeline: usize, op: &Op, span: &Span, microseconds: f64) -> Bar {
    let action = op.action.map(|action| plan.actions[pipeline][action]);
    let shade = shade_of(&op.work).or(action.map(|action| shade_of_action(&action)));
    Bar {
        lane: lane_name(op.lane),
        shade: shade.unwrap_or(Shade::Optimizer),
        label: op.work.to_string(),
        action: action.map(|action| action.to_string()),
        begin_us: span.start * microseconds,
        duration_us: span.duration() * microseconds,
    }
}

fn micro_batch(action: &Action) -> Option<usize> {
    let mut chunks = action.forwards().chain(action.backward_input()).chain(action.backward_weight());
    chunks.next().map(|chunk| chunk.micro_batch)
}

/// What a lane is called in pictures.
pub fn lane_name(lane: Lane) -> String {
    match lane {
        Lane::Compute => "compute".to_owned(),
        Lane::Expert => "all-to-all".to_owned(),
        Lane::Send(peer) => format!("send to {peer}"),
        Lane::Receive(peer) => format!("receive from {peer}"),
        Lane::Collective => "collective".to_owned(),
    }
}
