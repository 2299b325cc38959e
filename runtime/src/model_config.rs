//! The architecture of a model: the numbers of an HF `config.json`, and what follows from them.
//!
//! First thing a recipe resolves and last thing a run writes. `hf` reads and writes the file, `weights` lists
//! the tensors by their published names. Knows no ranks and no tensors.

pub mod builtin;
mod hf;
mod weights;

pub use hf::token_ids;
pub use weights::{HEAD, WeightShape, is_derived_buffer};

use serde_json::{Map, Value};

use crate::faults::Faults;
use crate::schedule::program::LayerKind;

/// Epsilon of the norms on the two compressed latents: a fixed 1e-6, whatever `rms_norm_eps` says.
///
/// **Source**: the published modelling code, which builds these two norms without passing the configured
/// value.
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// How a gate scores experts and chooses among them: `topk_method` and, with it, `scoring_func`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopkMethod {
    /// Sigmoid scores, a learnt bias in the choice, groups by their two best experts (DeepSeek-V3).
    NoauxTc,
    /// Softmax scores, the best of all experts (DeepSeek-V2-Lite).
    Greedy,
    /// Softmax scores, groups by their best expert (DeepSeek-V2).
    GroupLimitedGreedy,
}

impl TopkMethod {
    /// As the files spell it.
    pub fn name(self) -> &'static str {
        match self {
            TopkMethod::NoauxTc => "noaux_tc",
            TopkMethod::Greedy => "greedy",
            TopkMethod::GroupLimitedGreedy => "group_limited_greedy",
        }
    }
}

/// A model of the DeepSeek-V2 or V3 family. Fields carry the names of the published `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense FFN.
    pub intermediate_size: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Layers of the main model, without multi-token prediction.
    pub num_hidden_layers: usize,
    /// Number of leading layers with a dense FFN.
    pub first_k_dense_replace: usize,
    /// After those, a layer is a mixture of experts where its index is a multiple of this.
    pub moe_layer_freq: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the compressed query, or `None` where queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the compressed keys and values.
    pub kv_lora_rank: usize,
    /// Per head, the part of query and key without position.
    pub qk_nope_head_dim: usize,
    /// Per head, the rotated part of the query; the key has one such part for all heads.
    pub qk_rope_head_dim: usize,
    /// Per head, width of the values.
    pub v_head_dim: usize,
    /// Experts every token passes, stored as one FFN of this multiple of the expert width.
    pub n_shared_experts: usize,
    /// Experts of which the gate chooses.
    pub n_routed_experts: usize,
    /// Routed experts per token.
    pub num_experts_per_tok: usize,
    /// Groups the routed experts are divided into.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// How the gate scores and chooses.
    pub topk_method: TopkMethod,
    /// Whether the chosen scores are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the routing weights.
    pub routed_scaling_factor: f64,
    /// Epsilon of all norms but those on the latents ([`LATENT_NORM_EPS`]).
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Frequency scaling for long contexts as written in the file; see [`ModelConfig::yarn`].
    pub rope_scaling: Option<Yarn>,
    /// Longest sequence the model is configured for.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding: one table, one gradient, one update.
    pub tie_word_embeddings: bool,
    /// Depth of multi-token prediction: 0 or 1.
    pub num_nextn_predict_layers: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Token that opens a text, if the tokenizer has one.
    pub bos_token_id: Option<u64>,
    /// Tokens that end a text; none if the tokenizer has no such token.
    pub eos_token_id: Vec<u64>,
}

/// Parameters of YaRN (`rope_scaling` with type `yarn`).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context gets.
    pub factor: f64,
    /// Pairs that turn more often than this over the original context keep their frequency.
    pub beta_fast: f64,
    /// Pairs that turn less often than this over the original context are slowed by the whole factor.
    pub beta_slow: f64,
    /// Weight of the attention temperature in cos and sin, if given.
    pub mscale: Option<f64>,
    /// Weight of the attention temperature in the softmax scale, if given.
    pub mscale_all_dim: Option<f64>,
    /// Context length of the model before it was extended.
    pub original_max_position_embeddings: usize,
}

impl ModelConfig {
    /// Reads a `config.json` as published, in every spelling of the rotary parameters that transformers reads
    /// (`rope_theta`, `rope_scaling`, `rope_parameters`). Keys it has no use for are ignored.
    ///
    /// **Errors**: every missing key, wrong type, unsupported value and contradiction of the file, all at
    /// once.
    pub fn from_hf_json(text: &str) -> Result<Self, Faults> {
        hf::read(text)
    }

    /// The same of a file in which some keys are set anew, with what is right in it beside what is wrong: a key that is
    /// wrong has a value that stands in for it.
    ///
    /// **Errors**: text that is no JSON object.
    pub fn with_keys(text: &str, keys: &Map<String, Value>) -> Result<(Self, Faults), Faults> {
        hf::read_with(text, keys)
    }

    /// The keys of a `config.json` that mean something here.
    pub fn keys() -> Vec<String> {
        let any = builtin::model("tiny").expect("a built-in model");
        let written: Map<String, Value> =
            serde_json::from_str(&any.to_hf_json()).expect("what was written reads back");
        // Keys in the written form that say nothing of the arithmetic.
        let names = ["architectures", "model_type", "torch_dtype", "use_cache"];
        written.into_iter().map(|(key, _)| key).filter(|key| !names.contains(&key.as_str())).collect()
    }

    /// Keys of a `config.json` that change nothing here, though their writer may have meant something by them; none of a text that
    /// is no such file. Those that change nothing anywhere are left out.
    pub fn ignored_keys(text: &str) -> Vec<String> {
        hf::ignored_keys(text)
    }

    /// The `config.json` of this model in the spelling of the published DeepSeek checkpoints.
    pub fn to_hf_json(&self) -> String {
        hf::write(self)
    }

    /// Width of one head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Inner width of the shared experts, which are one FFN.
    pub fn shared_intermediate_size(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }

    /// Whether a layer is a mixture of experts. The block of multi-token prediction (layer
    /// `num_hidden_layers`) always is.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        layer >= self.num_hidden_layers
            || (layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq))
    }

    /// Whether gates have a bias, `e_score_correction_bias`, that keeps the experts in balance.
    pub fn has_gate_bias(&self) -> bool {
        self.topk_method == TopkMethod::NoauxTc
    }

    /// What a layer consists of.
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        if self.is_moe_layer(layer) { LayerKind::Moe } else { LayerKind::Dense }
    }

    /// Layer index of the multi-token-prediction block, if there is one.
    pub fn mtp_layer(&self) -> Option<usize> {
        (self.num_nextn_predict_layers > 0).then_some(self.num_hidden_layers)
    }

    /// YaRN where it is in force: wherever the file has it. The published inference code applies it only when it is
    /// set to run beyond the original context; the published modelling code, which gives a `config.json` its
    /// meaning, always does.
    pub fn yarn(&self) -> Option<&Yarn> {
        self.rope_scaling.as_ref()
    }

    /// Every tensor of the checkpoint by its published name, in the order of the layers.
    pub fn weights(&self) -> Vec<WeightShape> {
        weights::list(self)
    }

    /// The head that files may have beside the embedding where both are one: it is read as a copy and never written.
    pub fn head_copy(&self) -> Option<WeightShape> {
        weights::head_copy(self)
    }
}
