//! Model files as they are published, and as they should not be.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::model_config::{Yarn, builtin};

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name);
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn both_spellings_give_the_same_model() {
    for directory in ["qlora_grouped", "noqlora_flat", "yarn_mtp"] {
        let newer = read(&fixture(&format!("{directory}/config.json"))).unwrap();
        let older = read(&fixture(&format!("{directory}/config_deepseek.json"))).unwrap();
        assert_eq!(newer, older, "{directory}");
    }
}

#[test]
fn values_are_those_of_the_file() {
    let config = read(&fixture("noqlora_flat/config.json")).unwrap();
    assert_eq!((config.q_lora_rank, config.qk_head_dim(), config.shared_intermediate_size()), (None, 28, 80));
    assert_eq!((config.rope_theta, config.rms_norm_eps, config.norm_topk_prob), (50000.0, 1e-3, false));
    assert_eq!((config.bos_token_id, config.eos_token_id), (Some(0), Vec::new()));
    let config = read(&fixture("yarn_mtp/config.json")).unwrap();
    let yarn = config.yarn().unwrap();
    assert_eq!((yarn.factor, yarn.mscale, yarn.original_max_position_embeddings), (4.0, Some(1.0), 512));
    assert_eq!(config.mtp_layer(), Some(2));
    let kinds: Vec<_> = (0..=2).map(|layer| config.is_moe_layer(layer)).collect();
    assert_eq!(kinds, [false, true, true]);
}

#[test]
fn yarn_is_in_force_within_the_original_context_too() {
    let mut config = read(&fixture("yarn_mtp/config.json")).unwrap();
    config.max_position_embeddings = 512;
    assert!(config.yarn().is_some());
}

#[test]
fn what_is_written_reads_back() {
    let mut configs: Vec<_> =
        builtin::model_names().into_iter().map(|name| builtin::model(name).unwrap()).collect();
    let mut odd = configs[0].clone();
    (odd.moe_layer_freq, odd.q_lora_rank, odd.rms_norm_eps) = (2, None, 1.0 / 3.0);
    odd.eos_token_id = vec![256, 10];
    odd.rope_scaling = Some(Yarn {
        factor: 2.5,
        beta_fast: 16.0,
        beta_slow: 2.0,
        mscale: None,
        mscale_all_dim: Some(0.5),
        original_max_position_embeddings: 64,
    });
    configs.push(odd);
    let architectures = ["v2_lite", "v2_grouped", "moonlight", "kimi_k2"];
    configs.extend(architectures.map(|name| read(&fixture(&format!("{name}/config.json"))).unwrap()));
    for config in configs {
        assert_eq!(read(&write(&config)).unwrap(), config);
    }
}

/// What is said about the tiny model after some keys were set or, with null, taken away.
fn error_text(changes: Value) -> String {
    let mut file: Value = serde_json::from_str(&write(&builtin::model("tiny").unwrap())).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        file[key] = value.clone();
    }
    read(&file.to_string()).map_or_else(|faults| faults.to_string(), |_| "nothing".to_string())
}

