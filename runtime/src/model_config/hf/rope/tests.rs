//! The spellings of the rotary settings, against what transformers reads.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::model_config::{ModelConfig, Yarn, builtin};

/// A model of at most 512 positions whose file has these rotary keys and no others.
fn read(keys: &Value) -> Result<ModelConfig, String> {
    let mut file: Map<String, Value> =
        serde_json::from_str(&builtin::model("tiny").unwrap().to_hf_json()).unwrap();
    file.retain(|key, _| !key.starts_with("rope_"));
    file.insert("max_position_embeddings".into(), 512.into());
    file.extend(keys.as_object().unwrap().clone());
    ModelConfig::from_hf_json(&Value::Object(file).to_string()).map_err(|faults| faults.to_string())
}

/// One entry of the fixture: keys of a `config.json`, and `rope_parameters` as `AutoConfig` of transformers 5.24 has
/// them once the model's rotary embedding is built.
#[derive(Deserialize)]
struct Spelling {
    file: Value,
    read: Map<String, Value>,
}

fn yarn_of(read: &Map<String, Value>) -> Option<Yarn> {
    let number = |key: &str| read.get(key).and_then(Value::as_f64);
    (read["rope_type"] == "yarn").then(|| Yarn {
        factor: number("factor").unwrap(),
        beta_fast: number("beta_fast").unwrap_or(32.0),
        beta_slow: number("beta_slow").unwrap_or(1.0),
        mscale: number("mscale"),
        mscale_all_dim: number("mscale_all_dim"),
        original_max_position_embeddings: number("original_max_position_embeddings").unwrap() as usize,
    })
}

#[test]
fn every_spelling_is_read_as_transformers_reads_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/hf/spellings.json");
    let spellings: Vec<Spelling> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(spellings.len() > 40);
    for Spelling { file, read: expected } in spellings {
        let config = read(&file).unwrap_or_else(|faults| panic!("{file}: {faults}"));
        assert_eq!(Some(config.rope_theta), expected["rope_theta"].as_f64(), "{file}");
        assert_eq!(config.rope_scaling, yarn_of(&expected), "{file}");
        let again = ModelConfig::from_hf_json(&config.to_hf_json()).unwrap();
        assert_eq!(again, config, "{file}");
    }
}

/// What is said of a file with these rotary keys.
fn faults(keys: Value) -> String {
    read(&keys).err().unwrap_or_else(|| "nothing".to_owned())
}

#[test]
fn what_would_give_other_numbers_is_refused_by_its_key() {
    let only =
        |key: &str, value: &str| format!("{key}: expected {value}, the only form that is supported, got ");
    let yarn = |more: Value| {
        let mut keys = json!({"rope_type": "yarn", "factor": 4});
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"rope_scaling": keys})
    };
    let cases = [
        (json!({"rope_interleave": null}), only("rope_interleave", "true") + "null"),
        (json!({"partial_rotary_factor": 0.5}), only("partial_rotary_factor", "1") + "0.5"),
        (yarn(json!({"partial_rotary_factor": 0.5})), only("rope_scaling.partial_rotary_factor", "1") + "0.5"),
        (yarn(json!({"truncate": false})), only("rope_scaling.truncate", "true") + "false"),
        (yarn(json!({"truncate": null})), only("rope_scaling.truncate", "true") + "null"),
        (yarn(json!({"attention_factor": 1.5})), only("rope_scaling.attention_factor", "null") + "1.5"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 0}}),
            "rope_scaling.rope_theta: expected a number above 0, got 0\n\
             rope_scaling.type: expected \"yarn\" or \"default\", got \"linear\""
                .to_owned(),
        ),
        (
            json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": "x"}}),
            "rope_parameters.factor: expected a number above 0, got nothing\n\
             rope_parameters.rope_theta: expected a number above 0, got \"x\""
                .to_owned(),
        ),
        (
            yarn(json!({"factor": null, "original_max_position_embeddings": 0.5, "beta_fast": 0})),
            "rope_scaling.factor: expected a number above 0, got nothing\n\
             rope_scaling.beta_fast: expected a number above 0, got 0\n\
             rope_scaling.original_max_position_embeddings: expected a whole number from 1 to 1073741824, got 0.5"
                .to_owned(),
        ),
        (
            json!({"rope_scaling": {"factor": 4}}),
            "rope_scaling.factor: expected nothing without a rope_type, got 4".to_owned(),
        ),
        (
            json!({"rope_parameters": {"rope_type": "default", "factor": 4, "mscale": 1}}),
            "rope_parameters.factor: expected nothing with rope_type \"default\", got 4\n\
             rope_parameters.mscale: expected nothing with rope_type \"default\", got 1"
                .to_owned(),
        ),
        (json!({"rope_scaling": "yarn"}), "rope_scaling: expected an object, got \"yarn\"".to_owned()),
        (json!({"rope_theta": null}), "rope_theta: expected a number above 0, got null".to_owned()),
        (json!({"rope_theta": "700"}), "rope_theta: expected a number above 0, got \"700\"".to_owned()),
        (
            json!({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}}),
            "rope_theta: expected a number above 1 with YaRN, got 1".to_owned(),
        ),
    ];
    for (keys, message) in cases {
        let mut error_text: Vec<String> = faults(keys.clone()).lines().map(str::to_owned).collect();
        let mut expected: Vec<String> = message.lines().map(str::to_owned).collect();
        error_text.sort();
        expected.sort();
        assert_eq!(error_text, expected, "{keys}");
    }
}

