//! Every schedule over a grid of sizes: sound, of the promised memory and bubble, and lowered without loss.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeSet, HashMap};

use contraflow_runtime::schedule::{
    Action, Chunk, Component, Lane, LayerKind, Mode, Op, Overlap, PairOrder, Pass, Plan, Program,
    ScheduleKind, StageLayout, TransferKind, UnitCosts, Work, check, lower, lower_with, simulate, walk,
};

/// Layers per stage differ, the first are dense, the last stage has head and MTP.
fn layouts(stages: usize) -> Vec<StageLayout> {
    let mut first_layer = 0;
    (0..stages)
        .map(|stage| {
            let num_layers = 1 + stage % 3;
            let dense = 2usize.saturating_sub(first_layer).min(num_layers);
            let mut layers = vec![LayerKind::Dense; dense];
            layers.resize(num_layers, LayerKind::Moe);
            let layout = StageLayout {
                first_layer,
                layers,
                embedding: stage == 0,
                head: stage + 1 == stages,
                tied: false,
                mtp_layer: (stage + 1 == stages).then_some(100),
            };
            first_layer += num_layers;
            layout
        })
        .collect()
}

/// Every schedule on a range of sizes, the fallback's cases among them.
fn grid() -> Vec<(ScheduleKind, usize, Plan)> {
    let mut plans = Vec::new();
    for kind in ScheduleKind::ALL.into_iter().chain([ScheduleKind::Interleaved(3)]) {
        for pipeline in (1..=8).filter(|&pipeline| kind.validate(pipeline).is_ok()) {
            let full = kind.min_micro_batches(pipeline);
            let few = 1..=full + 5;
            for micro_batches in few.chain([2 * full, 4 * pipeline + 4]) {
                for mode in [Mode::Train, Mode::ForwardOnly] {
                    plans.push((kind, pipeline, kind.plan(pipeline, micro_batches, mode).unwrap().0));
                }
            }
        }
    }
    plans
}

/// Every way of laying passes beside each other.
fn overlaps() -> Vec<Overlap> {
    let mut overlaps = vec![Overlap::Off];
    overlaps.extend(PairOrder::all().map(Overlap::Pairs));
    overlaps
}

fn describe(plan: &Plan) -> String {
    let Plan { schedule, stages, micro_batches, .. } = plan;
    format!("{schedule} with {stages} stages, {} ranks, {micro_batches} micro-batches", plan.ranks())
}

#[test]
fn every_plan_of_the_grid_is_sound_in_every_lowering() {
    for (_, _, plan) in grid() {
        let layouts = layouts(plan.stages);
        for (stages, expert_ranks) in [(None, 1), (None, 2), (Some(&layouts[..]), 1), (Some(&layouts[..]), 2)]
        {
            let programs = lower(&plan, stages, expert_ranks);
            check(&plan, &programs).unwrap_or_else(|faults| panic!("{}: {}", describe(&plan), faults[0]));
        }
    }
}

