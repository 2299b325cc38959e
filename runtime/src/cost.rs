//! What a model costs: parameters and FLOPs per token, from its shapes alone.
//!
//! Convention of every FLOP figure: matrix products only, a multiply-add is 2, causal attention at its useful
//! half (a token sees (T + 1) / 2 keys on average), backward is twice forward, nothing recomputed is counted
//! twice. Knows no machine; `op` alone knows ranks.
//!
//! Shape letters: T tokens of a sequence, D hidden, V vocabulary.

mod op;

pub use op::{
    BucketElements, OpCost, Shapes, all_to_all_bytes, bucket_elements, bytes_of_rows, of, target_nodes,
};

use crate::model_config::ModelConfig;
use crate::schedule::Component;
use crate::schedule::program::LayerKind;

/// Parameters of one layer, or of the block of multi-token prediction without what it shares with the main
/// model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerParameters {
    /// Held by every rank of the stage: attention, norms, gate, shared experts or dense FFN.
    pub common: u64,
    /// Spread over the expert ranks: the routed experts together.
    pub routed: u64,
    /// The gate biases: balanced by a rule, not trained by gradients.
    pub gate_bias: u64,
}

impl LayerParameters {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.common + self.routed + self.gate_bias
    }
}

/// Parameters of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The main model.
    pub total: u64,
    /// Those of the main model that work on one token: embedding, head and the chosen experts included.
    pub active: u64,
    /// What multi-token prediction adds; the embedding and head it shares are not counted again.
    pub mtp: u64,
}

/// Parameters of a whole model.
pub fn parameters(config: &ModelConfig) -> Parameters {
    let layers =
        (0..config.num_hidden_layers).map(|layer| layer_parameters(config, config.layer_kind(layer)));
    let (total, active) = layers.fold((0, 0), |(total, active), layer| {
        let idle = layer.routed - chosen(config, layer.routed);
        (total + layer.total(), active + layer.total() - idle)
    });
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let ends = tables * table_parameters(config) + config.hidden_size as u64;
    Parameters {
        total: total + ends,
        active: active + ends,
        mtp: config.mtp_layer().map_or(0, |_| mtp_parameters(config).total()),
    }
}

/// The share of all routed experts' parameters that one token uses.
fn chosen(config: &ModelConfig, routed: u64) -> u64 {
    routed / config.n_routed_experts as u64 * config.num_experts_per_tok as u64
}

/// Parameters of the embedding, and as many again of a head of its own.
pub fn table_parameters(config: &ModelConfig) -> u64 {
    config.vocab_size as u64 * config.hidden_size as u64
}

/// Parameters of one layer.
pub fn layer_parameters(config: &ModelConfig, kind: LayerKind) -> LayerParameters {
    let latents = config.kv_lora_rank + config.q_lora_rank.unwrap_or(0);
    let norms = (2 * config.hidden_size + latents) as u64;
    let routed = config.n_routed_experts as u64;
    let (routed, gate_bias) = match kind {
        LayerKind::Dense => (0, 0),
        LayerKind::Moe => {
            let gate_bias = if config.has_gate_bias() { routed } else { 0 };
            (routed * ffn_matrices(config, config.moe_intermediate_size), gate_bias)
        }
    };
    LayerParameters {
        common: attention_matrices(config) + norms + common_ffn_matrices(config, kind),
        routed,
        gate_bias,
    }
}

/// Parameters of the block of multi-token prediction: its layer, three norms and the projection that joins
/// embedding and hidden state.
pub fn mtp_parameters(config: &ModelConfig) -> LayerParameters {
    let layer = layer_parameters(config, LayerKind::Moe);
    LayerParameters { common: layer.common + 3 * config.hidden_size as u64 + join_matrix(config), ..layer }
}

/// Parameters that belong to one component of a layer alone, on one of `expert` expert ranks: without gate biases, embedding and head.
pub fn component_parameters(
    config: &ModelConfig,
    component: Component,
    kind: LayerKind,
    expert: usize,
) -> u64 {
    let hidden = config.hidden_size as u64;
    let layer = layer_parameters(config, kind);
    match component {
        Component::Attention => layer.common - shared_ffn_matrices(config, kind),
        Component::SharedExpert => shared_ffn_matrices(config, kind),
        Component::Experts => layer.routed / expert as u64,
        Component::MtpJoin => join_matrix(config) + 2 * hidden,
        Component::Head | Component::MtpHead => hidden,
        Component::Chunk | Component::Embedding | Component::Dispatch | Component::Combine => 0,
    }
}

/// Forward FLOPs of one token in one layer.
///
/// **Units**: FLOP per token, in sequences of `sequence_length` tokens.
pub fn layer_flops(config: &ModelConfig, kind: LayerKind, sequence_length: usize) -> u64 {
    let routed = match kind {
        LayerKind::Dense => 0,
        LayerKind::Moe => {
            config.num_experts_per_tok as u64 * ffn_matrices(config, config.moe_intermediate_size)
        }
    };
    let matrices = attention_matrices(config) + common_ffn_matrices(config, kind) + routed;
    2 * matrices + attention_core_flops(config, sequence_length)
}

/// Forward FLOPs of one token in the head.
pub fn head_flops(config: &ModelConfig) -> u64 {
    2 * table_parameters(config)
}

/// Forward FLOPs of one token in multi-token prediction: join, layer and head.
pub fn mtp_flops(config: &ModelConfig, sequence_length: usize) -> u64 {
    2 * join_matrix(config) + layer_flops(config, LayerKind::Moe, sequence_length) + head_flops(config)
}

