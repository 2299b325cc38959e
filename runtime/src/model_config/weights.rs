//! The tensors of a model by their published names and shapes.
//!
//! The one list that checkpoint reading, writing and parameter counts agree on. Shapes are [out, in].

use super::ModelConfig;

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// Published name.
    pub name: String,
    /// **Shapes**: matrices are [out, in].
    pub shape: Vec<usize>,
    /// For a stored copy of a shared tensor (the embedding and the head of multi-token prediction, a head that is the
    /// embedding): the name of the tensor it must equal.
    pub tied_to: Option<&'static str>,
}

impl WeightShape {
    /// Number of elements.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// Buffers of the rotary embedding that published modelling code has registered at one time or another.
const ROTARY_BUFFERS: [&str; 4] = ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"];

/// Whether a tensor of this name is a buffer that follows from the configuration: files may contain it, and it is ignored.
///
/// **Source**: published checkpoints of this architecture hold `model.layers.N.self_attn.rotary_emb.inv_freq`.
pub fn is_derived_buffer(name: &str) -> bool {
    let Some((owner, buffer)) = name.split_once("rotary_emb.") else { return false };
    let layer = owner.strip_prefix("model.layers.").and_then(|rest| rest.strip_suffix(".self_attn."));
    let is_layer =
        layer.is_some_and(|layer| !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()));
    ROTARY_BUFFERS.contains(&buffer) && (owner == "model." || is_layer)
}

const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head, which a model has unless it is tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// Embedding, layers, final norm, head, and after them the block of multi-token prediction.
pub(super) fn list(config: &ModelConfig) -> Vec<WeightShape> {
    let table = [config.vocab_size, config.hidden_size];
    let mut list = WeightList { config, prefix: String::new(), weights: Vec::new() };
    list.add(EMBEDDING, &table);
    for layer in 0..config.num_hidden_layers {
        list.prefix = format!("model.layers.{layer}.");
        list.add_block(layer);
    }
    list.prefix.clear();
    list.add("model.norm.weight", &[config.hidden_size]);
    if !config.tie_word_embeddings {
        list.add(HEAD, &table);
    }
    if let Some(layer) = config.mtp_layer() {
        list.prefix = format!("model.layers.{layer}.");
        list.add_tied("embed_tokens.weight", &table, EMBEDDING);
        list.add("enorm.weight", &[config.hidden_size]);
        list.add("hnorm.weight", &[config.hidden_size]);
        list.add("eh_proj.weight", &[config.hidden_size, 2 * config.hidden_size]);
        list.add_block(layer);
        list.add("shared_head.norm.weight", &[config.hidden_size]);
        let head = if config.tie_word_embeddings { EMBEDDING } else { HEAD };
        list.add_tied("shared_head.head.weight", &table, head);
    }
    list.weights
}

/// The head of a model whose head is the embedding, as some files have it beside the embedding.
pub(super) fn head_copy(config: &ModelConfig) -> Option<WeightShape> {
    let shape = vec![config.vocab_size, config.hidden_size];
    let copy = WeightShape { name: HEAD.into(), shape, tied_to: Some(EMBEDDING) };
    config.tie_word_embeddings.then_some(copy)
}

struct WeightList<'a> {
    config: &'a ModelConfig,
    prefix: String,
    weights: Vec<WeightShape>,
}

