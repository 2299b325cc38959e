//! Directories as they are published and edited: other spellings, buffers among the weights, other tokenizers, several end
//! tokens. The models have random weights of 15,000 to 30,000 parameters; what is right is what transformers computes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::place::{Place, text};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// A folder with a model: of bytes (`bytes`, 257 rows) or of the word pieces of `wordpiece.json` (`words`, 701 rows). The keys
/// are set in its `config.json`.
fn model(place: &Place, dir: &str, kind: &str, keys: Value) {
    let mut config = fixture_json(&format!("{kind}.json"));
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::create_dir_all(place.path(dir)).unwrap();
    std::fs::write(place.path(dir).join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixture(&format!("{kind}.safetensors")), place.path(dir).join("model.safetensors"))
        .unwrap();
}

fn write(place: &Place, path: &str, value: &Value) {
    std::fs::write(place.path(path), value.to_string()).unwrap();
}

/// The text as far as it fills sequences of 32 tokens, and the token behind them, which is the last target: what transformers
/// was given to measure.
fn whole_sequences(place: &Place, data: &str) -> String {
    let text = std::fs::read_to_string(fixture(data)).unwrap();
    let whole = match data {
        "text.txt" => text[..14 * 32 + 1].to_owned(),
        "text.jsonl" => {
            let lines: Vec<&str> = text.lines().collect();
            let (last, before) = lines.split_last().unwrap();
            assert!(last.contains("sequence length or text"));
            [
                before.join("\n"),
                json!({"text": "sequence length or text is refused; other chang"}).to_string(),
            ]
            .join("\n")
        }
        other => panic!("{other}"),
    };
    let name = format!("whole-{data}");
    std::fs::write(place.path(&name), whole).unwrap();
    name
}

fn measured(place: &Place, model: &str, data: &str) -> Value {
    let data = whole_sequences(place, data);
    let args = ["eval", model, "--data", &data, "--sequence-length", "32", "--format", "json"];
    serde_json::from_str(&place.done(&args)).unwrap()
}

fn assert_loss(place: &Place, model: &str, data: &str, expected: f64) {
    let loss = measured(place, model, data)["loss"].as_f64().unwrap();
    assert!((loss - expected).abs() < 1e-5, "{model}: {loss} {expected}");
}

fn assert_contains(stderr: &str, words: &[&str]) {
    assert!(words.iter().all(|word| stderr.contains(word)), "expected {words:?} in {stderr}");
}

/// Loss of `bytes` on text.txt and of `words` on text.jsonl, in sequences of 32, by transformers in f32. The ends of
/// documents are read and not predicted.
const LOSS_OF_BYTES: f64 = 7.773_028_033;
const LOSS_OF_WORDS: f64 = 8.614_624;

