//! Prepared folders: the same tokens as in memory, the same bytes however often interrupted, and no shard read that is
//! not the one written.

use std::collections::BTreeMap;

use super::*;
use crate::data::load::{DataRequest, Loaded, WholeRequest, load, load_whole};
use crate::data::shards::{Part, Shards};
use crate::data::tokenizer::Tokenizer;
use crate::data::{hf_tokenizer, parquet_file};

/// A folder with a text file, a JSONL file and a Parquet file; 90 documents.
fn input() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = |i: usize| format!("document number {i}, {}", "with some text ".repeat(i % 7));
    let lines: String = (0..50).map(|i| format!("{}\n", serde_json::json!({ "text": text(i) }))).collect();
    fs::write(folder.path().join("a.jsonl"), lines).unwrap();
    let rows: Vec<String> = (50..89).map(text).collect();
    let rows: Vec<Option<&str>> = rows.iter().map(|row| Some(row.as_str())).collect();
    let codec = parquet::basic::Compression::SNAPPY;
    parquet_file::tests::write(&folder.path().join("b.parquet"), "text", &[&rows], codec);
    fs::write(folder.path().join("c.txt"), text(89)).unwrap();
    fs::write(folder.path().join("d.bin"), b"\0").unwrap();
    folder
}

fn preparation(input: &Path, to: &Path, tokenizer: Tokenizer) -> Preparation {
    let encoder = DocumentEncoder::plain(tokenizer);
    Preparation {
        paths: vec![input.into()],
        validation: Vec::new(),
        validation_share: 0.1,
        field: "text".into(),
        encoder,
        to: to.into(),
        shard_tokens: 500,
    }
}

/// What a preparation leads to, uninterrupted.
fn prepared(preparation: &Preparation) -> ShardIndex {
    prepare(preparation, &mut |_| true).unwrap().index
}

fn texts(path: &Path) -> Vec<Vec<u8>> {
    let (mut texts, reading) = (Vec::new(), Reading { field: "text", piece_bytes: PIECE_BYTES });
    files::visit(&[path.into()], reading, &mut |document| texts.push(document.text)).unwrap();
    texts
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn fault_texts(faults: Vec<PrepareFault>) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_shards_hold_the_documents_in_their_order() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    for tokenizer in [Tokenizer::Bytes, hf_tokenizer::tests::trained()] {
        let to = out.path().join(tokenizer.hash());
        let preparation = preparation(input.path(), &to, tokenizer.clone());
        let Prepared { index, skipped, rule } = prepare(&preparation, &mut |_| true).unwrap();
        assert!(index.train.len() > 2 && index.id_bytes == 2 && skipped.not_text == 1);
        let Some(Rule::Below(bound)) = rule else { panic!("{rule:?}") };
        let mut expected = [Vec::new(), Vec::new()];
        for text in texts(input.path()) {
            let side = &mut expected[usize::from(number(&text) < bound)];
            side.extend(tokenizer.encode(&text));
            side.push(tokenizer.end_of_document());
        }
        for (records, expected) in [(&index.train, &expected[0]), (&index.validation, &expected[1])] {
            let shards = Shards::open(&to, &index, records).unwrap();
            assert_eq!(shards.read(0..shards.len()), *expected);
            assert!(!expected.is_empty());
            // Every short range, over the edges of shards too.
            for start in 0..expected.len() - 3 {
                assert_eq!(shards.read(start..start + 3), expected[start..start + 3], "{start}");
            }
        }
    }
}

#[test]
fn an_interrupted_preparation_ends_in_the_same_bytes() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let whole = out.path().join("whole");
    prepared(&preparation(input.path(), &whole, Tokenizer::Bytes));
    let expected = contents(&whole);
    let kinds: std::collections::BTreeSet<&str> =
        expected.keys().map(|name| name.split(['-', '.']).next().unwrap()).collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["index", "train", "validation"]);
    let cut = out.path().join("cut");
    let cut_preparation = preparation(input.path(), &cut, Tokenizer::Bytes);
    let mut kept = 0;
    // Every call is stopped at the first unit that it adds, until there is no more to add.
    loop {
        let outcome = prepare(&cut_preparation, &mut |progress| progress.units == kept);
        match outcome {
            Err(faults) => assert!(matches!(faults[..], [PrepareFault::Stopped])),
            Ok(_) => break,
        }
        kept += 1;
        assert!(kept < 100);
        // What a kill leaves of the unit under way.
        fs::write(cut.join(format!("train-{kept:05}.partial")), b"half").unwrap();
    }
    assert!(kept > 2);
    let mut got = contents(&cut);
    got.retain(|name, _| !name.ends_with(".partial"));
    assert!(got == expected, "the folders differ: {:?} {:?}", got.keys(), expected.keys());
    // Ready folders stay as they are, and others are not taken over.
    prepare(&cut_preparation, &mut |_| false).unwrap();
    let other = Preparation { shard_tokens: 501, ..cut_preparation };
    assert!(
        fault_texts(prepare(&other, &mut |_| true).unwrap_err()).contains("one that holds something else")
    );
}

