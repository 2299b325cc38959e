//! What is trained on, what is validated on, and what is measured.

use serde_json::json;

use crate::place::{Place, assert_contains, figures};

#[test]
fn texts_that_come_twice_are_read_twice_by_every_command() {
    let place = Place::new();
    let line = |text: &str| format!("{}\n", json!({ "text": text }));
    place.write("same.jsonl", line("the same sentence, many times over").repeat(200));
    let (stdout, stderr) = place.done(&["data", "prepare", "--data", "same.jsonl", "--to", "tokens"]);
    assert_eq!(figures(&stdout, "training").1, 200);
    assert_contains(&stderr, &["note: the documents are few", "the last 10.0% of each are held back"]);
    place.done(&["train", "recipe.toml", "--data", "same.jsonl", "--name", "text"]);
    place.done(&["train", "recipe.toml", "--data", "tokens", "--name", "tokens"]);
    let loss = |run: &str| place.json(&format!("runs/{run}/summary.json"))["final_loss"].clone();
    assert_eq!(loss("text"), loss("tokens"));
    place.write("twice.jsonl", line("one of two").repeat(2));
    let measured = place.eval(&[".", "--data", "twice.jsonl", "--sequence-length", "16"]);
    assert_eq!(measured["bytes"], 2 * "one of two".len() - 1);
}

#[test]
fn one_file_is_enough_and_a_run_of_it_validates() {
    let place = Place::new();
    place.write("story.txt", "once upon a time there was a rank, and it waited. ".repeat(20));
    let (stdout, _) = place.done(&["data", "prepare", "--data", "story.txt", "--to", "tokens"]);
    assert_eq!((figures(&stdout, "training"), figures(&stdout, "validation")), ((901, 1), (101, 1)));
    let (stdout, stderr) = place.done(&["train", "recipe.toml", "--data", "tokens"]);
    assert_contains(&stdout, &["validation on "]);
    assert!(!stderr.contains("no validation"), "{stderr}");
}

/// Ten small files and one that is more than all of them.
#[test]
fn what_is_held_back_is_a_share_of_the_text_and_not_of_the_documents() {
    let place = Place::new();
    for number in 0..10 {
        place.write(&format!("code/{number}.py"), format!("print({number})  # a short file\n").repeat(4));
    }
    for large in 0..12 {
        // Some of them have a hash that chooses them.
        place.write("code/large.md", format!("{large} a large file. ").repeat(200));
        let to = format!("tokens-{large}");
        let (stdout, _) = place.done(&["data", "prepare", "--data", "code", "--to", &to]);
        let (train, validation) = (figures(&stdout, "training").0, figures(&stdout, "validation").0);
        let share = validation as f64 / (train + validation) as f64;
        assert!((0.05..0.2).contains(&share), "{large}: {share}: {stdout}");
    }
}

#[test]
fn the_text_to_validate_on_is_chosen_by_path_or_share() {
    let place = Place::new();
    place.write("held.txt", "a text that nothing is learnt from. ".repeat(10));
    let train = ["train", "recipe.toml", "--data", "text.txt", "--set", "training.validation_sequences=1000"];
    let validated = |more: &[&str], name: &str| {
        let stderr = place.done(&[&train[..], more, &["--name", name]].concat()).1;
        (place.json(&format!("runs/{name}/summary.json"))["validation_bytes"].as_u64().unwrap(), stderr)
    };
    // 46 bytes of 468: one sequence of 32. Half: seven.
    assert_eq!(validated(&[], "tenth").0, 32);
    assert_eq!(validated(&["--set", "data.validation_share=0.5"], "half").0, 224);
    assert_eq!(validated(&["--set", "data.validation=[\"held.txt\"]"], "named").0, 352);
    place.done(&["data", "prepare", "--data", "held.txt", "--to", "held", "--validation-share", "0"]);
    assert_eq!(validated(&["--set", "data.validation=[\"held\"]"], "prepared").0, 352);
    // None is said.
    let (bytes, stderr) = validated(&["--set", "data.validation_share=0"], "none");
    assert_eq!(bytes, 0);
    assert_contains(
        &stderr,
        &["warning: no validation: the text to validate on has 0 sequences of 32 tokens"],
    );
    let (_, stderr) = validated(&["--set", "training.validation_sequences=0"], "zero");
    assert_contains(&stderr, &["warning: no validation: training.validation_sequences is 0"]);
    let few = ["--set", "training.validation_sequences=1", "--set", "training.micro_batch_size=2"];
    let words = "no validation: training.validation_sequences is 1, less than a round of 2 (micro_batch_size 2 x expert 1";
    assert_contains(&validated(&few, "few").1, &["warning: ", words]);
    let (stdout, _) = place.done(&[&["plan", "recipe.toml"], &few[..]].concat());
    assert_contains(&stdout, &["note: ", words]);
    // Changed data to validate on is other data.
    place.write("held.txt", "another text. ".repeat(30));
    let stderr = place.refused(&["train", "--resume", "runs/named", "--set", "training.steps=2"]);
    assert_contains(&stderr, &["data.paths: expected data of blake3"]);
}

#[test]
fn the_tail_of_a_text_and_a_short_text_are_measured() {
    let place = Place::new();
    let measured = |data: &str, length: &str| place.eval(&[".", "--data", data, "--sequence-length", length]);
    let bytes = |data: &str, length: &str| {
        let measured = measured(data, length);
        (measured["bytes"].as_u64().unwrap(), measured["sequences"].as_u64().unwrap())
    };
    assert_eq!(bytes("text.txt", "32"), (467, 15));
    assert_eq!(bytes("text.txt", "512"), (467, 1));
    place.write("prompt.txt", "twenty-nine bytes of a prompt");
    assert_eq!(bytes("prompt.txt", "512"), (28, 1));
    // A text of two sequences costs what both cost: the second one begins with the last byte that the first one predicts.
    let nats = |data: &str| {
        let measured = measured(data, "300");
        measured["bits_per_byte"].as_f64().unwrap() * measured["bytes"].as_f64().unwrap()
    };
    let whole = std::fs::read(place.path("text.txt")).unwrap();
    place.write("first.txt", &whole[..301]);
    place.write("second.txt", &whole[300..]);
    let parts = nats("first.txt") + nats("second.txt");
    assert!((nats("text.txt") - parts).abs() < 1e-5 * parts, "{parts}");
}