#[test]
fn every_spelling_of_the_rotary_base_gives_the_logits_of_transformers() {
    let place = Place::new();
    let spellings: BTreeMap<String, Value> = serde_json::from_value(fixture_json("rope.json")).unwrap();
    assert_eq!(spellings.len(), 6);
    for (name, spelling) in spellings {
        model(&place, &name, "bytes", json!({"rope_parameters": null}));
        let mut config = place.json(&format!("{name}/config.json"));
        config.as_object_mut().unwrap().extend(spelling["keys"].as_object().unwrap().clone());
        write(&place, &format!("{name}/config.json"), &config);
        let data = fixture("text.txt");
        let data = data.to_str().unwrap();
        place.done(&[
            "eval",
            &name,
            "--data",
            data,
            "--sequence-length",
            "32",
            "--logits",
            "out.safetensors",
        ]);
        let bytes = std::fs::read(place.path("out.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let logits = tensors.tensor("logits").unwrap();
        let row = logits.data().chunks_exact(4 * 257).nth(31).unwrap();
        let row = row.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
        let expected: Vec<f32> = serde_json::from_value(spelling["logits"].clone()).unwrap();
        let furthest = row.zip(&expected).map(|(got, right)| (got - right).abs()).fold(0.0, f32::max);
        assert!(furthest < 1e-3, "{name}: {furthest}");
    }
}

#[test]
fn a_spelling_that_contradicts_itself_is_refused_with_every_key() {
    let place = Place::new();
    let keys = json!({
        "rope_theta": 700, "rope_scaling": {"type": "yarn", "factor": 4, "finetuned": true},
        "rope_parameters": {"rope_theta": 5000},
    });
    model(&place, "hf", "bytes", keys);
    for command in [&["eval", "hf", "--data", "text.txt"][..], &["generate", "hf"], &["import", "hf"]] {
        let stderr = place.refused(command);
        assert_contains(
            &stderr,
            &["rope_scaling.finetuned: expected no key but", "rope_parameters.rope_theta: expected 700"],
        );
    }
}

/// The tensors of a weights file, and a buffer for each of these names.
fn with_buffers(file: &Path, buffers: &[(&str, Dtype)], shards: &[&Path]) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let zeros = [0; 32];
    let buffer = |&(name, dtype): &(&str, Dtype)| {
        let view = TensorView::new(dtype, vec![4], &zeros[..dtype.bitsize() / 2]).unwrap();
        (name.to_owned(), view)
    };
    let all: Vec<(String, TensorView)> = tensors.into_iter().chain(buffers.iter().map(buffer)).collect();
    for (part, shard) in all.chunks(all.len().div_ceil(shards.len())).zip(shards) {
        safetensors::serialize_to_file(part.to_vec(), None, shard).unwrap();
    }
}

const BUFFERS: [(&str, Dtype); 4] = [
    ("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32),
    ("model.layers.1.self_attn.rotary_emb.inv_freq", Dtype::F64),
    ("model.layers.1.self_attn.rotary_emb.cos_cached", Dtype::BF16),
    ("model.rotary_emb.inv_freq", Dtype::F32),
];

#[test]
fn rotary_buffers_among_the_weights_are_passed_over() {
    let place = Place::new();
    model(&place, "moon", "bytes", json!({}));
    let file = place.path("moon/model.safetensors");
    with_buffers(&file, &BUFFERS, &[&file]);
    let output = place.run(&["import", "moon"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_contains(
        &text(&output.stderr),
        &["note: model.layers.0.self_attn.rotary_emb.inv_freq and 3 more: skipped"],
    );
    for name in ["moon", "runs/moon"] {
        assert_loss(&place, name, "text.txt", LOSS_OF_BYTES);
    }
    place.done(&["export", "moon", "--to", "out"]);
    let exported = crate::tensors(&place.path("out"));
    assert!(exported.keys().all(|name| !name.contains("rotary_emb")) && exported.len() > 10);
    // What looks like one is none.
    with_buffers(&file, &[("model.layers.0.self_attn.rotary_emb.weight", Dtype::F32)], &[&file]);
    let stderr = place.refused(&["import", "moon", "--name", "other"]);
    assert_contains(&stderr, &["self_attn.rotary_emb.weight: expected no such tensor"]);
    assert!(!stderr.contains("inv_freq"), "{stderr}");
}

#[test]
fn an_index_may_list_rotary_buffers() {
    let place = Place::new();
    model(&place, "moon", "bytes", json!({}));
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let shards = names.map(|name| place.path("moon").join(name));
    with_buffers(&place.path("moon/model.safetensors"), &BUFFERS, &[&shards[0], &shards[1]]);
    std::fs::remove_file(place.path("moon/model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (name, shard) in names.iter().zip(&shards) {
        let bytes = std::fs::read(shard).unwrap();
        map.extend(
            SafeTensors::deserialize(&bytes)
                .unwrap()
                .names()
                .iter()
                .map(|tensor| (tensor.to_string(), json!(name))),
        );
    }
    // Listed, but in no file; and in a file that is not there.
    map.insert("model.layers.0.self_attn.rotary_emb.sin_cached".into(), json!(names[0]));
    map.insert("model.rotary_emb.original_inv_freq".into(), json!("buffers.safetensors"));
    write(&place, "moon/model.safetensors.index.json", &json!({"weight_map": map}));
    place.done(&["import", "moon"]);
    for name in ["moon", "runs/moon"] {
        assert_loss(&place, name, "text.txt", LOSS_OF_BYTES);
    }
    map.insert("model.layers.0.self_attn.rotary_emb.weight".into(), json!(names[0]));
    write(&place, "moon/model.safetensors.index.json", &json!({"weight_map": map}));
    let stderr = place.refused(&["import", "moon", "--name", "other"]);
    assert_contains(
        &stderr,
        &["expected model.layers.0.self_attn.rotary_emb.weight, as model.safetensors.index.json says"],
    );
}

#[test]
fn text_is_not_fed_as_bytes_to_a_model_of_other_tokens() {
    let place = Place::new();
    let text_commands = |model: &str| {
        let data = ["eval", model, "--data", "text.txt", "--sequence-length", "32"].map(str::to_owned);
        let prompt = ["generate", model, "--prompt", "hello", "--tokens", "8"].map(str::to_owned);
        [data.to_vec(), prompt.to_vec()]
    };
    let refused = |model: &str, words: &[&str]| {
        for command in text_commands(model) {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            assert_contains(&place.refused(&command), &[&["expected a tokenizer.json"], words].concat());
        }
    };
    for (kind, file) in [
        ("words", "tiktoken.model"),
        ("bytes", "tiktoken.model"),
        ("bytes", "tokenizer.model"),
        ("bytes", "spiece.model"),
        ("bytes", "vocab.json"),
        ("bytes", "vocab.txt"),
        ("bytes", "tokenizer_config.json"),
    ] {
        let dir = format!("{kind}-{file}");
        model(&place, &dir, kind, json!({}));
        std::fs::write(place.path(&dir).join(file), "{}").unwrap();
        refused(&dir, &[&format!("got {file}")]);
    }
    // The run that is made of one is no model of bytes either, and its export has the file.
    let output = place.run(&["import", "bytes-tiktoken.model", "--name", "moon"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_contains(
        &text(&output.stderr),
        &["note: bytes-tiktoken.model has tiktoken.model and no tokenizer.json"],
    );
    refused("moon", &["runs/moon/model", "got tiktoken.model"]);
    place.done(&["export", "moon", "--to", "out"]);
    assert!(place.path("out/tiktoken.model").is_file());
    let stderr = place.refused(&["train", "--init", "moon", "--data", "text.txt", "--set", "mtp.weight=0"]);
    assert_contains(
        &stderr,
        &["tokenizer.path: expected the tokenizer.json of ", "runs/moon/model, which has tiktoken.model"],
    );

    model(&place, "words", "words", json!({}));
    refused("words", &["got none, and a vocabulary of 701 tokens, which are not the 257 of bytes"]);
    model(&place, "bytes", "bytes", json!({}));
    assert_loss(&place, "bytes", "text.txt", LOSS_OF_BYTES);
    place.done(&["generate", "bytes", "--tokens", "2"]);
}

/// A directory of word pieces, in which these files name the token that ends a document.
fn words(place: &Place, dir: &str, keys: Value, files: &[(&str, Value)]) {
    model(place, dir, "words", keys);
    std::fs::copy(fixture("wordpiece.json"), place.path(dir).join("tokenizer.json")).unwrap();
    for (name, value) in files {
        write(place, &format!("{dir}/{name}"), value);
    }
}

#[test]
fn a_directory_says_which_token_ends_a_document() {
    let place = Place::new();
    let none = json!({"eos_token_id": null});
    // A configuration of another token, which the name overrules.
    let other = json!({"eos_token_id": 0});
    let object = json!({"eos_token": {"content": "[SEP]", "lstrip": false, "special": true}});
    let unknown = json!({"eos_token": "<|im_end|>"});
    let name = json!({"eos_token": "[SEP]"});
    for (dir, keys, files) in [
        ("name", other.clone(), vec![("tokenizer_config.json", name.clone())]),
        ("object", none.clone(), vec![("tokenizer_config.json", object)]),
        ("map", none.clone(), vec![("tokenizer_config.json", json!({})), ("special_tokens_map.json", name)]),
        ("id", json!({"eos_token_id": 3}), vec![]),
        ("unknown", json!({"eos_token_id": 3}), vec![("tokenizer_config.json", unknown)]),
        (
            "list",
            json!({"eos_token_id": [3, 7]}),
            vec![("tokenizer_config.json", json!({"eos_token": null}))],
        ),
        ("generation", none.clone(), vec![("generation_config.json", json!({"eos_token_id": [3]}))]),
    ] {
        words(&place, dir, keys, &files);
        assert_loss(&place, dir, "text.jsonl", LOSS_OF_WORDS);
        place.done(&["generate", dir, "--prompt", "the ranks", "--tokens", "5"]);
    }
    words(&place, "nothing", none.clone(), &[]);
    let args = ["eval", "nothing", "--data", "text.txt"];
    let stderr = place.refused(&args);
    assert_contains(&stderr, &["nothing/tokenizer.json: expected a token for the end of a document"]);
    assert_contains(&stderr, &["\"eos_token\" in nothing/tokenizer_config.json names it"]);
    // Which is true.
    write(&place, "nothing/tokenizer_config.json", &json!({"eos_token": "[SEP]"}));
    place.done(&args);
    for (file, wrong) in [
        ("tokenizer_config.json", json!({"eos_token": 3})),
        ("generation_config.json", json!({"eos_token_id": "[SEP]"})),
        ("generation_config.json", json!("no object")),
    ] {
        words(&place, "wrong", none.clone(), &[(file, wrong)]);
        assert_contains(&place.refused(&["eval", "wrong", "--data", "text.txt"]), &["wrong/", file]);
        std::fs::remove_file(place.path("wrong").join(file)).unwrap();
    }
}

/// A user's own, beside the folder of the model.
const RECIPE: &str = r#"
[model]
config = "model/config.json"
[training]
steps = 2
sequence_length = 32
global_batch_size = 4
micro_batch_size = 1
validation_sequences = 2
[lr]
peak = 1e-2
"#;

#[test]
fn a_run_takes_its_end_of_a_document_along() {
    let place = Place::new();
    let data = fixture("text.jsonl");
    let data = data.to_str().unwrap();
    let tokenizer = fixture("wordpiece.json");
    let path = format!("tokenizer.path={}", tokenizer.display());
    // The configuration ends a text with another token, which the run does not know.
    model(&place, "model", "words", json!({"eos_token_id": 0}));
    std::fs::write(place.path("recipe.toml"), RECIPE).unwrap();
    let train = ["train", "recipe.toml", "--data", data, "--set", &path];
    assert_contains(&place.refused(&train), &["tokenizer.path: ", "; tokenizer.end_of_document names it"]);
    let train = [&train[..], &["--set", "tokenizer.end_of_document=\"[SEP]\"", "--name"]].concat();
    place.done(&[&train[..], &["wp"]].concat());
    let loss = |model: &str| measured(&place, model, "text.jsonl")["loss"].as_f64().unwrap();
    let of_run = loss("runs/wp");
    place.done(&["generate", "runs/wp", "--prompt", "the ranks", "--tokens", "5"]);
    place.done(&["export", "wp", "--to", "out"]);
    place.done(&["import", "out", "--name", "back"]);
    for model in ["out", "runs/back", "runs/wp/checkpoints/step-00000002"] {
        assert_eq!(loss(model).to_bits(), of_run.to_bits(), "{model}");
    }
    for model in ["out", "runs/back/model", "runs/wp/model", "runs/wp/checkpoints/step-00000002"] {
        assert_eq!(place.json(&format!("{model}/config.json"))["eos_token_id"], json!([3, 0]), "{model}");
        assert_eq!(place.json(&format!("{model}/tokenizer_config.json"))["eos_token"], "[SEP]", "{model}");
    }
    // Without these files the recipe says so.
    let recipe_alone = place.path("runs/wp/model");
    std::fs::remove_file(recipe_alone.join("tokenizer_config.json")).unwrap();
    let mut config = place.json("runs/wp/model/config.json");
    config["eos_token_id"] = 0.into();
    write(&place, "runs/wp/model/config.json", &config);
    assert_eq!(loss("runs/wp").to_bits(), of_run.to_bits());
    // The checkpoint of a job has the ids of the configuration that was submitted; they are no part of the model.
    let mut manifest = place.json("runs/wp/checkpoints/step-00000002/manifest.json");
    assert_eq!(manifest["model"]["eos_token_id"], json!([3, 0]));
    manifest["model"]["eos_token_id"] = 0.into();
    write(&place, "runs/wp/checkpoints/step-00000002/manifest.json", &manifest);
    place.done(&["train", "--resume", "runs/wp", "--set", "training.steps=3"]);
    assert_eq!(place.json("runs/wp/model/config.json")["eos_token_id"], json!([3, 0]));
    place.done(&[&train[..], &["on", "--init", "runs/wp"]].concat());
}

#[test]
fn a_continuation_ends_at_any_of_the_end_tokens() {
    let place = Place::new();
    let speak = |model: &str| {
        place.done(&["generate", model, "--prompt", "abc", "--tokens", "40", "--temperature", "0"])
    };
    model(&place, "one", "bytes", json!({"eos_token_id": 256}));
    let whole = speak("one");
    let whole = whole.strip_prefix("abc").unwrap().strip_suffix('\n').unwrap();
    // The likeliest bytes that come up are text: one of them after the first becomes an end token.
    let end = whole.bytes().position(|byte| byte.is_ascii() && byte != whole.as_bytes()[0]).unwrap();
    let id = whole.as_bytes()[end];
    let before = format!("abc{}\n", &whole[..whole.bytes().position(|byte| byte == id).unwrap()]);
    model(&place, "chat", "bytes", json!({"eos_token_id": [256, id]}));
    place.done(&["import", "chat"]);
    place.done(&["export", "chat", "--to", "out"]);
    for name in ["chat", "runs/chat", "out"] {
        assert_eq!(speak(name), before, "{name}");
    }
    assert_eq!(place.json("out/config.json")["eos_token_id"], json!([256, id]));
    write(&place, "one/generation_config.json", &json!({"eos_token_id": [id]}));
    assert_eq!(speak("one"), before);
}

#[test]
fn a_prompt_that_is_no_token_is_refused() {
    let place = Place::new();
    words(&place, "words", json!({}), &[]);
    let output = place.run(&["generate", "words", "--prompt", "   ", "--tokens", "4"]);
    assert_eq!(output.status.code(), Some(2));
    assert_contains(&text(&output.stderr), &["--prompt: expected text of at least one token"]);
    assert_eq!(text(&output.stdout), "");
}

#[test]
fn the_published_configuration_is_planned_and_other_quantizations_are_refused_in_words() {
    let place = Place::new();
    let mut config: Value =
        serde_json::from_str(&place.done(&["recipes", "--model", "deepseek-v3"])).unwrap();
    let published = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    });
    let mut plan = |quantization: Value, run: &dyn Fn(&[&str]) -> String| {
        config["quantization_config"] = quantization;
        write(&place, "config.json", &config);
        run(&["plan", "--set", "model.config=config.json"])
    };
    let planned = plan(published, &|args| place.done(args));
    assert!(planned == plan(Value::Null, &|args| place.done(args)));
    let other = |method: &str| json!({"quant_method": method, "bits": 4, "group_size": 128});
    for method in ["awq", "gptq", "compressed-tensors", "bitsandbytes"] {
        let stderr = plan(other(method), &|args| place.refused(args));
        let only = "the only form that is supported";
        let method = format!("quantization_config.quant_method: expected \"fp8\", {only}, got \"{method}\"");
        let block = format!("quantization_config.weight_block_size: expected [128,128], {only}, got nothing");
        assert_contains(&stderr, &[&method, &block]);
    }
    let fixed = json!({
        "activation_scheme": "static", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    });
    let stderr = plan(fixed, &|args| place.refused(args));
    assert_contains(&stderr, &["quantization_config.activation_scheme: expected \"dynamic\""]);
}
