//! What one operation of a program costs: FLOP by the convention of this module, and the bytes that leave its rank.
//!
//! Where tokens go is known only when they are routed; here routing is balanced: the experts of a token lie on as many
//! ranks as they can, and every rank gets equally many. Everything else is exact. Knows no machine and no time.

use std::ops::{Add, Range};

use super::{
    attention_core_flops, attention_matrices, ffn_matrices, gate_matrix, join_matrix, layer_parameters,
    mtp_parameters, shared_ffn_matrices, table_parameters,
};
use crate::model_config::ModelConfig;
use crate::recipe::{NumberFormat, PrecisionSection};
use crate::schedule::{Bucket, Component, Contents, LayerKind, Mode, Pass, StageLayout, Work};
use crate::stability::evidence::FOUND_LEN;
use crate::topology::Topology;
use crate::topology::collective::{children, shard};

const F32_BYTES: u64 = 4;
const BF16_BYTES: u64 = 2;
const F64_BYTES: u64 = 8;
/// Columns of a tile, which has one scale.
const TILE: usize = 128;
/// Of a pair of row and expert beside its row: two numbers of 4 bytes, and its routing weight.
const PAIR_BYTES: u64 = 8;
const ROUTING_WEIGHT_BYTES: u64 = 4;

/// What the cost of an operation follows from.
#[derive(Clone, Copy, Debug)]
pub struct Shapes<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// The axes.
    pub topology: Topology,
    /// Nodes that all-to-alls in two hops cross; 1 with one hop.
    pub expert_nodes: usize,
    /// What each stage consists of.
    pub stages: &'a [StageLayout],
    /// Every bucket of the model.
    pub buckets: &'a [Bucket],
    /// Tokens of a micro-batch.
    pub micro_batch_tokens: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// In which formats it is computed and sent.
    pub precision: &'a PrecisionSection,
    /// Whether a backward pass follows: the head makes its gradients with the loss.
    pub mode: Mode,
}

/// What an operation costs the rank that runs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCost {
    /// **Units**: FLOP.
    pub flops: u64,
    /// **Units**: bytes that it sends to other ranks.
    pub sent_bytes: u64,
}

impl Add for OpCost {
    type Output = OpCost;

    fn add(self, other: OpCost) -> OpCost {
        OpCost { flops: self.flops + other.flops, sent_bytes: self.sent_bytes + other.sent_bytes }
    }
}

/// What an operation costs rank `rank` of the world.
pub fn of(work: &Work, rank: usize, shapes: &Shapes) -> OpCost {
    match *work {
        Work::Component { pass, layer, component, .. } => OpCost {
            flops: shapes.micro_batch_tokens as u64 * shapes.flops_per_token(component, pass, layer),
            sent_bytes: shapes.all_to_all_sent_bytes(component, pass),
        },
        Work::Send { .. } => {
            let rows = shapes.micro_batch_tokens as u64;
            sends(bytes_of_rows(shapes.precision.activations, rows, shapes.config.hidden_size))
        }
        Work::Reduce { bucket } => sends(shapes.reduce_scatter_bytes(bucket, rank)),
        Work::Gather { bucket } => sends(shapes.all_gather_bytes(bucket, rank)),
        Work::Totals => sends(shapes.all_reduce_bytes(rank, shapes.num_totals())),
        Work::Evidence => sends(shapes.all_reduce_bytes(rank, FOUND_LEN * shapes.topology.world())),
        Work::Receive { .. }
        | Work::Pack { .. }
        | Work::GradNorm { .. }
        | Work::AwaitReplica
        | Work::Inspect
        | Work::Apply { .. }
        | Work::Balance
        | Work::Unpack { .. }
        | Work::Snapshot => OpCost::default(),
    }
}

fn sends(sent_bytes: u64) -> OpCost {
    OpCost { flops: 0, sent_bytes }
}

/// How many elements a bucket has on each of the ranks that hold it, by what they are computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BucketElements {
    /// In F32: norms and gates, and all else that the recipe leaves in F32.
    pub wide: u64,
    /// Weights of linear layers, in a narrower format.
    pub linear: u64,
    /// Embedding and head, in a narrower format.
    pub tables: u64,
}

