//! The corpus: the documents of a run, already split into training and validation.
//!
//! First room of the data walk. Three sources: the listed crates on this machine (the default), the project's
//! own sources inside the binary (where the crates are missing), files that the user names. It knows no
//! tokens.

use super::crates::{Manifest, Search};
use super::{DataFault, embedded, files};
use std::path::PathBuf;

/// One text: a source file, a page. Nothing is attended or predicted across its end but by way of the
/// end-of-document token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it came from, for messages only: `NAME-VERSION/src/lib.rs`, or a path.
    pub name: String,
    /// Its bytes.
    pub text: Vec<u8>,
}

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
    /// What the user should know about this choice of text, in one sentence.
    pub warning: Option<String>,
}

impl Corpus {
    /// The files and folders of `--data`, or the default corpus where there are none.
    ///
    /// **Errors**: every fault of every path at once.
    pub fn load(paths: &[PathBuf]) -> Result<Self, Vec<DataFault>> {
        if paths.is_empty() { Ok(Self::load_default()) } else { Self::load_paths(paths) }
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
                warning: None,
            },
            Err(why) => Self {
                warning: Some(format!(
                    "the default corpus is not on this machine as listed ({why}): training on contraflow's own sources \
                     instead, a far smaller text; --data PATH trains on yours"
                )),
                ..Self::from_documents("own-sources", embedded::own_sources())
            },
        }
    }

    /// Text files, and folders read recursively in sorted order.
    ///
    /// In folders hidden entries, links to folders, empty files and what is not UTF-8 text are skipped, and a
    /// text that repeats an earlier one is dropped everywhere (it could stand on both sides of the split);
    /// the warning counts what was left out for not being text. **Errors**: every path that is missing,
    /// unreadable, empty, without text or, named itself, binary.
    pub fn load_paths(paths: &[PathBuf]) -> Result<Self, Vec<DataFault>> {
        let found = files::read(paths)?;
        let warning = (found.num_not_text > 0).then(|| {
            format!(
                "skipped in the folders of --data: binary files {}, hidden entries {}",
                found.num_not_text, found.num_hidden
            )
        });
        Ok(Self { warning, ..Self::from_documents("files", found.documents) })
    }

    /// All documents of files and folders, not split.
    ///
    /// **Errors**: as [`Corpus::load_paths`].
    pub fn read_whole(paths: &[PathBuf]) -> Result<Vec<Document>, Vec<DataFault>> {
        files::read(paths).map(|found| found.documents)
    }

    fn from_documents(name: &str, documents: Vec<Document>) -> Self {
        let (train, validation) = split(documents);
        Self { name: name.into(), hash: hash(&train, &validation), train, validation, warning: None }
    }
}

/// Below this many documents none of them stands for the rest, and each gives its own end to validation.
const DOCUMENTS_PER_VALIDATION: usize = 10;

/// Every tenth document to validation in the order of the blake3 of their bytes, which no name or path can
/// sway; of fewer than ten documents the last tenth of each. Both sides keep the given order.
fn split(documents: Vec<Document>) -> (Vec<Document>, Vec<Document>) {
    if documents.len() < DOCUMENTS_PER_VALIDATION {
        return documents.into_iter().map(cut_last_tenth).unzip();
    }
    let mut by_hash: Vec<usize> = (0..documents.len()).collect();
    by_hash.sort_by_key(|&i| *blake3::hash(&documents[i].text).as_bytes());
    let mut validates = vec![false; documents.len()];
    for &i in by_hash.iter().skip(DOCUMENTS_PER_VALIDATION - 1).step_by(DOCUMENTS_PER_VALIDATION) {
        validates[i] = true;
    }
    let (validation, train): (Vec<_>, Vec<_>) =
        documents.into_iter().zip(validates).partition(|(_, validates)| *validates);
    let without_mark = |side: Vec<(Document, bool)>| side.into_iter().map(|(document, _)| document).collect();
    (without_mark(train), without_mark(validation))
}

fn cut_last_tenth(document: Document) -> (Document, Document) {
    let Document { name, mut text } = document;
    let mut start = text.len() - text.len() / 10;
    // Not inside a UTF-8 character: its continuation bytes are 10xxxxxx.
    while text.get(start).is_some_and(|byte| byte & 0b1100_0000 == 0b1000_0000) {
        start -= 1;
    }
    let end = text.split_off(start);
    (Document { name: name.clone(), text }, Document { name, text: end })
}

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
    fn every_tenth_document_by_hash_validates_whatever_the_order() {
        let name = |document: &Document| document.name.parse::<u32>().unwrap();
        let (train, validation) = split(documents(57));
        assert_eq!((train.len(), validation.len()), (52, 5));
        assert!(train.windows(2).all(|pair| name(&pair[0]) < name(&pair[1])));
        let mut reversed = documents(57);
        reversed.reverse();
        let (_, mut again) = split(reversed);
        again.reverse();
        assert_eq!(again, validation);
    }

    #[test]
    fn few_documents_each_give_their_last_tenth() {
        let text = "0123456789".repeat(3).into_bytes();
        let (train, validation) = split(vec![Document { name: "a".into(), text }]);
        assert_eq!(train[0].text.len(), 27);
        assert_eq!(validation[0].text, b"789");
        // Nineteen bytes: the cut would fall between the two of the last character.
        let text = "0123456789abcdefgé".as_bytes().to_vec();
        let (train, validation) = split(vec![Document { name: "a".into(), text }]);
        assert_eq!(
            (train[0].text.as_slice(), validation[0].text.as_slice()),
            (&b"0123456789abcdefg"[..], "é".as_bytes())
        );
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
        let warning = corpus.warning.unwrap();
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
        let corpus = Corpus::load(&[folder.path().into()]).unwrap();
        assert_eq!((corpus.name.as_str(), corpus.train.len(), corpus.validation.len()), ("files", 1, 1));
        assert_eq!(
            corpus.warning.unwrap(),
            "skipped in the folders of --data: binary files 1, hidden entries 0"
        );
    }
}
