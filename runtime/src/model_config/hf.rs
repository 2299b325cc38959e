//! Reading and writing the HF `config.json` of a model.
//!
//! Files carry many keys of no consequence here: those are ignored. What would change the model's arithmetic and
//! is not built is refused by name. The rotary settings, which have many spellings, are read in `rope`.

#[cfg(test)]
mod published;
mod rope;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use super::{ModelConfig, TopkMethod};
use crate::faults::Faults;

/// Upper bounds far beyond any model, low enough that no product of sizes overflows 64 bits.
const WIDTH: RangeInclusive<usize> = 1..=1 << 17;
const HEAD_WIDTH: RangeInclusive<usize> = 1..=1 << 12;
const EXPERTS: RangeInclusive<usize> = 1..=1 << 12;
const LAYERS: RangeInclusive<usize> = 1..=1 << 10;
/// Every expert has names of its own: what a file says must not ask for more memory than any model needs.
const EXPERTS_OF_ALL_LAYERS: usize = 1 << 16;
const TABLE_ROWS: RangeInclusive<usize> = 1..=1 << 24;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;

pub(super) fn read(text: &str) -> Result<ModelConfig, Faults> {
    let (config, faults) = read_with(text, &Map::new())?;
    faults.into_result(config)
}

/// The file with some keys in place of its own.
pub(super) fn read_with(text: &str, keys: &Map<String, Value>) -> Result<(ModelConfig, Faults), Faults> {
    let mut faults = Faults::default();
    let mut object = match serde_json::from_str(text) {
        Ok(Value::Object(object)) => object,
        Ok(other) => {
            faults.expected("", "an object with the keys of an HF config.json", value_text(&other));
            return Err(faults);
        }
        Err(error) => {
            faults.expected("", "valid JSON", error);
            return Err(faults);
        }
    };
    if keys.contains_key("num_attention_heads") {
        // It says the same once more.
        object.remove("num_key_value_heads");
    }
    object.extend(keys.clone());
    let mut reader = ConfigReader { object: &object, prefix: "", faults };
    reader.refuse_unsupported();
    let config = reader.config();
    let mut faults = reader.faults;
    check_relations(&config, &mut faults);
    Ok((config, faults))
}

/// Keys of published files that change nothing: they name classes, versions and types, or repeat what is fixed.
const WITHOUT_EFFECT: [&str; 22] = [
    "_name_or_path",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "head_dim",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "mlp_bias",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
];

/// Keys that other programs train by, and the recipe's that do it here.
const OF_TRAINING: [(&str, &str); 2] =
    [("aux_loss_alpha", "balance.sequence_alpha"), ("seq_aux", "balance.sequence_alpha")];

/// Keys of a file that are not read, in order; each with the key of the recipe that is instead, if there is one.
pub(super) fn ignored_keys(text: &str) -> Vec<String> {
    let Ok(Value::Object(object)) = serde_json::from_str(text) else { return Vec::new() };
    let own = super::builtin::model("tiny").map(|model| write(&model)).unwrap_or_default();
    let Ok(Value::Object(own)) = serde_json::from_str(&own) else { return Vec::new() };
    // "rope_" begins the keys of every spelling of the rotary settings, which are checked one by one.
    let is_read =
        |key: &str| own.contains_key(key) || key.starts_with("rope_") || key == "quantization_config";
    let ignored = object.keys().filter(|key| !is_read(key) && !WITHOUT_EFFECT.contains(&key.as_str()));
    let named = |key: &String| match OF_TRAINING.iter().find(|(known, _)| known == key) {
        Some((_, instead)) => format!("{key} (the recipe's {instead} counts)"),
        None => key.clone(),
    };
    ignored.map(named).collect()
}

/// What `model_type` may say. Kimi K2 is DeepSeek-V3 under another name.
const FAMILIES: [&str; 3] = ["deepseek_v3", "deepseek_v2", "kimi_k2"];

/// Takes typed values out of one JSON object and notes what is wrong with them.
struct ConfigReader<'a> {
    object: &'a Map<String, Value>,
    /// Path of the object in the file, with a dot behind it if not empty.
    prefix: &'static str,
    faults: Faults,
}

