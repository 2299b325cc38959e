//! Files of text and rows in the forms that other programs write.

use serde_json::{Value, json};

use crate::place::{Place, assert_contains, figures, fixture, shards};

/// Thirty texts of 30 bytes or so, by json, gzip and bz2 of Python, zstd of the command line, and pyarrow.
#[test]
fn the_same_rows_are_the_same_tokens_in_every_form() {
    let place = Place::new();
    let forms = [
        "lines.json",
        "array.json",
        "array.json.bz2",
        "lines.jsonl.gz",
        "lines.ndjson.zst",
        "bom.jsonl",
        "ROWS.PARQUET",
    ];
    for name in ["LINES.JSONL", "lines.ndjson"] {
        place.copy("forms/lines.json", name);
    }
    for name in forms {
        place.copy(&format!("forms/{name}"), name);
    }
    let lines = std::fs::read_to_string(place.path("lines.ndjson")).unwrap();
    let texts = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let bytes: usize = texts.map(|line| line["text"].as_str().unwrap().len()).sum();
    let mut prepared = Vec::new();
    for (number, name) in ["LINES.JSONL", "lines.ndjson"].into_iter().chain(forms).enumerate() {
        let to = format!("tokens-{number}");
        let (stdout, _) = place.done(&["data", "prepare", "--data", name, "--to", &to]);
        let (train, validation) = (figures(&stdout, "training"), figures(&stdout, "validation"));
        assert_eq!((train.1 + validation.1, train.0 + validation.0), (30, bytes as u64 + 30), "{name}");
        prepared.push(shards(&place.path(&to)));
        let measured = place.eval(&[".", "--data", name, "--sequence-length", "32"]);
        // All but the very first byte.
        assert_eq!(measured["bytes"], bytes - 1, "{name}");
    }
    assert!(prepared.windows(2).all(|pair| pair[0] == pair[1]));
    let trained = |name: &str| {
        place.done(&["train", "recipe.toml", "--data", name, "--name", name]);
        place.json(&format!("runs/{name}/summary.json"))["corpus_hash"].clone()
    };
    assert_eq!(trained("array.json.bz2"), trained("lines.ndjson.zst"));
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let place = Place::new();
    for (number, name) in ["bom.txt", "plain.txt", "plain.txt.bz2"].into_iter().enumerate() {
        place.copy(&format!("forms/{name}"), name);
        place.done(&["data", "prepare", "--data", name, "--to", &format!("tokens-{number}")]);
    }
    let of = |number: usize| shards(&place.path(&format!("tokens-{number}")));
    assert_eq!(of(0), of(1));
    assert_eq!(of(2), of(1));
    place.write("utf16.txt", b"\xff\xfea\0b\0");
    let stderr = place.refused(&["data", "prepare", "--data", "utf16.txt", "--to", "t"]);
    assert_contains(&stderr, &["utf16.txt: expected UTF-8 text, found UTF-16 at byte 0"]);
}

#[test]
fn parquet_is_read_in_every_usual_codec() {
    let place = Place::new();
    for codec in ["gzip", "brotli", "lz4"] {
        let name = format!("{codec}.parquet");
        place.copy(&format!("forms/{name}"), &name);
        let (stdout, _) = place.done(&["data", "prepare", "--data", &name, "--to", codec]);
        assert_eq!(figures(&stdout, "training").1 + figures(&stdout, "validation").1, 53, "{codec}");
    }
}

#[test]
fn another_field_is_named_and_a_conversation_is_no_text() {
    let place = Place::new();
    let row = |number: usize| json!({"id": number, "content": format!("row {number} of code")});
    place.write("code.jsonl", (0..30).map(|number| format!("{}\n", row(number))).collect::<String>());
    let prepare = ["data", "prepare", "--data", "code.jsonl", "--to", "tokens"];
    let stderr = place.refused(&prepare);
    let expected = "line 1: expected a JSON object with a text in the field `text`, got the fields content, id; data.field";
    assert_contains(&stderr, &[expected]);
    let (stdout, _) = place.done(&[&prepare[..], &["--field", "content"]].concat());
    assert_eq!(figures(&stdout, "training").1 + figures(&stdout, "validation").1, 30);
    let stderr = place.refused(&["train", "recipe.toml", "--data", "code.jsonl"]);
    assert_contains(&stderr, &["data.paths: ", expected]);
    place.done(&["train", "recipe.toml", "--data", "code.jsonl", "--set", "data.field=content"]);
    place.eval(&[".", "--data", "code.jsonl", "--field", "content", "--sequence-length", "32"]);
    place.write("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}\n");
    let stderr = place.refused(&["train", "recipe.toml", "--data", "chat.jsonl"]);
    assert_contains(
        &stderr,
        &["got a conversation in `messages`, which has no text yet", "apply_chat_template"],
    );
}

#[test]
fn archives_and_other_compressions_are_named() {
    let place = Place::new();
    place.write("a.txt.xz", b"\xfd7zXZ\0\0\x04");
    place.write("cut.jsonl.gz", &std::fs::read(fixture("forms/lines.jsonl.gz")).unwrap()[..100]);
    let stderr = place.refused(&["data", "prepare", "--data", "a.txt.xz", "cut.jsonl.gz", "--to", "t"]);
    assert_contains(
        &stderr,
        &[
            "a.txt.xz: expected text, or text compressed with gzip, zstd or bzip2, got a file compressed with xz",
            "cut.jsonl.gz: expected a whole gzip file, got: ",
        ],
    );
}

#[test]
fn what_is_skipped_in_folders_is_said_by_every_command() {
    let place = Place::new();
    place.copy("hf/text.txt", "notes/a.txt");
    place.write("notes/b.bin", b"\0");
    place.write("notes/c.latin1", b"caf\xe9");
    place.write("notes/.hidden", b"x");
    let words = "warning: skipped in the folders of --data: binary files 2, hidden entries 1";
    for command in [
        &["data", "prepare", "--data", "notes", "--to", "tokens"][..],
        &["train", "recipe.toml", "--data", "notes"],
        &["eval", ".", "--data", "notes"],
    ] {
        assert_contains(&place.done(command).1, &[words]);
    }
}

#[test]
fn a_refusal_leaves_nothing_and_the_mended_file_goes_on() {
    let place = Place::new();
    let row = "{\"text\": \"a row that is well\"}\n";
    place.write("rows.jsonl", format!("{row}{{\"text\": \n{row}"));
    let prepare = ["data", "prepare", "--data", "rows.jsonl", "--to", "tokens"];
    assert_contains(&place.refused(&prepare), &["rows.jsonl: line 2: expected a JSON object"]);
    place.write("rows.jsonl", row.repeat(3));
    place.done(&prepare);
}

/// What a job reads is below the data root of the workers.
#[test]
fn a_job_takes_its_data_as_a_run_does() {
    let place = Place::new();
    let stderr = place.refused(&["submit", "recipe.toml", "--data", "../notes", "/abs"]);
    let expected = "data.paths: expected a path below the workers' data root, got ";
    assert_contains(&stderr, &[&format!("{expected}\"../notes\""), &format!("{expected}\"/abs\"")]);
}

#[test]
fn the_tokens_for_filling_in_are_named_where_a_tokenizer_has_none() {
    let place = Place::new();
    let stderr = place.refused(&["data", "prepare", "--data", "text.txt", "--fim-rate", "0.1", "--to", "t"]);
    assert_contains(&stderr, &["--fim-rate: expected 0, or a tokenizer with", "<|fim_prefix|>"]);
    assert_contains(&stderr, &["(DeepSeek)", "(Qwen)", "(StarCoder)"]);
}
