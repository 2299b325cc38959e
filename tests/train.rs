//! The binary as a user meets it: a short run from recipe to folder, and text out of what it learnt.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/deadline.rs"]
mod deadline;

use std::path::Path;
use std::process::{Command, Output};

use contraflow_workers::checkpoint::{Checkpoint, Kind};
use contraflow_workers::hf::weights::HfWeights;

/// A model that trains in a second, as a user's own config.json.
const MODEL: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
  "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
  "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
  "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
  "max_position_embeddings": 256, "num_nextn_predict_layers": 1, "initializer_range": 0.05, "hidden_act": "silu"
}"#;

fn contraflow(dir: &Path, args: &[&str]) -> Output {
    deadline::output(Command::new(env!("CARGO_BIN_EXE_contraflow")).args(args).current_dir(dir))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A folder with a model and a text that repeats itself.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.json"), MODEL).unwrap();
    let line =
        |number: usize| format!("the {} quick brown foxes jump over {} lazy dogs\n", number % 7, number % 5);
    std::fs::write(dir.path().join("text.txt"), (0..600).map(line).collect::<String>()).unwrap();
    dir
}

const TRAIN: [&str; 13] = [
    "train",
    "--data",
    "text.txt",
    "--set",
    "model.config=model.json",
    "--set",
    "training.steps=30",
    "--set",
    "training.sequence_length=32",
    "--set",
    "training.validation_sequences=8",
    "--set",
    "lr.warmup_steps=5",
];