impl<'a> ConfigReader<'a> {
    /// Null and absent mean the same.
    fn given(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn fault(&mut self, key: &str, expected: &str, got: Option<&Value>) {
        let got = got.map_or_else(|| "nothing".to_string(), value_text);
        self.faults.expected(format!("{}{key}", self.prefix), expected, got);
    }

    /// A whole number, or the lowest of the range where the file has none that is valid.
    fn count(&mut self, key: &str, range: RangeInclusive<usize>, default: Option<usize>) -> usize {
        let given = self.given(key);
        let value = given.and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok());
        match (given, value, default) {
            (_, Some(value), _) if range.contains(&value) => value,
            (None, _, Some(default)) => default,
            _ => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                self.fault(key, &expected, given);
                *range.start()
            }
        }
    }

    fn optional_count(&mut self, key: &str, range: RangeInclusive<usize>) -> Option<usize> {
        self.given(key).map(|_| self.count(key, range, None))
    }

    fn token_id(&mut self, key: &str) -> Option<u64> {
        let given = self.given(key)?;
        if given.as_u64().is_none() {
            self.fault(key, "a token id", Some(given));
        }
        given.as_u64()
    }

    fn token_ids(&mut self, key: &str) -> Vec<u64> {
        let given = self.object.get(key).unwrap_or(&Value::Null);
        token_ids(given).unwrap_or_else(|| {
            self.fault(key, "a token id or a list of them", Some(given));
            Vec::new()
        })
    }

    fn number(&mut self, key: &str, default: Option<f64>) -> f64 {
        self.finite(key, default, "a number, 0 or more", |value| value >= 0.0)
    }

    fn positive(&mut self, key: &str, default: Option<f64>) -> f64 {
        self.finite(key, default, "a number above 0", |value| value > 0.0)
    }

    fn finite(&mut self, key: &str, default: Option<f64>, expected: &str, admits: fn(f64) -> bool) -> f64 {
        let given = self.given(key);
        match (given, given.and_then(Value::as_f64), default) {
            (_, Some(value), _) if value.is_finite() && admits(value) => value,
            (None, _, Some(default)) => default,
            _ => {
                self.fault(key, expected, given);
                1.0
            }
        }
    }

    fn flag(&mut self, key: &str, default: Option<bool>) -> bool {
        let given = self.given(key);
        match (given.and_then(Value::as_bool), given, default) {
            (Some(value), _, _) | (None, None, Some(value)) => value,
            _ => {
                self.fault(key, "true or false", given);
                false
            }
        }
    }

    /// What the model's arithmetic is built for; anything else must not be read as if it were that.
    fn refuse_unsupported(&mut self) {
        let family = self.given("model_type").and_then(Value::as_str);
        if !family.is_some_and(|family| FAMILIES.contains(&family)) {
            let expected = "\"deepseek_v3\", \"deepseek_v2\" or \"kimi_k2\"";
            self.fault("model_type", expected, self.given("model_type"));
        }
        let scoring = if self.is_v2() { "softmax" } else { "sigmoid" };
        let only = [
            ("scoring_func", json!(scoring)),
            ("mlp_bias", json!(false)),
            ("hidden_act", json!("silu")),
            ("attention_bias", json!(false)),
        ];
        for (key, supported) in only {
            if let Some(given) = self.given(key).filter(|&given| *given != supported) {
                self.fault(key, &format!("{supported}, the only form that is supported"), Some(given));
            }
        }
        // Null does not stand for the default here: transformers takes it for false.
        if let Some(given) = self.object.get("rope_interleave").filter(|&given| *given != json!(true)) {
            self.fault("rope_interleave", "true, the only form that is supported", Some(given));
        }
        if let Some(dropout) = self.given("attention_dropout").filter(|value| value.as_f64() != Some(0.0)) {
            self.fault("attention_dropout", "0, as dropout is not supported", Some(dropout));
        }
        if let Some(heads) = self.given("num_key_value_heads")
            && Some(heads) != self.given("num_attention_heads")
        {
            let expected = "the same as num_attention_heads, as latent attention has no key groups";
            self.fault("num_key_value_heads", expected, Some(heads));
        }
        self.refuse_other_quantization();
    }

    /// Weights in FP8 with a scale per block, as they are published, are read as the numbers they stand for.
    fn refuse_other_quantization(&mut self) {
        let Some(quantization) = self.given("quantization_config") else { return };
        let form = [
            ("quant_method", json!("fp8"), None),
            ("weight_block_size", json!([128, 128]), None),
            ("fmt", json!("e4m3"), Some(json!("e4m3"))),
            ("activation_scheme", json!("dynamic"), Some(json!("dynamic"))),
        ];
        for (key, supported, default) in form {
            let given = quantization.get(key).filter(|value| !value.is_null());
            if given.or(default.as_ref()) != Some(&supported) {
                let path = format!("quantization_config.{key}");
                self.fault(&path, &format!("{supported}, the only form that is supported"), given);
            }
        }
    }

    /// DeepSeek-V2 has gates of its own; all others have those of DeepSeek-V3.
    fn is_v2(&self) -> bool {
        self.given("model_type") == Some(&json!("deepseek_v2"))
    }

    fn topk_method(&mut self) -> TopkMethod {
        let given = self.given("topk_method");
        let methods: &[TopkMethod] = if self.is_v2() {
            &[TopkMethod::Greedy, TopkMethod::GroupLimitedGreedy]
        } else {
            &[TopkMethod::NoauxTc]
        };
        let named = |given: &Value| methods.iter().copied().find(|method| given == method.name());
        given.map_or(Some(methods[0]), named).unwrap_or_else(|| {
            let names: Vec<_> = methods.iter().map(|method| format!("\"{}\"", method.name())).collect();
            let only = if names.len() == 1 { ", the only form that is supported" } else { "" };
            self.fault("topk_method", &(names.join(" or ") + only), given);
            methods[0]
        })
    }

    fn config(&mut self) -> ModelConfig {
        let topk_method = self.topk_method();
        // Files of models without groups may have none of the two.
        let one_group = (topk_method == TopkMethod::Greedy).then_some(1);
        let max_position_embeddings = self.count("max_position_embeddings", POSITIONS, None);
        let (rope_theta, rope_scaling) = rope::read(self, max_position_embeddings);
        ModelConfig {
            vocab_size: self.count("vocab_size", TABLE_ROWS, None),
            hidden_size: self.count("hidden_size", WIDTH, None),
            intermediate_size: self.count("intermediate_size", WIDTH, None),
            moe_intermediate_size: self.count("moe_intermediate_size", WIDTH, None),
            num_hidden_layers: self.count("num_hidden_layers", LAYERS, None),
            first_k_dense_replace: self.count("first_k_dense_replace", 0..=*LAYERS.end(), None),
            moe_layer_freq: self.count("moe_layer_freq", LAYERS, Some(1)),
            num_attention_heads: self.count("num_attention_heads", HEAD_WIDTH, None),
            q_lora_rank: self.optional_count("q_lora_rank", WIDTH),
            kv_lora_rank: self.count("kv_lora_rank", WIDTH, None),
            qk_nope_head_dim: self.count("qk_nope_head_dim", HEAD_WIDTH, None),
            qk_rope_head_dim: self.count("qk_rope_head_dim", HEAD_WIDTH, None),
            v_head_dim: self.count("v_head_dim", HEAD_WIDTH, None),
            n_shared_experts: self.count("n_shared_experts", EXPERTS, None),
            n_routed_experts: self.count("n_routed_experts", EXPERTS, None),
            num_experts_per_tok: self.count("num_experts_per_tok", EXPERTS, None),
            n_group: self.count("n_group", EXPERTS, one_group),
            topk_group: self.count("topk_group", EXPERTS, one_group),
            topk_method,
            norm_topk_prob: self.flag("norm_topk_prob", None),
            routed_scaling_factor: self.positive("routed_scaling_factor", None),
            rms_norm_eps: self.number("rms_norm_eps", Some(1e-6)),
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            tie_word_embeddings: self.flag("tie_word_embeddings", Some(false)),
            num_nextn_predict_layers: self.count("num_nextn_predict_layers", 0..=1, Some(0)),
            initializer_range: self.number("initializer_range", Some(0.02)),
            bos_token_id: self.token_id("bos_token_id"),
            eos_token_id: self.token_ids("eos_token_id"),
        }
    }
}

