//! What is wrong with a directory, an argument or the disk: named, all at once, and nothing is written or left.

use std::path::Path;
use std::process::Command;

use crate::deadline;
use crate::place::{MODEL, Place, TRAINING, fixtures, text};

/// A sharded export of a fixture, to be damaged.
fn exported(place: &Place) {
    place.done(&["export", fixtures()[1].to_str().unwrap(), "--to", "hf", "--shard-size", "200KB"]);
}

fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

fn assert_contains(stderr: &str, words: &[&str]) {
    assert!(words.iter().all(|word| stderr.contains(word)), "expected {words:?} in {stderr}");
}

#[test]
fn flipped_truncated_and_missing_files_are_reported_together_by_name() {
    let place = Place::new();
    exported(&place);
    let shard = |number: usize| place.path(&format!("hf/model-{number:05}-of-00005.safetensors"));
    damage(&shard(1), |bytes| *bytes.last_mut().unwrap() ^= 1);
    damage(&shard(2), |bytes| bytes.truncate(bytes.len() - 1));
    std::fs::remove_file(shard(3)).unwrap();
    let stderr = place.refused(&["import", "hf"]);
    assert_contains(&stderr, &["model-00001-of-00005.safetensors: expected blake3 ", ": damaged"]);
    assert_contains(&stderr, &["model-00002-of-00005.safetensors: expected ", " bytes, got ", ": truncated"]);
    assert_contains(&stderr, &["model-00003-of-00005.safetensors: No such file"]);
    assert!(!stderr.contains("model-00004") && !stderr.contains("expected a tensor"), "{stderr}");
}

