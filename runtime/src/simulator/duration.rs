//! How long an operation takes on a cluster: its kernels at the profile's rates, what it sends over the profile's links, and chance.
//!
//! Every duration is known before the clock starts and none depends on what else runs, so a plan is slower wherever one of its costs
//! is: what communication takes from computation is a fixed share of the device. Ranks at one pipeline coordinate run the same
//! program; one of them is simulated, with the durations of the slowest: an exchange waits for it.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use super::chance::{largest_load, slowest};
use super::cluster::{Cluster, Rates, Role};
use super::kernels::{Kernel, KernelShapes, Traffic};
use super::link::Link;
use super::times::{OperationTimes, format_name, update_bytes};
use crate::cost::{self, bytes_of_rows};
use crate::recipe::NumberFormat;
use crate::schedule::{Chunk, Component, Lane, Op, Pass, Work};
use crate::topology::Coordinates;

/// A component wherever it stands: the key under which durations are kept.
type Piece = (Pass, Component, usize);

/// The durations of operations by the rates of their kernels.
pub struct Durations<'a> {
    cluster: &'a Cluster,
    rates: &'a Rates,
    kernels: KernelShapes<'a>,
    pieces: RefCell<HashMap<Piece, f64>>,
    /// By layer and micro-batch.
    loads: RefCell<HashMap<(usize, usize), f64>>,
}

impl<'a> Durations<'a> {
    /// On a cluster whose costs are rates.
    pub fn new(cluster: &'a Cluster, rates: &'a Rates, kernels: KernelShapes<'a>) -> Self {
        Durations { cluster, rates, kernels, pieces: RefCell::default(), loads: RefCell::default() }
    }

    /// Kernels one after the other, on the slowest of the ranks that do the same.
    fn component(&self, piece @ (pass, component, layer): Piece, chunk: Chunk) -> f64 {
        let balanced = *self.pieces.borrow_mut().entry(piece).or_insert_with(|| {
            self.kernels.of(pass, component, layer).iter().map(|kernel| self.kernel(kernel)).sum()
        });
        let load = if component == Component::Experts { self.load(layer, chunk) } else { 1.0 };
        balanced * load * self.stage(chunk.stage) * self.jitter(piece, chunk)
    }

    /// **Units**: seconds.
    pub fn kernel(&self, kernel: &Kernel) -> f64 {
        let rates = self.rates;
        let left = 1.0 - rates.communication_share;
        let bandwidth = |kind| match kind {
            Traffic::Norm => rates.bandwidth.norm,
            Traffic::Swiglu => rates.bandwidth.swiglu,
            Traffic::Cast => rates.bandwidth.cast,
            Traffic::AttentionEnds => rates.bandwidth.attention_ends,
            Traffic::Copy => rates.bandwidth.copy,
            Traffic::Update => rates.bandwidth.update,
        };
        rates.launch_s
            + match *kernel {
                // What has no rate has been refused before.
                Kernel::Product { role, format, shape, flops } => {
                    flops / (self.product_rate(role, format, shape).unwrap_or(f64::INFINITY) * left)
                }
                Kernel::Attention(flops) => flops / (rates.attention * left),
                Kernel::AttentionBackward(flops) => flops / (rates.attention_backward * left),
                Kernel::Traffic(kind, bytes) => bytes / bandwidth(kind),
            }
    }

    /// The rate of the nearest shape; that of all shapes where none is listed.
    fn product_rate(&self, role: Role, format: NumberFormat, (n, k): (usize, usize)) -> Option<f64> {
        let apart = |one: usize, other: usize| (one as f64 / other as f64).ln().abs();
        let distance = |shape: Option<(usize, usize)>| {
            shape.map_or(f64::INFINITY, |(of_n, of_k)| apart(n, of_n) + apart(k, of_k))
        };
        let fitting = self.rates.products.iter().filter(|rate| rate.role == role && rate.format == format);
        fitting.min_by(|a, b| distance(a.shape).total_cmp(&distance(b.shape))).map(|rate| rate.flops)
    }

    /// Expert ranks of a node, and nodes of an expert group.
    fn nodes(&self) -> (usize, usize) {
        let expert = self.kernels.shapes.topology.expert;
        let of_node = expert.min(self.cluster.ranks_per_node);
        (of_node, expert.div_ceil(of_node))
    }

    /// An all-to-all of the expert group under balanced routing.
    fn exchange(&self, pass: Pass, component: Component) -> f64 {
        let shapes = self.kernels.shapes;
        let (rates, config) = (&self.rates.exchange, shapes.config);
        let (of_node, nodes) = self.nodes();
        let ranks = shapes.topology.expert;
        if ranks == 1 {
            return 0.0;
        }
        let outward = matches!(
            (component, pass),
            (Component::Dispatch, Pass::Forward) | (Component::Combine, Pass::BackwardInput)
        );
        let (format, direction) =
            if outward { (shapes.precision.dispatch, 0) } else { (shapes.precision.combine, 1) };
        let row = bytes_of_rows(format, shapes.micro_batch_tokens as u64, config.hidden_size) as f64;
        let top_k = config.num_experts_per_tok;
        let rows_inside = row * top_k.min(ranks) as f64;
        let (across, inside) = match (nodes, rates.hops) {
            (1, _) => (0.0, rows_inside / rates.inside[direction]),
            (_, 2) => (
                row * self.target_nodes(nodes) / rates.across[direction],
                rows_inside / rates.inside[direction],
            ),
            _ => {
                let [elsewhere, here] = [ranks - of_node, of_node - 1].map(|some| some as f64 / ranks as f64);
                (
                    rows_inside * elsewhere / self.rates.across.bytes_per_s,
                    rows_inside * here / rates.inside[direction],
                )
            }
        };
        let latency = self.rates.inside.latency_s + if nodes > 1 { self.rates.across.latency_s } else { 0.0 };
        // What arrives at a node is passed on at once: the slower of both hops counts.
        rates.barrier_s + latency + across.max(inside)
    }