/// Contradictions between keys; keys that are wrong by themselves have been reported and are left out.
fn check_relations(config: &ModelConfig, faults: &mut Faults) {
    if faults.spare(&["qk_rope_head_dim"]) && !config.qk_rope_head_dim.is_multiple_of(2) {
        faults.expected("qk_rope_head_dim", "an even number", config.qk_rope_head_dim);
    }
    check_groups(config, faults);
    check_softmax(config, faults);
}

/// Where published programs disagree or give a key no meaning, nothing is guessed.
fn check_softmax(config: &ModelConfig, faults: &mut Faults) {
    if config.has_gate_bias() {
        return;
    }
    if config.num_nextn_predict_layers > 0 && faults.spare(&["num_nextn_predict_layers"]) {
        let expected = "0, as DeepSeek-V2 has no multi-token prediction";
        faults.expected("num_nextn_predict_layers", expected, config.num_nextn_predict_layers);
    }
    let is_known = faults.spare(&["topk_group", "n_group"]);
    if is_known && config.topk_method == TopkMethod::Greedy && config.topk_group != config.n_group {
        let expected = format!("n_group ({}), as topk_method \"greedy\" leaves no group out", config.n_group);
        faults.expected("topk_group", expected, config.topk_group);
    }
    // The published modelling code leaves the factor out where it normalises, others multiply by both.
    let is_known = faults.spare(&["norm_topk_prob", "routed_scaling_factor"]);
    if is_known && config.norm_topk_prob && config.routed_scaling_factor != 1.0 {
        let expected = "1 with softmax scores and norm_topk_prob";
        faults.expected("routed_scaling_factor", expected, config.routed_scaling_factor);
    }
    if config.norm_topk_prob && config.num_experts_per_tok == 1 {
        let expected = "false where num_experts_per_tok is 1: one weight is left as it is";
        faults.expected("norm_topk_prob", expected, true);
    }
}

