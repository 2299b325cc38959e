//! Recipes that are built into the binary; the files stand in `recipes/`.

/// Names and texts of the built-in recipes; the first is the default.
const RECIPES: [(&str, &str); 4] = [
    ("tiny", include_str!("../../../recipes/tiny.toml")),
    ("small", include_str!("../../../recipes/small.toml")),
    ("base", include_str!("../../../recipes/base.toml")),
    ("deepseek-v3", include_str!("../../../recipes/deepseek-v3.toml")),
];

/// Names of the built-in recipes, the default one first.
pub fn recipe_names() -> Vec<&'static str> {
    RECIPES.iter().map(|(name, _)| *name).collect()
}

/// The text of a built-in recipe.
pub fn recipe(name: &str) -> Option<&'static str> {
    RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// Description of a built-in recipe: its first comment.
pub fn recipe_summary(name: &str) -> Option<&'static str> {
    recipe(name)?.lines().next()?.strip_prefix("# ")
}
