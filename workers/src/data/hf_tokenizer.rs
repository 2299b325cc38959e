//! A tokenizer.json of Hugging Face's format, wrapped: what the data walk asks of it, and the training of one.
//!
//! Nothing outside of this file knows the library that reads the format.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::fault::DataFault;
use super::files;
use super::format::{PIECE_BYTES, Reading};
use super::text::Document;
use super::tokenizer::{FimTokens, TokenizerFault};

/// Names of the end of a document among published tokenizers, the first of which is taken: DeepSeek's, GPT-2's, Llama's
/// of three generations, Gemma's.
const END_NAMES: [&str; 6] = [
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
];

/// Names of the three tokens of filling in, by the published models that have them: before the prefix, before the suffix,
/// before the middle. The first that a tokenizer has whole are taken; those that are trained here have DeepSeek's.
const FIM_NAMES: [(&str, [&str; 3]); 3] = [
    (
        "DeepSeek",
        [
            "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
            "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
            "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
        ],
    ),
    ("Qwen", ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]),
    ("StarCoder", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]),
];

/// The names as a user reads them.
pub(super) fn fim_names() -> String {
    let words = FIM_NAMES.map(|(model, names)| format!("{} ({model})", names.join(" ")));
    words.join(", ")
}

/// Letters, marks, white space, accents, ideographs and an emoji: a tokenizer that has no way out for what it does not know
/// fails on one of them.
const PROBE: &str = "Az09 _-.,;:!?'\"()[]{}<>|/\\@#$%^&*+=~`\t\r\n\u{0}\u{7f}\u{e9}\u{df}\u{3b1}\u{416}\u{5d0}\u{4e2d}\u{1f600}";

/// A statement about the token that ends a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndToken {
    /// Its name.
    Name(String),
    /// Its id.
    Id(u32),
    /// It has one of the names that published tokenizers have for it.
    Usual,
}

impl EndToken {
    /// Its id, if the tokenizer has such a token.
    fn id(&self, tokenizer: &Inner) -> Option<u32> {
        match self {
            Self::Name(name) => tokenizer.token_to_id(name),
            Self::Id(id) => tokenizer.id_to_token(*id).map(|_| *id),
            Self::Usual => END_NAMES.iter().find_map(|name| tokenizer.token_to_id(name)),
        }
    }
}

impl fmt::Display for EndToken {
    /// As it stands after "none".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "called {name}"),
            Self::Id(id) => write!(f, "of id {id}"),
            Self::Usual => write!(f, "called {}", END_NAMES.join(" or ")),
        }
    }
}

/// How the token that ends a document is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndOfDocument {
    /// The first that the tokenizer has is taken.
    pub candidates: Vec<EndToken>,
    /// Where the user can name it, for the message that none was found.
    pub named_by: String,
}

impl EndOfDocument {
    /// The token of this name; if that is empty, one of the usual names.
    pub fn named(name: &str, named_by: &str) -> Self {
        let token = if name.is_empty() { EndToken::Usual } else { EndToken::Name(name.to_owned()) };
        Self { candidates: vec![token], named_by: named_by.to_owned() }
    }
}

/// A tokenizer.json that was read.
#[derive(Debug)]
pub struct HfTokenizer {
    inner: Inner,
    json: Vec<u8>,
    end_of_document: u32,
    id_limit: usize,
    /// Whether the letters of its tokens stand for bytes.
    is_byte_level: bool,
}

/// Reads a tokenizer.json. The library panics on some texts that are none: JSON that is broken is found before it, what
/// it falls over all the same is caught.
///
/// **Errors**: a message.
fn read(json: &[u8]) -> Result<Inner, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|error| error.to_string())?;
    let read = catch_unwind(|| Inner::from_bytes(json));
    let read = read.map_err(|_| "a text on which its reader fails".to_owned())?;
    read.map_err(|error| error.to_string())
}