impl BucketElements {
    /// All of them.
    pub fn all(&self) -> u64 {
        self.wide + self.narrow()
    }

    /// Those in a format narrower than F32.
    pub fn narrow(&self) -> u64 {
        self.linear + self.tables
    }
}

impl Add for BucketElements {
    type Output = BucketElements;

    fn add(self, other: BucketElements) -> BucketElements {
        BucketElements {
            wide: self.wide + other.wide,
            linear: self.linear + other.linear,
            tables: self.tables + other.tables,
        }
    }
}

/// Number of elements of a bucket, on each of the ranks that hold it.
pub fn bucket_elements(
    bucket: &Bucket,
    config: &ModelConfig,
    stages: &[StageLayout],
    topology: &Topology,
    precision: &PrecisionSection,
) -> BucketElements {
    let none = BucketElements::default();
    let wide = |wide: u64| BucketElements { wide, ..none };
    let linear = |linear: u64| match precision.linear {
        NumberFormat::F32 => wide(linear),
        _ => BucketElements { linear, ..none },
    };
    let table = |is_there: bool| match precision.activations {
        _ if !is_there => none,
        NumberFormat::F32 => wide(table_parameters(config)),
        _ => BucketElements { tables: table_parameters(config), ..none },
    };
    let of_stage = |&stage: &usize| {
        let StageLayout { layers, head, tied, mtp_layer, .. } = &stages[stage];
        let mtp = mtp_layer.map(|_| (LayerKind::Moe, mtp_parameters(config), join_matrix(config)));
        let of_layer = |&kind: &LayerKind| (kind, layer_parameters(config, kind), 0);
        layers.iter().map(of_layer).chain(mtp).fold(none, |sum, (kind, layer, join)| {
            let matrices = attention_matrices(config) + shared_ffn_matrices(config, kind) + join;
            sum + match bucket.contents {
                Contents::Experts => linear(layer.routed / topology.expert as u64),
                _ => linear(matrices) + wide(layer.common - matrices),
            }
        }) + match bucket.contents {
            Contents::Dense if *head => table(!tied) + wide(config.hidden_size as u64),
            _ => none,
        }
    };
    match bucket.contents {
        Contents::Embedding => table(true),
        _ => bucket.stages.iter().map(of_stage).fold(none, Add::add),
    }
}

/// Bytes of the frame that a rank sends another one in an exchange of the expert group, where `rows` rows with `pairs` pairs
/// of row and expert go between them. `component` is [`Component::Dispatch`] or [`Component::Combine`].
pub fn all_to_all_bytes(
    (component, pass): (Component, Pass),
    (rows, pairs): (u64, u64),
    hidden_size: usize,
    precision: &PrecisionSection,
) -> u64 {
    // What goes to the experts is one format, what comes back from them the other.
    let format = match (component, pass) {
        (Component::Dispatch, Pass::Forward) | (Component::Combine, Pass::BackwardInput) => {
            precision.dispatch
        }
        _ => precision.combine,
    };
    let of_pair = match (component, pass) {
        (Component::Dispatch, Pass::Forward) => PAIR_BYTES + ROUTING_WEIGHT_BYTES,
        (Component::Dispatch, _) => ROUTING_WEIGHT_BYTES,
        _ => 0,
    };
    bytes_of_rows(format, rows, hidden_size) + pairs * of_pair
}

/// Nodes that a token's experts are on at most, with `nodes` that share the groups of experts evenly (section 2.1.2).
pub fn target_nodes(config: &ModelConfig, nodes: u64) -> u64 {
    let of_groups = config.topk_group as u64 * nodes.div_ceil(config.n_group as u64);
    of_groups.min(nodes).min(config.num_experts_per_tok as u64)
}

/// Bytes of a tensor of rows, its scales included; codes of one byte are filled up to a multiple of four of them.
pub fn bytes_of_rows(format: NumberFormat, rows: u64, width: usize) -> u64 {
    let values = rows * width as u64;
    let scales = 4 * rows * width.div_ceil(TILE) as u64;
    match format {
        NumberFormat::F32 => F32_BYTES * values,
        NumberFormat::Bf16 => 2 * values,
        NumberFormat::Fp8 => values.next_multiple_of(4) + scales,
        NumberFormat::E5m6 => (3 * values).div_ceil(2).next_multiple_of(4) + scales,
    }
}

