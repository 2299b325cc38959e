//! What is no checkpoint to go on from is refused with its name, exit code 2, and nothing is written.

use std::path::Path;

use crate::workplace::{Workplace, told};

/// Runs a command that has to be refused without a trace; what it says.
fn refused(place: &Workplace, args: &[&str]) -> String {
    let before = place.files("");
    let output = place.run(args);
    let told = told(&output);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(place.files("") == before, "something was written: {told}");
    told
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
    let said = refused(&place, &resume);
    let sizes = format!("rank-00001.safetensors: expected {} bytes, got {}", whole.len(), whole.len() - 3);
    assert!(said.contains(&sizes), "{said}");
    assert!(
        said.contains("an earlier one is there: --resume runs/recipe/checkpoints/step-00000008"),
        "{said}"
    );
    change(&shard(1), |bytes| {
        *bytes = whole.clone();
        bytes[whole.len() / 2] ^= 16;
    });
    let said = refused(&place, &resume);
    assert!(said.contains("rank-00001.safetensors: expected blake3"), "{said}");
    std::fs::remove_file(shard(0)).unwrap();
    std::fs::remove_file(shard(1)).unwrap();
    let said = refused(&place, &resume);
    assert!(said.contains("rank-00000.safetensors: No such file"), "{said}");
    assert!(said.contains("rank-00001.safetensors: No such file"), "all at once: {said}");
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
    let said = refused(
        &place,
        &[&other[..], &["--set", "training.seed=2", "--set", "training.sequence_length=8"]].concat(),
    );
    for expected in [
        "model.config.hidden_size: expected 16, as in the checkpoint, got 24",
        "training.sequence_length: expected 16, as in the run so far, got 8",
        "training.seed: expected 1, as in the run so far, got 2",
        "data.paths: expected data of blake3",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let said = refused(&place, &["train", "--resume", "--set", "training.steps=5"]);
    assert!(
        said.contains("training.steps: expected at least 12, the step of the checkpoint, got 5"),
        "{said}"
    );
    let said = refused(&place, &["train", "--resume", "--set", "training.global_batch_size=9"]);
    assert!(said.contains("training.global_batch_size: expected a multiple of 2"), "{said}");
    let manifest = place.checkpoint("runs/recipe", 12).join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
    let said = refused(&place, &["train", "--resume"]);
    assert!(said.contains("manifest.json: expected format version 1 or earlier, got 2"), "{said}");
    std::fs::write(&manifest, "{").unwrap();
    let said = refused(&place, &["train", "--resume"]);
    assert!(said.contains("manifest.json: expected a manifest, got a damaged file"), "{said}");
}

#[test]
fn what_is_no_run_or_somebody_elses_or_unfinished_is_refused() {
    let place = Workplace::new();
    let said = refused(&place, &["train", "--resume", "nowhere"]);
    assert!(said.contains("nowhere: expected a run; looked in nowhere, runs/nowhere"), "{said}");
    std::fs::create_dir_all(place.path("runs/empty")).unwrap();
    let said = refused(&place, &["train", "--resume", "runs/empty"]);
    assert!(said.contains("runs/empty/checkpoints: expected a committed checkpoint to go on from"), "{said}");

    place.succeed(&["train", "recipe.toml"]);
    let part = place.path("runs/recipe/checkpoints/step-00000099.part");
    std::fs::create_dir(&part).unwrap();
    let said = refused(&place, &["train", "--resume", part.to_str().unwrap()]);
    assert!(
        said.contains("step-00000099.part: expected a committed checkpoint, got one that is being"),
        "{said}"
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
        format!("expected a run that nobody works on, got one that process {} is training", holder.id());
    assert_eq!(output.status.code(), Some(2));
    assert!(told(&output).contains(&expected), "{}", told(&output));
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(unfinished.is_dir());
    place.succeed(&["train", "--resume"]);
    assert!(!unfinished.exists());
}