#[test]
fn memory_is_what_the_schedule_promises_and_no_more_in_the_fallback() {
    for (kind, pipeline, plan) in grid() {
        let report = check(&plan, &lower(&plan, None, 1)).unwrap();
        assert!(report.weights_in_order);
        if plan.is_forward_only() {
            let nothing = vec![0; pipeline];
            let held = [&report.peak_activations, &report.peak_activations_until_weight, &report.queue_depth];
            assert_eq!(held, [&nothing; 3], "{}: kept for no backward pass", describe(&plan));
            continue;
        }
        let peak = match kind {
            ScheduleKind::OneFOneB | ScheduleKind::Zb1p => pipeline,
            ScheduleKind::Dualpipe | ScheduleKind::Dualpipev => plan.stages + 1,
            // On the first rank: a group on each of its stages but the last one, and two chunks for each rank behind it.
            ScheduleKind::Interleaved(per_rank) => (per_rank - 1) * pipeline + 2 * (pipeline - 1) + 1,
        };
        for (rank, &live) in report.peak_activations_until_weight.iter().enumerate() {
            let what = format!("{}: rank {rank}", describe(&plan));
            assert!(report.peak_activations[rank] <= live, "{what}");
            let distance = match kind {
                ScheduleKind::Dualpipe => rank.min(pipeline - 1 - rank),
                _ => rank,
            };
            match (plan.schedule.as_str(), kind) {
                ("one-way" | "two-way", _) => {
                    let most = if matches!(kind, ScheduleKind::Interleaved(_)) { peak } else { peak - 1 };
                    assert!(live <= most && report.queue_depth[rank] == 0, "{what}");
                }
                (_, ScheduleKind::OneFOneB) => {
                    assert_eq!(live, (pipeline - rank).min(plan.micro_batches), "{what}");
                    assert_eq!(report.queue_depth[rank], 0, "{what}");
                }
                (_, ScheduleKind::Zb1p) => {
                    // Wherever it is, as many as 1F1B holds on its first rank.
                    assert_eq!(live, pipeline.min(plan.micro_batches), "{what}");
                    let input = (pipeline - rank).min(plan.micro_batches);
                    assert_eq!(report.peak_activations[rank], input, "{what}");
                }
                (_, ScheduleKind::Interleaved(per_rank)) => {
                    let all = per_rank * plan.micro_batches;
                    assert_eq!(live, (peak - 2 * rank).min(all), "{what}");
                    assert_eq!(report.queue_depth[rank], 0, "{what}");
                }
                _ => {
                    assert_eq!((live, report.peak_activations[rank]), (peak, peak), "{what}");
                    assert_eq!(report.queue_depth[rank], distance + 1, "{what}");
                }
            }
        }
    }
}

/// Report section 3.2.1, table 2.
fn dualpipe_bubble(stages: usize, costs: UnitCosts) -> f64 {
    (stages as f64 / 2.0 - 1.0) * (costs.fb + costs.b - 3.0 * costs.w)
}

#[test]
fn bubbles_equal_the_formulas() {
    let overlaps = [3.0, 2.5, 2.0].map(|fb| UnitCosts { fb, ..UnitCosts::SUM });
    for (kind, pipelines) in
        [(ScheduleKind::Dualpipe, [2, 4, 6, 16]), (ScheduleKind::Dualpipev, [1, 2, 4, 8])]
    {
        for pipeline in pipelines {
            for micro_batches in [2 * pipeline, 2 * pipeline + 4, 4 * pipeline] {
                let (plan, _) = kind.plan(pipeline, micro_batches, Mode::Train).unwrap();
                for costs in overlaps {
                    let bubble = simulate(&plan, costs).unwrap();
                    let expected = dualpipe_bubble(plan.stages, costs);
                    assert_eq!(bubble.max_idle, expected, "{}, {costs:?}", describe(&plan));
                    if costs.fb == costs.f + costs.b {
                        assert!(bubble.idle.iter().all(|&idle| idle == expected), "{}", describe(&plan));
                        let work = 3 * micro_batches * plan.stages / pipeline;
                        assert_eq!(bubble.makespan, work as f64 + expected);
                    }
                }
            }
        }
    }
    for (ranks, micro_batches) in [(1, 3), (2, 8), (4, 8), (16, 64)] {
        let (plan, _) = ScheduleKind::OneFOneB.plan(ranks, micro_batches, Mode::Train).unwrap();
        let bubble = simulate(&plan, UnitCosts::SUM).unwrap();
        assert!(bubble.idle.iter().all(|&idle| idle == 3.0 * (ranks as f64 - 1.0)), "{}", describe(&plan));
    }
}

