//! An HF `config.json`: refused, or a model whose tensors can be listed and whose own file reads back.
#![no_main]

use contraflow_fuzz as _;
use contraflow_runtime::model_config::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::from_hf_json(text) {
        assert!(!config.weights().is_empty());
        assert!(ModelConfig::from_hf_json(&config.to_hf_json()).is_ok_and(|again| again == config));
    }
});
