//! The way from files to a run with a tokenizer of its own, as a user goes it; `prepare` killed on the way.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/deadline.rs"]
mod deadline;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const MODEL: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16,
  "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
  "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
  "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
  "max_position_embeddings": 256, "num_nextn_predict_layers": 1, "initializer_range": 0.05, "hidden_act": "silu"
}"#;

const RECIPE: &str = r#"
model.config = "model.json"
training = { steps = 6, sequence_length = 16, global_batch_size = 4, micro_batch_size = 2, validation_sequences = 4 }
lr.peak = 1e-2
data.paths = ["tokens"]
tokenizer.path = "tokenizer.json"
checkpoint.every = 3
"#;

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
    command.args(args).current_dir(dir);
    command
}

fn succeed(dir: &Path, args: &[&str]) -> Output {
    let output = deadline::output(&mut command(dir, args));
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn refused(dir: &Path, args: &[&str]) -> String {
    let output = deadline::output(&mut command(dir, args));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    stderr
}

/// JSON lines and a folder of text; documents of different lengths, with letters beyond ASCII.
fn workplace(documents: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = |number: usize| {
        format!("the {number} größte fox jumps over {} dogs — and on. ", number % 7).repeat(1 + number % 9)
    };
    let line = |number: usize| format!("{}\n", serde_json::json!({"id": number, "text": text(number)}));
    std::fs::write(dir.path().join("corpus.jsonl"), (0..documents).map(line).collect::<String>()).unwrap();
    std::fs::create_dir(dir.path().join("notes")).unwrap();
    for number in 0..5 {
        std::fs::write(dir.path().join(format!("notes/{number}.txt")), text(100 + number)).unwrap();
    }
    std::fs::write(dir.path().join("model.json"), MODEL).unwrap();
    std::fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
    dir
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

const TOKENIZER: [&str; 8] =
    ["data", "train-tokenizer", "--data", "corpus.jsonl", "--vocab-size", "400", "--to", "tokenizer.json"];

#[test]
fn a_run_on_prepared_tokens_trains_resumes_generates_and_is_evaluated() {
    let dir = workplace(300);
    let dir = dir.path();
    succeed(dir, &TOKENIZER);
    let prepare = [
        "data",
        "prepare",
        "--data",
        "notes",
        "corpus.jsonl",
        "--tokenizer",
        "tokenizer.json",
        "--to",
        "tokens",
    ];
    succeed(dir, &prepare);
    succeed(dir, &["data", "verify", "tokens"]);
    succeed(dir, &["train", "recipe.toml"]);
    succeed(dir, &["train", "--resume", "--set", "training.steps=9"]);
    let run = dir.join("runs/recipe");
    for file in ["model/tokenizer.json", "checkpoints/step-00000009/tokenizer.json"] {
        assert_eq!(
            std::fs::read(run.join(file)).unwrap(),
            std::fs::read(dir.join("tokenizer.json")).unwrap()
        );
    }
    let error_text = succeed(dir, &["generate", "--prompt", "the ", "--tokens", "12", "--temperature", "0"]);
    let error_text = String::from_utf8(error_text.stdout).unwrap();
    assert!(error_text.starts_with("the ") && error_text.len() > 8, "{error_text}");
    // The same sequences by eval and by the run's own measure: of the whole text, and of a checkpoint.
    let measure = |model: &str, data: &str| {
        let output = succeed(dir, &["eval", model, "--data", data, "--format", "json"]);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let of_model = measure("runs/recipe/model", "notes");
    let of_checkpoint = measure("runs/recipe/checkpoints/step-00000009", "notes");
    assert_eq!(of_model["loss"], of_checkpoint["loss"]);
    // Bits per byte and nats per token are of the same text: a token is several bytes here.
    let per_token = of_model["loss"].as_f64().unwrap() / std::f64::consts::LN_2;
    let per_byte = of_model["bits_per_byte"].as_f64().unwrap();
    assert!(per_byte < per_token / 1.5, "{of_model}");
    assert!(measure("runs/recipe", "tokens")["tokens"].as_u64() > of_model["tokens"].as_u64());

    // The folder brings the tokenizer: the recipe need not name it.
    let unnamed = succeed(dir, &["train", "recipe.toml", "--set", "tokenizer.path=", "--name", "unnamed"]);
    assert!(
        String::from_utf8_lossy(&unnamed.stderr).contains("note: the tokenizer is that of the prepared data")
    );
    let loss = |run: &str| {
        let metrics = std::fs::read_to_string(dir.join(run).join("metrics.jsonl")).unwrap();
        serde_json::from_str::<serde_json::Value>(metrics.lines().nth(5).unwrap()).unwrap()["loss"].clone()
    };
    assert_eq!(loss("runs/unnamed"), loss("runs/recipe"));
    let small = MODEL.replace("\"vocab_size\": 512", "\"vocab_size\": 300");
    std::fs::write(dir.join("model.json"), small).unwrap();
    let stderr = refused(dir, &["train", "recipe.toml"]);
    assert!(stderr.contains("tokenizer.path") && stderr.contains("got 300"), "{stderr}");
    let shard = std::fs::read_dir(dir.join("tokens")).unwrap().map(|entry| entry.unwrap().path());
    let shard =
        shard.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "tokens")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[9] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let stderr = refused(dir, &["data", "verify", "tokens"]);
    assert!(stderr.contains(&*shard.file_name().unwrap().to_string_lossy()), "{stderr}");
}

#[test]
fn prepare_killed_on_the_way_comes_to_the_same_bytes() {
    let dir = workplace(40_000);
    let dir = dir.path();
    let prepare = |to: &'static str| {
        ["data", "prepare", "--data", "corpus.jsonl", "--shard-tokens", "65536", "--to", to]
    };
    succeed(dir, &prepare("whole"));
    let num_shards = files(&dir.join("whole")).len();
    assert!(num_shards > 20, "{num_shards} files");
    let mut num_killed = 0;
    for shards in [1, 4, 9, 16] {
        let mut child =
            command(dir, &prepare("killed")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        let written = || {
            std::fs::read_dir(dir.join("killed")).map_or(0, |entries| {
                entries
                    .filter(|entry| {
                        entry.as_ref().unwrap().path().extension().is_some_and(|ending| ending == "tokens")
                    })
                    .count()
            })
        };
        while written() < shards && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "no shard within a minute");
            std::thread::yield_now();
        }
        num_killed += usize::from(child.try_wait().unwrap().is_none());
        drop(child.kill());
        child.wait().unwrap();
    }
    assert!(num_killed >= 2, "prepare was over before it could be killed");
    succeed(dir, &prepare("killed"));
    assert!(files(&dir.join("whole")) == files(&dir.join("killed")));
}