fn check_groups(config: &ModelConfig, faults: &mut Faults) {
    let &ModelConfig { n_routed_experts, n_group, topk_group, .. } = config;
    if !faults.spare(&["n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"]) {
        return;
    }
    if n_routed_experts % n_group != 0 {
        faults.expected("n_group", format!("a divisor of n_routed_experts ({n_routed_experts})"), n_group);
        return;
    }
    if faults.spare(&["num_hidden_layers"])
        && n_routed_experts * config.num_hidden_layers > EXPERTS_OF_ALL_LAYERS
    {
        let expected = format!("at most {EXPERTS_OF_ALL_LAYERS} in all {} layers", config.num_hidden_layers);
        faults.expected("n_routed_experts", expected, n_routed_experts);
    }
    let group_size = n_routed_experts / n_group;
    if n_group > 1 && group_size < 2 && config.has_gate_bias() {
        let expected = format!("groups of 2 experts or more (at most {} groups)", n_routed_experts / 2);
        faults.expected("n_group", expected, n_group);
    }
    if topk_group > n_group {
        faults.expected("topk_group", format!("at most n_group ({n_group})"), topk_group);
    } else if config.num_experts_per_tok > topk_group * group_size {
        let expected = format!("at most the {} experts of topk_group groups", topk_group * group_size);
        faults.expected("num_experts_per_tok", expected, config.num_experts_per_tok);
    }
}

/// The ids of an `eos_token_id` in HF's files: a number, a list or null. `None` if it is something else.
pub fn token_ids(value: &Value) -> Option<Vec<u64>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(Value::as_u64).collect(),
        id => Some(vec![id.as_u64()?]),
    }
}

/// The shortest spelling of what [`token_ids`] reads.
fn token_ids_json(ids: &[u64]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

/// A value as a reader of the message would name it.
fn value_text(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_string(),
        Value::Object(_) => "an object".to_string(),
        other => other.to_string(),
    }
}

pub(super) fn write(config: &ModelConfig) -> String {
    let (class, family, scoring) = if config.has_gate_bias() {
        ("DeepseekV3ForCausalLM", "deepseek_v3", "sigmoid")
    } else {
        ("DeepseekV2ForCausalLM", "deepseek_v2", "softmax")
    };
    let file = json!({
        "architectures": [class],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "first_k_dense_replace": config.first_k_dense_replace,
        "moe_layer_freq": config.moe_layer_freq,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "n_shared_experts": config.n_shared_experts,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "topk_method": config.topk_method.name(),
        "scoring_func": scoring,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.as_ref().map(rope::scaling_json),
        "max_position_embeddings": config.max_position_embeddings,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_json(&config.eos_token_id),
        "torch_dtype": "float32",
        "use_cache": true,
    });
    format!("{file:#}\n")
}
