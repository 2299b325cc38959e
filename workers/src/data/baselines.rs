//! What simple methods make of the text that the model is measured on: the yardsticks beside its bits per
//! byte.
//!
//! Called once at the end of a run. What is counted, here and for the model: the targets of the given
//! validation sequences that are bytes. Ends of documents are never targets (but always context), so
//! the figures share one denominator.
//!
//! All choices favour the baselines: they see the running text across the sequence's start, where the model
//! sees only the sequence; they are trained on the whole training split, however few of its tokens the model
//! has read.

use super::packing::PackedDataset;
use super::tokenizer::{BYTE_TOKENS, END_OF_DOCUMENT};
use std::io::{self, Write};

/// Bits per byte of three baselines on the same bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Baselines {
    /// One byte of context, Witten-Bell interpolation.
    pub bigram_bits_per_byte: f64,
    /// Two bytes of context, Witten-Bell interpolation.
    pub trigram_bits_per_byte: f64,
    /// `zstd -19` with the training text in its window.
    pub zstd_bits_per_byte: f64,
    /// Number of bytes that were predicted.
    pub num_bytes: usize,
}

impl Baselines {
    /// Trains on all of `train` and predicts the byte targets of the sequences `sequence_ids` of
    /// `validation`.
    ///
    /// Takes a few seconds, nearly all of them zstd's, on one thread. The figures are zero where no target is
    /// a byte. `None` where the streams are not in memory, each in one piece. The tokens must be those of the
    /// byte tokenizer.
    pub fn measure(
        train: &PackedDataset,
        validation: &PackedDataset,
        sequence_ids: &[usize],
    ) -> Option<Self> {
        let (train, tokens) = (train.tokens()?, validation.tokens()?);
        let text = target_bytes(validation, sequence_ids);
        let model = NGrams::train(train);
        let positions = sequence_ids.iter().flat_map(|&id| validation.target_positions(id));
        let (bigram_bits, trigram_bits) = model.bits(tokens, positions);
        let train_text: Vec<u8> = train.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
        let per_byte = |bits: f64| bits / text.len().max(1) as f64;
        Some(Self {
            bigram_bits_per_byte: per_byte(bigram_bits),
            trigram_bits_per_byte: per_byte(trigram_bits),
            zstd_bits_per_byte: per_byte(zstd_bits(&train_text, &text)),
            num_bytes: text.len(),
        })
    }
}

fn target_bytes(dataset: &PackedDataset, sequence_ids: &[usize]) -> Vec<u8> {
    let targets = sequence_ids.iter().flat_map(|&id| dataset.sequence(id).1);
    targets.filter_map(|id| u8::try_from(id).ok()).collect()
}

/// Counts of bytes after contexts of zero, one and two tokens.
struct NGrams {
    unigram: Counts,
    bigram: Counts,
    trigram: Counts,
}

impl NGrams {
    fn train(tokens: &[u32]) -> Self {
        let mut model = Self {
            unigram: Counts::new(1),
            bigram: Counts::new(BYTE_TOKENS),
            trigram: Counts::new(BYTE_TOKENS * BYTE_TOKENS),
        };
        for position in 0..tokens.len() {
            if let Ok(byte) = u8::try_from(tokens[position]) {
                let (bigram, trigram) = contexts(tokens, position);
                model.unigram.add(0, byte);
                model.bigram.add(bigram, byte);
                model.trigram.add(trigram, byte);
            }
        }
        model
    }

    /// Probabilities of `byte` after one and after two tokens of context.
    fn probabilities(&self, (bigram, trigram): (usize, usize), byte: u8) -> (f64, f64) {
        let after_none = self.unigram.interpolate(0, byte, 1.0 / 256.0);
        let after_one = self.bigram.interpolate(bigram, byte, after_none);
        (after_one, self.trigram.interpolate(trigram, byte, after_one))
    }

    /// Total information of the bytes at `positions` under the bigram and the trigram. **Units**: bits.
    fn bits(&self, tokens: &[u32], positions: impl Iterator<Item = usize>) -> (f64, f64) {
        let mut bits = (0.0, 0.0);
        for position in positions {
            if let Ok(byte) = u8::try_from(tokens[position]) {
                let (bigram, trigram) = self.probabilities(contexts(tokens, position), byte);
                bits.0 -= bigram.log2();
                bits.1 -= trigram.log2();
            }
        }
        bits
    }
}

