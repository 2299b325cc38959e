//! Recipes and models that are built into the binary; the files stand in `recipes/`.

use crate::model_config::ModelConfig;

/// Names and texts of the built-in recipes; the first is the default.
const RECIPES: [(&str, &str); 3] = [
    ("tiny", include_str!("../../../recipes/tiny.toml")),
    ("small", include_str!("../../../recipes/small.toml")),
    ("base", include_str!("../../../recipes/base.toml")),
];

/// Names and `config.json` texts of the built-in models.
const MODELS: [(&str, &str); 4] = [
    ("tiny", include_str!("../../../recipes/models/tiny.json")),
    ("small", include_str!("../../../recipes/models/small.json")),
    ("base", include_str!("../../../recipes/models/base.json")),
    ("deepseek-v3", include_str!("../../../recipes/models/deepseek-v3.json")),
];

/// Names of the built-in recipes, the default one first.
pub fn recipe_names() -> Vec<&'static str> {
    RECIPES.iter().map(|(name, _)| *name).collect()
}

/// The text of a built-in recipe.
pub fn recipe(name: &str) -> Option<&'static str> {
    RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// What a built-in recipe is, in the words of its first comment.
pub fn recipe_summary(name: &str) -> Option<&'static str> {
    recipe(name)?.lines().next()?.strip_prefix("# ")
}

/// Names of the built-in models.
pub fn model_names() -> Vec<&'static str> {
    MODELS.iter().map(|(name, _)| *name).collect()
}

/// A built-in model.
pub fn model(name: &str) -> Option<ModelConfig> {
    let text = MODELS.iter().find(|(known, _)| *known == name)?.1;
    Some(ModelConfig::from_hf_json(text).expect("built-in models are valid: a test reads them all"))
}
