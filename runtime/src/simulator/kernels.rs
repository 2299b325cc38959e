//! The kernels of an operation: which products it runs and which bytes it moves, from shapes, formats and what is computed again.
//!
//! The list is what a training framework for GPUs launches, cast by cast; routing is balanced. Knows no speed: `duration` does.
//!
//! Shape letters: T tokens of a micro-batch, D hidden, K top-k, E experts, F inner width, H heads, V vocabulary.

use super::cluster::Role;
use crate::cost::{Shapes, attention_core_flops};
use crate::recipe::{MemorySection, NumberFormat, Recomputed};
use crate::schedule::{Component, LayerKind, Pass};

/// What memory holds up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// Norms.
    Norm,
    /// SwiGLU, with its cast.
    Swiglu,
    /// Casts to a narrow format, and turning what is in one.
    Cast,
    /// What comes before and behind attention's core in its backward pass.
    AttentionEnds,
    /// Rows put in order, sums, rotations, the loss.
    Copy,
    /// The optimizer.
    Update,
}

/// One kernel, or several of a kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// A matrix product.
    Product {
        /// Its role.
        role: Role,
        /// Of its factors.
        format: NumberFormat,
        /// Columns of the result, length of the sums.
        shape: (usize, usize),
        /// **Units**: FLOP.
        flops: f64,
    },
    /// Attention's core forward. **Units**: FLOP.
    Attention(f64),
    /// Attention's core backward. **Units**: FLOP.
    AttentionBackward(f64),
    /// Bytes read and written.
    Traffic(Traffic, f64),
}

/// What the kernels of components follow from.
#[derive(Clone, Copy)]
pub struct KernelShapes<'a> {
    /// Model, layout and formats.
    pub shapes: &'a Shapes<'a>,
    /// What is computed again.
    pub memory: &'a MemorySection,
}

/// Bytes of a value, its share of a scale included.
fn bytes(format: NumberFormat) -> f64 {
    const SCALE: f64 = 4.0 / 128.0;
    match format {
        NumberFormat::F32 => 4.0,
        NumberFormat::Bf16 => 2.0,
        NumberFormat::Fp8 => 1.0 + SCALE,
        NumberFormat::E5m6 => 1.5 + SCALE,
    }
}

/// Kernels in the making.
struct List {
    kernels: Vec<Kernel>,
    /// Bytes of a value of the residual stream.
    wide: f64,
    /// Bytes of a value as a factor of a product.
    narrow: f64,
    /// Format of linear layers.
    linear: NumberFormat,
}

impl List {
    fn traffic(&mut self, kind: Traffic, bytes: f64) {
        self.kernels.push(Kernel::Traffic(kind, bytes));
    }

    /// Reads and writes some values of the residual stream.
    fn moves(&mut self, kind: Traffic, values: f64) {
        self.traffic(kind, self.wide * values);
    }

    /// Casts values for a product: as it is for the products of rows, and turned, if `turned`, for the gradient of weights.
    fn cast(&mut self, values: f64, turned: bool) {
        if self.linear == NumberFormat::Fp8 {
            let written = if turned { 2.0 } else { 1.0 };
            self.traffic(Traffic::Cast, values * (self.wide + written * self.narrow));
        }
    }

    /// Turns values that were kept narrow, for the gradient of weights: its sums go along the rows.
    fn turn(&mut self, values: f64) {
        if self.linear == NumberFormat::Fp8 {
            self.traffic(Traffic::Cast, 2.0 * self.narrow * values);
        }
    }

    /// `rows` rows of `k` by a matrix with `n` columns.
    fn product(&mut self, role: Role, format: NumberFormat, rows: f64, shape @ (n, k): (usize, usize)) {
        self.kernels.push(Kernel::Product { role, format, shape, flops: 2.0 * rows * n as f64 * k as f64 });
    }
}

/// What a pass does with the weights of a layer.
#[derive(Clone, Copy)]
struct Linear {
    role: Role,
    format: NumberFormat,
    rows: f64,
}

