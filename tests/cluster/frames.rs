//! What passes between the ranks is what the programs' operations cost, routing and replica groups say, byte by byte.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use contraflow_runtime::cost::{self, Shapes};
use contraflow_runtime::fabric::{FrameKind, Phase, SentFrame};
use contraflow_runtime::recipe::{NumberFormat, Recipe};
use contraflow_runtime::schedule::{
    Chunk, Component, LayerKind, Mode, Pass, Plan, StageLayout, TransferKind, Work,
};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::{Planned, Plans};
use contraflow_workers::engine::probe::{Probe, ProbePoint};

use crate::lab::{Finished, Lab, Layout, Setup, layout, parts};

/// **Units**: bytes of an f32.
const F32: usize = 4;

/// Bytes by address: step, kind, stage, micro-batch, layer, from, to.
type Frames = BTreeMap<(u64, FrameKind, u32, u32, u32, usize, usize), usize>;

/// Which ranks hold a published tensor, and how many elements it has.
type Holders = BTreeMap<String, (BTreeSet<usize>, usize)>;

fn frames(frame_log: &[SentFrame], phase: Phase, wanted: impl Fn(FrameKind) -> bool) -> Frames {
    let mut frames = Frames::new();
    for SentFrame { tag, to, bytes } in
        frame_log.iter().filter(|sent| sent.tag.phase == phase && wanted(sent.tag.kind))
    {
        let from = tag.source as usize;
        let address = (tag.step, tag.kind, tag.stage, tag.micro_batch, tag.layer, from, *to);
        assert_eq!(frames.insert(address, *bytes), None, "{tag} was sent twice to rank {to}");
    }
    frames
}

/// What the costs of a run's operations follow from.
fn shapes<'a>(recipe: &'a Recipe, plans: &'a Plans) -> Shapes<'a> {
    Shapes {
        config: &recipe.model_config,
        topology: recipe.topology(),
        expert_nodes: recipe.expert_nodes(),
        stages: &plans.layouts,
        buckets: &plans.sharding.buckets,
        micro_batch_tokens: recipe.training.micro_batch_size * recipe.training.sequence_length,
        sequence_length: recipe.training.sequence_length,
        precision: &recipe.precision,
        mode: Mode::Train,
    }
}

/// Which frames an operation sends: phase, kind, stage, micro-batch, layer; none for those that send nothing, and for
/// exchanges, whose size routing decides.
fn address_of(work: Work) -> Option<(Phase, FrameKind, u32, u32, u32)> {
    let of_chunk = |kind, chunk: Chunk| (Phase::Train, kind, chunk.stage as u32, chunk.micro_batch as u32, 0);
    match work {
        Work::Send { kind: TransferKind::Activation, chunk } => Some(of_chunk(FrameKind::Activation, chunk)),
        Work::Send { kind: TransferKind::Gradient, chunk } => Some(of_chunk(FrameKind::Gradient, chunk)),
        Work::Reduce { bucket } => Some((Phase::Update, FrameKind::ReduceScatter, 0, 0, bucket as u32)),
        Work::Gather { bucket } => Some((Phase::Update, FrameKind::AllGather, 0, 0, bucket as u32)),
        Work::Totals => Some((Phase::Update, FrameKind::AllReduce, 0, 0, 0)),
        _ => None,
    }
}

/// Every operation sends the bytes that its cost says, and nothing else is sent but all-to-alls.
fn assert_costs(recipe: &Recipe, plans: &Plans, planned: &Planned, frame_log: &[SentFrame]) {
    let (topology, shapes) = (recipe.topology(), shapes(recipe, plans));
    let mut sent: BTreeMap<_, u64> = BTreeMap::new();
    for SentFrame { tag, bytes, .. } in frame_log.iter().filter(|sent| !EXCHANGES.contains(&sent.tag.kind)) {
        let address = (tag.phase, tag.kind, tag.stage, tag.micro_batch, tag.layer);
        if tag.phase != Phase::Validate {
            *sent.entry((tag.step, tag.source as usize, address)).or_default() += *bytes as u64;
        }
    }
    let mut expected = BTreeMap::new();
    for step in 1..=recipe.training.steps as u64 {
        for rank in topology.ranks() {
            for (_, op) in planned.ops().filter(|(at, _)| *at == topology.coordinates(rank).pipeline) {
                let bytes = cost::of(&op.work, rank, &shapes).sent_bytes;
                if let Some(address) = address_of(op.work).filter(|_| bytes > 0) {
                    expected.insert((step, rank, address), bytes);
                }
            }
        }
    }
    sent.retain(|_, bytes| *bytes > 0);
    assert_eq!(sent, expected);
}

