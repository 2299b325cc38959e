//! Models that are built into the binary; the files stand in `recipes/models/`.

use super::ModelConfig;

/// Names and `config.json` texts of the built-in models.
const MODELS: [(&str, &str); 6] = [
    ("tiny", include_str!("../../../recipes/models/tiny.json")),
    ("small", include_str!("../../../recipes/models/small.json")),
    ("base", include_str!("../../../recipes/models/base.json")),
    ("deepseek-v3", include_str!("../../../recipes/models/deepseek-v3.json")),
    ("deepseek-v2-lite", include_str!("../../../recipes/models/deepseek-v2-lite.json")),
    ("moonlight", include_str!("../../../recipes/models/moonlight.json")),
];

/// Names of the built-in models.
pub fn model_names() -> Vec<&'static str> {
    MODELS.iter().map(|(name, _)| *name).collect()
}

/// The `config.json` of a built-in model, as a file to start from.
pub fn text(name: &str) -> Option<&'static str> {
    MODELS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// A built-in model.
pub fn model(name: &str) -> Option<ModelConfig> {
    Some(ModelConfig::from_hf_json(text(name)?).expect("built-in models are valid: a test reads them all"))
}
