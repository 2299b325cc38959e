//! One document as tokens: its text encoded, perhaps rearranged to be filled in, and closed.
//!
//! Pure: what a document becomes depends on its bytes, the tokenizer and the rate alone. Both ways to token streams
//! (packing in memory, `data prepare`) go through here.

use super::hf_tokenizer::fim_names;
use super::tokenizer::{FimTokens, Tokenizer, TokenizerFault};

/// How documents become tokens.
#[derive(Clone, Debug)]
pub struct DocumentEncoder {
    tokenizer: Tokenizer,
    /// Share of the documents that are rearranged, and the tokens for it.
    fim: Option<(f64, FimTokens)>,
}

impl DocumentEncoder {
    /// Documents in their own order.
    pub fn plain(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, fim: None }
    }

    /// Rearranges a share of the documents: prefix, suffix, middle.
    ///
    /// **Errors**: a rate above 0 where the tokenizer has no tokens for it.
    pub fn with_fim(tokenizer: Tokenizer, rate: f64) -> Result<Self, TokenizerFault> {
        let tokens = tokenizer.fim_tokens();
        match tokens {
            _ if rate == 0.0 => Ok(Self::plain(tokenizer)),
            Some(tokens) => Ok(Self { tokenizer, fim: Some((rate, tokens)) }),
            None => Err(TokenizerFault {
                file: "data.fim_rate".into(),
                expected: format!("0, or a tokenizer with the tokens for filling in: {}", fim_names()),
                got: format!("{rate} and a tokenizer without them"),
            }),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The share of rearranged documents.
    pub fn fim_rate(&self) -> f64 {
        self.fim.map_or(0.0, |(rate, _)| rate)
    }

    /// Tokens of a document with its end.
    ///
    /// **Source**: report section 4.1: `begin prefix hole suffix end middle END`.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        let encode = |text: &[u8]| self.tokenizer.encode(text);
        let mut ids = match self.fim.and_then(|(rate, tokens)| Some((tokens, cut(text, rate)?))) {
            None => encode(text),
            Some((tokens, (from, to))) => {
                let mut ids = vec![tokens.begin];
                ids.extend(encode(&text[..from]));
                ids.push(tokens.hole);
                ids.extend(encode(&text[to..]));
                ids.push(tokens.end);
                ids.extend(encode(&text[from..to]));
                ids
            }
        };
        ids.push(self.tokenizer.end_of_document());
        ids
    }
}

/// Where the middle of a document begins and ends, or nothing for the share that stays as it is. The dice are the
/// blake3 of the text, so the same document falls the same way wherever it is.
fn cut(text: &[u8], rate: f64) -> Option<(usize, usize)> {
    let dice = blake3::derive_key("contraflow fill in the middle 1", text);
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| dice[8 * at + byte]));
    let chance = (number(0) >> 11) as f64 / 2.0_f64.powi(53);
    let text = std::str::from_utf8(text).ok()?;
    if chance >= rate {
        return None;
    }
    let place = |number: u64| {
        let raw = (u128::from(number) * (text.len() as u128 + 1)) >> 64;
        text.floor_char_boundary(raw as usize)
    };
    let (one, two) = (place(number(1)), place(number(2)));
    Some((one.min(two), one.max(two)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::hf_tokenizer;

    fn texts() -> Vec<String> {
        (0..2000).map(|i| format!("document {i}: caf\u{e9} and more text to cut somewhere")).collect()
    }

    #[test]
    fn a_tenth_of_the_documents_is_rearranged_and_none_loses_a_byte() {
        let tokenizer = hf_tokenizer::tests::trained();
        let encoder = DocumentEncoder::with_fim(tokenizer.clone(), 0.1).unwrap();
        let FimTokens { begin, hole, end } = tokenizer.fim_tokens().unwrap();
        let mut rearranged = 0;
        for text in texts() {
            let ids = encoder.encode(text.as_bytes());
            assert_eq!(ids, encoder.encode(text.as_bytes()));
            let (last, ids) = ids.split_last().unwrap();
            assert_eq!(*last, tokenizer.end_of_document());
            if ids[0] != begin {
                assert_eq!(ids, tokenizer.encode(text.as_bytes()));
                continue;
            }
            rearranged += 1;
            let at = |token| ids.iter().position(|&id| id == token).unwrap();
            let part = |from: usize, to: usize| tokenizer.decode(&ids[from..to]);
            let (prefix, suffix) = (part(1, at(hole)), part(at(hole) + 1, at(end)));
            let middle = part(at(end) + 1, ids.len());
            assert_eq!([prefix, middle, suffix].concat(), text.as_bytes());
        }
        // Binomial: mean 200, standard deviation 13.4; five of them on either side.
        assert!((133..=267).contains(&rearranged), "{rearranged}");
    }

    #[test]
    fn the_cuts_reach_everywhere() {
        let middles: Vec<(usize, usize)> =
            texts().iter().filter_map(|text| cut(text.as_bytes(), 1.0)).collect();
        assert_eq!(middles.len(), 2000);
        // Two uniform points: the mean of the smaller is a third of the length, of the larger two thirds.
        let length = texts()[1500].len() as f64;
        let mean = |side: fn(&(usize, usize)) -> usize| {
            middles.iter().map(|cut| side(cut) as f64).sum::<f64>() / 2000.0 / length
        };
        assert!((mean(|cut| cut.0) - 1.0 / 3.0).abs() < 0.03, "{}", mean(|cut| cut.0));
        assert!((mean(|cut| cut.1) - 2.0 / 3.0).abs() < 0.03, "{}", mean(|cut| cut.1));
    }

    #[test]
    fn bytes_have_no_tokens_for_it() {
        let refused = DocumentEncoder::with_fim(Tokenizer::Bytes, 0.1).unwrap_err().to_string();
        let expected = "data.fim_rate: expected 0, or a tokenizer with the tokens for filling in: ";
        assert!(refused.starts_with(expected) && refused.ends_with(", got 0.1 and a tokenizer without them"));
        assert_eq!(DocumentEncoder::with_fim(Tokenizer::Bytes, 0.0).unwrap().encode(b"a"), [97, 256]);
    }
}
