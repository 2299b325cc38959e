//! The exports in the hands of the real transformers, where there is a Python that has it.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use crate::deadline;
use crate::place::{MODEL, Place, TRAINING, fixtures, text};

/// A Python with torch and transformers: `$CONTRAFLOW_PYTHON`, or the one on the path. `None` is printed.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("CONTRAFLOW_PYTHON").map(PathBuf::from);
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let import = Command::new(&python).args(["-c", "import torch, transformers, safetensors"]).output();
    let has_both = import.is_ok_and(|output| output.status.success());
    assert!(has_both || named.is_none(), "CONTRAFLOW_PYTHON: {} cannot import them", python.display());
    if !has_both {
        eprintln!("SKIPPED: no comparison with transformers, {} cannot import it", python.display());
    }
    has_both.then_some(python)
}

/// Whether it also has what transformers reads FP8 with. What it has not is printed.
fn reads_fp8(python: &PathBuf) -> bool {
    let import = Command::new(python).args(["-c", "import accelerate"]).output();
    let has_it = import.is_ok_and(|output| output.status.success());
    if !has_it {
        eprintln!("SKIPPED: no comparison in FP8, {} cannot import accelerate", python.display());
    }
    has_it
}

fn compare(python: &PathBuf, place: &Place, export: &str, logits: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hf_compare.py");
    let output =
        deadline::output(Command::new(python).arg(script).args([export, logits]).current_dir(place.path("")));
    assert!(output.status.success(), "{export}: {}{}", text(&output.stdout), text(&output.stderr));
    eprintln!("{export}: {}", text(&output.stdout).trim_end());
}

/// Models that differ in every way a configuration can: in the query, in the groups, in the rotations, in the head, in the
/// gate. Each with what its recipe needs.
fn models() -> Vec<(&'static str, String, &'static [&'static str])> {
    let flat = MODEL.replace("\"q_lora_rank\": 16", "\"q_lora_rank\": null");
    let flat = flat.replace("\"n_group\": 2", "\"n_group\": 1");
    let yarn = r#""rope_scaling": {"type": "yarn", "factor": 8, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
      "mscale_all_dim": 0.7, "original_max_position_embeddings": 32}, "hidden_act""#;
    let v2 = flat.replace("deepseek_v3", "deepseek_v2").replace("\"n_group\": 1, ", "\"n_group\": 2, ");
    let v2 = v2.replace("\"norm_topk_prob\": true", "\"norm_topk_prob\": false");
    let v2 = v2.replace("\"num_nextn_predict_layers\": 1", "\"topk_method\": \"group_limited_greedy\"");
    let yarn = MODEL.replace("\"hidden_act\"", yarn);
    let tied = MODEL.replace("\"hidden_act\"", "\"tie_word_embeddings\": true, \"hidden_act\"");
    let none: &[&str] = &[];
    let of_v2: &[&str] = &["--set", "mtp.weight=0", "--set", "balance.bias_speed=0"];
    vec![
        ("grouped", MODEL.into(), none),
        ("flat", flat, none),
        ("yarn", yarn, none),
        ("tied", tied, none),
        ("v2", v2, of_v2),
    ]
}

#[test]
fn transformers_computes_the_logits_that_we_compute() {
    let Some(python) = python() else { return };
    let place = Place::new();
    for (name, model, more) in models() {
        std::fs::write(place.path("model.json"), model).unwrap();
        let args =
            ["train", "--name", name, "--set", "model.config=model.json", "--set", "training.steps=20"];
        place.done(&[&args[..], &TRAINING[..], more].concat());
        let (export, logits) = (format!("{name}-hf"), format!("{name}.safetensors"));
        place.done(&["export", name, "--to", &export, "--shard-size", "50KB"]);
        let eval =
            ["eval", name, "--data", "validation.txt", "--sequence-length", "128", "--logits", &logits];
        place.done(&eval);
        compare(&python, &place, &export, &logits);
    }
}

#[test]
fn transformers_computes_the_logits_of_the_fixtures_from_their_exports() {
    let Some(python) = python() else { return };
    let place = Place::new();
    for fixture in fixtures() {
        let name = fixture.file_name().unwrap().to_str().unwrap();
        place.done(&["export", fixture.to_str().unwrap(), "--to", name]);
        compare(&python, &place, name, fixture.join("fixture.safetensors").to_str().unwrap());
    }
}

#[test]
fn transformers_reads_an_fp8_export_as_the_numbers_that_we_compute_with() {
    let Some(python) = python().filter(reads_fp8) else { return };
    let place = Place::new();
    // Without a GPU transformers takes the size of a block from the number of scales: sizes are those that it finds right.
    let keys = json!({
        "vocab_size": 257, "eos_token_id": 256, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128,
        "num_nextn_predict_layers": 1,
    });
    place.model("from", keys, |name, at| match name.ends_with("norm.weight") {
        true => 1.0,
        false => ((at * 7919 + 31 * name.len()) % 1009) as f32 / 5000.0 - 0.1,
    });
    place.done(&["export", "from", "--to", "fp8", "--dtype", "fp8", "--shard-size", "300KB"]);
    let eval = ["eval", "fp8", "--data", "validation.txt", "--sequence-length", "128", "--logits", "logits"];
    place.done(&eval);
    compare(&python, &place, "fp8", "logits");
}
