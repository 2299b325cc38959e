//! Which text is held back for validation. Pure: it depends on the bytes of the documents and on the share, on no name or path,
//! and every copy of a text falls on the same side.
//!
//! Whole documents are held back where there are enough of them and the share comes out about right by size; otherwise every
//! document gives its end.

use std::collections::BTreeMap;

use super::text::Document;

/// Parts that a share is counted in.
const WHOLE: u64 = 1_000_000;

fn parts(share: f64) -> u64 {
    (share * WHOLE as f64).round() as u64
}

/// Fewer documents than this do not stand for one another.
fn enough(share: f64) -> u64 {
    WHOLE.div_ceil(parts(share).max(1))
}

/// Whether bytes that are held back are about the share of all: between half of it and twice.
fn is_about(held: u64, all: u64, share: f64) -> bool {
    let wanted = share * all as f64;
    (wanted / 2.0..=wanted * 2.0).contains(&(held as f64))
}

/// Both sides of a text in memory, in the given order: of a tenth, every tenth document in the order of the blake3 of their
/// bytes, or the last tenth of each.
pub(super) fn split(documents: Vec<Document>, share: f64) -> (Vec<Document>, Vec<Document>) {
    if parts(share) == 0 {
        return (documents, Vec::new());
    }
    let hashes: Vec<[u8; 32]> =
        documents.iter().map(|document| *blake3::hash(&document.text).as_bytes()).collect();
    let mut validates: BTreeMap<[u8; 32], bool> = hashes.iter().map(|hash| (*hash, false)).collect();
    let is_next = |place: u64| (place + 1) * parts(share) / WHOLE > place * parts(share) / WHOLE;
    let num_texts = validates.len() as u64;
    validates.values_mut().zip(0..).for_each(|(validates, place)| *validates = is_next(place));
    let size = |document: &Document| document.text.len() as u64;
    let held = documents.iter().zip(&hashes).filter(|(_, hash)| validates[*hash]);
    let held: u64 = held.map(|(document, _)| size(document)).sum();
    if num_texts < enough(share) || !is_about(held, documents.iter().map(size).sum(), share) {
        return documents.into_iter().map(|document| cut_end(document, share)).unzip();
    }
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (document, hash) in documents.into_iter().zip(&hashes) {
        if validates[hash] { &mut validation } else { &mut train }.push(document);
    }
    (train, validation)
}

/// A document without its end, and the end: the share of it, or a few bytes more, so that no character is cut.
pub(super) fn cut_end(document: Document, share: f64) -> (Document, Document) {
    let Document { name, mut text } = document;
    let end = text.len() as u64 as u128 * u128::from(parts(share)) / u128::from(WHOLE);
    let mut start = text.len() - end as usize;
    // Not inside a UTF-8 character: its continuation bytes are 10xxxxxx.
    while text.get(start).is_some_and(|byte| byte & 0b1100_0000 == 0b1000_0000) {
        start -= 1;
    }
    let end = text.split_off(start);
    (Document { name: name.clone(), text }, Document { name, text: end })
}

/// How a text that does not fit into memory is split.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Nothing is held back.
    Nothing,
    /// Documents whose number, the first eight bytes of their blake3, is below this are held back.
    Below(u64),
    /// Every document gives this share of it, its end.
    Ends(f64),
}

/// What a text is told from others by.
pub(super) fn number(text: &[u8]) -> u64 {
    let hash = blake3::hash(text);
    u64::from_le_bytes(std::array::from_fn(|byte| hash.as_bytes()[byte]))
}

/// Texts that a survey remembers one by one. Of more than these a share by numbers is one by size.
const REMEMBERED: usize = 1 << 20;

/// What is known of all documents before the first one is split.
#[derive(Clone, Debug)]
pub(super) struct Survey {
    share: f64,
    /// Bytes of the text of each number, while there are few.
    by_number: BTreeMap<u64, u64>,
    /// Bytes of all documents.
    bytes: u64,
    /// Bytes of those that the share of all numbers would hold back.
    held: u64,
    is_full: bool,
}

impl Survey {
    pub(super) fn new(share: f64) -> Self {
        Survey { share, by_number: BTreeMap::new(), bytes: 0, held: 0, is_full: false }
    }

    /// The share of all numbers.
    fn bound(&self) -> u64 {
        (self.share * u64::MAX as f64) as u64
    }

    pub(super) fn add(&mut self, text: &[u8]) {
        let (number, size) = (number(text), text.len() as u64);
        self.bytes += size;
        self.held += if number < self.bound() { size } else { 0 };
        self.is_full |= self.by_number.len() >= REMEMBERED;
        if !self.is_full {
            *self.by_number.entry(number).or_default() += size;
        }
    }

    /// The rule by which the share comes out.
    pub(super) fn rule(&self) -> Rule {
        let share = self.share;
        if parts(share) == 0 {
            return Rule::Nothing;
        }
        let (bound, held) = if self.is_full { (self.bound(), self.held) } else { self.nearest() };
        let is_enough = self.is_full || self.by_number.len() as u64 >= enough(share);
        if is_enough && held < self.bytes && is_about(held, self.bytes, share) {
            Rule::Below(bound)
        } else {
            Rule::Ends(share)
        }
    }

