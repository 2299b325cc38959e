//! The tokenizer of a model's folder, and the tokens at which its texts end.
//!
//! Bytes are a guess that gives numbers for any model: they are used only if nothing in the folder contradicts it.
//! Knows files and the numbers of `config.json`, no weights.

use std::collections::BTreeSet;
use std::path::Path;

use contraflow_runtime::model_config::{ModelConfig, token_ids};
use contraflow_runtime::recipe::TokenizerSection;
use serde_json::{Map, Value};

use super::hf_tokenizer::{EndOfDocument, EndToken};
use super::tokenizer::{self, BYTE_TOKENS, END_OF_DOCUMENT, Tokenizer, TokenizerFault};

/// What a model's folder says about text.
#[derive(Clone, Debug)]
pub struct ModelTokenizer {
    /// How text becomes ids.
    pub tokenizer: Tokenizer,
    /// A continuation ends at any of these ids; the end of a document is one of them.
    pub ends: BTreeSet<u32>,
}

impl ModelTokenizer {
    /// Reads the tokenizer of a folder with a `config.json`; `run` is what the recipe of its run says, if it has one.
    ///
    /// The end of a document is, in this order, the `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`, what
    /// the run was given, the first known `eos_token_id` of `config.json` or `generation_config.json`, one of the usual names.
    ///
    /// **Errors**: a file that cannot be read or says something else than it should; a tokenizer in another form than
    /// tokenizer.json; none, where the model is not one of bytes; none of its tokens ends a document.
    pub fn read(
        dir: &Path,
        config: &ModelConfig,
        run: Option<&TokenizerSection>,
    ) -> Result<Self, TokenizerFault> {
        let configured = [config.eos_token_id.clone(), generation_ends(dir)?].concat();
        let configured: Vec<u32> = configured.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
        let files = tokenizer_files(dir)?;
        let tokenizer = if files.iter().any(|file| file == tokenizer::FILE) {
            let end = end_of_document(dir, &configured, run)?;
            Tokenizer::load(&dir.join(tokenizer::FILE), &end)?
        } else if files.is_empty() && is_of_bytes(config, run) {
            Tokenizer::Bytes
        } else {
            return Err(no_tokenizer(dir, config, &files));
        };
        let ends = configured.into_iter().chain([tokenizer.end_of_document()]).collect();
        Ok(ModelTokenizer { tokenizer, ends })
    }
}

/// Whether a file of this name belongs to a tokenizer, of whatever kind.
pub fn is_tokenizer_file(name: &str) -> bool {
    const BEGINNINGS: [&str; 5] = ["tokenizer", "tokenization", "tiktoken", "sentencepiece", "tekken"];
    const ENDINGS: [&str; 4] = [".model", ".tiktoken", ".spm", ".bpe"];
    const NAMES: [&str; 8] = [
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "encoder.json",
        "bpe.codes",
        "added_tokens.json",
        "special_tokens_map.json",
        "dict.txt",
    ];
    BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
        || NAMES.contains(&name)
}

/// Names of the tokenizer files of a folder, in order.
///
/// **Errors**: the folder cannot be listed.
pub fn tokenizer_files(dir: &Path) -> Result<Vec<String>, TokenizerFault> {
    let failed = |error: std::io::Error| TokenizerFault {
        file: dir.display().to_string(),
        expected: "a folder".into(),
        got: error.to_string(),
    };
    let mut names = Vec::new();
    for entry in contraflow_runtime::files::read_dir(dir).map_err(failed)? {
        names.extend(entry.file_name().into_string().ok());
    }
    names.retain(|name| is_tokenizer_file(name));
    names.sort();
    Ok(names)
}

/// A model has the rows of the byte tokenizer, or was trained with it.
fn is_of_bytes(config: &ModelConfig, run: Option<&TokenizerSection>) -> bool {
    let ends_as_bytes = config.eos_token_id.contains(&u64::from(END_OF_DOCUMENT));
    let is_told = run.is_some_and(|section| section.path.is_empty());
    config.vocab_size == BYTE_TOKENS || (config.vocab_size > BYTE_TOKENS && (ends_as_bytes || is_told))
}

fn no_tokenizer(dir: &Path, config: &ModelConfig, files: &[String]) -> TokenizerFault {
    let rows = config.vocab_size;
    TokenizerFault {
        file: dir.display().to_string(),
        expected: "a tokenizer.json (save_pretrained of a fast tokenizer in transformers writes one)".into(),
        got: match files {
            [] => {
                format!("none, and a vocabulary of {rows} tokens, which are not the {BYTE_TOKENS} of bytes")
            }
            files => files.join(", "),
        },
    }
}

fn end_of_document(
    dir: &Path,
    configured: &[u32],
    run: Option<&TokenizerSection>,
) -> Result<EndOfDocument, TokenizerFault> {
    let mut candidates = Vec::new();
    for file in [tokenizer::CONFIG_FILE, "special_tokens_map.json"] {
        candidates.extend(end_name(dir, file)?.map(EndToken::Name));
    }
    if let Some(section) = run.filter(|section| !section.path.is_empty()) {
        candidates.extend(EndOfDocument::named(&section.end_of_document, "").candidates);
    }
    candidates.extend(configured.iter().copied().map(EndToken::Id));
    candidates.push(EndToken::Usual);
    let named_by = format!("\"eos_token\" in {}", dir.join(tokenizer::CONFIG_FILE).display());
    Ok(EndOfDocument { candidates, named_by })
}