impl Shapes<'_> {
    /// Every pass of a product costs the same: its output, the gradient of its input, that of its weights. Scores and
    /// values of attention are products of two inputs, so their backward pass is all input part.
    fn flops_per_token(&self, component: Component, pass: Pass, layer: usize) -> u64 {
        let config = self.config;
        let kind = if config.mtp_layer() == Some(layer) { LayerKind::Moe } else { config.layer_kind(layer) };
        let matrices = match component {
            Component::Attention => attention_matrices(config) + gate_matrix(config, kind),
            Component::SharedExpert => shared_ffn_matrices(config, kind),
            Component::Experts => {
                config.num_experts_per_tok as u64 * ffn_matrices(config, config.moe_intermediate_size)
            }
            Component::MtpJoin => join_matrix(config),
            Component::Head | Component::MtpHead => return self.head_flops_per_token(pass),
            Component::Chunk | Component::Embedding | Component::Dispatch | Component::Combine => 0,
        };
        let core = match (component, pass) {
            (Component::Attention, Pass::Forward) => attention_core_flops(config, self.sequence_length),
            (Component::Attention, Pass::BackwardInput) => {
                2 * attention_core_flops(config, self.sequence_length)
            }
            _ => 0,
        };
        2 * matrices + core
    }

    fn head_flops_per_token(&self, pass: Pass) -> u64 {
        let product = 2 * table_parameters(self.config);
        match (pass, self.mode) {
            (Pass::Forward, Mode::Train) => 3 * product,
            (Pass::Forward, Mode::ForwardOnly) => product,
            (Pass::BackwardInput | Pass::BackwardWeight, _) => 0,
        }
    }

    /// With balanced routing, to all other ranks of the expert group together, the rows of others that are passed on among them.
    fn all_to_all_sent_bytes(&self, component: Component, pass: Pass) -> u64 {
        if !matches!(component, Component::Dispatch | Component::Combine) {
            return 0;
        }
        let (top_k, ranks) = (self.config.num_experts_per_tok as u64, self.topology.expert as u64);
        let bytes = |peers: u64, copies: u64| {
            let elsewhere = |count: u64| self.micro_batch_tokens as u64 * count * (peers - 1) / peers;
            let counts = (elsewhere(copies), elsewhere(top_k));
            all_to_all_bytes((component, pass), counts, self.config.hidden_size, self.precision)
        };
        match self.expert_nodes as u64 {
            1 => bytes(ranks, top_k.min(ranks)),
            nodes => bytes(nodes, target_nodes(self.config, nodes)) + bytes(ranks / nodes, top_k.min(ranks)),
        }
    }

    /// The bucket's elements, those of them that are computed with in F32, the size of its replica group, and this rank's shard;
    /// nothing of a bucket that it does not hold.
    fn share(&self, number: usize, rank: usize) -> Option<(BucketElements, u64, Range<u64>)> {
        let bucket = self.buckets.iter().find(|bucket| bucket.number == number)?;
        let group = bucket.ranks(&self.topology, self.topology.coordinates(rank).expert);
        let index = group.iter().position(|&member| member == rank)?;
        let elements = bucket_elements(bucket, self.config, self.stages, &self.topology, self.precision);
        let own = shard(elements.all() as usize, group.len(), index);
        Some((elements, group.len() as u64, own.start as u64..own.end as u64))
    }

    /// To each other member its shard.
    fn reduce_scatter_bytes(&self, bucket: usize, rank: usize) -> u64 {
        let bytes = |(elements, _, own): (BucketElements, _, Range<u64>)| {
            F32_BYTES * (elements.all() - (own.end - own.start))
        };
        self.share(bucket, rank).map_or(0, bytes)
    }

    /// To each other member the own shard: weights that are computed with in F32, which come first in a bucket, as they are,
    /// others in BF16.
    fn all_gather_bytes(&self, bucket: usize, rank: usize) -> u64 {
        let bytes = |(elements, members, own): (BucketElements, u64, Range<u64>)| {
            let middle = elements.wide.clamp(own.start, own.end);
            (members - 1) * (F32_BYTES * (middle - own.start) + BF16_BYTES * (own.end - middle))
        };
        self.share(bucket, rank).map_or(0, bytes)
    }

    /// Up the tree once, down to each child.
    fn all_reduce_bytes(&self, rank: usize, values: usize) -> u64 {
        let frames = children(rank, self.topology.world()).len() + usize::from(rank > 0);
        F64_BYTES * (values * frames) as u64
    }

    /// Squares of the gradient for embedding, each layer and head; three losses, two wishes about the stop and two about saves, the validation loss;
    /// tokens per expert.
    fn num_totals(&self) -> usize {
        let layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers;
        (layers + 2) + 8 + layers * self.config.n_routed_experts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{parameters, training_flops_per_token};
    use crate::layout::split_layers;
    use crate::model_config::builtin;
    use crate::schedule::{ScheduleKind, Sharding, StepPrograms, buckets, lower};

    const MICRO_BATCHES: usize = 8;

    fn elements(bucket: &Bucket, shapes: &Shapes) -> u64 {
        bucket_elements(bucket, shapes.config, shapes.stages, &shapes.topology, shapes.precision).all()
    }

    /// The costs of every rank in one step of `schedule`, and what they follow from.
    fn with_step(
        model: &str,
        schedule: ScheduleKind,
        topology: Topology,
        look: impl Fn(&Shapes, &[(usize, Work, OpCost)]),
    ) {
        for tie_word_embeddings in [false, true] {
            let config = ModelConfig { tie_word_embeddings, ..builtin::model(model).unwrap() };
            with_step_of(&config, schedule, topology, &look);
        }
    }

    fn with_step_of(
        config: &ModelConfig,
        schedule: ScheduleKind,
        topology: Topology,
        look: impl Fn(&Shapes, &[(usize, Work, OpCost)]),
    ) {
        let stages = split_layers(config, schedule.stages(topology.pipeline), 64).unwrap();
        let (plan, _) = schedule.plan(topology.pipeline, MICRO_BATCHES, Mode::Train).unwrap();
        let buckets = buckets(&plan.placement, &stages, &topology);
        let shapes = Shapes {
            config,
            topology,
            expert_nodes: 1,
            stages: &stages,
            buckets: &buckets,
            micro_batch_tokens: 128,
            sequence_length: 64,
            precision: &PrecisionSection::uniform(NumberFormat::F32),
            mode: Mode::Train,
        };
        let sharding = Sharding { buckets: buckets.clone(), replicated: false, overlap: true };
        let programs = StepPrograms::new(&lower(&plan, Some(&stages), topology.expert), &sharding).whole();
        let of_rank = |rank: usize| {
            let ops = &programs[topology.coordinates(rank).pipeline].ops;
            let shapes = &shapes;
            ops.iter().map(move |op| (rank, op.work, of(&op.work, rank, shapes))).collect::<Vec<_>>()
        };
        look(&shapes, &topology.ranks().flat_map(of_rank).collect::<Vec<_>>());
    }

    fn layouts() -> Vec<(&'static str, ScheduleKind, Topology)> {
        let topology = |pipeline, expert, data| Topology { pipeline, expert, data };
        vec![
            ("tiny", ScheduleKind::OneFOneB, topology(1, 1, 1)),
            ("tiny", ScheduleKind::Dualpipe, topology(2, 2, 1)),
            ("small", ScheduleKind::Dualpipev, topology(2, 2, 2)),
            ("base", ScheduleKind::OneFOneB, topology(4, 1, 2)),
            ("deepseek-v3", ScheduleKind::Dualpipe, topology(4, 8, 1)),
        ]
    }

    #[test]
    fn the_operations_of_a_step_cost_what_its_tokens_cost() {
        for (model, schedule, topology) in layouts() {
            with_step(model, schedule, topology, |shapes, costs| {
                let flops: u64 = costs.iter().map(|(_, _, cost)| cost.flops).sum();
                let tokens = (MICRO_BATCHES * topology.dp_size() * shapes.micro_batch_tokens) as u64;
                let per_token = training_flops_per_token(shapes.config, shapes.sequence_length);
                assert_eq!(flops, tokens * per_token, "{model}, {schedule}, {topology:?}");
            });
        }
    }

    #[test]
    fn a_reduction_moves_each_copy_but_one_once_and_so_does_a_gathering() {
        for (model, schedule, topology) in layouts() {
            with_step(model, schedule, topology, |shapes, costs| {
                let sum = |wanted: &dyn Fn(&Work) -> bool| {
                    let costs = costs.iter().filter(|(_, work, _)| wanted(work));
                    costs.map(|(_, _, cost)| cost.sent_bytes).sum::<u64>()
                };
                let groups = |bucket: &Bucket| match bucket.contents {
                    Contents::Experts => topology.expert as u64,
                    _ => 1,
                };
                let moved = shapes
                    .buckets
                    .iter()
                    .map(|bucket| 4 * elements(bucket, shapes) * (bucket.copies as u64 - 1) * groups(bucket));
                let moved: u64 = moved.sum();
                assert_eq!(sum(&|work| matches!(work, Work::Reduce { .. })), moved, "{model}");
                assert_eq!(sum(&|work| matches!(work, Work::Gather { .. })), moved, "{model}");
                // Two frames of the same size for each rank but the first.
                let totals = 16 * (topology.world() as u64 - 1) * shapes.num_totals() as u64;
                assert_eq!(sum(&|work| *work == Work::Totals), totals, "{model}");
            });
        }
    }

    #[test]
    fn the_buckets_hold_every_parameter_that_gradients_move() {
        for (model, schedule, topology) in layouts() {
            with_step(model, schedule, topology, |shapes, _| {
                let in_all = |bucket: &Bucket| match bucket.contents {
                    Contents::Experts => topology.expert as u64 * elements(bucket, shapes),
                    _ => elements(bucket, shapes),
                };
                let held: u64 = shapes.buckets.iter().map(in_all).sum();
                let all = parameters(shapes.config);
                let layers = shapes.stages.iter().flat_map(|stage| {
                    stage.layers.iter().copied().chain(stage.mtp_layer.map(|_| LayerKind::Moe))
                });
                let biases: u64 = layers.map(|kind| layer_parameters(shapes.config, kind).gate_bias).sum();
                assert_eq!(held + biases, all.total + all.mtp, "{model}, {schedule}");
            });
        }
    }

    #[test]
    fn an_all_to_all_sends_every_row_that_belongs_elsewhere() {
        let topology = Topology { pipeline: 1, expert: 2, data: 1 };
        with_step("tiny", ScheduleKind::OneFOneB, topology, |shapes, costs| {
            let hidden = shapes.config.hidden_size as u64;
            let top_k = shapes.config.num_experts_per_tok as u64;
            assert!(top_k >= 2, "a token has experts on both ranks");
            let sent = |component, pass| {
                let is_it = |work: &Work| matches!(work, Work::Component { component: c, pass: p, .. } if (*c, *p) == (component, pass));
                costs.iter().find(|(_, work, _)| is_it(work)).unwrap().2.sent_bytes
            };
            // Each of the 128 tokens goes to the other rank once, with half of its pairs.
            let (rows, pairs) = (128 * hidden * 4, 64 * top_k);
            assert_eq!(sent(Component::Dispatch, Pass::Forward), rows + 12 * pairs);
            assert_eq!(sent(Component::Combine, Pass::Forward), rows);
            assert_eq!(sent(Component::Combine, Pass::BackwardInput), rows);
            assert_eq!(sent(Component::Dispatch, Pass::BackwardInput), rows + 4 * pairs);
        });
    }

    #[test]
    fn two_hops_send_a_token_once_to_each_node_and_there_once_to_each_rank() {
        let topology = Topology { pipeline: 1, expert: 64, data: 1 };
        with_step("deepseek-v3", ScheduleKind::OneFOneB, topology, |shapes, _| {
            let two = Shapes { expert_nodes: 8, ..*shapes };
            let sent = |shapes: &Shapes| shapes.all_to_all_sent_bytes(Component::Combine, Pass::Forward);
            // Of 128 tokens: 4 nodes each, 7 of 8 of them others; then 8 ranks each, 7 of 8 of them others. In one hop 8 ranks each.
            let row = 4 * 7168;
            assert_eq!(sent(&two), (128 * 4 * 7 / 8 + 128 * 8 * 7 / 8) * row);
            assert_eq!(sent(shapes), (128 * 8 * 63 / 64) * row);
        });
    }
}
