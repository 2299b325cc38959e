//! Which tokenizer a recipe trains with: the one that it names, that of its prepared folders, that of the weights it starts
//! from, or bytes.
//!
//! Ids of one tokenizer mean nothing to a model of another: what differs is refused or said.

use std::path::{Path, PathBuf};

use contraflow_runtime::files;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::{Recipe, TokenizerSection};

use super::fault::TextFaults;
use super::hf_tokenizer::{EndOfDocument, EndToken};
use super::model_tokenizer::{ModelTokenizer, tokenizer_files};
use super::shards::ShardIndex;
use super::tokenizer::{self, Tokenizer, TokenizerFault};

const KEY: &str = "tokenizer.path";

/// A tokenizer, and why it is the one.
pub(super) struct Chosen {
    pub(super) tokenizer: Tokenizer,
    /// What a recipe says that names it.
    pub(super) section: TokenizerSection,
    pub(super) notes: Vec<String>,
}

/// Chooses the tokenizer of a recipe.
///
/// **Errors**: it cannot be read, or is too large for the model; the weights have one that is not read; a prepared folder has
/// another one than it was prepared with.
pub(super) fn choose(recipe: &Recipe) -> Result<Chosen, TextFaults> {
    let mut chosen = match recipe.tokenizer.path.is_empty() {
        false => named(&recipe.tokenizer)?,
        true => match prepared_folder(recipe) {
            Some(dir) => of_prepared(recipe, &dir)?,
            None => of_weights(recipe)?,
        },
    };
    let fits = chosen.tokenizer.check_fits(recipe.model_config.vocab_size);
    fits.map_err(|fault| TextFaults::of(KEY, &[fault]))?;
    chosen.notes.extend(difference(recipe, &chosen.tokenizer));
    Ok(chosen)
}

/// What is said where the weights have another tokenizer.
fn difference(recipe: &Recipe, tokenizer: &Tokenizer) -> Option<String> {
    let dir = recipe.model.init_dir()?;
    // What cannot be read of the weights is reported where they are.
    let of_weights = ModelTokenizer::read(dir, &own_config(dir).ok()?, None).ok()?.tokenizer;
    (of_weights.hash() != tokenizer.hash()).then(|| {
        let dir = dir.display();
        format!("the tokenizer, or its end of a document, is not that of the weights in {dir}: they stand for other tokens")
    })
}

fn named(section: &TokenizerSection) -> Result<Chosen, TextFaults> {
    let end = EndOfDocument::named(&section.end_of_document, "tokenizer.end_of_document");
    let tokenizer = load(Path::new(&section.path), &end)?;
    Ok(Chosen { tokenizer, section: section.clone(), notes: Vec::new() })
}

fn load(path: &Path, end: &EndOfDocument) -> Result<Tokenizer, TextFaults> {
    Tokenizer::load(path, end).map_err(|fault| TextFaults::of(KEY, &[fault]))
}

/// The section that names a tokenizer.
fn section(path: &Path, tokenizer: &Tokenizer) -> TokenizerSection {
    // What is written into a recipe has to be found from any folder.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    TokenizerSection { path: path.to_string_lossy().into_owned(), end_of_document: tokenizer.end_name() }
}

fn bytes(recipe: &Recipe) -> Chosen {
    Chosen { tokenizer: Tokenizer::Bytes, section: recipe.tokenizer.clone(), notes: Vec::new() }
}

/// The first prepared folder of a recipe. Whether the others are of the same tokenizer is found where they are read.
fn prepared_folder(recipe: &Recipe) -> Option<PathBuf> {
    let paths = recipe.data.paths.iter().chain(&recipe.data.validation).map(PathBuf::from);
    paths.into_iter().find(|path| ShardIndex::is_in(path))
}

fn of_prepared(recipe: &Recipe, dir: &Path) -> Result<Chosen, TextFaults> {
    let index = ShardIndex::read(dir).map_err(|fault| TextFaults::of("data.paths", &[fault]))?;
    if index.tokenizer == Tokenizer::Bytes.hash() {
        return Ok(bytes(recipe));
    }
    let path = dir.join(tokenizer::FILE);
    let refused = |expected: String, got: String| {
        let fault = TokenizerFault { file: path.display().to_string(), expected, got };
        TextFaults::of(KEY, &[fault])
    };
    if files::metadata(&path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        let expected = format!("the tokenizer that prepared {}; tokenizer.path names it", dir.display());
        return Err(refused(expected, "none in the folder".into()));
    }
    let candidates = vec![EndToken::Id(index.end_of_document)];
    let tokenizer = load(&path, &EndOfDocument { candidates, named_by: "index.json".into() })?;
    if tokenizer.hash() != index.tokenizer {
        return Err(refused(format!("the tokenizer that prepared {}", dir.display()), "another one".into()));
    }
    let notes = vec![format!("the tokenizer is that of the prepared data, {}", path.display())];
    Ok(Chosen { section: section(&path, &tokenizer), tokenizer, notes })
}

/// The tokenizer of the model that training starts from; bytes, if it has none.
fn of_weights(recipe: &Recipe) -> Result<Chosen, TextFaults> {
    let Some(dir) = recipe.model.init_dir() else { return Ok(bytes(recipe)) };
    // A folder that cannot be listed is a fault of its weights.
    let files = tokenizer_files(dir).unwrap_or_default();
    if files.is_empty() {
        return Ok(bytes(recipe));
    }
    let path = dir.join(tokenizer::FILE);
    if !files.iter().any(|file| file == tokenizer::FILE) {
        let dir = dir.display();
        let fault =
            format!("expected the tokenizer.json of {dir}, which has {}, got none: bytes", files.join(", "));
        return Err(TextFaults::of(KEY, &[fault]));
    }
    let tokenizer = match recipe.tokenizer.end_of_document.as_str() {
        "" => {
            let read = ModelTokenizer::read(dir, &own_config(dir)?, None);
            read.map_err(|fault| TextFaults::of(KEY, &[fault]))?.tokenizer
        }
        name => load(&path, &EndOfDocument::named(name, "tokenizer.end_of_document"))?,
    };
    let notes = vec![format!("the tokenizer is that of the weights, {}", path.display())];
    Ok(Chosen { section: section(&path, &tokenizer), tokenizer, notes })
}

/// What a directory says of its model.
fn own_config(dir: &Path) -> Result<ModelConfig, TextFaults> {
    let path = dir.join("config.json");
    let fault = |got: String| TextFaults::of("model.init", &[format!("{}: {got}", path.display())]);
    let text = files::read_to_string(&path).map_err(|error| fault(error.to_string()))?;
    ModelConfig::from_hf_json(&text).map_err(|faults| fault(faults.to_string()))
}