const EXCHANGES: [FrameKind; 4] =
    [FrameKind::Dispatch, FrameKind::Combine, FrameKind::CombineGradient, FrameKind::DispatchGradient];

/// What makes the frames of each kind.
const OF_EXCHANGE: [(FrameKind, Component, Pass); 4] = [
    (FrameKind::Dispatch, Component::Dispatch, Pass::Forward),
    (FrameKind::Combine, Component::Combine, Pass::Forward),
    (FrameKind::CombineGradient, Component::Combine, Pass::BackwardInput),
    (FrameKind::DispatchGradient, Component::Dispatch, Pass::BackwardInput),
];

/// Layers with routed experts, the MTP block included.
fn moe_layers(layout: &StageLayout) -> impl Iterator<Item = usize> {
    let moe = layout.layers.iter().enumerate().filter(|(_, kind)| **kind == LayerKind::Moe);
    moe.map(|(at, _)| layout.first_layer + at).chain(layout.mtp_layer)
}

/// Exactly one frame of each kind per layer, chunk and ordered pair of expert ranks, each with the rows that its
/// partner frames say.
fn assert_all_to_alls(recipe: &Recipe, plans: &Plans, plan: &Plan, frame_log: &[SentFrame]) {
    let topology = recipe.topology();
    let sent = frames(frame_log, Phase::Train, |kind| EXCHANGES.contains(&kind));
    let hidden = recipe.model_config.hidden_size;
    let row_bytes = cost::bytes_of_rows(recipe.precision.dispatch, 1, hidden) as usize;
    let tokens = recipe.training.micro_batch_size * recipe.training.sequence_length;
    let mut num_expected = 0;
    for (stage, layout) in plans.layouts.iter().enumerate() {
        for (layer, micro_batch) in
            moe_layers(layout).flat_map(|l| (0..plan.micro_batches).map(move |m| (l, m)))
        {
            let pipeline = plan.owner(Chunk { stage, micro_batch }).unwrap();
            for dp_rank in 0..topology.dp_size() {
                let from = topology.pipeline_peer(dp_rank, pipeline);
                for to in topology.expert_group(from).into_iter().filter(|&to| to != from) {
                    for step in 1..=recipe.training.steps as u64 {
                        let bytes = |kind, from, to| {
                            sent[&(step, kind, stage as u32, micro_batch as u32, layer as u32, from, to)]
                        };
                        let rows = bytes(FrameKind::CombineGradient, from, to) / row_bytes;
                        assert!(
                            rows <= tokens,
                            "a token goes once to a rank: {rows} rows of {tokens} tokens"
                        );
                        // Beside its row a pair has two numbers, row and expert, and a weight.
                        let pair_bytes = bytes(FrameKind::Dispatch, from, to) - rows * row_bytes;
                        assert_eq!(pair_bytes % (3 * F32), 0);
                        let pairs = pair_bytes / (3 * F32);
                        assert!(rows <= pairs && pairs <= rows * recipe.model_config.num_experts_per_tok);
                        for (kind, component, pass) in OF_EXCHANGE {
                            let (source, target) =
                                if kind == FrameKind::Combine || kind == FrameKind::DispatchGradient {
                                    (to, from)
                                } else {
                                    (from, to)
                                };
                            let counts = (rows as u64, pairs as u64);
                            let precision = &recipe.precision;
                            let expected =
                                cost::all_to_all_bytes((component, pass), counts, hidden, precision);
                            assert_eq!(bytes(kind, source, target) as u64, expected, "{kind:?}");
                        }
                        num_expected += EXCHANGES.len();
                    }
                }
            }
        }
    }
    assert_eq!(sent.len(), num_expected);
}

/// Bytes of a weight that is gathered: BF16 where it is computed with in a narrow format, and F32 in norms and gates always.
fn gathered_bytes(recipe: &Recipe, name: &str) -> usize {
    let is_wide = name.contains("norm") || name.ends_with("mlp.gate.weight");
    let is_table = name == "model.embed_tokens.weight" || name == "lm_head.weight";
    let format = if is_table { recipe.precision.activations } else { recipe.precision.linear };
    if is_wide || format == NumberFormat::F32 { F32 } else { 2 }
}

