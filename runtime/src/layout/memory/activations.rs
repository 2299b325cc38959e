//! What the operations of a rank's program hold in memory besides weights, gradients and moments: what waits for a backward pass,
//! and what an operation takes while it runs. And the most of both at any moment of a step.
//!
//! Every figure follows the components of `workers/src/model`, tensor by tensor; a test there holds the sum to what a run takes.
//! Routing is taken to be balanced.
//!
//! Shape letters: T tokens of a micro-batch, D hidden, K top-k, E experts, F inner width, H heads, C latent; N rows that come to the
//! experts of a rank, R pairs of a row and an expert.

use std::collections::{HashMap, HashSet};

use crate::cost::{self, bytes_of_rows, table_parameters};
use crate::model_config::ModelConfig;
use crate::recipe::{MemorySection, NumberFormat, PrecisionSection, Recomputed};
use crate::schedule::program::{LayerKind, Program, StageLayout};
use crate::schedule::{Component, Lane, Pass, Work};

/// **Units**: bytes of an F32.
const F32_BYTES: u64 = 4;
/// Rows of logits that are held at once at most, and logits, as the loss takes them.
const LOGIT_ROWS: (u64, u64) = (64, 256);
const LOGITS: u64 = 1 << 22;

/// What a component holds.
///
/// **Units**: bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OpBytes {
    /// From its forward pass to its input's gradient.
    pub kept: u64,
    /// From its input's gradient to its weights'.
    pub work: u64,
    /// Besides, while it runs: forward, for its input's gradient, for its weights'.
    pub scratch: [u64; 3],
    /// Gradients of its own weights, from the first pass that makes some on.
    pub gradient: u64,
}

/// A table whose gradient several components add to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Table {
    Embedding,
    Head,
}

/// The most that a step holds.
///
/// **Units**: bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Peak {
    /// Between two operations.
    pub live: u64,
    /// While one runs.
    pub running: u64,
    /// While one runs, with the gradients that are there by then.
    pub all: u64,
}

/// Walks over the operations of the compute lane in their order. `reduced(stage)` is held from the last operation of a stage on:
/// its gradients on their way.
pub(super) fn peak(
    program: &Program,
    rows: &Rows,
    stages: &[StageLayout],
    reduced: impl Fn(usize) -> u64,
) -> Peak {
    let components = || {
        program.ops.iter().filter_map(|op| match op.work {
            Work::Component { pass, chunk, layer, component } if op.lane == Lane::Compute => {
                Some((pass, chunk.stage, component, layer))
            }
            _ => None,
        })
    };
    let last_of_stage: HashMap<usize, usize> =
        components().enumerate().map(|(at, (_, stage, ..))| (stage, at)).collect();
    let (mut known, mut made, mut tables) = (HashMap::new(), HashSet::new(), HashSet::new());
    let (mut live, mut gradients, mut peak) = (0_u64, 0_u64, Peak::default());
    for (at, (pass, stage, component, layer)) in components().enumerate() {
        let place = (stage, component, layer);
        let held = *known.entry(place).or_insert_with(|| rows.bytes(&stages[stage], component, layer));
        let OpBytes { kept, work, scratch: [forward, input, weight], gradient } = held;
        if pass == makes_gradients(component) && made.insert(place) {
            let new = tables_of(component, &stages[stage]).into_iter().filter(|&table| tables.insert(table));
            gradients += gradient + new.count() as u64 * F32_BYTES * table_parameters(rows.config);
        }
        let scratch = match pass {
            Pass::Forward => kept + forward,
            Pass::BackwardInput => input.max(work),
            Pass::BackwardWeight => weight,
        };
        peak.running = peak.running.max(live + scratch);
        peak.all = peak.all.max(live + scratch + gradients);
        match pass {
            Pass::Forward => live += kept,
            Pass::BackwardInput => live = live + work - kept,
            Pass::BackwardWeight => live -= work,
        }
        if last_of_stage[&stage] == at {
            live += reduced(stage);
        }
        peak.live = peak.live.max(live);
        peak.all = peak.all.max(live + gradients);
    }
    peak.running = peak.running.max(peak.live);
    peak
}

/// The pass in which a component makes the gradients of its weights.
fn makes_gradients(component: Component) -> Pass {
    match component {
        Component::Head | Component::MtpHead => Pass::Forward,
        Component::Embedding | Component::MtpJoin => Pass::BackwardInput,
        _ => Pass::BackwardWeight,
    }
}