/// Numbers of the contexts of one and of two tokens before `position`; ends of documents stand before the
/// text's start.
fn contexts(tokens: &[u32], position: usize) -> (usize, usize) {
    let before = |distance: usize| {
        position.checked_sub(distance).map_or(END_OF_DOCUMENT, |earlier| tokens[earlier]) as usize
    };
    (before(1), before(2) * BYTE_TOKENS + before(1))
}

/// For every context, what followed it and how often.
struct Counts {
    /// Occurrences of byte b after context c at [c * 256 + b].
    successors: Vec<u32>,
    /// Sum of a context's occurrences.
    total: Vec<u32>,
    /// Number of different bytes seen after a context.
    distinct: Vec<u32>,
}

impl Counts {
    fn new(num_contexts: usize) -> Self {
        Self {
            successors: vec![0; num_contexts * 256],
            total: vec![0; num_contexts],
            distinct: vec![0; num_contexts],
        }
    }

    fn add(&mut self, context: usize, byte: u8) {
        let count = &mut self.successors[context * 256 + usize::from(byte)];
        self.distinct[context] += u32::from(*count == 0);
        *count += 1;
        self.total[context] += 1;
    }

    /// Witten-Bell: P(b|c) = (n(c,b) + d(c) * lower) / (n(c) + d(c)), with n the counts, d(c) the number of
    /// different bytes seen after c and `lower` the probability from one token less of context; `lower`
    /// itself after an unseen context.
    fn interpolate(&self, context: usize, byte: u8, lower: f64) -> f64 {
        if self.total[context] == 0 {
            return lower;
        }
        let count = f64::from(self.successors[context * 256 + usize::from(byte)]);
        let (total, distinct) = (f64::from(self.total[context]), f64::from(self.distinct[context]));
        (count + distinct * lower) / (total + distinct)
    }
}

const ZSTD_LEVEL: i32 = 19;

/// Twice the 8 MiB of level 19, so that the window holds the default corpus whole.
const ZSTD_WINDOW_LOG: u32 = 24;

