//! Single keys of the model in recipes, and what is checked where the model is wrong.

use super::*;

fn tiny(overrides: &[&str]) -> Result<Recipe, Faults> {
    let overrides: Vec<String> = overrides.iter().map(|entry| entry.to_string()).collect();
    Recipe::load(&RecipeSource::Builtin("tiny".into()), &overrides)
}

/// The faults of the tiny recipe after some overrides, a line each.
fn faults(overrides: &[&str]) -> Vec<String> {
    let faults = tiny(overrides).err().unwrap_or_default();
    faults.list.iter().map(ToString::to_string).collect()
}

#[test]
fn keys_of_the_model_replace_those_of_its_file_and_load_back() {
    let plain = tiny(&[]).unwrap();
    let set = [
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.rope_scaling={type=\"yarn\", factor=4.0, original_max_position_embeddings=256, beta_fast=32, beta_slow=1}",
    ];
    let recipe = tiny(&set).unwrap();
    let model = &recipe.model_config;
    assert_eq!((model.hidden_size, model.num_attention_heads), (64, 2));
    assert_eq!(model.rope_scaling.as_ref().unwrap().factor, 4.0);
    assert_eq!(model.intermediate_size, plain.model_config.intermediate_size);
    let again = Recipe::from_toml(&recipe.resolved_toml(), "again", Path::new(""), &[]).unwrap();
    assert_eq!(again, recipe);
    // A run that resumes has its model at hand, whatever has become of the file.
    let reloaded = Recipe::reload(&recipe.resolved_toml(), "again", &[], model.clone()).unwrap();
    assert_eq!(reloaded, recipe);
    // So has a job: the recipe as it is submitted, and its model if that is no built-in one.
    let overrides: Vec<String> = set.iter().map(|entry| entry.to_string()).collect();
    let (text, sent) = Recipe::to_submit(&RecipeSource::Builtin("tiny".into()), &overrides).unwrap();
    assert_eq!(sent, "");
    assert_eq!(Recipe::submitted(&text, "job", &overrides, None).unwrap().model_config, *model);
}

#[test]
fn a_key_can_be_taken_out() {
    let q_lora_rank = |set: &[&str]| tiny(set).unwrap().model_config.q_lora_rank;
    assert!(q_lora_rank(&[]).is_some());
    assert_eq!(q_lora_rank(&["model.q_lora_rank=null"]), None);
}

#[test]
fn gates_without_a_bias_are_not_moved_and_whoever_asks_for_it_is_told() {
    let keys = [
        ("deepseek_v3", "deepseek_v2"),
        ("sigmoid", "softmax"),
        ("noaux_tc", "group_limited_greedy"),
        ("\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 1"),
        ("\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0"),
    ];
    let mut text = crate::model_config::builtin::text("tiny").unwrap().to_owned();
    for (of_v3, of_v2) in keys {
        assert!(text.contains(of_v3), "{of_v3}");
        text = text.replace(of_v3, of_v2);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v2.json");
    std::fs::write(&path, text).unwrap();
    let model = format!("model.config={}", path.display());
    let with = |more: &[&str]| tiny(&[&[model.as_str(), "mtp.weight=0"], more].concat());
    let faults = |more: &[&str]| with(more).unwrap_err().to_string();
    let message = "balance.bias_speed: expected 0, as gates of topk_method \"group_limited_greedy\" have no bias \
                   (balance.sequence_alpha balances them), got a speed above 0";
    // The built-in recipe has a speed of its own.
    assert_eq!(faults(&[]), message);
    let later = "balance.bias_speed=[{from_tokens=0, value=0}, {from_tokens=9, value=1}]";
    assert_eq!(faults(&[later]), message);
    assert_eq!(with(&["balance.bias_speed=0"]).unwrap().bias_speed_at(0), 0.0);
}

#[test]
fn faults_of_such_keys_are_called_by_their_path_and_hide_no_other() {
    let all = faults(&[
        "model.hidden_size=wide",
        "model.hiden_size=64",
        "model.attention_bias=true",
        "model.num_nextn_predict_layers=0",
        "mtp.weight=0.3",
        "training.sequence_length=1000000",
    ]);
    let expected = [
        "model.hiden_size: unknown key (--set); did you mean `model.hidden_size`?",
        "model.attention_bias: expected false, the only form that is supported, got true",
        "model.hidden_size: expected a whole number from 1 to 131072, got \"wide\"",
        "mtp.weight: expected 0, as the model has no multi-token prediction, got a weight above 0",
    ];
    for fault in expected {
        assert!(all.iter().any(|got| got == fault), "{fault}: {all:#?}");
    }
    assert!(
        all.iter().any(|fault| fault.starts_with("training.sequence_length: expected at most the model's"))
    );
    assert_eq!(all.len(), 5, "{all:#?}");
}

#[test]
fn a_relation_is_not_checked_with_a_key_that_is_wrong() {
    let all = faults(&["model.num_nextn_predict_layers=7", "mtp.weight=0.3"]);
    assert_eq!(all, ["model.num_nextn_predict_layers: expected a whole number from 0 to 1, got 7"]);
    let all = faults(&["model.config=nowhere.json", "mtp.weight=0.3", "training.sequence_length=1000000"]);
    assert!(all.len() == 1 && all[0].starts_with("model.config: expected a built-in model"), "{all:?}");
}