#[test]
fn faults_of_a_file() {
    let yarn = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64});
    let cases = [
        (json!({"a_key_of_no_consequence": [1]}), "nothing"),
        (json!({"rope_parameters": yarn}), "nothing"),
        (
            json!({"model_type": "llama"}),
            "model_type: expected \"deepseek_v3\", \"deepseek_v2\" or \"kimi_k2\", got \"llama\"",
        ),
        (json!({"model_type": "kimi_k2"}), "nothing"),
        (json!({"mlp_bias": true}), "mlp_bias: expected false, the only form that is supported, got true"),
        (json!({"hidden_size": null}), "hidden_size: expected a whole number from 1 to 131072, got nothing"),
        (json!({"hidden_size": 0}), "hidden_size: expected a whole number from 1 to 131072, got 0"),
        (json!({"hidden_size": 8.5}), "hidden_size: expected a whole number from 1 to 131072, got 8.5"),
        (json!({"norm_topk_prob": "yes"}), "norm_topk_prob: expected true or false, got \"yes\""),
        (json!({"rope_theta": -1}), "rope_theta: expected a number above 0, got -1"),
        (json!({"rms_norm_eps": -1}), "rms_norm_eps: expected a number, 0 or more, got -1"),
        (json!({"rope_theta": 0}), "rope_theta: expected a number above 0, got 0"),
        (json!({"eos_token_id": [1, 2]}), "nothing"),
        (json!({"eos_token_id": []}), "nothing"),
        (
            json!({"eos_token_id": [1, "2"]}),
            "eos_token_id: expected a token id or a list of them, got a list",
        ),
        (
            json!({"eos_token_id": "</s>"}),
            "eos_token_id: expected a token id or a list of them, got \"</s>\"",
        ),
        (json!({"eos_token_id": -1}), "eos_token_id: expected a token id or a list of them, got -1"),
        (json!({"bos_token_id": [1]}), "bos_token_id: expected a token id, got a list"),
        (
            json!({"num_nextn_predict_layers": 2}),
            "num_nextn_predict_layers: expected a whole number from 0 to 1, got 2",
        ),
        (
            json!({"scoring_func": "softmax"}),
            "scoring_func: expected \"sigmoid\", the only form that is supported, got \"softmax\"",
        ),
        (
            json!({"topk_method": "greedy"}),
            "topk_method: expected \"noaux_tc\", the only form that is supported, got \"greedy\"",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "hidden_act: expected \"silu\", the only form that is supported, got \"gelu\"",
        ),
        (
            json!({"attention_bias": true}),
            "attention_bias: expected false, the only form that is supported, got true",
        ),
        (
            json!({"rope_interleave": false}),
            "rope_interleave: expected true, the only form that is supported, got false",
        ),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings: expected true or false, got \"yes\""),
        (
            json!({"attention_dropout": 0.1}),
            "attention_dropout: expected 0, as dropout is not supported, got 0.1",
        ),
        (
            json!({"num_key_value_heads": 2}),
            "num_key_value_heads: expected the same as num_attention_heads, as latent attention has no key \
             groups, got 2",
        ),
        (json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}), "nothing"),
        (
            json!({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}),
            "quantization_config.weight_block_size: expected [128,128], the only form that is supported, got nothing\n\
             quantization_config.fmt: expected \"e4m3\", the only form that is supported, got \"e5m2\"",
        ),
        (
            json!({"quantization_config": {"quant_method": "int4", "weight_block_size": [128, 128]}}),
            "quantization_config.quant_method: expected \"fp8\", the only form that is supported, got \"int4\"",
        ),
        (json!({"qk_rope_head_dim": 15}), "qk_rope_head_dim: expected an even number, got 15"),
        (
            json!({"num_experts_per_tok": 9}),
            "num_experts_per_tok: expected at most the 4 experts of topk_group groups, got 9",
        ),
        (json!({"n_group": 3}), "n_group: expected a divisor of n_routed_experts (8), got 3"),
        (json!({"n_group": 8}), "n_group: expected groups of 2 experts or more (at most 4 groups), got 8"),
        (
            json!({"n_routed_experts": 4096, "num_hidden_layers": 1000}),
            "n_routed_experts: expected at most 65536 in all 1000 layers, got 4096",
        ),
        (json!({"topk_group": 5}), "topk_group: expected at most n_group (4), got 5"),
        (
            json!({"vocab_size": "many", "hidden_act": "gelu"}),
            "hidden_act: expected \"silu\", the only form that is supported, got \"gelu\"\n\
             vocab_size: expected a whole number from 1 to 16777216, got \"many\"",
        ),
    ];
    for (changes, message) in cases {
        assert_eq!(error_text(changes.clone()), message, "{changes}");
    }
    assert_eq!(
        read("[1]").unwrap_err().to_string(),
        "expected an object with the keys of an HF config.json, got a list"
    );
    assert!(read("{").unwrap_err().to_string().starts_with("expected valid JSON, got "));
}

/// What is said about the V2-Lite fixture after some keys were set or, with null, taken away.
fn error_text_of_v2(changes: Value) -> String {
    let mut file: Value = serde_json::from_str(&fixture("v2_lite/config.json")).unwrap();
    file.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    read(&file.to_string()).map_or_else(|faults| faults.to_string(), |_| "nothing".to_string())
}

#[test]
fn gates_of_deepseek_v2_and_what_contradicts_them() {
    let grouped = json!({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2});
    let cases = [
        (json!({"n_group": null, "topk_group": null}), "nothing"),
        (json!({"topk_method": null}), "nothing"),
        (grouped, "nothing"),
        // One expert a group is enough where the best one decides.
        (json!({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 4}), "nothing"),
        (json!({"norm_topk_prob": true}), "nothing"),
        (
            json!({"topk_method": "noaux_tc"}),
            "topk_method: expected \"greedy\" or \"group_limited_greedy\", got \"noaux_tc\"",
        ),
        (
            json!({"scoring_func": "sigmoid"}),
            "scoring_func: expected \"softmax\", the only form that is supported, got \"sigmoid\"",
        ),
        (
            json!({"topk_method": "group_limited_greedy", "n_group": null, "topk_group": null}),
            "n_group: expected a whole number from 1 to 4096, got nothing\n\
             topk_group: expected a whole number from 1 to 4096, got nothing",
        ),
        (
            json!({"n_group": 4, "topk_group": 2}),
            "topk_group: expected n_group (4), as topk_method \"greedy\" leaves no group out, got 2",
        ),
        (
            json!({"num_nextn_predict_layers": 1}),
            "num_nextn_predict_layers: expected 0, as DeepSeek-V2 has no multi-token prediction, got 1",
        ),
        (
            json!({"norm_topk_prob": true, "routed_scaling_factor": 16}),
            "routed_scaling_factor: expected 1 with softmax scores and norm_topk_prob, got 16",
        ),
        (
            json!({"norm_topk_prob": true, "num_experts_per_tok": 1}),
            "norm_topk_prob: expected false where num_experts_per_tok is 1: one weight is left as it is, got true",
        ),
    ];
    for (changes, message) in cases {
        assert_eq!(error_text_of_v2(changes.clone()), message, "{changes}");
    }
}