/// (P - 1)(F + B - 2W) for ZB1P, report table 2, where F = I and W <= I; (P - 1)(F + B) for interleaved 1F1B, F and B those of one stage
/// out of several on a rank (Narayanan et al. 2021, section 2.2.2).
#[test]
fn bubbles_of_zb1p_and_interleaved_equal_the_formulas() {
    for ranks in [1, 2, 3, 4, 8, 16] {
        for w in [1.0, 0.75, 0.5, 0.25] {
            let costs = UnitCosts { f: 1.0, b: 1.0 + w, i: 1.0, w, fb: 2.0 + w };
            for micro_batches in [ranks, 2 * ranks, 3 * ranks + 1] {
                let (plan, _) = ScheduleKind::Zb1p.plan(ranks, micro_batches, Mode::Train).unwrap();
                let expected = (ranks as f64 - 1.0) * (costs.f + costs.b - 2.0 * costs.w);
                let idle = simulate(&plan, costs).unwrap().max_idle;
                assert!((idle - expected).abs() < 1e-9, "{}: {idle}, not {expected}", describe(&plan));
            }
            for per_rank in [2, 3, 4] {
                let kind = ScheduleKind::Interleaved(per_rank);
                for micro_batches in [ranks, 2 * ranks, 4 * ranks] {
                    let (plan, _) = kind.plan(ranks, micro_batches, Mode::Train).unwrap();
                    let expected = (ranks as f64 - 1.0) * (costs.f + costs.b);
                    let idle = simulate(&plan, costs).unwrap().max_idle;
                    assert!((idle - expected).abs() < 1e-9, "{}: {idle}, not {expected}", describe(&plan));
                }
            }
        }
    }
}

#[test]
fn published_figures_come_out() {
    let (plan, _) = ScheduleKind::Dualpipe.plan(8, 20, Mode::Train).unwrap();
    let step = |fb| simulate(&plan, UnitCosts { fb, ..UnitCosts::SUM }).unwrap();
    assert_eq!([step(3.0).makespan, step(2.5).makespan, step(2.0).makespan], [66.0, 59.0, 52.0]);
    assert_eq!([step(3.0).max_idle, step(2.5).max_idle, step(2.0).max_idle], [6.0, 4.5, 3.0]);
    assert_eq!(step(2.0).idle, [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0]);

    let (one_f_one_b, _) = ScheduleKind::OneFOneB.plan(16, 32, Mode::Train).unwrap();
    let (dualpipe, _) = ScheduleKind::Dualpipe.plan(16, 32, Mode::Train).unwrap();
    assert_eq!(simulate(&one_f_one_b, UnitCosts::SUM).unwrap().max_idle, 45.0);
    assert_eq!(simulate(&dualpipe, UnitCosts::SUM).unwrap().max_idle, 14.0);
    assert_eq!(simulate(&dualpipe, UnitCosts::HIDDEN).unwrap().max_idle, 7.0);

    // Where the formula does not hold (input and weight part differ), the simulated value of an asynchronous walk.
    let (dualpipe, _) = ScheduleKind::Dualpipe.plan(8, 20, Mode::Train).unwrap();
    let costs = UnitCosts { f: 1.0, b: 1.8, i: 0.8, w: 1.0, fb: 2.8 };
    let idle = simulate(&dualpipe, costs).unwrap().max_idle;
    assert!((idle - 6.0).abs() < 1e-9, "{idle}");
}

/// All component operations of a stage in one pass, unordered.
fn components(stage: &StageLayout, pass: Pass) -> BTreeSet<(Component, usize)> {
    use Component::{Attention, Combine, Dispatch, Embedding, Experts, Head, MtpHead, MtpJoin, SharedExpert};
    let mut all: Vec<(Component, usize)> = Vec::new();
    for (position, kind) in stage.layers.iter().enumerate() {
        let parts: &[Component] = match kind {
            LayerKind::Dense => &[Attention, SharedExpert],
            LayerKind::Moe => &[Attention, Dispatch, SharedExpert, Experts, Combine],
        };
        all.extend(parts.iter().map(|&part| (part, stage.first_layer + position)));
    }
    if stage.embedding {
        all.push((Embedding, 0));
    }
    if stage.head {
        all.push((Head, 0));
    }
    if let Some(layer) = stage.mtp_layer {
        let parts = [MtpJoin, Attention, Dispatch, SharedExpert, Experts, Combine, MtpHead];
        all.extend(parts.map(|part| (part, layer)));
    }
    let deferrable = |part: &Component| matches!(part, Attention | SharedExpert | Experts | MtpJoin);
    all.into_iter().filter(|(part, _)| pass != Pass::BackwardWeight || deferrable(part)).collect()
}