    /// Nodes that a token's experts are on, the own one among them: as many as its groups allow, or else as chance has it.
    fn target_nodes(&self, nodes: usize) -> f64 {
        let config = self.kernels.shapes.config;
        let top_k = config.num_experts_per_tok;
        if config.topk_group < config.n_group {
            return cost::target_nodes(config, nodes as u64) as f64;
        }
        let nodes = nodes as f64;
        nodes * (1.0 - (1.0 - 1.0 / nodes).powi(top_k as i32))
    }

    fn rank(&self, pipeline: usize) -> usize {
        self.kernels.shapes.topology.rank(Coordinates { pipeline, data: 0, expert: 0 })
    }

    fn sent_bytes(&self, pipeline: usize, work: &Work) -> f64 {
        cost::of(work, self.rank(pipeline), self.kernels.shapes).sent_bytes as f64
    }

    /// The slowest link of the whole world.
    fn of_world(&self) -> Link {
        let is_one_node = self.kernels.shapes.topology.world() <= self.cluster.ranks_per_node;
        if is_one_node { self.rates.inside } else { self.rates.across }
    }

    fn send(&self, pipeline: usize, op: &Op) -> f64 {
        let Lane::Send(peer) = op.lane else { return 0.0 };
        let node = |pipeline| self.rank(pipeline) / self.cluster.ranks_per_node;
        let link = if node(pipeline) == node(peer) { self.rates.inside } else { self.rates.across };
        link.latency_s
            + self.rates.calibrated.hop_latency_s
            + self.sent_bytes(pipeline, &op.work) / link.bytes_per_s
    }

    fn load(&self, layer: usize, chunk: Chunk) -> f64 {
        let chance = self.rates.chance;
        let shapes = self.kernels.shapes;
        let draw = || {
            largest_load(
                chance,
                shapes.config.n_routed_experts,
                shapes.topology.expert,
                (layer, chunk.micro_batch),
            )
        };
        *self.loads.borrow_mut().entry((layer, chunk.micro_batch)).or_insert_with(draw)
    }

    /// Slowest at both ends of the pipeline, fastest in its middle, in even steps; the mean over the stages stays.
    fn stage(&self, stage: usize) -> f64 {
        let last = self.kernels.shapes.stages.len() - 1;
        let farthest = last / 2;
        if farthest == 0 {
            return 1.0;
        }
        let from_end = stage.min(last - stage) as f64 / farthest as f64;
        1.0 + self.rates.calibrated.stage_imbalance * (1.0 - 2.0 * from_end)
    }

    fn jitter(&self, (pass, component, layer): Piece, chunk: Chunk) -> f64 {
        let place =
            [pass as u64, component as u64, layer as u64, chunk.stage as u64, chunk.micro_batch as u64];
        slowest(self.rates.chance, self.kernels.shapes.topology.expert, place)
    }
}

impl OperationTimes for Durations<'_> {
    fn of(&self, pipeline: usize, op: &Op) -> f64 {
        match op.work {
            Work::Component { pass, chunk, layer, component } => match component {
                Component::Dispatch | Component::Combine => {
                    self.exchange(pass, component) * self.load(layer, chunk)
                }
                _ => self.component((pass, component, layer), chunk),
            },
            Work::Send { .. } => self.send(pipeline, op),
            Work::Reduce { .. } | Work::Gather { .. } => {
                self.rates.across.latency_s
                    + self.sent_bytes(pipeline, &op.work) / self.of_world().bytes_per_s
            }
            Work::Totals | Work::Evidence => {
                let link = self.of_world();
                // Up a tree of eight branches and down again.
                let levels = (self.kernels.shapes.topology.world() as f64).log(8.0).ceil();
                2.0 * levels * link.latency_s + self.sent_bytes(pipeline, &op.work) / link.bytes_per_s
            }
            Work::Pack { .. } | Work::GradNorm { .. } | Work::Apply { .. } | Work::Unpack { .. } => {
                self.kernel(&Kernel::Traffic(Traffic::Update, update_bytes(&op.work, self.kernels.shapes)))
            }
            Work::Receive { .. } | Work::AwaitReplica | Work::Inspect | Work::Balance | Work::Snapshot => 0.0,
        }
    }

    fn missing(&self, works: &[&Work]) -> Vec<String> {
        let pieces: BTreeSet<Piece> = works
            .iter()
            .filter_map(|&&work| match work {
                Work::Component { pass, layer, component, .. } => Some((pass, component, layer)),
                _ => None,
            })
            .collect();
        let kernels =
            pieces.into_iter().flat_map(|(pass, component, layer)| self.kernels.of(pass, component, layer));
        let without = kernels.filter_map(|kernel| match kernel {
            Kernel::Product { role, format, shape, .. }
                if self.product_rate(role, format, shape).is_none() =>
            {
                Some(format!(
                    "compute.products: expected a rate of {} products in {}",
                    role.name(),
                    format_name(format)
                ))
            }
            _ => None,
        });
        without.collect::<BTreeSet<String>>().into_iter().collect()
    }
}