    /// The bound that comes nearest to the share by size, and what it holds back.
    fn nearest(&self) -> (u64, u64) {
        let wanted = self.share * self.bytes as f64;
        let distance = |held: u64| (held as f64 - wanted).abs();
        let (mut bound, mut held) = (0, 0);
        for (&number, &size) in &self.by_number {
            if distance(held + size) >= distance(held) {
                break;
            }
            (bound, held) = (number.saturating_add(1), held + size);
        }
        (bound, held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(num: usize) -> Vec<Document> {
        let text = |i: usize| format!("text number {i}").into_bytes();
        (0..num).map(|i| Document { name: format!("{i}"), text: text(i) }).collect()
    }

    fn document(text: impl Into<Vec<u8>>) -> Document {
        Document { name: "a".into(), text: text.into() }
    }

    fn bytes(documents: &[Document]) -> usize {
        documents.iter().map(|document| document.text.len()).sum()
    }

    #[test]
    fn every_tenth_document_by_hash_validates_whatever_the_order() {
        let name = |document: &Document| document.name.parse::<u32>().unwrap();
        let (train, validation) = split(documents(57), 0.1);
        assert_eq!((train.len(), validation.len()), (52, 5));
        assert!(train.windows(2).all(|pair| name(&pair[0]) < name(&pair[1])));
        let mut reversed = documents(57);
        reversed.reverse();
        let (_, mut again) = split(reversed, 0.1);
        again.reverse();
        assert_eq!(again, validation);
        assert_eq!(split(documents(200), 0.05).1.len(), 10);
        assert_eq!(split(documents(200), 0.3).1.len(), 60);
        assert_eq!(split(documents(20), 0.0), (documents(20), vec![]));
    }

    #[test]
    fn few_documents_each_give_their_last_tenth() {
        let (train, validation) = split(vec![document("0123456789".repeat(3))], 0.1);
        assert_eq!(train[0].text.len(), 27);
        assert_eq!(validation[0].text, b"789");
        // Nineteen bytes: the cut would fall between the two of the last character.
        let (train, validation) = split(vec![document("0123456789abcdefgé")], 0.1);
        assert_eq!(
            (train[0].text.as_slice(), validation[0].text.as_slice()),
            (&b"0123456789abcdefg"[..], "é".as_bytes())
        );
        let (train, _) = split(vec![document("0123456789".repeat(3))], 0.25);
        assert_eq!(train[0].text.len(), 23);
    }

    /// Ten small files and one that is larger than all of them.
    fn uneven() -> Vec<Document> {
        let mut documents = documents(10);
        for number in 0..60_u32 {
            documents.push(document(number.to_string().repeat(5000)));
            let (train, validation) = split(documents.clone(), 0.1);
            let count = documents.len();
            if count == 11 && bytes(&validation) * 11 > bytes(&train) {
                break;
            }
            documents.pop();
        }
        documents
    }

    #[test]
    fn a_document_that_would_be_most_of_the_text_is_not_held_back_whole() {
        let documents = uneven();
        let all = bytes(&documents) as f64;
        let (train, validation) = split(documents.clone(), 0.1);
        assert!((bytes(&validation) as f64 / all - 0.1).abs() < 0.01);
        assert_eq!(train.len(), documents.len());
        let mut survey = Survey::new(0.1);
        documents.iter().for_each(|document| survey.add(&document.text));
        assert_eq!(survey.rule(), Rule::Ends(0.1));
    }

    #[test]
    fn copies_are_all_on_one_side() {
        let mut many = documents(50);
        many.extend(documents(50));
        let (train, validation) = split(many, 0.1);
        assert_eq!((train.len(), validation.len()), (90, 10));
        assert!(validation.iter().all(|document| !train.contains(document)));
        // One text two hundred times is trained on as often.
        let same = vec![document("the same sentence, many times over"); 200];
        let (train, validation) = split(same.clone(), 0.1);
        assert_eq!((train.len(), validation.len()), (200, 200));
        let mut survey = Survey::new(0.1);
        same.iter().for_each(|document| survey.add(&document.text));
        assert_eq!(survey.rule(), Rule::Ends(0.1));
    }

    #[test]
    fn a_survey_finds_the_bound_that_holds_back_the_share_by_size() {
        for (count, share) in [(30, 0.1), (53, 0.1), (1000, 0.1), (1000, 0.02), (100, 0.5)] {
            let documents: Vec<Document> =
                (0..count).map(|i: usize| document(format!("{i} ").repeat(1 + i % 9))).collect();
            let mut survey = Survey::new(share);
            documents.iter().for_each(|document| survey.add(&document.text));
            let Rule::Below(bound) = survey.rule() else { panic!("{count} {share}") };
            let held = documents.iter().filter(|document| number(&document.text) < bound);
            let held: usize = held.map(|document| document.text.len()).sum();
            let got = held as f64 / bytes(&documents) as f64;
            assert!((got - share).abs() < 0.5 * 30.0 / bytes(&documents) as f64, "{count} {share} {got}");
        }
        assert_eq!(Survey::new(0.0).rule(), Rule::Nothing);
    }
}