impl WeightList<'_> {
    fn add(&mut self, name: &str, shape: &[usize]) {
        let name = format!("{}{name}", self.prefix);
        self.weights.push(WeightShape { name, shape: shape.to_vec(), tied_to: None });
    }

    fn add_tied(&mut self, name: &str, shape: &[usize], to: &'static str) {
        let name = format!("{}{name}", self.prefix);
        self.weights.push(WeightShape { name, shape: shape.to_vec(), tied_to: Some(to) });
    }

    fn add_block(&mut self, layer: usize) {
        self.add_attention();
        if self.config.is_moe_layer(layer) {
            self.add_experts();
        } else {
            self.add_ffn("mlp", self.config.intermediate_size);
        }
        self.add("input_layernorm.weight", &[self.config.hidden_size]);
        self.add("post_attention_layernorm.weight", &[self.config.hidden_size]);
    }

    fn add_attention(&mut self) {
        let c = self.config;
        let heads = c.num_attention_heads;
        match c.q_lora_rank {
            Some(rank) => {
                self.add("self_attn.q_a_proj.weight", &[rank, c.hidden_size]);
                self.add("self_attn.q_a_layernorm.weight", &[rank]);
                self.add("self_attn.q_b_proj.weight", &[heads * c.qk_head_dim(), rank]);
            }
            None => self.add("self_attn.q_proj.weight", &[heads * c.qk_head_dim(), c.hidden_size]),
        }
        let latent_and_rope_key = c.kv_lora_rank + c.qk_rope_head_dim;
        self.add("self_attn.kv_a_proj_with_mqa.weight", &[latent_and_rope_key, c.hidden_size]);
        self.add("self_attn.kv_a_layernorm.weight", &[c.kv_lora_rank]);
        let keys_and_values = heads * (c.qk_nope_head_dim + c.v_head_dim);
        self.add("self_attn.kv_b_proj.weight", &[keys_and_values, c.kv_lora_rank]);
        self.add("self_attn.o_proj.weight", &[c.hidden_size, heads * c.v_head_dim]);
    }

    fn add_experts(&mut self) {
        let c = self.config;
        self.add("mlp.gate.weight", &[c.n_routed_experts, c.hidden_size]);
        if c.has_gate_bias() {
            self.add("mlp.gate.e_score_correction_bias", &[c.n_routed_experts]);
        }
        for expert in 0..c.n_routed_experts {
            self.add_ffn(&format!("mlp.experts.{expert}"), c.moe_intermediate_size);
        }
        self.add_ffn("mlp.shared_experts", c.shared_intermediate_size());
    }

    fn add_ffn(&mut self, name: &str, inner: usize) {
        let hidden = self.config.hidden_size;
        self.add(&format!("{name}.gate_proj.weight"), &[inner, hidden]);
        self.add(&format!("{name}.up_proj.weight"), &[inner, hidden]);
        self.add(&format!("{name}.down_proj.weight"), &[hidden, inner]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    /// Name and shape of every tensor in a safetensors file, read from its header by hand.
    fn header(path: &Path) -> BTreeMap<String, Vec<usize>> {
        let bytes = std::fs::read(path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
        entries
            .map(|(name, entry)| (name.clone(), serde_json::from_value(entry["shape"].clone()).unwrap()))
            .collect()
    }

    #[test]
    fn names_and_shapes_equal_those_of_the_parity_checkpoints() {
        let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
        for fixture in [
            "qlora_grouped",
            "noqlora_flat",
            "yarn_mtp",
            "v2_lite",
            "v2_grouped",
            "moonlight",
            "kimi_k2",
            "tied",
        ] {
            let text = std::fs::read_to_string(parity.join(fixture).join("config.json")).unwrap();
            let weights = ModelConfig::from_hf_json(&text).unwrap().weights();
            let listed: BTreeMap<_, _> = weights.iter().map(|w| (w.name.clone(), w.shape.clone())).collect();
            assert_eq!(listed.len(), weights.len(), "{fixture}: a name is listed twice");
            assert_eq!(listed, header(&parity.join(fixture).join("model.safetensors")), "{fixture}");
        }
    }

    #[test]
    fn derived_buffers_are_those_of_the_rotary_embedding_alone() {
        for name in [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.61.self_attn.rotary_emb.inv_freq",
            "model.layers.3.self_attn.rotary_emb.cos_cached",
            "model.layers.3.self_attn.rotary_emb.sin_cached",
            "model.rotary_emb.inv_freq",
            "model.rotary_emb.original_inv_freq",
        ] {
            assert!(is_derived_buffer(name), "{name}");
        }
        for name in [
            "model.layers.0.self_attn.rotary_emb.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
            "model.layers.x.self_attn.rotary_emb.inv_freq",
            "model.layers..self_attn.rotary_emb.inv_freq",
            "model.layers.0.mlp.rotary_emb.inv_freq",
            "vision.rotary_emb.inv_freq",
            "rotary_emb.inv_freq",
            "model.layers.0.self_attn.inv_freq",
        ] {
            assert!(!is_derived_buffer(name), "{name}");
        }
        let config = crate::model_config::builtin::model("deepseek-v3").unwrap();
        assert!(config.weights().iter().all(|weight| !is_derived_buffer(&weight.name)));
    }

    #[test]
    fn copies_of_shared_tensors_are_marked() {
        let config = crate::model_config::builtin::model("deepseek-v3").unwrap();
        let weights = config.weights();
        let tied: Vec<_> = weights.iter().filter_map(|w| Some((w.name.as_str(), w.tied_to?))).collect();
        let expected = [
            ("model.layers.61.embed_tokens.weight", EMBEDDING),
            ("model.layers.61.shared_head.head.weight", HEAD),
        ];
        assert_eq!(tied, expected);
        for (copy, original) in tied {
            let shape = |name| weights.iter().find(|w| w.name == name).map(|w| &w.shape);
            assert_eq!(shape(copy), shape(original));
        }
    }

    #[test]
    fn a_tied_model_has_one_table_and_whatever_else_has_it_is_a_copy() {
        let config = crate::model_config::builtin::model("deepseek-v3").unwrap();
        let own = config.weights();
        let tied = ModelConfig { tie_word_embeddings: true, ..config.clone() };
        let weights = tied.weights();
        let left_out: Vec<_> = own.iter().filter(|w| weights.iter().all(|t| t.name != w.name)).collect();
        assert_eq!(left_out.iter().map(|w| w.name.as_str()).collect::<Vec<_>>(), [HEAD]);
        assert_eq!(weights.len() + 1, own.len());
        assert!(weights.iter().filter_map(|w| w.tied_to).eq([EMBEDDING, EMBEDDING]));
        let copy = tied.head_copy().unwrap();
        assert_eq!((copy.name.as_str(), copy.tied_to), (HEAD, Some(EMBEDDING)));
        assert_eq!(copy.shape, left_out[0].shape);
        assert_eq!(config.head_copy(), None);
    }

    #[test]
    fn deepseek_v3_has_its_published_size() {
        let config = crate::model_config::builtin::model("deepseek-v3").unwrap();
        let main = |name: &str| !name.starts_with("model.layers.61.");
        let total: u64 =
            config.weights().iter().filter(|w| main(&w.name)).map(WeightShape::num_elements).sum();
        assert_eq!(total, 671_026_419_200);
    }

    #[test]
    fn models_of_other_architectures_have_their_published_sizes() {
        let total = |name: &str| -> u64 {
            let config = crate::model_config::builtin::model(name).unwrap();
            config.weights().iter().map(WeightShape::num_elements).sum()
        };
        // The published index says 31,412,968,448 bytes in 16 bits.
        assert_eq!(2 * total("deepseek-v2-lite"), 31_412_968_448);
        // Moonlight is published as one of 15.96 billion.
        assert_eq!(total("moonlight") / 10_000_000, 1596);
    }

    /// The published files hold 8-bit matrices with one f32 scale per 128 x 128 block, 16-bit norms, tables,
    /// gates and joins, and f32 gate biases: 91,991 tensors of 688,574,839,360 bytes.
    #[test]
    fn deepseek_v3_fills_the_published_files() {
        let config = crate::model_config::builtin::model("deepseek-v3").unwrap();
        let (mut num_tensors, mut num_bytes) = (0, 0);
        for weight in config.weights() {
            let is = |name: &str| weight.name.ends_with(name);
            let is_16_bit = weight.shape.len() == 1
                || ["embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight"]
                    .iter()
                    .any(|name| is(name));
            let (tensors, bytes) = if is("e_score_correction_bias") {
                (1, 4 * weight.num_elements())
            } else if is_16_bit {
                (1, 2 * weight.num_elements())
            } else {
                let blocks: u64 = weight.shape.iter().map(|&size| size.div_ceil(128) as u64).product();
                (2, weight.num_elements() + 4 * blocks)
            };
            num_tensors += tensors;
            num_bytes += bytes;
        }
        assert_eq!((num_tensors, num_bytes), (91_991, 688_574_839_360));
    }
}
