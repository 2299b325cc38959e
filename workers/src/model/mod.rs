//! The model as one rank sees it: the stages it holds, cut into components.
//!
//! Each component is a pair of plain functions over tensors, `forward(x) -> (y, Saved)` and
//! `backward_input(dy, Saved) -> (dx, WeightWork)`; the weight part is a value that a later action consumes.
//! Knows layers and weights, no ranks beyond the group a parameter is replicated over, no schedule and no fabric.

pub mod attention;
pub mod build;
pub mod expert_counts;
pub mod experts;
pub mod ffn;
pub mod head;
pub mod init;
pub mod micro_batch;
pub mod mtp;
pub mod params;
pub mod precision;
pub mod weight_work;

use contraflow_kernels::attention::Heads;
use contraflow_kernels::gate::{GateSpec, GroupScore, Scoring};
use contraflow_kernels::latent::LatentHeads;
use contraflow_kernels::rope::{Rope, RopeSpec, Yarn, softmax_scale};
use contraflow_runtime::model_config::{ModelConfig, TopkMethod};
use contraflow_runtime::recipe::{MemorySection, Recomputed};
use contraflow_runtime::schedule::{Chunk, Component, StageLayout};

use self::params::ParamId;
use self::precision::Precision;

/// Everything the components need to know of the architecture, derived once.
pub struct Architecture {
    /// The published configuration.
    pub config: ModelConfig,
    /// Rotary frequencies, YaRN included.
    pub rope: Rope,
    /// Shape and scale of the attention core.
    pub heads: Heads,
    /// The same heads as cut into content and rotary parts.
    pub latent_heads: LatentHeads,
    /// Choice of experts.
    pub gate: GateSpec,
    /// Formats of weights and activations.
    pub precision: Precision,
    /// What the backward pass computes again instead of keeping it.
    pub recompute: Recompute,
}

/// What the backward pass computes again instead of keeping it (report section 3.2.3). What it gets is what the forward pass had, bit by
/// bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recompute {
    /// Outputs of all norms.
    pub norms: bool,
    /// Outputs of MLA's up-projections: queries where they have a latent, keys and values.
    pub mla_up_projections: bool,
    /// Outputs of SwiGLU.
    pub swiglu: bool,
}

impl Recompute {
    /// That of a recipe.
    pub fn of(section: &MemorySection) -> Self {
        let has = |what| section.recompute.contains(&what);
        Recompute {
            norms: has(Recomputed::Norms),
            mla_up_projections: has(Recomputed::MlaUpProjections),
            swiglu: has(Recomputed::Swiglu),
        }
    }
}

impl Architecture {
    /// Derives frequencies and scales from a configuration. Norms and SwiGLU are computed again.
    pub fn new(config: ModelConfig, precision: Precision) -> Self {
        let yarn = config.yarn().map(|yarn| Yarn {
            factor: yarn.factor,
            beta_fast: yarn.beta_fast,
            beta_slow: yarn.beta_slow,
            mscale: yarn.mscale,
            mscale_all_dim: yarn.mscale_all_dim,
            original_max_position_embeddings: yarn.original_max_position_embeddings,
        });
        let qk_dim = config.qk_head_dim();
        let heads = Heads {
            num_heads: config.num_attention_heads,
            qk_dim,
            v_dim: config.v_head_dim,
            scale: softmax_scale(qk_dim, yarn.as_ref()),
        };
        let latent_heads = LatentHeads {
            num_heads: config.num_attention_heads,
            nope_dim: config.qk_nope_head_dim,
            rope_dim: config.qk_rope_head_dim,
            v_dim: config.v_head_dim,
        };
        let rope = Rope::new(&RopeSpec { dim: config.qk_rope_head_dim, theta: config.rope_theta, yarn });
        let (scoring, group_score) = match config.topk_method {
            TopkMethod::NoauxTc => (Scoring::Sigmoid, GroupScore::TopTwo),
            TopkMethod::Greedy | TopkMethod::GroupLimitedGreedy => (Scoring::Softmax, GroupScore::Best),
        };
        let gate = GateSpec {
            scoring,
            group_score,
            num_experts: config.n_routed_experts,
            top_k: config.num_experts_per_tok,
            num_groups: config.n_group,
            top_groups: config.topk_group,
            normalise: config.norm_topk_prob,
            scale: config.routed_scaling_factor as f32,
        };
        let recompute = Recompute { norms: true, mla_up_projections: false, swiglu: true };
        Architecture { config, rope, heads, latent_heads, gate, precision, recompute }
    }