impl Linear {
    /// The products of one pass by matrices of `n` columns and `k` rows.
    fn run(self, list: &mut List, pass: Pass, matrices: &[(usize, usize)]) {
        for &(n, k) in matrices {
            match pass {
                Pass::Forward => list.product(self.role, self.format, self.rows, (n, k)),
                Pass::BackwardInput => list.product(self.role, self.format, self.rows, (k, n)),
                Pass::BackwardWeight => list.kernels.push(Kernel::Product {
                    role: Role::Weight,
                    format: self.format,
                    shape: (n, k),
                    flops: 2.0 * self.rows * n as f64 * k as f64,
                }),
            }
        }
    }
}

impl KernelShapes<'_> {
    /// The kernels of a component of a layer.
    pub fn of(&self, pass: Pass, component: Component, layer: usize) -> Vec<Kernel> {
        let config = self.shapes.config;
        let kind = if config.mtp_layer() == Some(layer) { LayerKind::Moe } else { config.layer_kind(layer) };
        let precision = self.shapes.precision;
        let mut list = List {
            kernels: Vec::new(),
            wide: bytes(precision.activations),
            narrow: bytes(precision.linear),
            linear: precision.linear,
        };
        match (component, pass) {
            (Component::Attention, Pass::Forward) => self.attention(&mut list, kind),
            (Component::Attention, Pass::BackwardInput) => self.attention_input(&mut list, kind),
            (Component::Attention, Pass::BackwardWeight) => self.attention_weight(&mut list, kind),
            (Component::SharedExpert, _) => {
                let width = match kind {
                    LayerKind::Dense => config.intermediate_size,
                    LayerKind::Moe => config.shared_intermediate_size(),
                };
                self.ffn(&mut list, pass, Role::Dense, self.tokens(), width);
                if pass != Pass::BackwardWeight {
                    list.moves(Traffic::Copy, 3.0 * self.tokens() * self.hidden());
                }
            }
            (Component::Experts, _) => {
                let rows = self.tokens() * config.num_experts_per_tok as f64;
                self.ffn(&mut list, pass, Role::Grouped, rows, config.moe_intermediate_size);
                if pass != Pass::BackwardWeight {
                    // Rows in the order of experts, and back in that of their sources.
                    let row = 2.0 * rows * self.hidden();
                    list.traffic(Traffic::Copy, row * bytes(precision.dispatch));
                    list.traffic(Traffic::Copy, row * bytes(precision.combine));
                }
            }
            (Component::Head | Component::MtpHead, _) => self.head(&mut list, pass),
            (Component::MtpJoin, _) => self.join(&mut list, pass),
            (Component::Embedding, Pass::Forward) => {
                list.moves(Traffic::Copy, 2.0 * self.tokens() * self.hidden())
            }
            (Component::Embedding, _) => {
                list.traffic(Traffic::Copy, (list.wide + 8.0) * self.tokens() * self.hidden());
            }
            (Component::Chunk | Component::Dispatch | Component::Combine, _) => {}
        }
        list.kernels
    }

    fn tokens(&self) -> f64 {
        self.shapes.micro_batch_tokens as f64
    }

    fn hidden(&self) -> f64 {
        self.shapes.config.hidden_size as f64
    }

    fn recomputes(&self, what: Recomputed) -> bool {
        self.memory.recompute.contains(&what)
    }

    /// Forward: read and written. Backward: input and gradient read, gradient written; forward again where it is not kept.
    fn norm(&self, list: &mut List, pass: Pass, width: f64) {
        let again = if self.recomputes(Recomputed::Norms) { 2.0 } else { 0.0 };
        match pass {
            Pass::Forward => list.moves(Traffic::Norm, 2.0 * self.tokens() * width),
            Pass::BackwardInput => list.moves(Traffic::Norm, (3.0 + again) * self.tokens() * width),
            Pass::BackwardWeight => {}
        }
    }

    fn linear(&self, role: Role, rows: f64) -> Linear {
        Linear { role, format: self.shapes.precision.linear, rows }
    }

    /// Projections from the input, those from the latents, and the one behind attention, each as columns and rows; the widths of
    /// the latents' norms together.
    fn projections(&self) -> ([Vec<(usize, usize)>; 3], f64) {
        let c = self.shapes.config;
        let queries = c.num_attention_heads * c.qk_head_dim();
        let keys_and_values = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim);
        let latent = c.kv_lora_rank + c.qk_rope_head_dim;
        let (down, mut up) = match c.q_lora_rank {
            Some(rank) => ((rank + latent, c.hidden_size), vec![(queries, rank)]),
            None => ((queries + latent, c.hidden_size), Vec::new()),
        };
        up.push((keys_and_values, c.kv_lora_rank));
        let behind = (c.hidden_size, c.num_attention_heads * c.v_head_dim);
        let latents = c.q_lora_rank.unwrap_or(0) + c.kv_lora_rank;
        ([vec![down], up, vec![behind]], latents as f64)
    }

    /// Values of one token: queries, keys and values together, attention's output.
    fn head_widths(&self) -> (f64, f64, f64) {
        let c = self.shapes.config;
        let heads = c.num_attention_heads as f64;
        let (qk, v) = (c.qk_head_dim() as f64, c.v_head_dim as f64);
        (heads * qk, heads * (c.qk_nope_head_dim as f64 + v), heads * v)
    }

    fn core_flops(&self) -> f64 {
        self.tokens() * attention_core_flops(self.shapes.config, self.shapes.sequence_length) as f64
    }

    fn gate(&self, list: &mut List, pass: Pass, kind: LayerKind) {
        if kind == LayerKind::Moe {
            let c = self.shapes.config;
            let gate = Linear { role: Role::Dense, format: NumberFormat::F32, rows: self.tokens() };
            gate.run(list, pass, &[(c.n_routed_experts, c.hidden_size)]);
        }
    }

    fn attention(&self, list: &mut List, kind: LayerKind) {
        let (tokens, hidden) = (self.tokens(), self.hidden());
        let ([down, up, behind], latents) = self.projections();
        let (queries, _, output) = self.head_widths();
        let linear = self.linear(Role::Dense, tokens);
        self.norm(list, Pass::Forward, hidden);
        list.cast(tokens * hidden, false);
        linear.run(list, Pass::Forward, &down);
        self.up(list, &up, latents, queries);
        list.kernels.push(Kernel::Attention(self.core_flops()));
        list.cast(tokens * output, false);
        linear.run(list, Pass::Forward, &behind);
        // The residual sum; what the feed-forward reads.
        list.moves(Traffic::Copy, 3.0 * tokens * hidden);
        self.norm(list, Pass::Forward, hidden);
        list.cast(tokens * hidden, false);
        self.gate(list, Pass::Forward, kind);
    }

    /// Norms of the latents, the projections up, rotated parts put in place.
    fn up(&self, list: &mut List, up: &[(usize, usize)], latents: f64, queries: f64) {
        self.norm(list, Pass::Forward, latents);
        list.cast(self.tokens() * latents, false);
        self.linear(Role::Dense, self.tokens()).run(list, Pass::Forward, up);
        list.moves(Traffic::Copy, 2.0 * self.tokens() * queries);
    }

    fn attention_input(&self, list: &mut List, kind: LayerKind) {
        let (tokens, hidden) = (self.tokens(), self.hidden());
        let ([down, up, behind], latents) = self.projections();
        let (queries, keys_and_values, output) = self.head_widths();
        let linear = self.linear(Role::Dense, tokens);
        let c = self.shapes.config;
        self.gate(list, Pass::BackwardInput, kind);
        self.norm(list, Pass::BackwardInput, hidden);
        list.moves(Traffic::Copy, 3.0 * tokens * hidden);
        list.cast(tokens * hidden, true);
        linear.run(list, Pass::BackwardInput, &behind);
        if self.recomputes(Recomputed::MlaUpProjections) {
            self.up(list, &up, latents, queries);
        }
        // Before it: output and its gradient read. Behind it: the queries' gradient, summed in f32, read and written.
        list.moves(Traffic::AttentionEnds, 2.0 * tokens * output);
        list.traffic(Traffic::AttentionEnds, (4.0 + list.wide) * tokens * queries);
        // Scores again, then the gradients of values, probabilities, queries and keys: three products as wide as a key and two as
        // wide as a value, where forward there is one of each.
        let (qk, v) = (c.qk_head_dim() as f64, c.v_head_dim as f64);
        list.kernels.push(Kernel::AttentionBackward(self.core_flops() * (3.0 * qk + 2.0 * v) / (qk + v)));
        list.cast(tokens * (queries + keys_and_values), true);
        linear.run(list, Pass::BackwardInput, &up);
        self.norm(list, Pass::BackwardInput, latents);
        list.cast(tokens * latents, true);
        linear.run(list, Pass::BackwardInput, &down);
        self.norm(list, Pass::BackwardInput, hidden);
        list.moves(Traffic::Copy, 3.0 * tokens * hidden);
    }

    fn attention_weight(&self, list: &mut List, kind: LayerKind) {
        let (tokens, hidden) = (self.tokens(), self.hidden());
        let ([down, up, behind], latents) = self.projections();
        let (.., output) = self.head_widths();
        list.turn(tokens * (hidden + latents + output));
        for matrices in [down, up, behind] {
            self.linear(Role::Dense, tokens).run(list, Pass::BackwardWeight, &matrices);
        }
        self.gate(list, Pass::BackwardWeight, kind);
    }

    /// Gate and up projection as one product, SwiGLU, the projection down.
    fn ffn(&self, list: &mut List, pass: Pass, role: Role, rows: f64, width: usize) {
        let hidden = self.shapes.config.hidden_size;
        let (gate_up, down) = ((2 * width, hidden), (hidden, width));
        let linear = self.linear(role, rows);
        let inner = rows * width as f64;
        let (wide, narrow) = (list.wide, list.narrow);
        match pass {
            Pass::Forward => {
                linear.run(list, pass, &[gate_up]);
                list.traffic(Traffic::Swiglu, inner * (2.0 * wide + narrow));
                linear.run(list, pass, &[down]);
            }
            Pass::BackwardInput => {
                if role == Role::Dense {
                    list.cast(rows * hidden as f64, true);
                }
                linear.run(list, pass, &[down]);
                // Both halves of the input as they were kept, the gradient; two gradients, as they are and turned.
                let kept = bytes(self.shapes.precision.swiglu_input);
                let again = if self.recomputes(Recomputed::Swiglu) { narrow } else { 0.0 };
                list.traffic(Traffic::Swiglu, inner * (2.0 * kept + wide + 4.0 * narrow + again));
                linear.run(list, pass, &[gate_up]);
            }
            Pass::BackwardWeight => {
                // What went in and what went on; rows of a dense layer's gradient were turned with their cast.
                let gradient = if role == Role::Grouped { hidden as f64 } else { 0.0 };
                list.turn(rows * (hidden as f64 + width as f64 + gradient));
                linear.run(list, pass, &[gate_up, down]);
            }
        }
    }

    /// Norm, head, loss and, with the loss, the gradients of both factors.
    fn head(&self, list: &mut List, pass: Pass) {
        self.norm(list, pass, self.hidden());
        if pass == Pass::Forward {
            let c = self.shapes.config;
            let format = self.shapes.precision.activations;
            let (n, k) = (c.vocab_size, c.hidden_size);
            let linear = Linear { role: Role::Dense, format, rows: self.tokens() };
            linear.run(list, Pass::Forward, &[(n, k)]);
            // Logits written, read twice, their gradient written.
            list.moves(Traffic::Copy, 4.0 * self.tokens() * n as f64);
            linear.run(list, Pass::BackwardInput, &[(n, k)]);
            linear.run(list, Pass::BackwardWeight, &[(n, k)]);
        }
    }

    /// Two norms side by side, and the projection of both.
    fn join(&self, list: &mut List, pass: Pass) {
        let hidden = self.shapes.config.hidden_size;
        let values = 2.0 * self.tokens() * hidden as f64;
        self.norm(list, pass, 2.0 * self.hidden());
        match pass {
            Pass::Forward => list.cast(values, false),
            Pass::BackwardInput => list.cast(values / 2.0, true),
            Pass::BackwardWeight => list.turn(values),
        }
        self.linear(Role::Dense, self.tokens()).run(list, pass, &[(hidden, 2 * hidden)]);
    }
}
