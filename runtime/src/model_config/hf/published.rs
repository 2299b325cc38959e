//! Configurations as they are published: every key of the files, and the sizes that the model cards give.

use serde_json::{Value, json};

use super::read;
use crate::model_config::{ModelConfig, TopkMethod, WeightShape, builtin};

/// A built-in model's file with what the published file has in its place, and besides.
fn published(start: &str, keys: Value) -> String {
    let mut file: Value = serde_json::from_str(builtin::text(start).unwrap()).unwrap();
    let besides = json!({
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "seq_aux": true,
        "ep_size": 1, "pretraining_tp": 1, "transformers_version": "4.46.3", "torch_dtype": "bfloat16",
    });
    for keys in [besides, keys] {
        file.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    }
    file.to_string()
}

fn fp8(more: Value) -> Value {
    let mut form = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    });
    form.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    form
}

fn num_parameters(config: &ModelConfig) -> u64 {
    config.weights().iter().map(WeightShape::num_elements).sum()
}

#[test]
fn r1_and_v3_1_are_deepseek_v3_in_fp8() {
    let v3 = builtin::model("deepseek-v3").unwrap();
    for form in [fp8(json!({})), fp8(json!({"scale_fmt": "ue8m0"}))] {
        let text = published("deepseek-v3", json!({"quantization_config": form}));
        assert_eq!(read(&text).unwrap(), v3);
        let of_training = ["aux_loss_alpha", "seq_aux"];
        let named = of_training.map(|key| format!("{key} (the recipe's balance.sequence_alpha counts)"));
        assert_eq!(ModelConfig::ignored_keys(&text), named);
    }
}

#[test]
fn kimi_k2_has_its_published_size() {
    let rope = json!({
        "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    });
    let text = published(
        "deepseek-v3",
        json!({
            "model_type": "kimi_k2", "vocab_size": 163840, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
            "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "rope_scaling": rope,
            "max_position_embeddings": 131072, "num_nextn_predict_layers": 0, "quantization_config": fp8(json!({})),
        }),
    );
    let config = read(&text).unwrap();
    assert_eq!((config.topk_method, num_parameters(&config)), (TopkMethod::NoauxTc, 1_026_408_232_448));
}

#[test]
fn deepseek_v2_has_its_published_size() {
    let text = published(
        "deepseek-v2-lite",
        json!({
            "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
            "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160,
            "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
        }),
    );
    let config = read(&text).unwrap();
    assert_eq!((config.topk_method, config.has_gate_bias()), (TopkMethod::GroupLimitedGreedy, false));
    assert_eq!(num_parameters(&config), 235_741_434_880);
}
