//! A folder that is no checkpoint to resume from is refused with its name, exit code 2, and nothing is written.

use std::path::Path;

use crate::workplace::{Workplace, stderr};

/// Runs a command that has to be refused without a trace; what it says.
fn refused(place: &Workplace, args: &[&str]) -> String {
    let before = place.files("");
    let output = place.run(args);
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(place.files("") == before, "something was written: {stderr}");
    stderr
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_checkpoints_are_refused_by_file_and_the_earlier_one_is_offered() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let shard = |rank: usize| place.checkpoint("runs/recipe", 12).join(format!("rank-{rank:05}.safetensors"));
    let whole = std::fs::read(shard(1)).unwrap();
    let resume = ["train", "--resume"];
    change(&shard(1), |bytes| bytes.truncate(bytes.len() - 3));
    let error_text = refused(&place, &resume);
    let sizes = format!("rank-00001.safetensors: expected {} bytes, got {}", whole.len(), whole.len() - 3);
    assert!(error_text.contains(&sizes), "{error_text}");
    assert!(
        error_text.contains("an earlier one is there: --resume runs/recipe/checkpoints/step-00000008"),
        "{error_text}"
    );
    change(&shard(1), |bytes| {
        *bytes = whole.clone();
        bytes[whole.len() / 2] ^= 16;
    });
    let error_text = refused(&place, &resume);
    assert!(error_text.contains("rank-00001.safetensors: expected blake3"), "{error_text}");
    std::fs::remove_file(shard(0)).unwrap();
    std::fs::remove_file(shard(1)).unwrap();
    let error_text = refused(&place, &resume);
    assert!(error_text.contains("rank-00000.safetensors: No such file"), "{error_text}");
    assert!(error_text.contains("rank-00001.safetensors: No such file"), "all at once: {error_text}");
    place.succeed(&["train", "--resume", "runs/recipe/checkpoints/step-00000008"]);
}

#[test]
fn a_manifest_of_another_format_or_model_or_of_other_data_is_refused_by_field() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let other = ["train", "recipe.toml", "--resume", "runs/recipe", "--data", "model.json"];
    let model = std::fs::read_to_string(place.path("model.json")).unwrap();
    std::fs::write(place.path("model.json"), model.replace("\"hidden_size\": 16", "\"hidden_size\": 24"))
        .unwrap();
    let error_text = refused(
        &place,
        &[&other[..], &["--set", "training.seed=2", "--set", "training.sequence_length=8"]].concat(),
    );
    for expected in [
        "model.config.hidden_size: expected 16, as in the checkpoint, got 24",
        "training.sequence_length: expected 16, as in the run so far, got 8",
        "training.seed: expected 1, as in the run so far, got 2",
        "data.paths: expected data of blake3",
    ] {
        assert!(error_text.contains(expected), "{expected}: {error_text}");
    }
    let error_text = refused(&place, &["train", "--resume", "--set", "training.steps=5"]);
    assert!(
        error_text.contains("training.steps: expected at least 12, the step of the checkpoint, got 5"),
        "{error_text}"
    );
    let error_text = refused(&place, &["train", "--resume", "--set", "training.global_batch_size=9"]);
    assert!(error_text.contains("training.global_batch_size: expected a multiple of 2"), "{error_text}");
    let manifest = place.checkpoint("runs/recipe", 12).join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
    let error_text = refused(&place, &["train", "--resume"]);
    assert!(
        error_text.contains("manifest.json: expected format version 1 or earlier, got 2"),
        "{error_text}"
    );
    std::fs::write(&manifest, "{").unwrap();
    let error_text = refused(&place, &["train", "--resume"]);
    assert!(error_text.contains("manifest.json: expected a manifest, got a damaged file"), "{error_text}");
}

#[test]
fn foreign_and_unfinished_runs_are_refused() {
    let place = Workplace::new();
    let error_text = refused(&place, &["train", "--resume", "nowhere"]);
    assert!(error_text.contains("nowhere: expected a run; looked in nowhere, runs/nowhere"), "{error_text}");
    std::fs::create_dir_all(place.path("runs/empty")).unwrap();
    let error_text = refused(&place, &["train", "--resume", "runs/empty"]);
    assert!(
        error_text.contains("runs/empty/checkpoints: expected a committed checkpoint to resume from"),
        "{error_text}"
    );

    place.succeed(&["train", "recipe.toml"]);
    let part = place.path("runs/recipe/checkpoints/step-00000099.part");
    std::fs::create_dir(&part).unwrap();
    let error_text = refused(&place, &["train", "--resume", part.to_str().unwrap()]);
    assert!(
        error_text.contains("step-00000099.part: expected a committed checkpoint, got one that is being"),
        "{error_text}"
    );
    // Another process works on it: it pauses inside a commit.
    let long = ["train", "--resume", "--set", "training.steps=1000000", "--set", "checkpoint.every=1"];
    let mut holder = place.start(&long, "checkpoint.shards-saved=pause");
    let unfinished = place.path("runs/recipe/checkpoints/step-00000013.part");
    let begins = std::time::Instant::now();
    while !unfinished.join("rank-00001.safetensors").exists() {
        assert!(begins.elapsed().as_secs() < 60, "no shard within a minute");
        std::thread::yield_now();
    }
    let output = place.run(&["train", "--resume"]);
    let expected =
        format!("expected a run that is not in use, got one that process {} is training", holder.id());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains(&expected), "{}", stderr(&output));
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(unfinished.is_dir());
    place.succeed(&["train", "--resume"]);
    assert!(!unfinished.exists());
}