/// Every tensor is reduced and gathered among the ranks that hold it and no others. A member sends each other one
/// its share of the gradients, and its own share of the weights: (n - 1) times the tensor in all, each way.
fn assert_collectives(recipe: &Recipe, holders: &Holders, frame_log: &[SentFrame]) {
    let steps = recipe.training.steps;
    for kind in [FrameKind::ReduceScatter, FrameKind::AllGather] {
        let bytes_of = |name: &str| match kind {
            FrameKind::AllGather => gathered_bytes(recipe, name),
            _ => F32,
        };
        let expected: usize =
            holders.iter().map(|(name, (ranks, len))| bytes_of(name) * len * (ranks.len() - 1)).sum();
        let sent = frames(frame_log, Phase::Update, |sent| sent == kind);
        assert_eq!(sent.values().sum::<usize>(), steps * expected, "{kind:?}");
        let mut by_pair: BTreeMap<(usize, usize), (usize, usize)> = BTreeMap::new();
        for ((.., from, to), bytes) in &sent {
            let (total, num_frames) = by_pair.entry((*from, *to)).or_default();
            *total += bytes;
            *num_frames += 1;
        }
        // Which elements of a bucket a rank's share is made of decides its bytes where formats are mixed.
        let is_even = holders.keys().all(|name| bytes_of(name) == F32);
        for ((from, to), (bytes, num_frames)) in by_pair.into_iter().filter(|_| is_even) {
            let shared = holders.values().filter(|(ranks, _)| ranks.contains(&from) && ranks.contains(&to));
            let fair: f64 = shared.map(|(ranks, len)| (F32 * len) as f64 / ranks.len() as f64).sum();
            // A share is rounded to whole elements once per frame.
            let difference = (bytes as f64 - fair * steps as f64).abs();
            assert!(difference <= (F32 * num_frames) as f64, "{kind:?} from {from} to {to}: {bytes} bytes");
        }
    }
}

/// The totals go to the first rank and back.
fn assert_totals(recipe: &Recipe, frame_log: &[SentFrame]) {
    let sent = frames(frame_log, Phase::Update, |kind| kind == FrameKind::AllReduce);
    let pairs: Vec<(u64, usize, usize)> = sent.keys().map(|&(step, .., from, to)| (step, from, to)).collect();
    let mut expected = Vec::new();
    for step in 1..=recipe.training.steps as u64 {
        for rank in recipe.topology().ranks().skip(1) {
            expected.extend([(step, 0, rank), (step, rank, 0)]);
        }
    }
    expected.sort();
    assert_eq!(pairs, expected);
}

/// Runs a layout and compares what was sent with what the plan says.
pub fn run_and_hold_to_the_plan(lab: &Lab, layout: Layout, changes: &[&str]) {
    let holders: Arc<Mutex<Holders>> = Arc::default();
    let seen = holders.clone();
    let probe = Probe::new(move |point| {
        if let ProbePoint::Gradients { rank, step: 1, params, .. } = point {
            let mut holders = seen.lock().unwrap();
            for (_, part) in parts(params) {
                let holder =
                    holders.entry(part.name.clone()).or_insert_with(|| (BTreeSet::new(), part.len()));
                holder.0.insert(rank);
            }
        }
    });
    let setup = lab.setup(layout, changes);
    let recipe = setup.recipe.clone();
    let mut plans = Plans::new(&recipe).unwrap();
    let planned =
        plans.get(recipe.micro_batches(recipe.training.global_batch_size), TaskKind::Train).unwrap();
    let finished: Finished = lab.run(Setup { probe, ..setup });
    assert_eq!(finished.losses().len(), recipe.training.steps);
    assert_eq!(finished.num_waiting, 0, "{layout:?}: frames that nobody took");
    let frame_log = &finished.frame_log;
    let sent_bytes: u64 = finished.records.iter().map(|record| record.sent_bytes).sum();
    let in_training = frame_log.iter().filter(|sent| sent.tag.phase != Phase::Validate);
    assert_eq!(in_training.map(|sent| sent.bytes as u64).sum::<u64>(), sent_bytes, "{layout:?}");
    assert_costs(&recipe, &plans, &planned, frame_log);
    assert_all_to_alls(&recipe, &plans, &planned.plan, frame_log);
    assert_collectives(&recipe, &holders.lock().unwrap(), frame_log);
    assert_totals(&recipe, frame_log);
}

#[test]
fn the_frames_of_a_run_are_those_of_its_plan() {
    let lab = Lab::new();
    let layouts = [
        layout("dualpipe", (2, 2, 1)),
        layout("dualpipe", (4, 2, 1)),
        layout("dualpipev", (2, 2, 2)),
        layout("1f1b", (4, 1, 2)),
    ];
    for layout in layouts {
        run_and_hold_to_the_plan(&lab, layout, &["training.steps=2"]);
    }
    let of_two = ["training.steps=1", "training.micro_batch_size=2", "training.global_batch_size=32"];
    run_and_hold_to_the_plan(&lab, layout("dualpipe", (2, 2, 1)), &of_two);
}
