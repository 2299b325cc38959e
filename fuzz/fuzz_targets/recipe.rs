//! A recipe: refused, or resolved to one that reads back as the same.
#![no_main]

use std::path::Path;

use contraflow_fuzz as _;
use contraflow_runtime::recipe::Recipe;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(recipe) = Recipe::from_toml(text, "fuzz", Path::new("/nowhere"), &[]) {
        let again = Recipe::from_toml(&recipe.resolved_toml(), "fuzz", Path::new("/nowhere"), &[]);
        assert!(again.is_ok_and(|again| again == recipe));
    }
});
