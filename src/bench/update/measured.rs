//! What a measured run says of the update's communication, beside the virtual clock on which the same operations take what
//! they were measured to take. Pure.
//!
//! A transfer or a collective took from the moment in which the last of its ranks had come to it until it ended: what a rank
//! waits for the others before that follows from the durations of what they do, here and there.

use std::collections::HashMap;

use contraflow_runtime::schedule::{Lane, Op, Program, Span, Work, walk};
use serde::Serialize;

use super::rank::{Recorded, Trained};

/// Medians over steps. **Units**: milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figures {
    /// A step, on the rank on which it took longest.
    pub step_ms: f64,
    /// The same, on the virtual clock.
    pub walk_step_ms: f64,
    /// How long a compute lane waited for the update, in the mean of the ranks: for frames, and for ranks that come to a
    /// collective later.
    pub exposed_communication_ms: f64,
    /// The same, on the virtual clock.
    pub walk_exposed_communication_ms: f64,
}

/// The same four of one step. **Units**: seconds.
pub type StepFigures = [f64; 4];

/// What a run's measured steps took. `programs` and `ranks` are by pipeline rank.
///
/// # Errors
/// In words, if the ranks have not run these programs.
pub fn figures(programs: &[Program], ranks: &[Trained]) -> Result<Vec<StepFigures>, String> {
    let num_steps = ranks.iter().map(|rank| rank.steps.len()).min().unwrap_or(0);
    let step = |index: usize| {
        let steps: Vec<&Recorded> = ranks.iter().map(|rank| &rank.steps[index]).collect();
        of_step(programs, &steps)
    };
    (0..num_steps).map(step).collect()
}

fn of_step(programs: &[Program], steps: &[&Recorded]) -> Result<StepFigures, String> {
    for (rank, (program, step)) in programs.iter().zip(steps).enumerate() {
        let (expected, got) = (program.ops.len(), step.spans.len());
        if expected != got {
            return Err(format!("rank {rank}: expected {expected} operations in a step, got {got}"));
        }
    }
    let spans: Vec<&[Span]> = steps.iter().map(|step| &step.spans[..]).collect();
    let durations = durations(programs, &spans);
    let cost = |rank: usize, op: &Op| durations.get(&(rank, op.work)).copied().unwrap_or_default();
    let timeline = walk(programs, cost).map_err(|deadlock| deadlock.to_string())?;
    let waits = (0..programs.len()).map(|rank| timeline.idle(programs, rank..rank + 1, 0.0).update);
    let ranks = programs.len() as f64;
    Ok([
        steps.iter().map(|step| step.step_s).fold(0.0, f64::max),
        timeline.makespan,
        steps.iter().map(|step| step.exposed_s).sum::<f64>() / ranks,
        waits.sum::<f64>() / ranks,
    ])
}

/// What each operation of each rank took, once all ranks had come to it.
fn durations(programs: &[Program], spans: &[&[Span]]) -> HashMap<(usize, Work), f64> {
    let mut ran: HashMap<(usize, Work), Span> = HashMap::new();
    for (rank, (program, spans)) in programs.iter().zip(spans).enumerate() {
        ran.extend(program.ops.iter().zip(*spans).map(|(op, &span)| ((rank, op.work), span)));
    }
    let took = |rank: usize, op: &Op| {
        let together: Vec<Span> = match (op.work, op.lane) {
            (Work::Send { kind, chunk }, Lane::Send(peer)) => {
                let ends = [(rank, op.work), (peer, Work::Receive { kind, chunk })];
                ends.iter().filter_map(|end| ran.get(end).copied()).collect()
            }
            (work, _) if work.is_collective() => {
                (0..programs.len()).filter_map(|rank| ran.get(&(rank, work)).copied()).collect()
            }
            (work, _) => ran.get(&(rank, work)).copied().into_iter().collect(),
        };
        let begun = together.iter().map(|span| span.start).fold(0.0, f64::max);
        let ended = together.iter().map(|span| span.end).fold(0.0, f64::max);
        f64::max(ended - begun, 0.0)
    };
    let all =
        programs.iter().enumerate().flat_map(|(rank, program)| program.ops.iter().map(move |op| (rank, op)));
    all.map(|(rank, op)| ((rank, op.work), took(rank, op))).collect()
}

