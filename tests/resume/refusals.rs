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
    let resume = ["train", "--resume", "runs/recipe/checkpoints/step-00000012"];
    change(&shard(1), |bytes| bytes.truncate(bytes.len() - 3));
    let error_text = refused(&place, &resume);
    let sizes = format!("rank-00001.safetensors: expected {} bytes, got {}", whole.len(), whole.len() - 3);
    assert!(error_text.contains(&sizes), "{error_text}");
    assert!(
        error_text.contains("\nan earlier one is there: --resume ")
            && error_text.contains("/runs/recipe/checkpoints/step-00000008"),
        "{error_text}"
    );
    change(&shard(1), |bytes| {
        *bytes = whole.clone();
        bytes[whole.len() / 2] ^= 16;
    });
    let error_text = refused(&place, &resume);
    assert!(error_text.contains("rank-00001.safetensors: expected blake3"), "{error_text}");
    change(&shard(1), |bytes| bytes[whole.len() / 2] ^= 16);
    let config = shard(0).with_file_name("config.json");
    change(&config, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let error_text = refused(&place, &resume);
    assert!(error_text.contains("config.json: expected blake3"), "{error_text}");
    std::fs::remove_file(shard(0)).unwrap();
    std::fs::remove_file(shard(1)).unwrap();
    let error_text = refused(&place, &resume);
    assert!(error_text.contains("rank-00000.safetensors: No such file"), "{error_text}");
    assert!(error_text.contains("rank-00001.safetensors: No such file"), "all at once: {error_text}");
    place.succeed(&["train", "--resume", "runs/recipe/checkpoints/step-00000008"]);
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_in_words_and_the_curve_stays_the_same() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let undisturbed = place.curve("runs/recipe");
    change(&place.checkpoint("runs/recipe", 12).join("rank-00001.safetensors"), |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 16;
    });
    let output = place.run(&["train", "--resume"]);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    let words = "warning: the checkpoint of step 12 is damaged, resuming from that of step 8:";
    assert!(said.contains(words) && said.contains("rank-00001.safetensors: expected blake3"), "{said}");
    assert_eq!(place.curve("runs/recipe"), undisturbed);
    assert!(place.path("runs/recipe/checkpoints/damaged-step-00000012/rank-00001.safetensors").is_file());
    place.succeed(&["checkpoint", "verify", "runs/recipe"]);
    for step in [8, 12] {
        std::fs::remove_file(place.checkpoint("runs/recipe", step).join("manifest.json")).unwrap();
    }
    let error_text = refused(&place, &["train", "--resume", "runs/recipe"]);
    assert!(error_text.contains("step-00000008/manifest.json: No such file"), "{error_text}");
    assert!(error_text.contains("step-00000012/manifest.json: No such file"), "all at once: {error_text}");
}

#[test]
fn verify_says_of_each_checkpoint_whether_it_is_whole() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let verify = |arguments: &[&str]| {
        let output = place.run(&[&["checkpoint", "verify"], arguments].concat());
        (output.status.code(), String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output))
    };
    std::fs::create_dir_all(place.path("storage/jobs")).unwrap();
    std::os::unix::fs::symlink("../../runs/recipe", place.path("storage/jobs/job-7")).unwrap();
    let names = [
        &["runs/recipe"][..],
        &["recipe"],
        &["job-7", "--storage", "storage"],
        &["7", "--storage", "storage"],
    ];
    for name in names {
        let (code, out, _) = verify(name);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!((code, lines.len()), (Some(0), 2), "{out}");
        for (line, step) in lines.iter().zip(["step-00000008", "step-00000012"]) {
            assert!(line.contains(step) && line.contains(": whole, 2 shards, "), "{out}");
        }
    }
    let shard = place.checkpoint("runs/recipe", 12).join("rank-00000.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    let manifest = shard.with_file_name("manifest.json");
    let said = std::fs::read_to_string(&manifest).unwrap();
    // One bit anywhere, a missing end, no file, a manifest that leaves a rank out.
    let damages: [(&dyn Fn(), &str); 4] = [
        (&|| change(&shard, |bytes| bytes[whole.len() - 1] ^= 1), "rank-00000.safetensors: expected blake3"),
        (&|| std::fs::write(&shard, &whole[..100]).unwrap(), "rank-00000.safetensors: expected "),
        (&|| std::fs::remove_file(&shard).unwrap(), "rank-00000.safetensors: No such file"),
        (
            &|| {
                let mut whole: serde_json::Value = serde_json::from_str(&said).unwrap();
                whole["shards"].as_array_mut().unwrap().pop();
                std::fs::write(&manifest, whole.to_string()).unwrap();
            },
            "step-00000012: damaged: ",
        ),
    ];
    for (damage, words) in damages {
        damage();
        let (code, out, errors) = verify(&["runs/recipe"]);
        assert_eq!(code, Some(1), "{words}: {out}");
        assert!(out.contains("step-00000008: whole") && out.contains("step-00000012: damaged: "), "{out}");
        assert!(out.contains(words) && out.lines().count() == 2, "{words}: {out}");
        assert!(errors.contains("1 of 2 checkpoints damaged"), "{errors}");
        let (_, out, _) = verify(&["runs/recipe/checkpoints/step-00000012", "--format", "json"]);
        let record: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(record["whole"], false);
        assert!(!record["faults"][0]["path"].as_str().unwrap().is_empty(), "{out}");
        std::fs::write(&shard, &whole).unwrap();
        std::fs::write(&manifest, &said).unwrap();
    }
    assert_eq!(verify(&["runs/recipe"]).0, Some(0));
    let (code, out, errors) = verify(&["nothing"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(errors.contains("nothing: expected a run or a job with a committed checkpoint"), "{errors}");
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
    std::fs::write(&manifest, text.replace("\"format_version\": 2", "\"format_version\": 3")).unwrap();
    let error_text = refused(&place, &["train", "--resume"]);
    assert!(
        error_text.contains("manifest.json: expected format version 2 or earlier, got 3"),
        "{error_text}"
    );
    std::fs::write(&manifest, "{").unwrap();
    let error_text = refused(&place, &["train", "--resume", "runs/recipe/checkpoints/step-00000012"]);
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