#[test]
fn lowering_runs_each_component_exactly_once() {
    for (_, _, plan) in grid() {
        let layouts = layouts(plan.stages);
        let mut found: HashMap<(Pass, Chunk), Vec<(Component, usize)>> = HashMap::new();
        for program in lower(&plan, Some(&layouts), 2) {
            for (id, op) in program.ops.iter().enumerate() {
                assert!(op.after.iter().all(|&earlier| earlier < id && program.ops[earlier].lane != op.lane));
                if let Work::Component { pass, chunk, layer, component } = op.work {
                    found.entry((pass, chunk)).or_default().push((component, layer));
                }
            }
        }
        for ((pass, chunk), mut made) in found {
            made.sort_unstable();
            let expected = Vec::from_iter(components(&layouts[chunk.stage], pass));
            assert_eq!(made, expected, "{}: {pass:?} of {chunk}", describe(&plan));
        }
    }
}

/// What `work` needs by the arithmetic of the model, not by what lowering says. Gradients with respect to weights need
/// their own input gradient; everything else is the chain of a chunk's components.
fn needs(work: Work, layouts: &[StageLayout]) -> Vec<Work> {
    use Component::{Attention, Combine, Dispatch, Embedding, Experts, Head, MtpHead, MtpJoin, SharedExpert};
    let Work::Component { pass, chunk, layer, component } = work else { return Vec::new() };
    let stage = &layouts[chunk.stage];
    let at = |component, layer| Work::Component { pass, chunk, layer, component };
    if pass == Pass::BackwardWeight {
        return vec![Work::Component { pass: Pass::BackwardInput, chunk, layer, component }];
    }
    let is_moe = |layer: usize| {
        stage.mtp_layer == Some(layer) || stage.layers[layer - stage.first_layer] == LayerKind::Moe
    };
    // The ends of the chain at which a layer takes over from and hands over to its neighbours.
    let output = |layer| {
        if is_moe(layer) {
            vec![at(Combine, layer), at(SharedExpert, layer)]
        } else {
            vec![at(SharedExpert, layer)]
        }
    };
    let last = (!stage.layers.is_empty()).then(|| stage.first_layer + stage.layers.len() - 1);
    let forward = pass == Pass::Forward;
    let before_layer = |layer: usize| match () {
        _ if stage.mtp_layer == Some(layer) => vec![at(MtpJoin, layer)],
        _ if layer > stage.first_layer => output(layer - 1),
        _ if stage.embedding => vec![at(Embedding, 0)],
        _ => Vec::new(),
    };
    let after_layer = |layer: usize| match () {
        _ if stage.mtp_layer == Some(layer) => vec![at(MtpHead, layer)],
        _ if Some(layer) < last => vec![at(Attention, layer + 1)],
        _ if stage.head => vec![at(Head, 0), at(MtpJoin, stage.mtp_layer.unwrap())],
        _ => Vec::new(),
    };
    match (component, forward) {
        (Attention, true) => before_layer(layer),
        (Dispatch | SharedExpert, true) => vec![at(Attention, layer)],
        (Experts, true) => vec![at(Dispatch, layer)],
        (Combine, true) => vec![at(Experts, layer), at(SharedExpert, layer)],
        (Head | MtpJoin, true) => output(last.unwrap()),
        (MtpHead, true) => output(layer),
        (Combine | SharedExpert, false) => after_layer(layer),
        (Experts, false) => vec![at(Combine, layer)],
        (Dispatch, false) => vec![at(Experts, layer)],
        (Attention, false) if is_moe(layer) => vec![at(Dispatch, layer), at(SharedExpert, layer)],
        (Attention, false) => vec![at(SharedExpert, layer)],
        (MtpJoin, false) => vec![at(Attention, layer)],
        (Embedding, false) => vec![at(Attention, stage.first_layer)],
        _ => Vec::new(),
    }
}

/// Durations that differ from operation to operation, the same in every run of a seed.
fn jitter(seed: u64, rank: usize, op: &Op) -> f64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (seed, rank, op.lane, op.work).hash(&mut hasher);
    1.0 + (hasher.finish() % 1000) as f64
}