/// The tables whose gradients a component adds to.
fn tables_of(component: Component, stage: &StageLayout) -> Vec<Table> {
    match component {
        Component::Embedding | Component::MtpJoin => vec![Table::Embedding],
        Component::Head | Component::MtpHead if stage.tied => vec![Table::Embedding],
        Component::Head | Component::MtpHead => vec![Table::Head],
        _ => Vec::new(),
    }
}

/// What the bytes of operations follow from.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub config: &'a ModelConfig,
    pub precision: &'a PrecisionSection,
    pub memory: &'a MemorySection,
    pub expert_ranks: usize,
    pub expert_nodes: usize,
    pub micro_batch_tokens: usize,
}

impl Rows<'_> {
    /// A component of a stage.
    pub fn bytes(&self, stage: &StageLayout, component: Component, layer: usize) -> OpBytes {
        let kind = match layer.checked_sub(stage.first_layer).and_then(|at| stage.layers.get(at)) {
            Some(&kind) if stage.mtp_layer != Some(layer) => kind,
            _ => LayerKind::Moe,
        };
        let gradient =
            F32_BYTES * cost::component_parameters(self.config, component, kind, self.expert_ranks);
        let bytes = match component {
            Component::Attention => self.attention(kind),
            Component::SharedExpert => self.shared_expert(kind),
            Component::Experts => self.experts(),
            Component::Head | Component::MtpHead => self.head(),
            Component::MtpJoin => self.join(),
            Component::Embedding => {
                OpBytes { scratch: [0, self.wide(self.config.hidden_size), 0], ..OpBytes::default() }
            }
            Component::Dispatch | Component::Combine => self.passed_on(component),
            Component::Chunk => OpBytes::default(),
        };
        OpBytes { gradient, ..bytes }
    }

    fn recomputes(&self, what: Recomputed) -> bool {
        self.memory.recompute.contains(&what)
    }

    /// Whether products are narrow, and pass through F32 on their way.
    fn is_narrow(&self) -> bool {
        self.precision.linear != NumberFormat::F32
    }

    /// T rows in a format.
    fn rows(&self, format: NumberFormat, width: usize) -> u64 {
        bytes_of_rows(format, self.micro_batch_tokens as u64, width)
    }

    /// T rows in F32.
    fn wide(&self, width: usize) -> u64 {
        self.rows(NumberFormat::F32, width)
    }

    /// T rows in F32 where a narrow format passes through it.
    fn passing(&self, width: usize) -> u64 {
        if self.is_narrow() { self.wide(width) } else { 0 }
    }

    /// Both factors in F32, where narrow ones are widened for the product, and their product on its way to BF16.
    fn product(&self, (input, output): (usize, usize)) -> u64 {
        let weights = if self.is_narrow() { F32_BYTES * (input * output) as u64 } else { 0 };
        self.passing(input) + weights + self.passing(output)
    }

    /// Norm, MLA, residual, norm, gate.
    fn attention(&self, kind: LayerKind) -> OpBytes {
        let c = self.config;
        let PrecisionSection { activations, attention_output, linear, .. } = *self.precision;
        let (products, hidden, heads) = (self.precision.products(), c.hidden_size, c.num_attention_heads);
        let query_latent = c.q_lora_rank.unwrap_or(0);
        let kv_latent = c.kv_lora_rank + c.qk_rope_head_dim;
        let (qk, v) = (heads * c.qk_head_dim(), heads * c.v_head_dim);
        let kv = heads * (c.qk_nope_head_dim + c.v_head_dim);
        let up = self.rows(products, qk) * u64::from(query_latent > 0)
            + self.rows(products, qk)
            + self.rows(products, v);
        let direct = self.rows(products, qk) * u64::from(query_latent == 0);
        let is_moe = kind == LayerKind::Moe;
        let routing = self.wide(c.n_routed_experts + 2 * c.num_experts_per_tok) * u64::from(is_moe);
        // Input and residual stream, both latents, queries without one, output with a log-sum, scores with ids and weights.
        let mut kept = 2 * self.rows(activations, hidden)
            + self.rows(products, query_latent)
            + self.rows(products, kv_latent)
            + direct
            + self.rows(attention_output, v)
            + self.wide(heads)
            + routing;
        if !self.recomputes(Recomputed::Norms) {
            let latents = self.rows(products, query_latent) + self.rows(products, c.kv_lora_rank);
            kept += self.rows(linear, hidden) + latents;
            // Rows that stay on the rank as they are share this memory.
            kept += self.rows(activations, hidden) * u64::from(!(is_moe && self.shares_rows()));
        }
        let recomputes_up = self.recomputes(Recomputed::MlaUpProjections);
        if !recomputes_up {
            kept += up;
        }
        // What the weights' gradients read: of gate, output, query and key-value projections.
        let gate = self.wide(c.n_routed_experts)
            + if linear == activations { 0 } else { self.rows(activations, hidden) };
        let of_query = match query_latent {
            0 => self.rows(products, qk),
            latent => self.rows(products, qk) + self.rows(linear, latent) + self.rows(products, latent),
        };
        let work = gate * u64::from(is_moe)
            + self.rows(activations, hidden)
            + self.rows(linear, v)
            + of_query
            + self.rows(products, kv)
            + self.rows(linear, c.kv_lora_rank)
            + self.rows(products, kv_latent)
            + self.rows(linear, hidden);
        let again = if recomputes_up { up } else { 0 };
        let core = self.passing(2 * qk + 2 * v).max(self.product((query_latent.max(hidden), qk)));
        // Queries, keys, values, their gradients and those of the output, once as they are and once in F32.
        let gradients = self.rows(products, 2 * qk) + self.rows(products, v);
        let of_core = self.rows(products, v) + self.passing(4 * qk + 4 * v) + gradients;
        let stream = 3 * self.rows(activations, hidden) + self.rows(products, hidden) + self.wide(hidden);
        let largest = [(hidden, v), (query_latent.max(hidden), qk), (c.kv_lora_rank, kv)];
        let largest = largest.map(|shape| self.product(shape)).into_iter().max().unwrap_or(0);
        OpBytes {
            kept,
            work,
            scratch: [
                again + core + 2 * self.rows(activations, hidden),
                stream + (again + of_core).max(work + largest),
                largest,
            ],
            ..OpBytes::default()
        }
    }

    /// The FFN that every token passes.
    fn shared_expert(&self, kind: LayerKind) -> OpBytes {
        let c = self.config;
        let inner = match kind {
            LayerKind::Dense => c.intermediate_size,
            LayerKind::Moe => c.shared_intermediate_size(),
        };
        let PrecisionSection { activations, linear, .. } = *self.precision;
        let (products, hidden) = (self.precision.products(), c.hidden_size);
        let swiglu = self.swiglu(inner, &|format, width| self.rows(format, width));
        let product = self.product((hidden, 2 * inner)).max(self.product((inner, hidden)));
        let hidden_rows = self.rows(activations, hidden);
        // Inner values, their gradients, and the input, normed again or kept.
        let normed = hidden_rows * u64::from(self.recomputes(Recomputed::Norms));
        let of_input = if linear == activations { 0 } else { self.rows(linear, hidden) };
        let work = hidden_rows + self.rows(linear, inner) + self.rows(products, 2 * inner) + of_input;
        let backward = self.rows(products, inner) + self.passing(5 * inner);
        OpBytes {
            kept: swiglu.kept,
            work,
            scratch: [
                3 * hidden_rows + swiglu.forward + product,
                2 * hidden_rows + normed + work + backward.max(product),
                product,
            ],
            ..OpBytes::default()
        }
    }

    /// Rows of other ranks that an all-to-all in two hops passes on to the node, or sums up from it.
    fn passed_on(&self, component: Component) -> OpBytes {
        if self.expert_nodes == 1 {
            return OpBytes::default();
        }
        let nodes = cost::target_nodes(self.config, self.expert_nodes as u64);
        let rows =
            |format| bytes_of_rows(format, self.micro_batch_tokens as u64 * nodes, self.config.hidden_size);
        let there = rows(self.precision.dispatch);
        let back = rows(NumberFormat::F32) + rows(self.precision.combine);
        let scratch = if component == Component::Dispatch { [there, back, 0] } else { [back, there, 0] };
        OpBytes { scratch, ..OpBytes::default() }
    }

    /// The routed experts of the rank.
    fn experts(&self) -> OpBytes {
        let c = self.config;
        let (top_k, tokens) = (c.num_experts_per_tok, self.micro_batch_tokens);
        let PrecisionSection { activations, dispatch, combine, linear, .. } = *self.precision;
        let (products, hidden, inner) = (self.precision.products(), c.hidden_size, c.moe_intermediate_size);
        let arrived = (tokens * top_k.min(self.expert_ranks)) as u64;
        let routed = (tokens * top_k) as u64;
        let of_arrived = |format, width| bytes_of_rows(format, arrived, width);
        let of_routed = |format, width| bytes_of_rows(format, routed, width);
        let passing = |width| if self.is_narrow() { of_routed(NumberFormat::F32, width) } else { 0 };
        let swiglu = self.swiglu(inner, &of_routed);
        // Rows, the pairs' order and weights, the way home.
        let kept = of_arrived(dispatch, hidden) + 12 * routed + swiglu.kept + 4 * (arrived + routed);
        let of_input = if dispatch == linear { 0 } else { of_routed(linear, hidden) };
        let gathered = of_routed(dispatch, hidden) + of_input;
        let work = gathered
            + of_routed(dispatch, hidden)
            + of_routed(linear, inner)
            + of_routed(products, 2 * inner);
        let weights = |input: usize, output: usize| {
            if self.is_narrow() { F32_BYTES * (input * output) as u64 } else { 0 }
        };
        let sums = of_arrived(NumberFormat::F32, hidden);
        let outputs = of_routed(products, hidden);
        // Each tensor of the sequence with those that are still there.
        let forward = [
            gathered + passing(2 * inner) + of_routed(products, 2 * inner) + weights(hidden, 2 * inner),
            swiglu.forward,
            of_routed(products, inner) + passing(hidden) + outputs + passing(inner) + weights(inner, hidden),
            outputs + passing(hidden) + sums,
        ];
        let home = self.rows(activations, hidden) + of_arrived(combine, hidden);
        let backward =
            [work + passing(5 * inner) + of_routed(products, inner), work + outputs + passing(hidden) + sums];
        let d_home =
            self.rows(activations, hidden) * 3 + self.rows(products, hidden) + of_arrived(dispatch, hidden);
        let of_weights = weights(hidden, 2 * inner) + passing(hidden) + passing(2 * inner);
        OpBytes {
            kept,
            work,
            scratch: [
                home + forward.into_iter().max().unwrap_or(0),
                d_home + backward.into_iter().max().unwrap_or(0),
                of_weights,
            ],
            ..OpBytes::default()
        }
    }

    /// Whether the rows that come to the experts are the normed rows themselves.
    fn shares_rows(&self) -> bool {
        self.expert_ranks == 1 && self.precision.dispatch == self.precision.activations
    }

    /// A SwiGLU over rows of a kind: what is kept, and what the forward pass takes besides.
    fn swiglu(&self, inner: usize, rows: &dyn Fn(NumberFormat, usize) -> u64) -> Swiglu {
        let PrecisionSection { swiglu_input, linear, .. } = *self.precision;
        let products = self.precision.products();
        let output = if self.recomputes(Recomputed::Swiglu) { 0 } else { rows(linear, inner) };
        let passing = |width| if self.is_narrow() { rows(NumberFormat::F32, width) } else { 0 };
        let before = if swiglu_input == products { 0 } else { rows(products, 2 * inner) };
        let forward = before + passing(3 * inner) + rows(products, inner);
        Swiglu { kept: rows(swiglu_input, 2 * inner) + output, forward }
    }

    /// The loss, which makes the gradient of its input at once.
    fn head(&self) -> OpBytes {
        let c = self.config;
        let (hidden, vocabulary) = (c.hidden_size, c.vocab_size as u64);
        let activations = self.precision.activations;
        let is_narrow = activations != NumberFormat::F32;
        let rows = self.rows(activations, hidden);
        let block =
            (LOGITS / vocabulary).clamp(LOGIT_ROWS.0, LOGIT_ROWS.1).min(self.micro_batch_tokens as u64);
        // Logits, and their gradient as the products read it, in BF16 and widened; the head, widened; the input, normed.
        let logits = block * vocabulary * if is_narrow { 10 } else { 4 };
        let widened = if is_narrow { F32_BYTES * vocabulary * hidden as u64 } else { 0 };
        let forward = logits + widened + 2 * rows + self.wide(hidden);
        let scratch = [forward, rows + 2 * self.passing(hidden), 0];
        OpBytes { kept: 2 * rows, scratch, ..OpBytes::default() }
    }

    /// What joins embedding and hidden state for multi-token prediction.
    fn join(&self) -> OpBytes {
        let hidden = self.config.hidden_size;
        let PrecisionSection { activations, linear, .. } = *self.precision;
        let rows = self.rows(activations, hidden);
        let joined = self.rows(linear, 2 * hidden);
        let kept = 2 * rows + if self.recomputes(Recomputed::Norms) { 0 } else { joined };
        let product = self.product((2 * hidden, hidden));
        let work = rows + joined;
        let scratch = [2 * rows + joined + product, 2 * work + product, product];
        OpBytes { kept, work, scratch, ..OpBytes::default() }
    }
}

struct Swiglu {
    kept: u64,
    forward: u64,
}