#[test]
fn a_shard_that_is_not_the_one_written_is_refused_by_name() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let to = out.path().join("tokens");
    let index = prepared(&preparation(input.path(), &to, Tokenizer::Bytes));
    let name = index.train[1].file.clone();
    let path = to.join(&name);
    let whole = fs::read(&path).unwrap();
    let refusal = || {
        let faults = Shards::open(&to, &index, &index.train).unwrap_err();
        assert_eq!(faults.len(), 1);
        faults[0].to_string()
    };
    for at in [0, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(refusal().starts_with(&format!("{}: expected the checksum", path.display())));
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let expected = format!("{}: expected {} bytes, got {}", path.display(), whole.len(), whole.len() - 1);
    assert_eq!(refusal(), expected);
    fs::remove_file(&path).unwrap();
    assert!(refusal().starts_with(&format!("{}: cannot be read", path.display())));
}

#[test]
fn an_id_beyond_the_vocabulary_is_refused() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let to = out.path().join("tokens");
    let mut index = prepared(&preparation(input.path(), &to, Tokenizer::Bytes));
    index.id_limit = 256;
    let error_text = Shards::open(&to, &index, &index.train[..1]).unwrap_err()[0].to_string();
    assert!(error_text.ends_with("expected token ids below 256, got 256"), "{error_text}");
}

#[test]
fn a_run_takes_a_prepared_folder_of_its_own_tokenizer_only() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let to = out.path().join("tokens");
    prepared(&preparation(input.path(), &to, Tokenizer::Bytes));
    let take = |paths: &[PathBuf], weights: &[u32], tokenizer: Tokenizer| {
        let encoder = DocumentEncoder::plain(tokenizer);
        load(DataRequest {
            paths,
            weights,
            field: "text",
            validation: &[],
            validation_share: 0.1,
            encoder: &encoder,
            sequence_length: 16,
        })
    };
    let one = [to.clone()];
    let Loaded { name, train, validation, .. } = take(&one, &[], Tokenizer::Bytes).unwrap();
    assert_eq!(name, "prepared");
    assert!(train.num_sequences() > 100 && validation.num_sequences() > 5 && train.tokens().is_none());
    let error_text = take(&one, &[], hf_tokenizer::tests::trained()).unwrap_err()[0].to_string();
    assert!(
        error_text.contains("expected tokens of the run's tokenizer")
            && error_text.ends_with("tokens of bytes"),
        "{error_text}"
    );
    // Beside another path it needs a weight.
    let two = [to, input.path().to_path_buf()];
    let error_text = take(&two, &[], Tokenizer::Bytes).unwrap_err()[0].to_string();
    assert!(error_text.contains("expected data.weights"), "{error_text}");
    let joined = take(&two, &[3, 1], Tokenizer::Bytes).unwrap();
    let [(first, 3), (second, 1)] = joined.train.sources()[..] else {
        panic!("{:?}", joined.train.sources())
    };
    assert_eq!((first, first + second), (train.num_sequences(), joined.train.num_sequences()));
    assert_eq!(joined.train.sequence(first - 1), train.sequence(first - 1));
}

#[test]
fn faults_of_the_input_come_with_their_place() {
    let (input, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let to = out.path().join("tokens");
    let refusal = |paths: &[&str]| {
        let paths = paths.iter().map(|name| input.path().join(name)).collect();
        let preparation = Preparation { paths, ..preparation(input.path(), &to, Tokenizer::Bytes) };
        let words = fault_texts(prepare(&preparation, &mut |_| true).unwrap_err());
        assert!(!to.exists(), "nothing is written for it");
        words
    };
    fs::write(input.path().join("a.txt"), "text").unwrap();
    // A folder below a file cannot be read, even by root.
    let error_text = refusal(&["missing", "a.txt/folder"]);
    let root = input.path().display();
    let expected = format!("{root}/missing: no such file or folder\n{root}/a.txt/folder: cannot be read: ");
    assert!(error_text.starts_with(&expected), "{error_text}");
    fs::write(input.path().join("b.jsonl"), "{\"text\":\"a\"}\n{\"text\":").unwrap();
    let error_text = refusal(&["b.jsonl", "missing", "a.txt"]);
    assert!(
        error_text.starts_with(&format!("{root}/b.jsonl: line 2: expected a JSON object")),
        "{error_text}"
    );
    assert!(error_text.ends_with(&format!("\n{root}/missing: no such file or folder")), "{error_text}");
    // With the line mended the same call goes on.
    fs::write(input.path().join("b.jsonl"), "{\"text\":\"a longer text\"}\n").unwrap();
    let paths = vec![input.path().join("b.jsonl")];
    let index = prepared(&Preparation { paths, ..preparation(input.path(), &to, Tokenizer::Bytes) });
    assert_eq!(index.train.iter().map(|shard| shard.documents).sum::<u64>(), 1);
}

#[test]
fn what_fails_to_be_written_leaves_nothing_and_a_folder_of_others_is_left_alone() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    fs::write(out.path().join("mine.txt"), "x").unwrap();
    let to = out.path().to_path_buf();
    let refused = prepare(&preparation(input.path(), &to, Tokenizer::Bytes), &mut |_| true).unwrap_err();
    assert!(fault_texts(refused).contains("one that holds something else"));
    assert_eq!(contents(&to).into_keys().collect::<Vec<_>>(), ["mine.txt"]);
    // A folder in the place of the first shard: it cannot be created.
    let to = out.path().join("tokens");
    fs::create_dir(&to).unwrap();
    fs::create_dir(to.join("train-00000.partial")).unwrap();
    let refused = prepare(&preparation(input.path(), &to, Tokenizer::Bytes), &mut |_| true).unwrap_err();
    assert!(fault_texts(refused).contains("train-00000.partial"));
    assert!(to.read_dir().unwrap().all(|entry| entry.unwrap().file_name() == "train-00000.partial"));
}