impl HfTokenizer {
    /// Reads the text of a tokenizer.json.
    ///
    /// **Errors**: no tokenizer, or none of the tokens that may end a document; the caller fills in the file.
    pub fn from_json(json: &[u8], end_of_document: &EndOfDocument) -> Result<Self, TokenizerFault> {
        let fault = |expected: &str, got: String| TokenizerFault {
            file: super::tokenizer::FILE.into(),
            expected: expected.into(),
            got,
        };
        let mut inner = read(json).map_err(|got| fault("a tokenizer.json", got))?;
        // Text that spells a special token stays text; and every text is taken whole.
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| fault("a tokenizer.json", error.to_string()))?;
        let candidates = &end_of_document.candidates;
        let end = candidates.iter().find_map(|candidate| candidate.id(&inner)).ok_or_else(|| {
            let expected =
                format!("a token for the end of a document; {} names it", end_of_document.named_by);
            let tried: Vec<String> = candidates.iter().map(ToString::to_string).collect();
            fault(&expected, format!("none {}", tried.join(", ")))
        })?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(end);
        let probe = catch_unwind(AssertUnwindSafe(|| inner.encode_fast(PROBE, false).map(drop)));
        match probe {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(fault("a tokenizer that encodes any text", error.to_string())),
            Err(_) => return Err(fault("a tokenizer that encodes any text", "one that fails".into())),
        }
        let decoder = serde_json::to_string(&inner.get_decoder()).unwrap_or_default();
        Ok(Self {
            is_byte_level: decoder.contains("\"ByteLevel\""),
            inner,
            json: json.to_vec(),
            end_of_document: end,
            id_limit: largest as usize + 1,
        })
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let encoding = self.inner.encode_fast(text, false);
        encoding.expect("a tokenizer that encodes the probe encodes any text").get_ids().to_vec()
    }

    pub(super) fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    pub(super) fn stream(&self) -> Box<dyn FnMut(u32) -> Vec<u8> + '_> {
        let mut stream = self.inner.decode_stream(true);
        Box::new(move |id| stream.step(id).ok().flatten().unwrap_or_default().into_bytes())
    }

    pub(super) fn end_of_document(&self) -> u32 {
        self.end_of_document
    }

    /// The name of the token that ends a document.
    pub(super) fn end_name(&self) -> String {
        self.inner.id_to_token(self.end_of_document).unwrap_or_default()
    }

    /// `tokenizer_config.json` beside the tokenizer: transformers and [`super::model_tokenizer`] find the end of a document
    /// there.
    pub(super) fn config_json(&self) -> Vec<u8> {
        let config =
            serde_json::json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_name()});
        format!("{config:#}\n").into_bytes()
    }

    pub(super) fn id_limit(&self) -> usize {
        self.id_limit
    }

    pub(super) fn json(&self) -> &[u8] {
        &self.json
    }

    pub(super) fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.end_of_document.to_le_bytes());
        hasher.update(&self.json);
        hasher.finalize().to_hex().to_string()
    }

    pub(super) fn fim_tokens(&self) -> Option<FimTokens> {
        FIM_NAMES.iter().find_map(|(_, names)| {
            let [begin, hole, end] = names.map(|name| self.inner.token_to_id(name));
            Some(FimTokens { begin: begin?, hole: hole?, end: end? })
        })
    }

    /// In a byte-level tokenizer a letter is a byte; elsewhere U+2581 is a space and `<0xNN>` a byte.
    pub(super) fn byte_length(&self, id: u32) -> usize {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id);
        if let Some(added) = added {
            return if added.special { 0 } else { added.content.len() };
        }
        let Some(token) = self.inner.id_to_token(id) else { return 0 };
        if self.is_byte_level {
            token.chars().count()
        } else if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
            1
        } else {
            token.chars().map(|letter| if letter == '\u{2581}' { 1 } else { letter.len_utf8() }).sum()
        }
    }
}

