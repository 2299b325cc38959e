//! From a recipe to what a run reads: its tokenizer and its sequences.

use std::fmt;
use std::path::{Path, PathBuf};

use contraflow_runtime::recipe::Recipe;

use super::Tokenizer;
use super::batches::Datasets;
use super::documents::DocumentEncoder;
use super::files::DataFault;
use super::hf_tokenizer::EndOfDocument;
use super::load::{DataRequest, Loaded, load};
use super::model_tokenizer::tokenizer_files;

/// What a run reads, by name; the sequences themselves are with the ranks.
#[derive(Clone)]
pub struct Text {
    /// The data.
    pub corpus: CorpusName,
    /// How it became tokens.
    pub tokenizer: Tokenizer,
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

/// Everything that is wrong with what one key of a recipe names.
#[derive(Debug, PartialEq, Eq)]
pub struct TextFaults {
    /// The key.
    pub key: &'static str,
    /// What was expected and what came.
    pub faults: Vec<String>,
    /// Whether the system cannot read what is there: that says nothing of the recipe.
    pub is_of_node: bool,
}

impl fmt::Display for TextFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.faults.join("; "))
    }
}

fn faults<T: fmt::Display>(key: &'static str, faults: &[T]) -> TextFaults {
    TextFaults { key, faults: faults.iter().map(T::to_string).collect(), is_of_node: false }
}

/// Loads the tokenizer and the sequences of a recipe.
///
/// **Errors**: every fault of the tokenizer, or of the data, at once: a file that cannot be read or is of the wrong kind, ids
/// that the model has no row for, too little text.
pub fn load_text(recipe: &Recipe) -> Result<(Text, Datasets), TextFaults> {
    let tokenizer = load_tokenizer(recipe)?;
    let (corpus, datasets) = load_data(recipe, &tokenizer)?;
    Ok((Text { corpus, tokenizer }, datasets))
}

fn load_tokenizer(recipe: &Recipe) -> Result<Tokenizer, TextFaults> {
    let section = &recipe.tokenizer;
    if section.path.is_empty() {
        return check_bytes(recipe).map(|()| Tokenizer::Bytes);
    }
    let refused = |fault| faults("tokenizer.path", &[fault]);
    let end = EndOfDocument::named(&section.end_of_document, "tokenizer.end_of_document");
    let tokenizer = Tokenizer::load(Path::new(&section.path), &end).map_err(refused)?;
    tokenizer.check_fits(recipe.model_config.vocab_size).map_err(refused)?;
    Ok(tokenizer)
}

/// Refuses bytes for a model that starts from weights of other tokens.
fn check_bytes(recipe: &Recipe) -> Result<(), TextFaults> {
    let Some(dir) = recipe.model.init_dir() else { return Ok(()) };
    // A folder that cannot be listed is a fault of its weights.
    let files = tokenizer_files(dir).unwrap_or_default();
    if files.is_empty() {
        return Ok(());
    }
    let dir = dir.display();
    let fault =
        format!("expected the tokenizer.json of {dir}, which has {}, got none: bytes", files.join(", "));
    Err(faults("tokenizer.path", &[fault]))
}

fn load_data(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<(CorpusName, Datasets), TextFaults> {
    let encoder = DocumentEncoder::with_fim(tokenizer.clone(), recipe.data.fim_rate).map_err(|fault| {
        let reported = fault.to_string();
        faults("data.fim_rate", &[reported.strip_prefix("data.fim_rate: ").unwrap_or(&reported)])
    })?;
    let paths: Vec<PathBuf> = recipe.data.paths.iter().map(PathBuf::from).collect();
    let length = recipe.training.sequence_length;
    let wanted = DataRequest {
        paths: &paths,
        weights: &recipe.data.weights,
        encoder: &encoder,
        sequence_length: length,
    };
    let loaded = load(wanted).map_err(|found| {
        let is_of_node = found.iter().all(|fault| matches!(fault, DataFault::Unreadable { .. }));
        TextFaults { is_of_node, ..faults("data.paths", &found) }
    })?;
    let Loaded { name, hash, train, validation, warnings } = loaded;
    if let Some(number) = train.sources().iter().position(|(sequences, _)| *sequences == 0) {
        let source = if recipe.data.weights.is_empty() { "" } else { recipe.data.paths[number].as_str() };
        let of = if source.is_empty() { String::new() } else { format!(" of {source}") };
        let got = train.num_tokens();
        let got = if source.is_empty() { format!("{got} tokens") } else { "less".to_owned() };
        let fault = format!("expected text for at least one sequence of {length} tokens{of}, got {got}");
        return Err(faults("data.paths", &[fault]));
    }
    Ok((CorpusName { name, hash, warnings }, Datasets { train, validation }))
}
