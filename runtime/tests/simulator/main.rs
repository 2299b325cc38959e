//! The simulator against published figures of DeepSeek-V3's run, against bounds that no schedule can beat, and against itself.
#![allow(clippy::unwrap_used, missing_docs)]

mod documented;
mod neighbours;
mod orders;
mod pictures;
mod profiles;
mod properties;
mod published;
mod searched;

use contraflow_runtime::recipe::{Recipe, RecipeSource};

fn recipe(name: &str, changes: &[&str]) -> Recipe {
    let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
    Recipe::load(&RecipeSource::Builtin(name.into()), &changes).unwrap()
}
