//! How text becomes ids: bytes (a token is a byte, or the end of a document), or any tokenizer.json.
//!
//! It sits between the corpus and packing, and between a prompt and `generate`. It knows no model: whether a
//! model can take its ids is the caller's question to [`Tokenizer::check_fits`].

use std::path::Path;

use contraflow_runtime::recipe;

use super::hf_tokenizer::{EndOfDocument, HfTokenizer};

/// What a run reads and writes text with. Cloning shares it.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// One token per byte, and [`END_OF_DOCUMENT`].
    Bytes,
    /// A tokenizer.json.
    Hf(std::sync::Arc<HfTokenizer>),
}

/// Tokens around the parts of a document that is to be filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the prefix.
    pub begin: u32,
    /// Between prefix and suffix.
    pub hole: u32,
    /// Between suffix and middle.
    pub end: u32,
}

/// What is wrong with a tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: expected {expected}, got {got}")]
pub struct TokenizerFault {
    /// The file, or the key of the recipe.
    pub file: String,
    /// What should have been there.
    pub expected: String,
    /// What was there.
    pub got: String,
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// **Errors**: the file cannot be read or is no tokenizer, or has no token to end a document.
    pub fn load(path: &Path, end_of_document: &EndOfDocument) -> Result<Self, TokenizerFault> {
        let fault = |got| TokenizerFault {
            file: path.display().to_string(),
            expected: "a tokenizer.json".into(),
            got,
        };
        let json = contraflow_runtime::files::read(path).map_err(|error| fault(error.to_string()))?;
        let tokenizer = HfTokenizer::from_json(&json, end_of_document)
            .map_err(|wrong| TokenizerFault { file: path.display().to_string(), ..wrong })?;
        Ok(Self::Hf(std::sync::Arc::new(tokenizer)))
    }

    /// The ids of a text, with no end of document added.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        match self {
            Self::Bytes => encode(text),
            Self::Hf(tokenizer) => tokenizer.encode(&String::from_utf8_lossy(text)),
        }
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        match self {
            Self::Bytes => decode(ids),
            Self::Hf(tokenizer) => tokenizer.decode(ids).into_bytes(),
        }
    }

    /// Takes ids one by one and gives the bytes that are certain by then: a character may be several tokens.
    pub fn stream(&self) -> Box<dyn FnMut(u32) -> Vec<u8> + '_> {
        match self {
            Self::Bytes => Box::new(|id| decode(&[id])),
            Self::Hf(tokenizer) => tokenizer.stream(),
        }
    }

    /// The id that closes every document.
    pub fn end_of_document(&self) -> u32 {
        match self {
            Self::Bytes => END_OF_DOCUMENT,
            Self::Hf(tokenizer) => tokenizer.end_of_document(),
        }
    }

    /// The name of that token; bytes have none.
    pub fn end_name(&self) -> String {
        match self {
            Self::Bytes => String::new(),
            Self::Hf(tokenizer) => tokenizer.end_name(),
        }
    }

    /// Every id is below this.
    pub fn id_limit(&self) -> usize {
        match self {
            Self::Bytes => BYTE_TOKENS,
            Self::Hf(tokenizer) => tokenizer.id_limit(),
        }
    }

    /// Bytes of text that a token encodes as far as it is known without the text: white space that the tokenizer adds or drops, a
    /// character that it changes or does not know, are counted as they come out. Special tokens encode none.
    pub fn byte_length(&self, id: u32) -> usize {
        match self {
            Self::Bytes => usize::from(id < END_OF_DOCUMENT),
            Self::Hf(tokenizer) => tokenizer.byte_length(id),
        }
    }

    /// The tokens for filling in, where the tokenizer has them.
    pub fn fim_tokens(&self) -> Option<FimTokens> {
        match self {
            Self::Bytes => None,
            Self::Hf(tokenizer) => tokenizer.fim_tokens(),
        }
    }

    /// `bytes`, or the blake3 of the tokenizer.json and the name of its end of document: equal hashes give
    /// equal ids.
    pub fn hash(&self) -> String {
        match self {
            Self::Bytes => "bytes".into(),
            Self::Hf(tokenizer) => tokenizer.hash(),
        }
    }

    /// The files that stand beside a model of this tokenizer, so that it is read with it.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        match self {
            Self::Bytes => Vec::new(),
            Self::Hf(tokenizer) => {
                vec![(FILE, tokenizer.json().to_vec()), (CONFIG_FILE, tokenizer.config_json())]
            }
        }
    }

    /// The ids that end a text of a model trained with this tokenizer: the end of a document, then those of `configured`
    /// that can be meant. If the end of a document is not among them, they were meant for another tokenizer, and only those
    /// stay that stand for no text here.
    pub fn end_ids(&self, configured: &[u64]) -> Vec<u64> {
        let end = u64::from(self.end_of_document());
        let is_special = |&id: &u64| {
            u32::try_from(id).is_ok_and(|id| (id as usize) < self.id_limit() && self.byte_length(id) == 0)
        };
        let others = configured.iter().copied().filter(|&id| id != end);
        let others: Vec<u64> = match configured.contains(&end) {
            true => others.collect(),
            false => others.filter(is_special).collect(),
        };
        [vec![end], others].concat()
    }

    /// The tokenizer.json, where there is one.
    pub fn json(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes => None,
            Self::Hf(tokenizer) => Some(tokenizer.json()),
        }
    }

    /// **Errors**: an id that a model of `vocab_size` rows has no row for, with both numbers.
    pub fn check_fits(&self, vocab_size: usize) -> Result<(), TokenizerFault> {
        if self.id_limit() <= vocab_size {
            return Ok(());
        }
        Err(TokenizerFault {
            file: "model.config.vocab_size".into(),
            expected: format!("at least {} for the tokenizer (its largest id and one)", self.id_limit()),
            got: vocab_size.to_string(),
        })
    }
}