/// Documents and tokens of both sides.
fn sides_of(index: &ShardIndex) -> [(u64, u64); 2] {
    [&index.train, &index.validation].map(|side| {
        (side.iter().map(|shard| shard.documents).sum(), side.iter().map(|shard| shard.tokens).sum())
    })
}

#[test]
fn one_file_is_enough_and_gives_its_end() {
    let (input, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for number in 0..20 {
        // Whatever its hash.
        let text = format!("{number:4} ").repeat(200);
        fs::write(input.path().join("story.txt"), &text).unwrap();
        let to = out.path().join(format!("tokens-{number}"));
        let Prepared { index, rule, .. } =
            prepare(&preparation(input.path(), &to, Tokenizer::Bytes), &mut |_| true).unwrap();
        assert_eq!((sides_of(&index), rule), ([(1, 901), (1, 101)], Some(Rule::Ends(0.1))));
    }
}

#[test]
fn the_text_to_validate_on_is_named_or_a_share() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let own = out.path().join("own.txt");
    fs::write(&own, "a text of our own").unwrap();
    let of = |name: &str, validation: Vec<PathBuf>, validation_share: f64| {
        let to = out.path().join(name);
        let preparation = preparation(input.path(), &to, Tokenizer::Bytes);
        sides_of(&prepared(&Preparation { validation, validation_share, ..preparation }))
    };
    let all = texts(input.path());
    let all_tokens = all.iter().map(|text| text.len() as u64 + 1).sum::<u64>();
    let everything = (all.len() as u64, all_tokens);
    assert_eq!(of("named", vec![own], 0.1), [everything, (1, 18)]);
    assert_eq!(of("none", vec![], 0.0), [everything, (0, 0)]);
    let [(train, _), (validation, tokens)] = of("third", vec![], 0.3);
    assert_eq!(train + validation, everything.0);
    assert!((tokens as f64 / all_tokens as f64 - 0.3).abs() < 0.02, "{tokens} {all_tokens}");
}

#[test]
fn a_folder_carries_its_tokenizer_and_the_bytes_of_its_text() {
    let (input, out) = (input(), tempfile::tempdir().unwrap());
    let to = out.path().join("tokens");
    let tokenizer = hf_tokenizer::tests::trained();
    let index = prepared(&preparation(input.path(), &to, tokenizer.clone()));
    for (name, bytes) in tokenizer.files() {
        assert_eq!(fs::read(to.join(name)).unwrap(), bytes);
    }
    let all: usize = texts(input.path()).iter().map(Vec::len).sum();
    let encoder = DocumentEncoder::plain(tokenizer);
    let whole = |part| {
        load_whole(std::slice::from_ref(&to), WholeRequest { field: "text", encoder: &encoder, part }, 16)
    };
    assert_eq!(whole(Part::All).unwrap().sequences.text_bytes(), Some(all as u64));
    let [(_, train), (_, validation)] = sides_of(&index);
    assert_eq!(whole(Part::Train).unwrap().sequences.num_tokens() as u64, train);
    assert_eq!(whole(Part::Validation).unwrap().sequences.num_tokens() as u64, validation);
    // An index of the first version has no bytes of text.
    let text = fs::read_to_string(to.join(INDEX)).unwrap();
    let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
    old["version"] = 1.into();
    for shard in old["train"].as_array_mut().unwrap() {
        shard.as_object_mut().unwrap().remove("text_bytes");
    }
    fs::write(to.join(INDEX), old.to_string()).unwrap();
    assert_eq!(whole(Part::All).unwrap().sequences.text_bytes(), None);
}
