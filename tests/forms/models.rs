//! Tokenizers and configurations: where they come from, and what is said of them.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::deadline;
use crate::place::{Place, RECIPE, assert_contains, figures, fixture, text};

const LINES: usize = 200;

fn write_corpus(place: &Place, name: &str) {
    let line = |number: usize| format!("the {number} quick foxes jump over {} dogs\n", number % 7);
    place.write(name, (0..LINES).map(line).collect::<String>());
}

fn train_tokenizer(place: &Place, size: &str, to: &str) {
    place.done(&["data", "train-tokenizer", "--data", "corpus.txt", "--vocab-size", size, "--to", to]);
}

/// A folder with a model of 512 rows, and a tokenizer made of the text.
fn with_tokenizer() -> Place {
    let place = Place::new();
    let mut config = place.json("config.json");
    config["vocab_size"] = 512.into();
    place.write("large.json", config.to_string());
    place.write("large.toml", RECIPE.replace("config.json", "large.json"));
    write_corpus(&place, "corpus.txt");
    train_tokenizer(&place, "400", "tokenizer.json");
    place
}

#[test]
fn prepared_tokens_bring_the_tokenizer_and_are_measured_by_part() {
    let place = with_tokenizer();
    let prepare =
        ["data", "prepare", "--data", "corpus.txt", "--tokenizer", "tokenizer.json", "--to", "tokens"];
    let (stdout, _) = place.done(&prepare);
    std::fs::rename(place.path("tokenizer.json"), place.path("elsewhere.json")).unwrap();
    let (_, stderr) = place.done(&["train", "large.toml", "--data", "tokens"]);
    assert_contains(
        &stderr,
        &["note: the tokenizer is that of the prepared data, ", "tokens/tokenizer.json"],
    );
    place.done(&["train", "--resume", "--set", "training.steps=2"]);
    place.done(&["generate", "--prompt", "the ", "--tokens", "3"]);
    let part = |more: &[&str]| place.eval(&[&["runs/large", "--data", "tokens"], more].concat());
    let of = |part: &Value| (part["tokens"].as_u64().unwrap(), part["split"].as_str().unwrap().to_owned());
    let (train, validation) = (figures(&stdout, "training").0, figures(&stdout, "validation").0);
    // Every token but the first is predicted from one before it.
    assert_eq!(of(&part(&[])), (validation - 1, "validation".into()));
    assert_eq!(of(&part(&["--split", "train"])), (train - 1, "train".into()));
    let all = part(&["--split", "all"]);
    assert_eq!(of(&all), (train + validation - 1, "all".into()));
    let bytes = std::fs::metadata(place.path("corpus.txt")).unwrap().len();
    assert!(all["bytes"].as_u64().unwrap().abs_diff(bytes) < 8, "{all}");
    let (stdout, _) = place.done(&["eval", "runs/large", "--data", "tokens"]);
    assert_contains(&stdout, &[" bytes of the validation part of tokens in "]);
    // The tokens of another one say whose they are.
    train_tokenizer(&place, "300", "other.json");
    let other = ["train", "large.toml", "--data", "tokens", "--set", "tokenizer.path=other.json"];
    let words = "tokens/tokenizer.json, which a run takes that names no other";
    assert_contains(&place.refused(&other), &["got those of ", words]);
}