/// The median of each figure.
pub fn medians(steps: &[StepFigures]) -> Figures {
    let median = |index: usize| {
        let mut values: Vec<f64> = steps.iter().map(|step| step[index] * 1e3).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    Figures {
        step_ms: median(0),
        walk_step_ms: median(1),
        exposed_communication_ms: median(2),
        walk_exposed_communication_ms: median(3),
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::schedule::{Bucket, Chunk, Component, Contents, Pass, TransferKind};

    use super::*;

    const CHUNK: Chunk = Chunk { stage: 0, micro_batch: 0 };

    fn op(lane: Lane, work: Work, after: &[usize]) -> Op {
        Op { lane, work, after: after.to_vec(), action: None }
    }

    fn pass() -> Work {
        Work::Component { pass: Pass::Forward, chunk: CHUNK, layer: 0, component: Component::Attention }
    }

    /// Rank 0 computes and sends, rank 1 receives and computes; then both reduce a bucket and look at it.
    fn programs() -> Vec<Program> {
        let kind = TransferKind::Activation;
        let bucket = Bucket {
            number: 0,
            contents: Contents::Dense,
            stages: vec![0],
            tied: false,
            positions: vec![0, 1],
            copies: 2,
        };
        let reduce = Work::Reduce { bucket: 0 };
        let norm = Work::GradNorm { bucket: 0 };
        let program = |ops| Program { ops, buckets: vec![bucket.clone()] };
        vec![
            program(vec![
                op(Lane::Compute, pass(), &[]),
                op(Lane::Send(1), Work::Send { kind, chunk: CHUNK }, &[0]),
                op(Lane::Collective, reduce, &[0]),
                op(Lane::Compute, norm, &[2]),
            ]),
            program(vec![
                op(Lane::Receive(0), Work::Receive { kind, chunk: CHUNK }, &[]),
                op(Lane::Compute, pass(), &[0]),
                op(Lane::Collective, reduce, &[1]),
                op(Lane::Compute, norm, &[2]),
            ]),
        ]
    }

    fn recorded(spans: &[(f64, f64)], exposed_s: f64) -> Trained {
        let spans = spans.iter().map(|&(start, end)| Span { start, end }).collect();
        let steps = vec![Recorded { spans, step_s: 100.0, exposed_s }];
        Trained { losses_and_norms: Vec::new(), weights: String::new(), steps }
    }

    #[test]
    fn waiting_for_another_rank_is_no_part_of_a_duration() {
        // The receive waits from 50 on, the data comes at 63; rank 0 waits in the reduction until rank 1 comes to it at 83.
        let first = recorded(&[(50.0, 60.0), (60.0, 60.5), (60.0, 90.0), (90.0, 91.0)], 30.0);
        let second = recorded(&[(50.0, 63.0), (63.0, 83.0), (83.0, 90.0), (90.0, 91.0)], 7.0);
        let programs = programs();
        let spans: Vec<&[Span]> = [&first, &second].map(|rank| &rank.steps[0].spans[..]).into();
        let durations = durations(&programs, &spans);
        let took = |rank: usize, op: usize| durations[&(rank, programs[rank].ops[op].work)];
        assert_eq!([took(0, 0), took(0, 1), took(1, 1)], [10.0, 3.0, 20.0]);
        assert_eq!([took(0, 2), took(1, 2), took(0, 3)], [7.0, 7.0, 1.0]);
        // On the virtual clock from 0 on, with the waits as they were.
        let [step, walk_step, exposed, walk_exposed] = figures(&programs, &[first, second]).unwrap()[0];
        assert_eq!((step, walk_step), (100.0, 41.0));
        assert_eq!((exposed, walk_exposed), (18.5, 18.5));
    }

    #[test]
    fn other_programs_than_those_that_ran_are_refused() {
        let short = recorded(&[(0.0, 1.0)], 0.0);
        let error = figures(&programs(), &[short, recorded(&[(0.0, 1.0)], 0.0)]).unwrap_err();
        assert_eq!(error, "rank 0: expected 4 operations in a step, got 1");
    }
}