#[test]
fn without_checksums_truncated_and_missing_files_and_a_broken_index_are_reported() {
    let place = Place::new();
    exported(&place);
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    let shard = |number: usize| place.path(&format!("hf/model-{number:05}-of-00005.safetensors"));
    damage(&shard(2), |bytes| bytes.truncate(bytes.len() - 1));
    std::fs::remove_file(shard(3)).unwrap();
    let stderr = place.refused(&["import", "hf"]);
    assert_contains(
        &stderr,
        &["2 faults", "model-00002-of-00005.safetensors: ", ": truncated", "model-00003-of-00005"],
    );
    for command in [["eval", "hf", "--data", "text.txt"].as_slice(), &["generate", "hf"]] {
        assert_contains(&place.refused(command), &["model-00002-of-00005.safetensors", "truncated"]);
    }
    std::fs::write(place.path("hf/model.safetensors.index.json"), r#"{"weight_map": {"a": "../../b"}}"#)
        .unwrap();
    assert_contains(
        &place.refused(&["import", "hf"]),
        &["index.json: a: expected the name of a file", "../../b"],
    );
}

#[test]
fn a_configuration_that_was_edited_is_told_from_a_file_that_is_cut_off() {
    let place = Place::new();
    exported(&place);
    let config = place.path("hf/config.json");
    let sealed = std::fs::read_to_string(&config).unwrap();
    for edited in [
        sealed.replace("\"use_cache\": true", "\"use_cache\": false"),
        sealed.replace("\"use_cache\": true", "\"use_cache\": null"),
    ] {
        assert_ne!(edited, sealed);
        std::fs::write(&config, edited).unwrap();
        let stderr = place.refused(&["import", "hf"]);
        assert_contains(
            &stderr,
            &["hf/config.json: expected ", "edited or damaged; if it was edited, remove contraflow.json"],
        );
        assert!(!stderr.contains("truncated"), "{stderr}");
    }
    // Which is a way on.
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    place.done(&["import", "hf"]);
}

#[test]
fn a_newer_form_of_the_checksums_is_refused() {
    let place = Place::new();
    exported(&place);
    let newer = std::fs::read_to_string(place.path("hf/contraflow.json")).unwrap();
    let newer = newer.replace("\"format_version\": 1", "\"format_version\": 2");
    std::fs::write(place.path("hf/contraflow.json"), newer).unwrap();
    assert_contains(
        &place.refused(&["import", "hf"]),
        &["contraflow.json: format_version: expected 1, got 2"],
    );
}

#[test]
fn tensors_of_another_model_are_reported_all_at_once() {
    let place = Place::new();
    place.done(&["export", fixtures()[2].to_str().unwrap(), "--to", "hf"]);
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    let mut config = place.json("hf/config.json");
    let experts = config["n_routed_experts"].as_u64().unwrap();
    config["n_routed_experts"] = (2 * experts).into();
    config["num_hidden_layers"] = 3.into();
    config["kv_lora_rank"] = 20.into();
    std::fs::write(place.path("hf/config.json"), config.to_string()).unwrap();
    let stderr = place.refused(&["import", "hf"]);
    let more = format!("model.layers.1.mlp.experts.{experts}.up_proj.weight: expected a tensor of shape");
    assert_contains(
        &stderr,
        &[" faults\n", &more, "self_attn.kv_a_layernorm.weight: expected shape [20], got"],
    );
    // The block of multi-token prediction has the number of a layer now.
    assert_contains(
        &stderr,
        &["model.layers.2.eh_proj.weight: expected no such tensor", "model.layers.3.*: expected"],
    );
    config["model_type"] = "llama".into();
    std::fs::write(place.path("hf/config.json"), config.to_string()).unwrap();
    assert_contains(
        &place.refused(&["import", "hf"]),
        &["config.json: model_type: expected \"deepseek_v3\", \"deepseek_v2\" or \"kimi_k2\", got \"llama\""],
    );
    assert_contains(&place.refused(&["train", "--init", "hf"]), &["model_type"]);
}

#[test]
fn a_head_that_is_missing_is_told_with_the_key_that_does_without() {
    let place = Place::new();
    let tied = fixtures().into_iter().find(|path| path.ends_with("tied")).unwrap();
    place.done(&["export", tied.to_str().unwrap(), "--to", "hf"]);
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    let mut config = place.json("hf/config.json");
    config["tie_word_embeddings"] = false.into();
    std::fs::write(place.path("hf/config.json"), config.to_string()).unwrap();
    let stderr = place.refused(&["import", "hf"]);
    let hint = "; \"tie_word_embeddings\": true in config.json takes the embedding for it";
    let fault = stderr.lines().find(|line| line.contains("lm_head.weight: expected a tensor of shape ["));
    assert!(fault.is_some_and(|fault| fault.ends_with(&format!("], got none{hint}"))), "{stderr}");
    config["tie_word_embeddings"] = true.into();
    std::fs::write(place.path("hf/config.json"), config.to_string()).unwrap();
    place.done(&["import", "hf"]);
}

#[test]
fn numbers_that_are_none_are_found() {
    let place = Place::new();
    exported(&place);
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    let last = place.path("hf/model-00005-of-00005.safetensors");
    damage(&last, |bytes| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let output = place.run(&["import", "hf"]);
    assert_eq!(output.status.code(), Some(2));
    assert_contains(&text(&output.stderr), &["lm_head.weight: expected finite values, got NaN at"]);
    assert_eq!(place.path("runs").read_dir().unwrap().count(), 0);
}

#[test]
fn a_copy_that_is_none_is_found() {
    let place = Place::new();
    let fixture = &fixtures()[2];
    std::fs::create_dir(place.path("hf")).unwrap();
    std::fs::copy(fixture.join("config.json"), place.path("hf/config.json")).unwrap();
    let bytes = std::fs::read(fixture.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let copy = "model.layers.2.embed_tokens.weight";
    let ones = 1_f32.to_le_bytes().repeat(1 << 16);
    let changed = tensors.tensors().into_iter().map(|(name, view)| {
        let data = if name == copy { &ones[..view.data().len()] } else { view.data() };
        let view = safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap();
        (name, view)
    });
    let file = place.path("hf/model.safetensors");
    safetensors::serialize_to_file(changed, None, &file).unwrap();
    let stderr = text(place.run(&["import", "hf"]).stderr);
    assert_contains(&stderr, &[copy, "expected a copy of model.embed_tokens.weight, got other values"]);
    // Without the copies the same is a whole model.
    let without = tensors
        .tensors()
        .into_iter()
        .filter(|(name, _)| name != copy && name != "model.layers.2.shared_head.head.weight");
    safetensors::serialize_to_file(without, None, &file).unwrap();
    place.done(&["import", "hf"]);
    assert!(crate::tensors(&place.path("runs/hf/model")) == crate::tensors(fixture));
}

#[test]
fn a_tied_model_may_come_with_its_head_if_it_is_the_embedding() {
    let place = Place::new();
    let tied = MODEL.replace("\"hidden_act\"", "\"tie_word_embeddings\": true, \"hidden_act\"");
    std::fs::write(place.path("model.json"), tied).unwrap();
    place.train();
    place.done(&["export", "tiny", "--to", "hf"]);
    std::fs::remove_file(place.path("hf/contraflow.json")).unwrap();
    let exported = crate::tensors(&place.path("hf"));
    let bytes = std::fs::read(place.path("hf/model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let table = tensors.tensor("model.embed_tokens.weight").unwrap();
    assert!(tensors.tensor("lm_head.weight").is_err(), "one table is exported once");
    let with_head = |rows: usize, head: &[u8]| {
        let shape = vec![rows, table.shape()[1]];
        let head = safetensors::tensor::TensorView::new(table.dtype(), shape, head).unwrap();
        let all = tensors.tensors().into_iter().chain([("lm_head.weight".to_owned(), head)]);
        safetensors::serialize_to_file(all, None, &place.path("hf/model.safetensors")).unwrap();
    };
    let mut other = table.data().to_vec();
    other[0] ^= 1;
    with_head(260, &other);
    let init = ["train", "--init", "hf", "--set", "model.config=model.json"];
    let init = [&init[..], &TRAINING].concat();
    let eval = ["eval", "hf", "--data", "validation.txt"];
    for command in [&["import", "hf"][..], &eval, &["generate", "hf"], &init] {
        let words = "lm_head.weight: expected a copy of model.embed_tokens.weight, got other values";
        assert_contains(&place.refused(command), &[words]);
    }
    with_head(130, &table.data()[..table.data().len() / 2]);
    assert_contains(
        &place.refused(&["import", "hf"]),
        &["lm_head.weight: expected shape [260, 32], got [130, 32]"],
    );
    // One that is a copy says nothing new, and is not written again.
    with_head(260, table.data());
    place.done(&eval);
    place.done(&["import", "hf"]);
    assert!(crate::tensors(&place.path("runs/hf/model")) == exported);
}

#[test]
fn a_folder_that_cannot_be_read_and_one_that_is_none() {
    let place = Place::new();
    std::os::unix::fs::symlink("loop", place.path("loop")).unwrap();
    assert_contains(&place.refused(&["import", "nowhere"]), &["nowhere/config.json: No such file"]);
    assert_contains(&place.refused(&["import", "text.txt"]), &["text.txt/config.json: Not a directory"]);
    assert_contains(&place.refused(&["import", "loop"]), &["loop/config.json: Too many levels"]);
    assert_contains(&place.refused(&["import", ".", "--name", "../up"]), &["--name", "../up"]);
    for command in [["export", "nowhere", "--to", "x"].as_slice(), &["train", "--init", "nowhere"]] {
        assert_contains(&place.refused(command), &["nowhere: expected a run or a folder with config.json"]);
    }
}

#[test]
fn a_target_that_holds_something_is_left_alone() {
    let place = Place::new();
    exported(&place);
    let fixture = &fixtures()[0];
    let again = place.refused(&["export", fixture.to_str().unwrap(), "--to", "hf"]);
    assert_contains(&again, &["--to: hf: expected a new or an empty folder"]);
    std::fs::create_dir(place.path("empty")).unwrap();
    place.done(&["export", "hf", "--to", "empty"]);
    let into = |to: &str| place.refused(&["export", "nothing", "--to", to]);
    assert_contains(
        &into("text.txt"),
        &["2 faults", "--to: text.txt: Not a directory", "nothing: expected a run"],
    );
    assert_contains(&into("no/where"), &["--to: no/where: expected a folder no to make it in"]);
    std::fs::create_dir(place.path("x.part")).unwrap();
    assert_contains(&into("x"), &["--to: x: expected no x.part"]);
}

/// The system refuses to write more than some kilobytes into a file.
fn on_a_full_disk(place: &Place, kilobytes: usize, args: &str) -> std::process::Output {
    let limit = format!(
        "trap '' XFSZ; ulimit -f {}; exec {} {args}",
        2 * kilobytes,
        env!("CARGO_BIN_EXE_contraflow")
    );
    deadline::output(Command::new("sh").args(["-c", &limit]).current_dir(place.path("")))
}

#[test]
fn a_full_disk_leaves_nothing_and_harms_nothing() {
    let place = Place::new();
    exported(&place);
    let before = place.entries();
    // Room for the first five of ten shards; then for each of them, but not for all in one file.
    for (kilobytes, args) in [(83, "export hf --to new --shard-size 90KB"), (300, "export hf --to new")] {
        let output = on_a_full_disk(&place, kilobytes, args);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert_contains(&text(&output.stderr), &["new.part/model", "File too large"]);
        assert_eq!(place.entries(), before);
    }
    let output = on_a_full_disk(&place, 300, "import hf");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(place.path("runs").read_dir().unwrap().count(), 0);
    place.done(&["export", "hf", "--to", "new"]);
}

#[test]
fn eval_says_what_it_cannot_measure() {
    let place = Place::new();
    // No room for bytes.
    let small = fixtures()[1].to_str().unwrap().to_owned();
    let stderr = place.refused(&["eval", &small, "--data", "text.txt"]);
    assert_contains(&stderr, &["expected a tokenizer.json", "got none, and a vocabulary of 192 tokens"]);
    place.train();
    assert_contains(
        &place.refused(&["eval", "--data", "missing.txt"]),
        &["--data: ", "missing.txt: no such file"],
    );
    std::fs::write(place.path("short.txt"), "s").unwrap();
    assert_contains(
        &place.refused(&["eval", "--data", "short.txt"]),
        &["--data: expected text of at least two tokens"],
    );
    assert_contains(
        &place.refused(&["eval", "--data", "text.txt", "--split", "train"]),
        &["--split: expected a prepared folder in --data"],
    );
    let too_long = ["eval", "--data", "text.txt", "--sequence-length", "257"];
    assert_contains(&place.refused(&too_long), &["--sequence-length: expected 2 to 256", "got 257"]);
    assert_contains(
        &place.refused(&["eval", "--data", "text.txt", "--threads", "0"]),
        &["--threads: expected at least 1"],
    );
}
