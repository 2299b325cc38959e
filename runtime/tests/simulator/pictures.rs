//! Pictures of simulations: what is drawn is what the timeline says.

use contraflow_runtime::schedule::{Mode, ScheduleKind, UnitCosts, clock};
use contraflow_runtime::simulator::{Cluster, rows, simulate_recipe, svg, write_trace};
use serde_json::Value;

use crate::recipe;

#[test]
fn the_picture_has_every_action_in_its_place() {
    let (plan, _) = ScheduleKind::Dualpipe.plan(4, 10, Mode::Train).unwrap();
    let (programs, timeline) = clock(&plan, UnitCosts::SUM).unwrap();
    let text = svg(&plan, &rows("rank", &programs, &timeline), "F");
    let count = |colour: &str| text.matches(colour).count();
    let actions: usize = plan.actions.iter().map(Vec::len).sum();
    // Each action once, the background, and a legend of five kinds.
    assert_eq!(text.matches("<rect ").count(), actions + 1 + 5, "{text}");
    let weights = plan.actions.iter().flatten().filter(|action| action.to_string().starts_with('W')).count();
    assert_eq!(count("#e69f00"), weights + 1);
    assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
}

#[test]
fn the_trace_has_every_operation_and_arrows_to_the_experts() {
    let cluster = Cluster::load("h800-2048").unwrap();
    let run = simulate_recipe(&recipe("tiny", &["parallel.expert=2"]), &cluster).unwrap();
    let mut bytes = Vec::new();
    write_trace(&mut bytes, &run.plan, &rows("rank", &run.programs, &run.timeline), 1e6).unwrap();
    let trace: Value = serde_json::from_slice(&bytes).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();
    let lasting = run.timeline.spans.iter().flatten().filter(|span| span.duration() > 0.0).count();
    assert_eq!(of("X").len(), lasting);
    let end = of("X").into_iter().map(|event| event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap());
    assert!((end.fold(0.0, f64::max) / 1e6 - run.step_s).abs() < 1e-9);
    // Every forward pass of experts has one arrow, from its dispatch; every backward one from its combine.
    let experts = of("X").into_iter().filter(|event| {
        let name = event["name"].as_str().unwrap();
        name.contains("Experts") && !name.starts_with("weight")
    });
    assert_eq!((of("s").len(), of("f").len()), (experts.clone().count(), experts.count()));
}
