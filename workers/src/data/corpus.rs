//! The corpus: the documents of a run, already split into training and validation.
//!
//! First room of the data walk. Three sources: the listed crates on this machine (the default), the project's
//! own sources inside the binary (where the crates are missing), files that the user names. It knows no
//! tokens.

use super::crates::{Manifest, Search};
use super::files::Skipped;
use super::split::split;
use super::{DataFault, embedded, files};
use std::path::PathBuf;

pub use super::text::Document;

/// Share of a text that is held back where nobody says another.
pub const VALIDATION_SHARE: f64 = 0.1;

/// The documents of a run.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// `rust-crates`, `own-sources` or `files`.
    pub name: String,
    /// blake3 of what a loss depends on: the documents' bytes, their order and their split, as 64 hex digits.
    pub hash: String,
    /// What the model learns from, in order.
    pub train: Vec<Document>,
    /// What it is measured on.
    pub validation: Vec<Document>,
    /// What the user should know about this choice of text, in sentences.
    pub warnings: Vec<String>,
}

impl Corpus {
    /// The files and folders of `--data`, with the text in this field of rows, or the default corpus where there are none. The
    /// share is held back, but for that of the listed crates, which is listed.
    ///
    /// **Errors**: every fault of every path at once.
    pub fn load(paths: &[PathBuf], field: &str, validation_share: f64) -> Result<Self, Vec<DataFault>> {
        if paths.is_empty() {
            return Ok(Self::load_default());
        }
        Self::load_paths(paths, field, validation_share)
    }

    /// The listed crates where all of them are on this machine as listed, otherwise the embedded sources and
    /// a warning.
    pub fn load_default() -> Self {
        Self::load_listed(embedded::MANIFEST, &Search::from_environment())
    }

    fn load_listed(manifest: &str, search: &Search) -> Self {
        match Manifest::parse(manifest).and_then(|manifest| manifest.read(search)) {
            Ok(read) => Self {
                name: "rust-crates".into(),
                hash: read.hash,
                train: read.train,
                validation: read.validation,
                warnings: Vec::new(),
            },
            Err(why) => Self {
                warnings: vec![format!(
                    "the default corpus is not on this machine as listed ({why}): training on contraflow's own sources \
                     instead, a far smaller text; --data PATH trains on yours"
                )],
                ..Self::from_documents("own-sources", embedded::own_sources(), VALIDATION_SHARE)
            },
        }
    }

    /// Text files, and folders read recursively in sorted order.
    ///
    /// In folders hidden entries, links to folders, empty files and what is not UTF-8 text are skipped; the warnings count what
    /// was left out for not being text. **Errors**: every path that is missing, unreadable, empty, without text or, named
    /// itself, binary.
    fn load_paths(paths: &[PathBuf], field: &str, validation_share: f64) -> Result<Self, Vec<DataFault>> {
        let found = files::read(paths, field)?;
        let warnings = found.skipped.warnings();
        Ok(Self { warnings, ..Self::from_documents("files", found.documents, validation_share) })
    }

    /// All documents of files and folders, not split, and what in the folders was not read.
    ///
    /// **Errors**: as [`Corpus::load`].
    pub fn read_whole(paths: &[PathBuf], field: &str) -> Result<(Vec<Document>, Skipped), Vec<DataFault>> {
        files::read(paths, field).map(|found| (found.documents, found.skipped))
    }

    fn from_documents(name: &str, documents: Vec<Document>, validation_share: f64) -> Self {
        let (train, validation) = split(documents, validation_share);
        Self { name: name.into(), hash: hash(&train, &validation), train, validation, warnings: Vec::new() }
    }
}

/// Every document with its length, so that no other split has the same bytes.
fn hash(train: &[Document], validation: &[Document]) -> String {
    let mut hasher = blake3::Hasher::new();
    for side in [train, validation] {
        hasher.update(&(side.len() as u64).to_le_bytes());
        for document in side {
            hasher.update(&(document.text.len() as u64).to_le_bytes());
            hasher.update(&document.text);
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(num: usize) -> Vec<Document> {
        let text = |i: usize| format!("text number {i}").into_bytes();
        (0..num).map(|i| Document { name: format!("{i}"), text: text(i) }).collect()
    }

    #[test]
    fn the_hash_covers_bytes_order_and_split_but_not_names() {
        let mut one = documents(3);
        let reference = hash(&one[..2], &one[2..]);
        one[0].name = "renamed".into();
        assert_eq!(hash(&one[..2], &one[2..]), reference);
        assert_ne!(hash(&one[..1], &one[1..]), reference);
        one.swap(0, 1);
        assert_ne!(hash(&one[..2], &one[2..]), reference);
        one.swap(0, 1);
        one[2].text[0] ^= 1;
        assert_ne!(hash(&one[..2], &one[2..]), reference);
    }

    #[test]
    fn without_the_crates_the_own_sources_stand_in_with_one_warning() {
        let nowhere = tempfile::tempdir().unwrap();
        let corpus = Corpus::load_listed(embedded::MANIFEST, &Search::new(vec![], nowhere.path().into()));
        assert_eq!(corpus.name, "own-sources");
        assert_eq!(corpus.hash, hash(&corpus.train, &corpus.validation));
        let warning = &corpus.warnings[0];
        assert!(warning.contains("in no cargo registry") && warning.contains("--data PATH"), "{warning}");
        let all = || corpus.train.iter().chain(&corpus.validation);
        assert!(all().any(|document| document.name.ends_with("src/data/corpus.rs")));
        assert!(!corpus.validation.is_empty() && corpus.train.len() > corpus.validation.len());
    }

    #[test]
    fn the_files_of_data_replace_the_default() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.txt"), "first text, long enough").unwrap();
        std::fs::write(folder.path().join("b.bin"), b"\0\x01").unwrap();
        let corpus = Corpus::load(&[folder.path().into()], "text", 0.1).unwrap();
        assert_eq!((corpus.name.as_str(), corpus.train.len(), corpus.validation.len()), ("files", 1, 1));
        assert_eq!(corpus.warnings, ["skipped in the folders of --data: binary files 1, hidden entries 0"]);
    }
}