#[test]
fn weights_bring_their_tokenizer_and_another_one_is_said() {
    let place = with_tokenizer();
    let train = ["train", "large.toml", "--data", "corpus.txt", "--name"];
    place.done(&[&train[..], &["first", "--set", "tokenizer.path=tokenizer.json"]].concat());
    std::fs::rename(place.path("tokenizer.json"), place.path("elsewhere.json")).unwrap();
    let (_, stderr) = place.done(&[&train[..], &["second", "--init", "first"]].concat());
    assert_contains(
        &stderr,
        &["note: the tokenizer is that of the weights, ", "runs/first/model/tokenizer.json"],
    );
    let file = |run: &str| std::fs::read(place.path(&format!("runs/{run}/model/tokenizer.json"))).unwrap();
    assert_eq!(file("first"), file("second"));
    place.done(&["train", "--resume", "runs/second", "--set", "training.steps=2"]);
    train_tokenizer(&place, "300", "other.json");
    let other = ["third", "--init", "first", "--set", "tokenizer.path=other.json"];
    let (_, stderr) = place.done(&[&train[..], &other].concat());
    let words = "note: the tokenizer, or its end of a document, is not that of the weights in ";
    assert_contains(&stderr, &[words]);
}

#[test]
fn the_hint_of_a_new_tokenizer_is_a_command_that_works() {
    let place = Place::new();
    write_corpus(&place, "my text.txt");
    let make = ["data", "train-tokenizer", "--vocab-size", "300", "--to", "my tokenizer.json", "--data"];
    let (stdout, _) = place.done(&[&make[..], &["my text.txt"]].concat());
    let hint = stdout.lines().find_map(|line| line.strip_prefix("next: contraflow ")).unwrap();
    assert_eq!(hint, "train tiny --set 'tokenizer.path=my tokenizer.json' --data 'my text.txt'");
    let binary = env!("CARGO_BIN_EXE_contraflow");
    let quick =
        "--set training.steps=1 --set training.sequence_length=32 --set training.validation_sequences=4";
    let command = format!("{binary} {hint} {quick}");
    let output = deadline::output(Command::new("sh").args(["-c", &command]).current_dir(place.path(".")));
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// One puts a blank before every document, one replaces characters, one drops white space and what it does not know.
#[test]
fn bytes_are_bytes_of_the_text_whatever_the_tokenizer_does() {
    let place = Place::new();
    let data = fixture("hf/text-200.jsonl");
    let lines = std::fs::read_to_string(&data).unwrap();
    let texts = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let bytes: usize = texts.map(|line| line["text"].as_str().unwrap().len()).sum();
    assert_eq!(bytes, 10322);
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(fixture("hf/words.json")).unwrap()).unwrap();
    config["eos_token_id"] = 1.into();
    for name in ["llama", "uni", "wl"] {
        place.write(&format!("{name}/config.json"), config.to_string());
        place.copy("hf/words.safetensors", &format!("{name}/model.safetensors"));
        place.copy(&format!("hf/tokenizer-{name}.json"), &format!("{name}/tokenizer.json"));
        let of =
            |data: &Path| place.eval(&[name, "--data", data.to_str().unwrap(), "--sequence-length", "8"]);
        let measured = of(&data);
        let counted = measured["bytes"].as_f64().unwrap();
        assert!((counted / bytes as f64 - 1.0).abs() < 0.01, "{name}: {measured}");
    }
}

#[test]
fn keys_of_a_configuration_that_change_nothing_are_said() {
    let place = Place::new();
    let mut config = place.json("config.json");
    (config["my_new_knob"], config["aux_loss_alpha"]) = (3.into(), 0.001.into());
    place.write("config.json", config.to_string());
    let words = "config.json: keys without effect: aux_loss_alpha (the recipe's balance.sequence_alpha counts), my_new_knob";
    let train = ["train", "recipe.toml", "--data", "text.txt"];
    assert_contains(&place.done(&train).1, &["note: ", words]);
    assert_contains(&place.done(&["import", ".", "--name", "knob"]).1, &["note: ", words]);
    assert_contains(&place.done(&["plan", "recipe.toml"]).0, &["note: ", words]);
}

#[test]
fn a_built_in_model_is_printed_to_be_changed() {
    let place = Place::new();
    place.write("config.json", place.done(&["recipes", "--model", "tiny"]).0);
    assert_eq!(place.json("config.json")["vocab_size"], 320);
    place.done(&["plan", "recipe.toml"]);
}
