//! What runs beside what: nothing without overlap, and with it all that the order of a pair lets run.
#![allow(clippy::unwrap_used, missing_docs)]

use contraflow_runtime::layout::recipe_stages;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{
    Lane, Mode, Op, Overlap, Plan, Program, StageLayout, Work, check, lower_with, walk,
};

/// The plan of a recipe and what its stages consist of.
fn planned(schedule: &str, pipeline: usize) -> (Plan, Vec<StageLayout>) {
    let changes = [
        "parallel.expert=2".to_owned(),
        format!("parallel.schedule={schedule}"),
        format!("parallel.pipeline={pipeline}"),
        "training.global_batch_size=64".to_owned(),
    ];
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap();
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    let (plan, _) = recipe.parallel.schedule.plan(pipeline, micro_batches, Mode::Train).unwrap();
    (plan, recipe_stages(&recipe).unwrap())
}

const CASES: [(&str, usize); 6] =
    [("dualpipe", 2), ("dualpipe", 4), ("dualpipev", 1), ("dualpipev", 2), ("1f1b", 1), ("1f1b", 4)];

/// A computation takes 3, an exchange 2, a transfer 1.
fn cost(_: usize, op: &Op) -> f64 {
    match op.lane {
        Lane::Compute => 3.0,
        Lane::Expert => 2.0,
        _ => 1.0,
    }
}

fn sum_of(program: &Program, is: impl Fn(&Op) -> bool) -> f64 {
    program.ops.iter().filter(|op| is(op)).map(|op| cost(0, op)).sum()
}

#[test]
fn without_overlap_a_rank_does_one_thing_at_a_time() {
    for (schedule, pipeline) in CASES {
        let (plan, stages) = planned(schedule, pipeline);
        let programs = lower_with(&plan, Some(&stages), 2, Overlap::Off);
        check(&plan, &programs).unwrap_or_else(|faults| panic!("{schedule} {pipeline}: {faults:?}"));
        let timeline = walk(&programs, cost).unwrap();
        for (program, spans) in programs.iter().zip(&timeline.spans) {
            let own =
                program.ops.iter().zip(spans).filter(|(op, _)| !matches!(op.work, Work::Receive { .. }));
            let mut own: Vec<_> = own.collect();
            own.sort_by(|(_, a), (_, b)| a.start.total_cmp(&b.start));
            for pair in own.windows(2) {
                let [(first, before), (second, after)] = [pair[0], pair[1]];
                assert!(
                    before.end <= after.start,
                    "{schedule} {pipeline}: {} beside {}",
                    first.work,
                    second.work
                );
            }
        }
    }
}

#[test]
fn what_overlap_saves_is_communication() {
    for (schedule, pipeline) in CASES {
        let (plan, stages) = planned(schedule, pipeline);
        let [off, on] = [false, true].map(|is_on| {
            let programs = lower_with(&plan, Some(&stages), 2, Overlap::of(is_on));
            (walk(&programs, cost).unwrap().makespan, programs)
        });
        let exchanges = sum_of(&on.1[0], |op| op.lane == Lane::Expert);
        let sends = sum_of(&on.1[0], |op| matches!(op.lane, Lane::Send(_)));
        assert!(on.0 < off.0, "{schedule} {pipeline}: {} with, {} without", on.0, off.0);
        if pipeline == 1 {
            let compute = sum_of(&on.1[0], |op| op.lane == Lane::Compute);
            assert_eq!(off.0, compute + exchanges + sends, "{schedule}");
        }
    }
}
