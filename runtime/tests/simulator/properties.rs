//! What holds of every simulation: it is no faster than its bounds, memory is as the check says, and nothing gets faster when a cost
//! grows.

use std::collections::HashMap;

use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Lane, OpId, Program, Timeline, check, lower};
use contraflow_runtime::simulator::{Cluster, Costs, Rates, Run, simulate_recipe};
use proptest::prelude::*;

use crate::recipe;

/// The published machine, some of its rates divided and some of its times added to.
fn changed(change: impl Fn(&mut Rates)) -> Cluster {
    let mut cluster = Cluster::load("h800-2048").unwrap();
    if let Costs::Kernels(rates) = &mut cluster.costs {
        change(rates);
    }
    cluster
}

type Change = fn(&mut Rates, f64);

/// Every cost of a profile, made larger.
const CHANGES: [(&str, Change); 20] = [
    ("communication share", |rates, by| rates.communication_share = 1.0 - 1.0 / by),
    ("launch", |rates, by| rates.launch_s += 1e-6 * by),
    ("products", |rates, by| rates.products.iter_mut().for_each(|rate| rate.flops /= by)),
    ("attention", |rates, by| rates.attention /= by),
    ("attention backward", |rates, by| rates.attention_backward /= by),
    ("norm", |rates, by| rates.bandwidth.norm /= by),
    ("swiglu", |rates, by| rates.bandwidth.swiglu /= by),
    ("cast", |rates, by| rates.bandwidth.cast /= by),
    ("attention ends", |rates, by| rates.bandwidth.attention_ends /= by),
    ("copy", |rates, by| rates.bandwidth.copy /= by),
    ("update", |rates, by| rates.bandwidth.update /= by),
    ("inside", |rates, by| rates.inside.bytes_per_s /= by),
    ("across", |rates, by| rates.across.bytes_per_s /= by),
    ("latency inside", |rates, by| rates.inside.latency_s *= by),
    ("latency across", |rates, by| rates.across.latency_s *= by),
    ("exchange across", |rates, by| rates.exchange.across = rates.exchange.across.map(|speed| speed / by)),
    ("exchange inside", |rates, by| rates.exchange.inside = rates.exchange.inside.map(|speed| speed / by)),
    ("barrier", |rates, by| rates.exchange.barrier_s += 1e-5 * by),
    ("jitter", |rates, by| rates.chance.jitter_cv += 0.01 * by),
    ("hop", |rates, by| rates.calibrated.hop_latency_s += 1e-5 * by),
];

fn layouts() -> impl Strategy<Value = Recipe> {
    let schedule = prop::sample::select(vec!["dualpipe", "dualpipev", "1f1b"]);
    let precision = prop::sample::select(vec!["f32", "bf16", "fp8"]);
    (schedule, precision, 1_usize..=2, 0_usize..=1, 1_usize..=6).prop_map(
        |(schedule, precision, pipeline, expert, more)| {
            let pipeline = if schedule == "dualpipe" { 2 } else { pipeline };
            let expert = 1 << expert;
            // Two micro-batches at least, an even number for both directions.
            let batch = 2 * more * expert;
            recipe(
                "tiny",
                &[
                    &format!("parallel.schedule={schedule}"),
                    &format!("parallel.pipeline={pipeline}"),
                    &format!("parallel.expert={expert}"),
                    "parallel.data=1",
                    "training.micro_batch_size=1",
                    &format!("training.global_batch_size={batch}"),
                    &format!("precision.recipe={precision}"),
                ],
            )
        },
    )
}

fn step(recipe: &Recipe, cluster: &Cluster) -> Run {
    simulate_recipe(recipe, cluster).unwrap()
}

/// The longest chain of operations that need each other's results: what no number of lanes could beat.
fn critical_path(programs: &[Program], timeline: &Timeline) -> f64 {
    let mut kth: HashMap<(usize, usize, usize), (usize, OpId)> = HashMap::new();
    for (rank, program) in programs.iter().enumerate() {
        let mut seen: HashMap<usize, usize> = HashMap::new();
        for (id, op) in program.ops.iter().enumerate() {
            if let Lane::Send(peer) = op.lane {
                let k = seen.entry(peer).or_default();
                kth.insert((rank, peer, *k), (rank, id));
                *k += 1;
            }
        }
    }
    let mut ends: Vec<Vec<f64>> = programs.iter().map(|program| vec![0.0; program.ops.len()]).collect();
    let mut is_settled = false;
    while !is_settled {
        is_settled = true;
        for (rank, program) in programs.iter().enumerate() {
            let mut received: HashMap<usize, usize> = HashMap::new();
            for (id, op) in program.ops.iter().enumerate() {
                let own = op.after.iter().map(|&earlier| ends[rank][earlier]).fold(0.0, f64::max);
                let end = match op.lane {
                    Lane::Receive(peer) => {
                        let k = received.entry(peer).or_default();
                        let (from, send) = kth[&(peer, rank, *k)];
                        *k += 1;
                        ends[from][send]
                    }
                    _ => own + timeline.spans[rank][id].duration(),
                };
                if end > ends[rank][id] + 1e-12 {
                    ends[rank][id] = end;
                    is_settled = false;
                }
            }
        }
    }
    ends.into_iter().flatten().fold(0.0, f64::max)
}