/// Fewest tokens of a byte-level tokenizer: the bytes, the end of a document, and three to fill in.
pub const MIN_VOCAB_SIZE: usize = 256 + 1 + FIM_NAMES[0].1.len();

/// Documents under way from the reader to the trainer.
const QUEUE: usize = 64;

/// Trains a byte-level BPE of at most `vocab_size` tokens on the documents of `paths`, which are in this `field` of rows; returns
/// the tokenizer.json. Its
/// first ids are the end of a document and the tokens for filling in, by the names of DeepSeek-V3.
///
/// **Errors**: all faults of the paths, or what the trainer says.
pub fn train(paths: &[PathBuf], field: &str, vocab_size: usize) -> Result<Vec<u8>, Vec<String>> {
    let words = |faults: Vec<DataFault>| faults.iter().map(ToString::to_string).collect::<Vec<_>>();
    let reading = Reading { field, piece_bytes: PIECE_BYTES };
    // What is wrong inside of the other files comes with it.
    let all = |faults| files::visit(paths, reading, &mut |_| ()).err().unwrap_or(faults);
    let files = files::list(paths, field).map_err(|faults| words(all(faults)))?;
    let special = |name: &str| AddedToken::from(name, true);
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .special_tokens(std::iter::once(END_NAMES[0]).chain(FIM_NAMES[0].1).map(special).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    let mut tokenizer = Inner::new(BPE::default());
    let byte_level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    let (send, documents) = std::sync::mpsc::sync_channel::<String>(QUEUE);
    let read = move || -> Vec<DataFault> {
        // The trainer takes every document; if it has failed, its own error is reported.
        let take = &mut |document: Document| {
            drop(send.send(String::from_utf8_lossy(&document.text).into_owned()));
        };
        files.iter().flat_map(|file| file.visit(reading, take)).collect()
    };
    let (read, trained) = std::thread::scope(|scope| {
        let reader = scope.spawn(read);
        let trained = tokenizer.train(&mut trainer, documents.into_iter()).map(|_| ());
        (reader.join(), trained)
    });
    let faults = read.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if !faults.is_empty() {
        return Err(words(faults));
    }
    trained.map_err(|error| vec![error.to_string()])?;
    tokenizer.to_string(false).map(String::into_bytes).map_err(|error| vec![error.to_string()])
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::data::tokenizer::Tokenizer;

    fn usual() -> EndOfDocument {
        EndOfDocument::named("", "tokenizer.end_of_document")
    }

    /// A tokenizer of 400 tokens at most, trained on a file of this crate.
    pub(in crate::data) fn trained() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.rs");
        std::fs::write(&path, include_str!("packing.rs")).unwrap();
        let json = train(&[path], "text", 400).unwrap();
        Tokenizer::Hf(Arc::new(HfTokenizer::from_json(&json, &usual()).unwrap()))
    }

    #[test]
    fn training_is_repeatable_and_keeps_to_its_size() {
        let (one, two) = (trained(), trained());
        assert_eq!(one.json(), two.json());
        assert_eq!((one.id_limit(), one.end_of_document()), (400, 0));
        assert_eq!(one.fim_tokens(), Some(FimTokens { begin: 1, hole: 2, end: 3 }));
        let text = include_str!("packing.rs").as_bytes();
        assert!(one.encode(text).len() * 3 < text.len() * 2, "it has learnt some of the text");
    }

    #[test]
    fn the_tokens_for_filling_in_go_by_the_names_of_published_models() {
        let Tokenizer::Hf(hf) = trained() else { unreachable!() };
        let json = String::from_utf8(hf.json().to_vec()).unwrap();
        let own = FIM_NAMES[0].1;
        let renamed = |names: [&str; 3]| {
            let json = own.iter().zip(names).fold(json.clone(), |json, (old, new)| json.replace(old, new));
            HfTokenizer::from_json(json.as_bytes(), &usual()).unwrap().fim_tokens()
        };
        for names in [
            ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
            ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ] {
            assert_eq!(renamed(names), Some(FimTokens { begin: 1, hole: 2, end: 3 }));
            assert!(fim_names().contains(&names.join(" ")));
        }
        assert_eq!(renamed(["<fim_prefix>", "<|fim_suffix|>", "<fim_middle>"]), None);
    }

    #[test]
    fn text_that_spells_a_special_token_is_text() {
        let tokenizer = trained();
        let ids = tokenizer.encode(END_NAMES[0].as_bytes());
        assert!(!ids.contains(&0) && ids.len() > 1);
        assert_eq!(tokenizer.decode(&ids), END_NAMES[0].as_bytes());
        assert_eq!(tokenizer.decode(&[0, 1, 2, 3]), b"");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        assert!(trained().check_fits(400).is_ok());
        assert_eq!(
            trained().check_fits(399).unwrap_err().to_string(),
            "model.config.vocab_size: expected at least 400 for the tokenizer (its largest id and one), got 399"
        );
    }

    #[test]
    fn the_end_of_a_document_is_found_or_named() {
        let Tokenizer::Hf(hf) = trained() else { unreachable!() };
        let json = String::from_utf8(hf.json().to_vec()).unwrap();
        let renamed = json.replace(END_NAMES[0], "<fin>");
        let error_text = HfTokenizer::from_json(renamed.as_bytes(), &usual()).unwrap_err().to_string();
        assert!(error_text.contains("tokenizer.end_of_document names it, got none called"), "{error_text}");
        let named = EndOfDocument::named("<fin>", "tokenizer.end_of_document");
        assert_eq!(HfTokenizer::from_json(renamed.as_bytes(), &named).unwrap().end_of_document, 0);
        assert!(HfTokenizer::from_json(json.as_bytes(), &named).is_err());
        assert!(HfTokenizer::from_json(b"{}", &usual()).is_err());
        assert!(HfTokenizer::from_json(&json.as_bytes()[..json.len() / 2], &usual()).is_err());
    }

    #[test]
    fn the_first_candidate_that_the_tokenizer_has_ends_documents() {
        let Tokenizer::Hf(hf) = trained() else { unreachable!() };
        let name = |name: &str| EndToken::Name(name.to_owned());
        let end = |candidates: Vec<EndToken>| {
            let named_by = "eos_token".to_owned();
            HfTokenizer::from_json(hf.json(), &EndOfDocument { candidates, named_by })
                .map(|tokenizer| tokenizer.end_of_document)
                .map_err(|fault| fault.to_string())
        };
        assert_eq!(end(vec![name(FIM_NAMES[0].1[1]), EndToken::Usual]), Ok(2));
        assert_eq!(end(vec![name("[SEP]"), EndToken::Id(400), EndToken::Id(3), EndToken::Usual]), Ok(3));
        let error_text = end(vec![name("[SEP]"), EndToken::Id(400)]).unwrap_err();
        assert_eq!(
            error_text,
            "tokenizer.json: expected a token for the end of a document; eos_token names it, got none called [SEP], of \
             id 400"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_text_survives_and_its_bytes_are_counted(text in any::<String>()) {
            static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(trained);
            let ids = TOKENIZER.encode(text.as_bytes());
            prop_assert_eq!(&TOKENIZER.decode(&ids), text.as_bytes());
            prop_assert_eq!(ids.iter().map(|&id| TOKENIZER.byte_length(id)).sum::<usize>(), text.len());
            let mut stream = TOKENIZER.stream();
            let pieces: Vec<u8> = ids.iter().flat_map(|&id| stream(id)).collect();
            // The library holds back what ends in U+FFFD, which may be half a character or may be meant.
            prop_assert!(text.as_bytes().starts_with(&pieces));
            if !text.contains('\u{fffd}') {
                prop_assert_eq!(pieces, text.as_bytes());
            }
        }
    }
}