#[test]
fn a_run_leaves_all_its_files_and_its_model_generates() {
    let dir = workplace();
    let output = contraflow(dir.path(), &[&TRAIN[..], &["--trace", "run.json", "--svg", "run.svg"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let run = dir.path().join("runs/tiny");
    let trace = std::fs::read_to_string(dir.path().join("run.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let processes = events.iter().filter(|event| event["name"] == "process_name");
    let processes: Vec<&str> = processes.map(|event| event["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(processes, ["rank 0", "rank 1", "rank 2", "rank 3", "plan 0", "plan 1"]);
    assert!(events.iter().any(|event| event["ph"] == "X" && event["cat"] == "optimizer"));
    assert!(std::fs::read_to_string(dir.path().join("run.svg")).unwrap().contains("plan 1"));
    for file in ["recipe.toml", "plan.txt", "model/config.json", "model/model.safetensors.index.json"] {
        assert!(run.join(file).is_file(), "{file}");
    }
    assert!(!run.join("model.part").exists());

    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let losses: Vec<f64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap())
        .collect();
    assert_eq!(losses.len(), 30);
    // 260 ids at random cost ln 260 = 5.56; letters of one repeated sentence far less.
    assert!((losses[0] - 260_f64.ln()).abs() < 0.3, "{losses:?}");
    assert!(losses[29] < 3.5, "{losses:?}");

    let summary: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    let numbers = [
        "steps",
        "tokens",
        "seconds",
        "tokens_per_second",
        "mfu",
        "bubble_share",
        "validation_bits_per_byte",
        "baseline_bigram_bits_per_byte",
        "baseline_trigram_bits_per_byte",
    ];
    for key in numbers {
        assert!(summary[key].as_f64().is_some_and(f64::is_finite), "{key}: {summary}");
    }
    assert_eq!(summary["corpus"], "files");
    assert_eq!(summary["corpus_hash"].as_str().unwrap().len(), 64);
    assert!(text(&output.stdout).contains("bits per byte"));

    let generate = ["generate", "--prompt", "the ", "--tokens", "20", "--temperature", "0"];
    let (once, twice) = (contraflow(dir.path(), &generate), contraflow(dir.path(), &generate));
    assert!(once.status.success(), "{}", text(&once.stderr));
    assert!(text(&once.stdout).starts_with("the "));
    assert_eq!(once.stdout, twice.stdout);

    let again = contraflow(dir.path(), &TRAIN);
    assert!(again.status.success());
    assert_eq!(std::fs::read_link(dir.path().join("runs/latest")).unwrap(), Path::new("tiny-2"));
    // The same layout, the same bits.
    let weights = |run: &str| {
        std::fs::read(dir.path().join(run).join("model/model-00001-of-00002.safetensors")).unwrap()
    };
    assert!(weights("runs/tiny") == weights("runs/tiny-2"));
}

#[test]
fn user_errors_are_reported_at_once_and_nothing_is_written() {
    let dir = workplace();
    std::fs::write(dir.path().join("empty.txt"), "").unwrap();
    std::fs::write(dir.path().join("binary.bin"), [0_u8, 159, 146, 150]).unwrap();
    let output = contraflow(dir.path(), &["train", "--data", "missing.txt", "empty.txt", "binary.bin"]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    for file in ["missing.txt", "empty.txt", "binary.bin"] {
        assert!(stderr.contains(file), "{stderr}");
    }
    let output =
        contraflow(dir.path(), &["train", "--set", "parallel.expert=3", "--set", "parallel.pipline=2"]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("parallel.expert") && stderr.contains("did you mean `parallel.pipeline`"),
        "{stderr}"
    );
    assert!(!dir.path().join("runs").exists());

    let output = contraflow(dir.path(), &["generate", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("nowhere"));
}

#[test]
fn a_run_that_is_not_finite_ends_with_evidence_and_skipped_batches_are_on_record() {
    let dir = workplace();
    let absurd = [&TRAIN[..], &["--set", "lr.peak=1e30", "--set"]].concat();
    let output = contraflow(dir.path(), &[&absurd[..], &["watch.on_nan=stop"]].concat());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let mut from_end = stderr.lines().rev();
    let (doctor, last) = (from_end.next().unwrap(), from_end.next().unwrap());
    assert_eq!(doctor, "more about it: contraflow doctor runs/tiny", "{stderr}");
    assert!(last.starts_with("error: step 2: "), "{stderr}");
    assert!(last.contains("; no rank has updated its weights; see runs/tiny/evidence.json"), "{stderr}");
    assert!(last.ends_with("; no checkpoint has been made"), "{stderr}");
    let read = |file: &str| std::fs::read_to_string(dir.path().join("runs").join(file)).unwrap();
    let evidence: serde_json::Value = serde_json::from_str(&read("tiny/evidence.json")).unwrap();
    assert_eq!(evidence["step"], 2);
    let name = evidence["ranks"][0]["first_gradient"]["name"].as_str().unwrap();
    assert!(last.contains(&format!("gradient of {name} on rank ")), "{stderr}");
    assert_eq!(read("tiny/metrics.jsonl").lines().count(), 1);
    // The batch of that step: each sequence once, and the documents that it is from.
    let batch = evidence["sequences"].as_array().unwrap();
    assert_eq!(batch.len(), 16);
    let sequences: std::collections::BTreeSet<u64> =
        batch.iter().map(|found| found["sequence"].as_u64().unwrap()).collect();
    assert_eq!(sequences.len(), 16);
    assert_eq!((&batch[0]["dp_rank"], &batch[0]["micro_batch"]), (&0.into(), &0.into()));
    assert_eq!(batch[0]["documents"], serde_json::json!([0, 0]));

    let output = contraflow(dir.path(), &[&absurd[..], &["watch.on_nan=skip"]].concat());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("3 batches in a row were skipped (watch.max_skips)"), "{stderr}");
    let skipped: Vec<bool> = read("tiny-2/metrics.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["skipped"] == true)
        .collect();
    assert_eq!(skipped, [false, true, true, true]);
}

#[test]
fn the_moving_average_of_a_run_is_evaluated_and_exported() {
    let dir = workplace();
    let done = |args: &[&str]| {
        let output = contraflow(dir.path(), args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let train = |changes: &[&'static str]| done(&[&TRAIN[..], changes].concat());
    train(&["--set", "training.ema_decay=0.9", "--name", "averaged"]);
    train(&["--set", "training.steps=1", "--name", "plain"]);
    done(&["export", "averaged", "--ema", "--to", "average"]);
    done(&["export", "averaged", "--to", "trained"]);
    let kept = Checkpoint::open(&dir.path().join("runs/averaged/checkpoints/step-00000030"));
    let records = kept.unwrap_or_else(|faults| panic!("{faults}")).records;
    let [average, trained] = ["average", "trained"].map(|to| HfWeights::open(&dir.path().join(to)).unwrap());
    let mut num_other = 0;
    for (name, shape) in records.weights() {
        let expected = records.read_numbers(Kind::Average, name, shape).unwrap();
        num_other += usize::from(trained.read(name, shape).unwrap() != expected);
        assert!(average.read(name, shape).unwrap() == expected, "{name}");
    }
    assert_eq!(num_other, records.weights().count());
    let eval = |model: &[&str]| {
        let args = [&["eval"], model, &["--data", "text.txt", "--sequence-length", "32", "--format", "json"]]
            .concat();
        let report: serde_json::Value = serde_json::from_str(&done(&args)).unwrap();
        (report["loss"].as_f64().unwrap().to_bits(), report["ema"].as_bool().unwrap())
    };
    let averaged = eval(&["averaged", "--ema"]);
    assert_eq!(averaged, (eval(&["average"]).0, true));
    assert_ne!(averaged.0, eval(&["averaged"]).0);
    let words = done(&["eval", "averaged", "--ema", "--data", "text.txt"]);
    assert!(words.starts_with("runs/averaged/checkpoints/step-00000030, moving average, on "), "{words}");
    for (model, got) in [
        ("plain", "got one of a run without training.ema_decay"),
        ("runs/averaged/model", "got a directory of weights"),
    ] {
        for args in
            [&["eval", model, "--ema", "--data", "text.txt"][..], &["export", model, "--ema", "--to", "x"]]
        {
            let output = contraflow(dir.path(), args);
            let expected = format!("expected a checkpoint with a moving average of the weights, {got}");
            assert_eq!(output.status.code(), Some(2), "{args:?}");
            assert!(text(&output.stderr).contains(&expected), "{args:?}: {}", text(&output.stderr));
        }
    }
    assert!(!dir.path().join("x").exists());
}