#[test]
fn nothing_starts_before_what_it_needs_whatever_the_durations() {
    for (_, pipeline, plan) in grid() {
        if plan.micro_batches > 4 * pipeline || pipeline > 6 {
            continue;
        }
        let layouts = layouts(plan.stages);
        for (seed, overlap) in (0..).zip(overlaps().into_iter().cycle().take(19)) {
            let programs = lower_with(&plan, Some(&layouts), 2, overlap);
            let timeline = walk(&programs, |rank, op| jitter(seed, rank, op)).unwrap();
            let mut ends: HashMap<Work, f64> = HashMap::new();
            for (program, spans) in programs.iter().zip(&timeline.spans) {
                for (op, span) in program.ops.iter().zip(spans) {
                    ends.insert(op.work, span.end);
                }
            }
            for (program, spans) in programs.iter().zip(&timeline.spans) {
                for (op, span) in program.ops.iter().zip(spans) {
                    let what = || format!("seed {seed}, {}: {}", describe(&plan), op.work);
                    for need in needs(op.work, &layouts).into_iter().chain(stage_inputs(op.work, &layouts)) {
                        assert!(ends[&need] <= span.start, "{} before {need}", what());
                    }
                    if let Work::Send { kind, chunk } = op.work {
                        for product in products(kind, chunk, &layouts) {
                            assert!(ends[&product] <= span.start, "{} before {product}", what());
                        }
                    }
                }
            }
        }
    }
}

/// The operations whose results leave the chunk.
fn products(kind: TransferKind, chunk: Chunk, layouts: &[StageLayout]) -> Vec<Work> {
    let stage = &layouts[chunk.stage];
    let (pass, components) = match kind {
        TransferKind::Activation => {
            let is_moe = *stage.layers.last().unwrap() == LayerKind::Moe;
            (
                Pass::Forward,
                if is_moe {
                    vec![Component::Combine, Component::SharedExpert]
                } else {
                    vec![Component::SharedExpert]
                },
            )
        }
        TransferKind::Gradient => (Pass::BackwardInput, vec![Component::Attention]),
    };
    let layer = match kind {
        TransferKind::Activation => stage.first_layer + stage.layers.len() - 1,
        TransferKind::Gradient => stage.first_layer,
    };
    components.into_iter().map(|component| Work::Component { pass, chunk, layer, component }).collect()
}

/// What the first operations of a chunk need of the neighbouring stage.
fn stage_inputs(work: Work, layouts: &[StageLayout]) -> Vec<Work> {
    let Work::Component { pass, chunk, layer, component } = work else { return Vec::new() };
    let stage = &layouts[chunk.stage];
    let last_layer = stage.first_layer + stage.layers.len() - 1;
    match (pass, component) {
        (Pass::Forward, Component::Attention) if layer == stage.first_layer && chunk.stage > 0 => {
            products(TransferKind::Activation, Chunk { stage: chunk.stage - 1, ..chunk }, layouts)
        }
        (Pass::BackwardInput, Component::Combine | Component::SharedExpert)
            if layer == last_layer && chunk.stage + 1 < layouts.len() =>
        {
            products(TransferKind::Gradient, Chunk { stage: chunk.stage + 1, ..chunk }, layouts)
        }
        _ => Vec::new(),
    }
}

/// The exchanges of every action, in issue order.
fn exchanges(program: &Program) -> Vec<(usize, Pass, Work)> {
    let exchange = |op: &Op| match op.work {
        Work::Component { pass, component: Component::Dispatch | Component::Combine, .. } => {
            Some((op.action.unwrap(), pass, op.work))
        }
        _ => None,
    };
    program.ops.iter().filter_map(exchange).collect()
}