/// The most chunks that are between the begin of their forward and the end of their input gradient at once, by rank.
fn live_chunks(run: &Run) -> Vec<usize> {
    let of_rank = |(rank, program): (usize, &Program)| {
        let mut events: Vec<(f64, bool)> = Vec::new();
        for (index, action) in run.plan.actions[rank].iter().enumerate() {
            let spans = program.ops.iter().zip(&run.timeline.spans[rank]);
            let own = spans.filter(|(op, _)| op.action == Some(index) && op.lane == Lane::Compute);
            let (begin, end) = own.fold((f64::INFINITY, 0.0), |(begin, end): (f64, f64), (_, span)| {
                (begin.min(span.start), end.max(span.end))
            });
            events.extend(action.forwards().map(|_| (begin, true)));
            events.extend(action.backward_input().map(|_| (end, false)));
        }
        // What ends goes before what begins at the same moment.
        events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (mut live, mut most) = (0_usize, 0);
        for (_, begins) in events {
            live = if begins { live + 1 } else { live - 1 };
            most = most.max(live);
        }
        most
    };
    run.programs.iter().enumerate().map(of_rank).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_step_beats_its_bounds(recipe in layouts()) {
        let run = step(&recipe, &changed(|_| {}));
        let bound = critical_path(&run.programs, &run.timeline);
        prop_assert!(run.step_s >= bound - 1e-12 && bound > 0.0, "{} {bound}", run.step_s);
        for (program, spans) in run.programs.iter().zip(&run.timeline.spans) {
            let mut busy: HashMap<Lane, f64> = HashMap::new();
            for (op, span) in program.ops.iter().zip(spans) {
                *busy.entry(op.lane).or_default() += span.duration();
            }
            prop_assert!(busy.values().all(|busy| *busy <= run.step_s + 1e-9));
        }
        for components in &run.breakdown.ranks {
            prop_assert!((components.sum() - run.step_s).abs() < 1e-9, "{components:?} {}", run.step_s);
            prop_assert!(components.named().iter().all(|(_, seconds)| *seconds >= -1e-12), "{components:?}");
        }
    }

    #[test]
    fn chunks_live_as_the_check_counts_them(recipe in layouts()) {
        let run = step(&recipe, &changed(|_| {}));
        let report = check(&run.plan, &lower(&run.plan, None, 1)).unwrap();
        prop_assert_eq!(live_chunks(&run), report.peak_activations);
    }

    #[test]
    fn nothing_is_faster_where_something_costs_more(recipe in layouts(), which in 0..CHANGES.len(), by in 1.01..4.0_f64) {
        let (name, change) = CHANGES[which];
        let before = step(&recipe, &changed(|_| {})).step_s;
        let after = step(&recipe, &changed(|rates| change(rates, by))).step_s;
        prop_assert!(after >= before - 1e-12, "{name} {by}: {before} {after}");
    }
}

/// Uneven routing makes the slowest rank of a group slower, never faster.
#[test]
fn uneven_routing_costs() {
    let recipe = recipe("tiny", &["parallel.expert=2"]);
    let even = step(&recipe, &changed(|_| {})).step_s;
    let uneven = step(&recipe, &changed(|rates| rates.chance.expert_cv = 0.5)).step_s;
    assert!(uneven > even);
}

/// Work grows with the number of actions, and so does what the simulation walks through.
#[test]
fn operations_are_linear_in_micro_batches() {
    let operations = |batch: usize| {
        let recipe =
            recipe("tiny", &["training.micro_batch_size=1", &format!("training.global_batch_size={batch}")]);
        let run = step(&recipe, &changed(|_| {}));
        run.programs.iter().map(|program| program.ops.len()).sum::<usize>()
    };
    let [one, two, three] = [64, 128, 192].map(operations);
    assert_eq!(two - one, three - two);
}