    /// The same, with another choice of what is computed again.
    pub fn recomputing(self, recompute: Recompute) -> Self {
        Architecture { recompute, ..self }
    }

    /// Epsilon of the layer norms.
    pub fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }
}

/// The query path of MLA.
pub enum Query {
    /// `q_a_proj`, `q_a_layernorm`, `q_b_proj`.
    Latent {
        /// Down projection.
        down: ParamId,
        /// Norm of the latent.
        norm: ParamId,
        /// Up projection.
        up: ParamId,
    },
    /// `q_proj`.
    Direct(ParamId),
}

/// Weights of the attention component.
pub struct AttentionWeights {
    /// `input_layernorm`.
    pub input_norm: ParamId,
    /// Query path.
    pub query: Query,
    /// `kv_a_proj_with_mqa`: latent, then the rope key.
    pub kv_down: ParamId,
    /// `kv_a_layernorm`.
    pub kv_norm: ParamId,
    /// `kv_b_proj`.
    pub kv_up: ParamId,
    /// `o_proj`.
    pub output: ParamId,
    /// `post_attention_layernorm`.
    pub post_norm: ParamId,
    /// Layer in the published names: where the gate bias is kept.
    pub layer: usize,
    /// `mlp.gate`, in layers with routed experts.
    pub gate: Option<ParamId>,
}

/// Weights of a SwiGLU network: gate and up projection stacked, then the down projection.
pub struct FfnWeights {
    /// `gate_proj` over `up_proj`.
    pub gate_up: ParamId,
    /// `down_proj`.
    pub down: ParamId,
}

/// One transformer layer.
pub struct Layer {
    /// Index in the published names.
    pub index: usize,
    /// Attention and gate.
    pub attention: AttentionWeights,
    /// The dense network or the shared experts.
    pub ffn: FfnWeights,
    /// The routed experts this rank owns, in its expert parameters.
    pub experts: Option<FfnWeights>,
}

/// Weights of the last stage's end.
pub struct HeadWeights {
    /// `model.norm`.
    pub norm: ParamId,
    /// `lm_head`, or `model.embed_tokens` where the two are tied.
    pub head: ParamId,
}

/// The multi-token-prediction block (report section 2.2).
pub struct MtpWeights {
    /// `model.embed_tokens`, the same tensor as the first stage's where both are on one rank.
    pub embedding: ParamId,
    /// `enorm`.
    pub embedding_norm: ParamId,
    /// `hnorm`.
    pub hidden_norm: ParamId,
    /// `eh_proj`.
    pub projection: ParamId,
    /// The block.
    pub layer: Layer,
    /// `shared_head.norm`.
    pub norm: ParamId,
}

/// One pipeline stage.
pub struct Stage {
    /// Position in the pipeline.
    pub index: usize,
    /// What the stage consists of.
    pub layout: StageLayout,
    /// `model.embed_tokens`, on the first stage.
    pub embedding: Option<ParamId>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// On the last stage.
    pub head: Option<HeadWeights>,
    /// On the last stage of a model with MTP.
    pub mtp: Option<MtpWeights>,
}

impl Stage {
    /// Under which chunk the input of a layer travels: its own, or the previous stage's at the stage's edge.
    pub fn activation_source(&self, chunk: Chunk, layer: usize) -> Chunk {
        let is_edge =
            !self.layout.embedding && layer == self.layout.first_layer && !self.layout.layers.is_empty();
        if is_edge { Chunk { stage: chunk.stage - 1, ..chunk } } else { chunk }
    }

    /// Under which chunk the gradient of a layer's output travels: its own, or the next stage's at the stage's edge.
    pub fn gradient_source(&self, chunk: Chunk, layer: usize) -> Chunk {
        let is_edge = !self.layout.head && layer + 1 == self.layout.first_layer + self.layout.layers.len();
        if is_edge { Chunk { stage: chunk.stage + 1, ..chunk } } else { chunk }
    }

    /// Whether this component is the last of a chunk's backward pass.
    pub fn is_last_of_backward(&self, component: Component, layer: usize) -> bool {
        match component {
            Component::Embedding => true,
            Component::Attention => !self.layout.embedding && layer == self.layout.first_layer,
            _ => false,
        }
    }

    /// The layer with this index, the MTP block included.
    ///
    /// # Panics
    /// If the stage has no such layer: the program was made for another layout.
    pub fn layer(&self, index: usize) -> &Layer {
        let mtp = self.mtp.as_ref().map(|mtp| &mtp.layer);
        let found = self.layers.iter().chain(mtp).find(|layer| layer.index == index);
        found.unwrap_or_else(|| panic!("stage {:?} has no layer {index}", self.layout))
    }
}
