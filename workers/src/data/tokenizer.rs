//! The byte-level tokenizer: a token is a byte, or the end of a document.
//!
//! It sits between the corpus and packing, and between a prompt and `generate`. It knows no model: whether a
//! model can take its ids is the caller's question to [`fits`].

use contraflow_runtime::recipe;

/// The id that closes every document. Ids below it are the bytes themselves.
pub const END_OF_DOCUMENT: u32 = recipe::END_OF_DOCUMENT as u32;

/// Number of distinct ids: 256 bytes and the end of a document.
pub const BYTE_TOKENS: usize = recipe::BYTE_TOKENS;

/// Whether a model with `vocab_size` rows of embedding has a row for every id, the end of a document
/// included.
///
/// A larger vocabulary is legal: its upper rows are never asked for.
pub fn fits(vocab_size: usize) -> bool {
    vocab_size >= BYTE_TOKENS
}

/// The ids of a text, one per byte, with no end of document added.
pub fn encode(text: &[u8]) -> Vec<u32> {
    text.iter().map(|&byte| u32::from(byte)).collect()
}

/// The bytes among `ids`; an end of document or an id that only a larger vocabulary has stands for no byte.
pub fn decode(ids: &[u32]) -> Vec<u8> {
    ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect()
}

/// The text of `ids` for display: [`decode`], with U+FFFD where the bytes are not UTF-8.
pub fn decode_lossy(ids: &[u32]) -> String {
    String::from_utf8_lossy(&decode(ids)).into_owned()
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
    fn ids_that_are_no_byte_are_left_out_and_broken_utf8_is_shown() {
        assert_eq!(decode(&[104, END_OF_DOCUMENT, 105, 5000]), b"hi");
        assert_eq!(decode_lossy(&encode("naïve".as_bytes())), "naïve");
        assert_eq!(decode_lossy(&[0xc3, 104]), "\u{fffd}h");
    }

    #[test]
    fn legal_when_the_largest_id_is_below_the_vocabulary() {
        assert!(!fits(256));
        assert!(fits(257));
        assert!(fits(129_280));
    }
}
