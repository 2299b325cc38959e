//! What a run's checkpoints say of where they come from: recipe, model, data, layout, program and machine.

use contraflow_kernels::isa::instruction_set;
use contraflow_runtime::checkpoint::manifest::FORMAT_VERSION;
use contraflow_runtime::checkpoint::{Companions, Layout, MadeBy, Manifest, Position};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::Generation;

use crate::data::Tokenizer;

/// What a checkpoint of this process says about its origin.
pub fn made_by(recipe: &Recipe) -> MadeBy {
    let digest = || -> std::io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(std::env::current_exe()?)?)?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    // Without its own file a program can still train; it only cannot say whether another one is the same.
    let digest = digest().unwrap_or_else(|error| format!("unknown: {error}"));
    MadeBy {
        layout: Layout::of(recipe),
        binary: format!("{} {digest}", env!("CARGO_PKG_VERSION")),
        instruction_set: instruction_set(),
    }
}

/// Files of a checkpoint beside the manifest, so that it can be read like a model.
pub fn companions(recipe: &Recipe, tokenizer: &Tokenizer) -> Companions {
    let config = recipe.model_config.to_hf_json().into_bytes();
    [("config.json", config)].into_iter().chain(tokenizer.files()).collect()
}

/// What all manifests of a run have in common.
///
/// **Errors**: never, in truth: the model's configuration is JSON of our own.
pub fn manifest(recipe: &Recipe, corpus_hash: &str) -> Result<Manifest, serde_json::Error> {
    let model = serde_json::from_str(&recipe.model_config.to_hf_json())?;
    Ok(Manifest {
        format_version: FORMAT_VERSION,
        generation: Generation::default(),
        position: Position::default(),
        watch: Default::default(),
        recipe: recipe.resolved_toml(),
        model,
        corpus_hash: corpus_hash.to_owned(),
        made_by: made_by(recipe),
        shards: Vec::new(),
        companions: Vec::new(),
    })
}