/// Name of a tokenizer in a model's folder.
pub const FILE: &str = "tokenizer.json";

/// Name of the file beside it that says which of its tokens is which.
pub const CONFIG_FILE: &str = "tokenizer_config.json";

/// The id that closes every document. Ids below it are the bytes themselves.
pub const END_OF_DOCUMENT: u32 = recipe::END_OF_DOCUMENT as u32;

/// Number of distinct ids: 256 bytes and the end of a document.
pub const BYTE_TOKENS: usize = recipe::BYTE_TOKENS;

/// The ids of a text, one per byte, with no end of document added.
pub fn encode(text: &[u8]) -> Vec<u32> {
    text.iter().map(|&byte| u32::from(byte)).collect()
}

/// The bytes among `ids`; an end of document or an id that only a larger vocabulary has encodes no byte.
pub fn decode(ids: &[u32]) -> Vec<u8> {
    ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_round_trip() {
        let text: Vec<u8> = (0..=255).collect();
        let ids = encode(&text);
        assert!(ids.iter().enumerate().all(|(byte, &id)| id as usize == byte));
        assert_eq!(decode(&ids), text);
    }

    #[test]
    fn ids_that_are_no_byte_are_left_out() {
        assert_eq!(decode(&[104, END_OF_DOCUMENT, 105, 5000]), b"hi");
    }

    #[test]
    fn the_end_of_a_document_is_the_first_of_the_ids_that_end_a_text() {
        assert_eq!(Tokenizer::Bytes.end_ids(&[]), [256]);
        assert_eq!(Tokenizer::Bytes.end_ids(&[10, 256]), [256, 10]);
        assert_eq!(Tokenizer::Bytes.end_ids(&[1, 10, 300]), [256]);
        let trained = crate::data::hf_tokenizer::tests::trained();
        // 0 to 3 are special, 256 is text.
        assert_eq!(trained.end_ids(&[256, 2, 1 << 40]), [0, 2]);
        assert_eq!(trained.end_ids(&[256, 0]), [0, 256]);
    }

    #[test]
    fn legal_when_the_largest_id_is_below_the_vocabulary() {
        assert!(Tokenizer::Bytes.check_fits(256).is_err());
        assert!(Tokenizer::Bytes.check_fits(257).is_ok());
        assert!(Tokenizer::Bytes.check_fits(129_280).is_ok());
    }
}