#[test]
fn all_to_alls_of_a_pair_alternate_and_their_order_does_not_depend_on_the_group() {
    let mut pairs = 0;
    for (_, _, plan) in grid() {
        let layouts = layouts(plan.stages);
        let (alone, group) = (lower(&plan, Some(&layouts), 1), lower(&plan, Some(&layouts), 2));
        for rank in 0..plan.ranks() {
            let order = exchanges(&group[rank]);
            assert_eq!(order, exchanges(&alone[rank]), "{}", describe(&plan));
            for (index, action) in plan.actions[rank].iter().enumerate() {
                let Action::ForwardBackward { .. } = action else { continue };
                let passes: Vec<Pass> = order.iter().filter(|e| e.0 == index).map(|e| e.1).collect();
                let forwards = passes.iter().filter(|&&pass| pass == Pass::Forward).count();
                let both = forwards.min(passes.len() - forwards);
                let alternating = [Pass::BackwardInput, Pass::Forward].into_iter().cycle().take(2 * both);
                assert!(passes.iter().copied().take(2 * both).eq(alternating), "{action}: {passes:?}");
                pairs += usize::from(both > 0);
            }
        }
    }
    assert!(pairs > 1000, "{pairs}");
}

#[test]
fn a_pair_hides_its_all_to_alls() {
    let moe = |stage: usize| StageLayout {
        first_layer: 4 * stage,
        layers: vec![LayerKind::Moe; 4],
        embedding: false,
        head: false,
        tied: false,
        mtp_layer: None,
    };
    let layouts: Vec<StageLayout> = (0..8).map(moe).collect();
    let (plan, _) = ScheduleKind::Dualpipe.plan(8, 80, Mode::Train).unwrap();
    let cost = |_: usize, op: &Op| match op.work {
        Work::Component { .. } if op.lane == Lane::Compute => 3.0,
        Work::Component { .. } => 2.0,
        _ => 0.0,
    };
    let timeline = walk(&lower(&plan, Some(&layouts), 2), cost).unwrap();
    // 80 chunks per rank of 4 layers with 3 forward, 3 input and 3 weight parts and 4 exchanges each.
    let (compute, exchange) = ((80 * 4 * 9 * 3) as f64, (80 * 4 * 4 * 2) as f64);
    assert!(timeline.compute_busy.iter().all(|&busy| busy == compute));
    assert!(timeline.makespan < compute + 0.25 * exchange, "{} of {compute}", timeline.makespan);
}

#[test]
fn receives_are_posted_ahead_but_not_far_ahead() {
    for (_, _, plan) in grid() {
        for program in lower(&plan, Some(&layouts(plan.stages)), 2) {
            let is_receive = |op: &Op| matches!(op.lane, Lane::Receive(_));
            let receiving: BTreeSet<usize> =
                program.ops.iter().filter(|op| is_receive(op)).map(|op| op.action.unwrap()).collect();
            // Receives that are posted together, by lane. The last of a lane is why the others come along: the
            // sender sends them first.
            let mut posted: HashMap<Lane, &Op> = HashMap::new();
            for (id, op) in program.ops.iter().enumerate() {
                if is_receive(op) {
                    posted.insert(op.lane, op);
                    let first_use = program.ops.iter().find(|user| user.after.contains(&id)).unwrap();
                    assert_eq!(first_use.action, op.action, "{}: {}", describe(&plan), op.work);
                    continue;
                }
                for (_, receive) in posted.drain() {
                    let (action, receiving_action) = (op.action.unwrap(), receive.action.unwrap());
                    let ahead = receiving.range(action..receiving_action.max(action)).count();
                    assert!(ahead <= 1, "{}: {} comes {ahead} actions early", describe(&plan), receive.work);
                }
            }
        }
    }
}

#[test]
fn a_large_plan_is_no_effort() {
    let (plan, _) = ScheduleKind::Dualpipe.plan(64, 512, Mode::Train).unwrap();
    let started = std::time::Instant::now();
    let programs = lower(&plan, None, 1);
    let lowered = started.elapsed();
    let timeline = walk(&programs, |_, op| if op.lane == Lane::Compute { 1.0 } else { 0.0 }).unwrap();
    println!("lower {lowered:?}, walk {:?}", started.elapsed() - lowered);
    assert_eq!(timeline.spans.len(), 64);
    check(&plan, &programs).unwrap();
    println!("all {:?}", started.elapsed());
}