/// What `zstd -19 --long=24 --patch-from=TRAINING` makes of `text`: one frame that may refer to any of the
/// training text as if it had just been written. Of a longer training text the last window's worth is given.
/// This is 3 s quicker than to compress both and take the difference, and its figure on the default corpus is
/// the lower one by 0.001. **Units**: bits.
fn zstd_bits(train_text: &[u8], text: &[u8]) -> f64 {
    let in_reach = &train_text[train_text.len().saturating_sub(1 << ZSTD_WINDOW_LOG)..];
    let compress = || -> io::Result<usize> {
        let mut encoder = zstd::stream::Encoder::with_ref_prefix(Vec::new(), ZSTD_LEVEL, in_reach)?;
        encoder.window_log(ZSTD_WINDOW_LOG)?;
        encoder.long_distance_matching(true)?;
        encoder.write_all(text)?;
        Ok(encoder.finish()?.len())
    };
    8.0 * compress().expect("zstd writes to memory with legal parameters") as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Document;

    fn packed(texts: &[&[u8]], sequence_length: usize) -> PackedDataset {
        let document = |text: &&[u8]| Document { name: String::new(), text: text.to_vec() };
        PackedDataset::pack(&texts.iter().map(document).collect::<Vec<_>>(), sequence_length)
    }

    /// Text with structure at distance two, from a small alphabet so that contexts repeat.
    fn text(num_bytes: usize, mut state: u64) -> Vec<u8> {
        let mut text = vec![b'a', b'b'];
        while text.len() < num_bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let noise = (state >> 33) as u8;
            text.push(if noise < 64 { b'a' + noise % 7 } else { text[text.len() - 2] });
        }
        text
    }

    #[test]
    fn the_trigram_is_the_one_worked_by_hand() {
        // Training stream: a b a c END. Counts: a 2, b 1, c 1 (n 4, d 3); after a: b 1, c 1 (n 2, d 2); after
        // b: a 1; after END (before the start): a 1; after (a,b): a; after (b,a): c; after (END,a): b; after
        // (END,END): a.
        let model = NGrams::train(packed(&[b"abac"], 1).tokens().unwrap());
        let uniform = 1.0 / 256.0;
        let unigram_c = (1.0 + 3.0 * uniform) / 7.0;
        let bigram_ac = (1.0 + 2.0 * unigram_c) / 4.0;
        let trigram_bac = (1.0 + 1.0 * bigram_ac) / 2.0;
        let validation = packed(&[b"bac"], 3);
        let tokens = validation.tokens().unwrap();
        let (_, bac) = contexts(tokens, 2);
        assert_eq!(bac, 98 * 257 + 97);
        assert_eq!(model.probabilities(contexts(tokens, 2), b'c'), (bigram_ac, trigram_bac));
        // The whole of b [a c END]: a after (END,b) has an unseen trigram context and falls to the bigram b
        // -> a.
        let unigram_a = (2.0 + 3.0 * uniform) / 7.0;
        let bigram_ba = (1.0 + unigram_a) / 2.0;
        let (bigram, trigram) = model.bits(tokens, validation.target_positions(0));
        assert!((bigram + bigram_ba.log2() + bigram_ac.log2()).abs() < 1e-12);
        assert!((trigram + bigram_ba.log2() + trigram_bac.log2()).abs() < 1e-12);
    }

    #[test]
    fn probabilities_sum_to_one_after_every_context() {
        let model = NGrams::train(packed(&[&text(500, 1), b"", &text(300, 2)], 8).tokens().unwrap());
        let letters: Vec<u32> = (b'a'..=b'h').map(u32::from).chain([0, 255, END_OF_DOCUMENT]).collect();
        for &two in &letters {
            for &one in &letters {
                let contexts = contexts(&[two, one, 0], 2);
                let (mut bigram, mut trigram) = (0.0, 0.0);
                for byte in 0..=255 {
                    let (b, t) = model.probabilities(contexts, byte);
                    assert!(b > 0.0 && t > 0.0, "after {two} {one}");
                    (bigram, trigram) = (bigram + b, trigram + t);
                }
                assert!(
                    (bigram - 1.0_f64).abs() < 1e-12 && (trigram - 1.0_f64).abs() < 1e-12,
                    "after {two} {one}"
                );
            }
        }
    }

    /// Witten-Bell written down recursively over plain lists of what followed a context, in the other form of
    /// the formula.
    fn slow_probability(train: &[u32], context: &[u32], byte: u32) -> f64 {
        let padded: Vec<u32> = [END_OF_DOCUMENT; 2].iter().chain(train).copied().collect();
        let followers: Vec<u32> = (2..padded.len())
            .filter(|&at| padded[at] < 256 && padded[at - context.len()..at] == *context)
            .map(|at| padded[at])
            .collect();
        let lower =
            if context.is_empty() { 1.0 / 256.0 } else { slow_probability(train, &context[1..], byte) };
        if followers.is_empty() {
            return lower;
        }
        let distinct = followers.iter().collect::<std::collections::HashSet<_>>().len() as f64;
        let num = followers.len() as f64;
        let share = followers.iter().filter(|&&id| id == byte).count() as f64 / num;
        let kept = num / (num + distinct);
        kept * share + (1.0 - kept) * lower
    }

    #[test]
    fn the_figures_agree_with_a_slow_twin() {
        let train = packed(&[&text(400, 3), b"fed", &text(200, 4)], 16);
        let validation = packed(&[&text(90, 5), b"gg", &text(60, 6)], 16);
        let ids = [0, 2, 3, 5, 8];
        let (mut bigram, mut trigram, mut num_bytes) = (0.0, 0.0, 0);
        let tokens: Vec<u32> =
            [END_OF_DOCUMENT; 2].iter().chain(validation.tokens().unwrap()).copied().collect();
        for at in ids.iter().flat_map(|&id| validation.target_positions(id)).map(|position| position + 2) {
            if tokens[at] != END_OF_DOCUMENT {
                bigram -= slow_probability(train.tokens().unwrap(), &tokens[at - 1..at], tokens[at]).log2();
                trigram -= slow_probability(train.tokens().unwrap(), &tokens[at - 2..at], tokens[at]).log2();
                num_bytes += 1;
            }
        }
        let measured = Baselines::measure(&train, &validation, &ids).unwrap();
        assert_eq!(measured.num_bytes, num_bytes);
        assert!(num_bytes < 5 * 16, "an end of document is among the targets, and not counted");
        assert!((measured.bigram_bits_per_byte - bigram / num_bytes as f64).abs() < 1e-12);
        assert!((measured.trigram_bits_per_byte - trigram / num_bytes as f64).abs() < 1e-12);
        assert!(measured.trigram_bits_per_byte < measured.bigram_bits_per_byte, "the text looks two back");
    }

    #[test]
    fn zstd_has_read_the_training_text() {
        let known = text(20_000, 7);
        let repeated = zstd_bits(&known, &known[5_000..15_000]);
        let unknown = zstd_bits(&known, &text(10_000, 8));
        assert!(repeated < 8.0 * 100.0, "a repetition costs {repeated} bits");
        assert!(unknown > 8.0 * 1_000.0, "new text costs {unknown} bits");
    }
}