#[test]
fn gates_have_a_bias_in_the_family_of_deepseek_v3_alone() {
    let read = |name: &str| read(&fixture(name)).unwrap();
    let (v2, kimi) = (read("v2_grouped/config.json"), read("kimi_k2/config.json"));
    assert_eq!((v2.topk_method, v2.has_gate_bias()), (TopkMethod::GroupLimitedGreedy, false));
    assert_eq!((kimi.topk_method, kimi.has_gate_bias()), (TopkMethod::NoauxTc, true));
    let has_bias =
        |config: &ModelConfig| config.weights().iter().any(|w| w.name.ends_with("correction_bias"));
    assert_eq!((has_bias(&v2), has_bias(&kimi)), (false, true));
}

#[test]
fn the_largest_model_counts_within_64_bits() {
    let largest = json!({
        "vocab_size": TABLE_ROWS.end(), "hidden_size": WIDTH.end(), "intermediate_size": WIDTH.end(),
        "moe_intermediate_size": WIDTH.end(), "num_hidden_layers": LAYERS.end(), "first_k_dense_replace": 0,
        "num_attention_heads": HEAD_WIDTH.end(), "num_key_value_heads": HEAD_WIDTH.end(),
        "q_lora_rank": WIDTH.end(), "kv_lora_rank": WIDTH.end(), "qk_nope_head_dim": HEAD_WIDTH.end(),
        "qk_rope_head_dim": HEAD_WIDTH.end(), "v_head_dim": HEAD_WIDTH.end(),
        "n_shared_experts": EXPERTS.end(), "n_routed_experts": EXPERTS_OF_ALL_LAYERS / LAYERS.end(),
        "num_experts_per_tok": EXPERTS_OF_ALL_LAYERS / LAYERS.end(), "n_group": 1, "topk_group": 1,
    });
    let mut file: Value = serde_json::from_str(&write(&builtin::model("tiny").unwrap())).unwrap();
    file.as_object_mut().unwrap().extend(largest.as_object().unwrap().clone());
    let config = read(&file.to_string()).unwrap();
    // Arithmetic is checked for overflow in tests.
    let parameters = crate::cost::parameters(&config);
    assert!(parameters.total > 1 << 56 && 12 * u128::from(parameters.total) < 1 << 64);
    assert!(crate::cost::training_flops_per_token(&config, 1 << 20) > 1 << 56);
}

proptest! {
    #[test]
    fn no_mutation_makes_it_panic(key in any::<prop::sample::Index>(), value in any_json()) {
        let mut file: Value = serde_json::from_str(&write(&builtin::model("deepseek-v3").unwrap())).unwrap();
        let file = file.as_object_mut().unwrap();
        let name = key.get(&file.keys().cloned().collect::<Vec<_>>()).clone();
        file.insert(name, value);
        if let Ok(config) = read(&Value::Object(file.clone()).to_string()) {
            prop_assert_eq!(read(&write(&config)).unwrap(), config);
        }
    }
}

/// Numbers whose decimal form is short enough for `serde_json` to read back exactly; with 17 digits it may miss
/// the last bit.
fn eighths() -> impl Strategy<Value = f64> {
    (-40i32..4000).prop_map(|count| f64::from(count) / 8.0)
}

fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        Just(json!(i64::MIN)),
        (-2i64..600).prop_map(Value::from),
        eighths().prop_map(Value::from),
        "[a-z]{0,8}".prop_map(Value::from),
        Just(json!([1])),
        Just(json!({"type": "yarn", "factor": "x"})),
        eighths().prop_map(
            |factor| json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": 7})
        ),
    ]
}

#[test]
fn keys_that_change_nothing_are_named() {
    let text = crate::model_config::builtin::model("tiny").unwrap().to_hf_json();
    assert_eq!(ModelConfig::ignored_keys(&text), [""; 0]);
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["my_new_knob"] = 3.into();
    config["aux_loss_alpha"] = 0.001.into();
    config["rope_parameters"] = Value::Null;
    config["transformers_version"] = "5.0".into();
    let expected = ["aux_loss_alpha (the recipe's balance.sequence_alpha counts)", "my_new_knob"];
    assert_eq!(ModelConfig::ignored_keys(&config.to_string()), expected);
    assert_eq!(ModelConfig::ignored_keys("no file"), [""; 0]);
}