/// The `eos_token` of a file: a text, or an object with the text as its `content`.
fn end_name(dir: &Path, file: &str) -> Result<Option<String>, TokenizerFault> {
    let Some(json) = read_json(dir, file)? else { return Ok(None) };
    let token = json.get("eos_token").unwrap_or(&Value::Null);
    match token.as_str().or_else(|| token["content"].as_str()) {
        Some(name) => Ok(Some(name.to_owned())),
        None if token.is_null() => Ok(None),
        None => Err(TokenizerFault {
            file: format!("{}: eos_token", dir.join(file).display()),
            expected: "a text, or an object with a text as content".into(),
            got: token.to_string(),
        }),
    }
}

/// The `eos_token_id` of `generation_config.json`.
fn generation_ends(dir: &Path) -> Result<Vec<u64>, TokenizerFault> {
    const FILE: &str = "generation_config.json";
    let Some(json) = read_json(dir, FILE)? else { return Ok(Vec::new()) };
    let ids = json.get("eos_token_id").unwrap_or(&Value::Null);
    token_ids(ids).ok_or_else(|| TokenizerFault {
        file: format!("{}: eos_token_id", dir.join(FILE).display()),
        expected: "a token id or a list of them".into(),
        got: ids.to_string(),
    })
}

/// The object in a file of a folder; `None` if there is no such file.
fn read_json(dir: &Path, file: &str) -> Result<Option<Map<String, Value>>, TokenizerFault> {
    let path = dir.join(file);
    let fault = |expected: &str, got: String| TokenizerFault {
        file: path.display().to_string(),
        expected: expected.into(),
        got,
    };
    let text = match contraflow_runtime::files::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault("a file that can be read", error.to_string())),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| fault("a JSON object", error.to_string()))
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::model_config::builtin;

    use super::*;

    #[test]
    fn bytes_are_taken_for_models_of_bytes_alone() {
        let model = |vocab_size, ends: &[u64]| ModelConfig {
            vocab_size,
            eos_token_id: ends.to_vec(),
            ..builtin::model("tiny").unwrap()
        };
        let reported =
            |path: &str| TokenizerSection { path: path.to_owned(), end_of_document: String::new() };
        assert!(is_of_bytes(&model(257, &[]), None));
        assert!(is_of_bytes(&model(320, &[256]), None));
        assert!(is_of_bytes(&model(320, &[]), Some(&reported(""))));
        assert!(!is_of_bytes(&model(320, &[1]), None));
        assert!(!is_of_bytes(&model(320, &[1]), Some(&reported("tokenizer.json"))));
        assert!(!is_of_bytes(&model(256, &[256]), Some(&reported(""))));
    }

    #[test]
    fn a_name_beside_the_tokenizer_comes_first_and_a_guess_last() {
        let dir = tempfile::tempdir().unwrap();
        let name = |name: &str| EndToken::Name(name.to_owned());
        let reported =
            |end: &str| TokenizerSection { path: "tokenizer.json".into(), end_of_document: end.into() };
        let candidates = |run: Option<&TokenizerSection>| {
            end_of_document(dir.path(), &[3, 7], run)
                .map(|end| end.candidates)
                .map_err(|fault| fault.to_string())
        };
        let (ids, usual) = ([EndToken::Id(3), EndToken::Id(7)], [EndToken::Usual]);
        assert_eq!(candidates(None), Ok([&ids[..], &usual].concat()));
        // A run without a setting took one of the usual names.
        let of_run = [&usual, &ids[..], &usual].concat();
        assert_eq!(candidates(Some(&reported(""))), Ok(of_run));
        std::fs::write(dir.path().join("special_tokens_map.json"), r#"{"eos_token": {"content": "B"}}"#)
            .unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "A"}"#).unwrap();
        let all = [&[name("A"), name("B"), name("C")], &ids[..], &usual].concat();
        assert_eq!(candidates(Some(&reported("C"))), Ok(all));
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"["eos_token"]"#).unwrap();
        assert!(candidates(None).unwrap_err().contains("tokenizer_config.json: expected a JSON object"));
    }

    #[test]
    fn tokenizer_files_go_by_the_names_that_published_directories_have() {
        let files = [
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tokenizer_config.json",
            "tiktoken.model",
            "qwen.tiktoken",
            "spiece.model",
            "sentencepiece.bpe.model",
            "source.spm",
            "vocab.json",
            "merges.txt",
            "vocab.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "tekken.json",
            "tokenization_kimi.py",
        ];
        assert!(files.into_iter().all(is_tokenizer_file));
        let others = [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "contraflow.json",
            "manifest.json",
            "rank-00000.safetensors",
            "chat_template.jinja",
            "modeling_deepseek.py",
            "README.md",
            ".gitattributes",
        ];
        assert!(!others.into_iter().any(is_tokenizer_file));
    }
}
