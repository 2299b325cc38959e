//! From a recipe to what a run reads: its tokenizer and its sequences.

use std::path::PathBuf;

use contraflow_runtime::files::objects::{ObjectError, ObjectFault, fetch_all, fetched_name, forget};
use contraflow_runtime::recipe::{Recipe, TokenizerSection};

use super::Tokenizer;
use super::batches::Datasets;
use super::documents::DocumentEncoder;
use super::fault::DataFault;
pub use super::fault::TextFaults;
use super::load::{DataRequest, Loaded, load};
use super::tokenizer_choice::choose;

/// What a run reads, by name; the sequences themselves are with the ranks.
#[derive(Clone)]
pub struct Text {
    /// The data.
    pub corpus: CorpusName,
    /// How it became tokens.
    pub tokenizer: Tokenizer,
    /// The recipe's section that names this tokenizer, where it was found without.
    pub tokenizer_section: TokenizerSection,
    /// What is said of the choice of the tokenizer.
    pub notes: Vec<String>,
}

/// What is said of the data.
#[derive(Clone)]
pub struct CorpusName {
    /// `rust-crates`, `files` and so on.
    pub name: String,
    /// blake3 of what a loss depends on.
    pub hash: String,
    /// What the user should know, in sentences.
    pub warnings: Vec<String>,
}

/// Loads the tokenizer and the sequences of a recipe.
///
/// **Errors**: every fault of the tokenizer, or of the data, at once: a file that cannot be read or is of the wrong kind, ids
/// that the model has no row for, too little text.
pub fn load_text(recipe: &Recipe) -> Result<(Text, Datasets), TextFaults> {
    let named = |texts: Vec<String>| texts.iter().map(|text| fetched_name(text)).collect();
    let loaded = fetched(recipe).and_then(|local| {
        let chosen = choose(&local)?;
        let (corpus, datasets) = load_data(&local, &chosen.tokenizer)?;
        Ok((chosen, corpus, datasets))
    });
    let (chosen, corpus, datasets) =
        loaded.map_err(|faults| TextFaults { faults: named(faults.faults), ..faults })?;
    let section = TokenizerSection { path: fetched_name(&chosen.section.path), ..chosen.section };
    let corpus = CorpusName { warnings: named(corpus.warnings), ..corpus };
    let notes = named(chosen.notes);
    Ok((Text { corpus, tokenizer: chosen.tokenizer, tokenizer_section: section, notes }, datasets))
}

/// The same recipe with local paths for what it reads of object stores, as it is there now: a process that runs for months has
/// fetched it for other jobs before.
///
/// **Errors**: as [`load_text`], of what is fetched.
pub fn fetched_anew(recipe: &Recipe) -> Result<Recipe, TextFaults> {
    let single = [&recipe.tokenizer.path, &recipe.model.init];
    let all = recipe.data.paths.iter().chain(&recipe.data.validation).chain(single);
    all.for_each(|text| forget(text));
    fetched(recipe)
}

/// The same recipe with local paths for what it reads of object stores.
fn fetched(recipe: &Recipe) -> Result<Recipe, TextFaults> {
    let mut local = recipe.clone();
    let fetch = |key: &'static str, texts: &mut [String]| {
        let faults = |found: Vec<ObjectError>| TextFaults {
            is_of_node: found.iter().all(|fault| fault.kind == ObjectFault::Failed),
            ..TextFaults::of(key, &found)
        };
        let paths = fetch_all(texts).map_err(faults)?;
        texts.iter_mut().zip(paths).for_each(|(text, path)| *text = path.to_string_lossy().into_owned());
        Ok(())
    };
    fetch("data.paths", &mut local.data.paths)?;
    fetch("data.validation", &mut local.data.validation)?;
    fetch("tokenizer.path", std::slice::from_mut(&mut local.tokenizer.path))?;
    fetch("model.init", std::slice::from_mut(&mut local.model.init))?;
    Ok(local)
}

fn load_data(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<(CorpusName, Datasets), TextFaults> {
    let data = &recipe.data;
    let encoder = DocumentEncoder::with_fim(tokenizer.clone(), data.fim_rate).map_err(|fault| {
        let reported = fault.to_string();
        TextFaults::of("data.fim_rate", &[reported.strip_prefix("data.fim_rate: ").unwrap_or(&reported)])
    })?;
    let as_paths = |paths: &[String]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
    let (paths, validation) = (as_paths(&data.paths), as_paths(&data.validation));
    let length = recipe.training.sequence_length;
    let wanted = DataRequest {
        paths: &paths,
        weights: &data.weights,
        field: &data.field,
        validation: &validation,
        validation_share: data.validation_share,
        encoder: &encoder,
        sequence_length: length,
    };
    let loaded = load(wanted).map_err(|found| {
        let is_of_node = found.iter().all(|fault| matches!(fault, DataFault::Unreadable { .. }));
        let key =
            if data.paths.is_empty() && !validation.is_empty() { "data.validation" } else { "data.paths" };
        TextFaults { is_of_node, ..TextFaults::of(key, &found) }
    })?;
    let Loaded { name, hash, train, validation, warnings } = loaded;
    if let Some(number) = train.sources().iter().position(|(sequences, _)| *sequences == 0) {
        let source = if data.weights.is_empty() { "" } else { data.paths[number].as_str() };
        let of = if source.is_empty() { String::new() } else { format!(" of {source}") };
        let got = train.num_tokens();
        let got = if source.is_empty() { format!("{got} tokens") } else { "less".to_owned() };
        let fault = format!("expected text for at least one sequence of {length} tokens{of}, got {got}");
        return Err(TextFaults::of("data.paths", &[fault]));
    }
    Ok((CorpusName { name, hash, warnings }, Datasets { train, validation }))
}