/// Forward FLOPs of one token in the main model.
///
/// **Units**: FLOP per token, in sequences of `sequence_length` tokens.
pub fn forward_flops_per_token(config: &ModelConfig, sequence_length: usize) -> u64 {
    let layers = (0..config.num_hidden_layers).map(|layer| config.layer_kind(layer));
    layers.map(|kind| layer_flops(config, kind, sequence_length)).sum::<u64>() + head_flops(config)
}

/// FLOPs of one token in training: forward, and twice that backward; with multi-token prediction where the
/// model has it.
///
/// **Units**: FLOP per token, in sequences of `sequence_length` tokens.
pub fn training_flops_per_token(config: &ModelConfig, sequence_length: usize) -> u64 {
    let mtp = config.mtp_layer().map_or(0, |_| mtp_flops(config, sequence_length));
    3 * (forward_flops_per_token(config, sequence_length) + mtp)
}

/// Scores and their products with the values, for (T + 1) / 2 keys, forward.
///
/// **Units**: FLOP per token, in sequences of `sequence_length` tokens.
pub fn attention_core_flops(config: &ModelConfig, sequence_length: usize) -> u64 {
    let per_key = config.num_attention_heads * (config.qk_head_dim() + config.v_head_dim);
    per_key as u64 * (sequence_length as u64 + 1)
}

fn attention_matrices(config: &ModelConfig) -> u64 {
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    let queries = heads * config.qk_head_dim();
    let queries = config.q_lora_rank.map_or(hidden * queries, |rank| rank * (hidden + queries));
    let latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim);
    let keys_and_values = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim);
    (queries + latent + keys_and_values + heads * config.v_head_dim * hidden) as u64
}

/// The FFN every token passes, and the gate.
fn common_ffn_matrices(config: &ModelConfig, kind: LayerKind) -> u64 {
    gate_matrix(config, kind) + shared_ffn_matrices(config, kind)
}

fn gate_matrix(config: &ModelConfig, kind: LayerKind) -> u64 {
    match kind {
        LayerKind::Dense => 0,
        LayerKind::Moe => (config.n_routed_experts * config.hidden_size) as u64,
    }
}

fn shared_ffn_matrices(config: &ModelConfig, kind: LayerKind) -> u64 {
    match kind {
        LayerKind::Dense => ffn_matrices(config, config.intermediate_size),
        LayerKind::Moe => ffn_matrices(config, config.shared_intermediate_size()),
    }
}

fn ffn_matrices(config: &ModelConfig, inner: usize) -> u64 {
    3 * config.hidden_size as u64 * inner as u64
}

/// Parameters of what joins embedding and hidden state for multi-token prediction.
fn join_matrix(config: &ModelConfig) -> u64 {
    2 * (config.hidden_size as u64).pow(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_config::builtin;

    fn close(got: u64, expected: f64, last_digit: f64) {
        assert!((got as f64 - expected).abs() <= last_digit / 2.0, "expected {expected:e}, got {got}");
    }

    #[test]
    fn bench_models_cost_what_the_peer_script_counts() {
        let small = builtin::model("small").unwrap();
        let base = builtin::model("base").unwrap();
        close(training_flops_per_token(&small, 256), 54.15e6, 0.01e6);
        close(training_flops_per_token(&base, 512), 246.9e6, 0.1e6);
        close(parameters(&small).total, 22.7e6, 0.1e6);
        close(parameters(&base).total, 162.5e6, 0.1e6);
    }

    #[test]
    fn deepseek_v3_costs_what_was_published() {
        let mut config = builtin::model("deepseek-v3").unwrap();
        let counted = parameters(&config);
        assert_eq!(counted.total, 671_026_419_200);
        close(counted.active, 37.55e9, 0.01e9);
        close(counted.mtp, 11.61e9, 0.01e9);
        let with_mtp = training_flops_per_token(&config, 4096);
        config.num_nextn_predict_layers = 0;
        let without = training_flops_per_token(&config, 4096);
        // The published figures count T / 2 keys: without half of the diagonal.
        let half_diagonal = |layers: u64| 3 * layers * 128 * (192 + 128);
        close(without - half_diagonal(61), 250.4e9, 0.1e9);
        close(with_mtp - half_diagonal(62), 260.6e9, 0.1e9);
        close(
            forward_flops_per_token(&config, 4096) - 61 * attention_core_flops(&config, 4096),
            73.25e9,
            0.01e9,
        );
    }

    #[test]
    fn parameters_are_those_of_the_checkpoint() {
        let built_in =
            || builtin::model_names().into_iter().map(|name| (name, builtin::model(name).unwrap()));
        let tied =
            built_in().map(|(name, config)| (name, ModelConfig { tie_word_embeddings: true, ..config }));
        for (name, config) in built_in().chain(tied) {
            let own = config.weights().into_iter().filter(|weight| weight.tied_to.is_none());
            let mtp = config.mtp_layer().map(|layer| format!("model.layers.{layer}."));
            let is_mtp = |name: &str| mtp.as_ref().is_some_and(|prefix| name.starts_with(prefix));
            let (mtp, main): (Vec<_>, Vec<_>) = own.partition(|weight| is_mtp(&weight.name));
            let sum = |list: &[crate::model_config::WeightShape]| {
                list.iter().map(|w| w.num_elements()).sum::<u64>()
            };
            let counted = parameters(&config);
            assert_eq!((counted.total, counted.mtp), (sum(&main), sum(&mtp)), "{name}");
        }
    }
}