#[test]
fn a_key_that_is_not_known_is_refused() {
    for keys in [
        json!({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fasst": 16}}),
        json!({"rope_parameters": {"rope_theta": 700, "beta_fasst": 16}}),
        json!({"rope_parameters": {"rope_type": "default", "beta_fasst": 16}}),
    ] {
        let error_text = faults(keys);
        let start = error_text.split_once(".beta_fasst: expected no key but factor, beta_fast, ");
        assert!(start.is_some_and(|(_, rest)| rest.ends_with(", got 16")), "{error_text}");
    }
    let nested = json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 700}}});
    assert!(faults(nested).starts_with("rope_parameters.full_attention: expected no key but "));
}

#[test]
fn statements_that_contradict_what_counts_are_refused() {
    let yarn =
        |theta: Option<u32>, factor: u32| json!({"type": "yarn", "factor": factor, "rope_theta": theta});
    let cases = [
        (
            json!({"rope_theta": 700, "rope_parameters": {"rope_theta": 5000}}),
            "rope_theta: expected 5000, as rope_parameters.rope_theta says, got 700",
        ),
        (
            json!({"rope_theta": 700, "rope_scaling": yarn(Some(5000), 4)}),
            "rope_theta: expected 5000, as rope_scaling.rope_theta says, got 700",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 700}, "rope_scaling": yarn(None, 4)}),
            "rope_parameters.rope_theta: expected 10000, the default, as rope_scaling counts and has none, got 700",
        ),
        (
            json!({"rope_theta": 900, "rope_parameters": {"rope_theta": 700}, "rope_scaling": yarn(None, 4)}),
            "rope_parameters.rope_theta: expected 900, as rope_theta says, got 700",
        ),
        (
            json!({"rope_theta": 900, "rope_parameters": {"rope_theta": 700}, "rope_scaling": yarn(Some(800), 4)}),
            "rope_theta: expected 800, as rope_scaling.rope_theta says, got 900\n\
             rope_parameters.rope_theta: expected 800, as rope_scaling.rope_theta says, got 700",
        ),
        (
            json!({"rope_parameters": yarn(None, 2), "rope_scaling": yarn(None, 4)}),
            "rope_parameters: expected the scaling of rope_scaling, which counts where both are given, got an object",
        ),
        (
            json!({"rope_parameters": yarn(None, 2), "rope_scaling": {"type": "default"}}),
            "rope_parameters: expected the scaling of rope_scaling, which counts where both are given, got an object",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "rope_type": "default", "factor": 4}}),
            "rope_scaling.type: expected \"default\", as rope_type says, got \"yarn\"",
        ),
        (
            json!({
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128},
            }),
            "rope_scaling.original_max_position_embeddings: expected 64, as original_max_position_embeddings beside \
             says, got 128",
        ),
    ];
    for (keys, message) in cases {
        assert_eq!(faults(keys.clone()), message, "{keys}");
    }
}
