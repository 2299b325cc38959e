//! To Hugging Face and back, by the binary: eval, export, import, and starting from what was imported.
#![allow(clippy::unwrap_used, missing_docs)]

mod blocks;
#[path = "../common/deadline.rs"]
mod deadline;
mod faults;
mod fp8;
mod large;
mod place;
mod published;
mod stopped;
mod transformers;

use std::collections::BTreeMap;
use std::path::Path;

use place::{Place, fixtures, text};
use safetensors::SafeTensors;
use serde_json::Value;

/// Type, shape and bytes of every tensor in the weight files of a folder.
pub fn tensors(dir: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let tensor = (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec());
            assert!(found.insert(name, tensor).is_none(), "a tensor stands in two files");
        }
    }
    found
}

#[test]
fn the_parity_fixtures_export_to_the_tensors_they_were_read_from() {
    let place = Place::new();
    for fixture in fixtures() {
        let from = fixture.to_str().unwrap();
        let name = fixture.file_name().unwrap().to_str().unwrap();
        let (whole, cut) = (format!("{name}-whole"), format!("{name}-cut"));
        place.done(&["export", from, "--to", &whole]);
        place.done(&["export", from, "--to", &cut, "--shard-size", "100KB"]);
        let before = tensors(&fixture);
        assert!(before == tensors(&place.path(&whole)), "{name}");
        assert!(before == tensors(&place.path(&cut)), "{name}");
        assert!(place.path(&whole).join("model.safetensors").is_file());

        let index = place.json(&format!("{cut}/model.safetensors.index.json"));
        let map = index["weight_map"].as_object().unwrap();
        assert!(map.keys().eq(before.keys()), "{name}");
        let bytes: usize = before.values().map(|(_, _, bytes)| bytes.len()).sum();
        assert_eq!(index["metadata"]["total_size"], bytes);
        let files: std::collections::BTreeSet<&str> =
            map.values().map(|file| file.as_str().unwrap()).collect();
        for (number, file) in files.iter().enumerate() {
            assert_eq!(*file, format!("model-{:05}-of-{:05}.safetensors", number + 1, files.len()));
            let size = place.path(&cut).join(file).metadata().unwrap().len();
            let header = 100 * map.len() as u64 + 1000;
            assert!(size <= 100_000 + header, "{file}: {size}");
        }
        assert!(files.len() > 1);
    }
}

#[test]
fn bf16_is_the_rounded_half_and_the_gate_biases_stay() {
    let place = Place::new();
    let fixture = &fixtures()[0];
    place.done(&["export", fixture.to_str().unwrap(), "--to", "half", "--dtype", "bf16"]);
    let (before, after) = (tensors(fixture), tensors(&place.path("half")));
    assert!(before.keys().eq(after.keys()));
    assert_eq!(place.json("half/config.json")["torch_dtype"], "bfloat16");
    for (name, (dtype, shape, bytes)) in after {
        let exact = &before[&name].2;
        assert_eq!(shape, before[&name].1);
        if name.ends_with("e_score_correction_bias") {
            assert!(dtype == "F32" && bytes == *exact, "{name}");
            continue;
        }
        assert_eq!(dtype, "BF16", "{name}");
        for (two, four) in bytes.chunks(2).zip(exact.chunks(4)) {
            let rounded = f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16);
            let exact = f32::from_le_bytes(four.try_into().unwrap());
            // Eight bits of mantissa: half a unit of the last one.
            assert!((rounded - exact).abs() <= exact.abs() / 256.0, "{name}: {exact} {rounded}");
        }
    }
}

#[test]
fn a_run_is_measured_exported_imported_and_trained_on() {
    let place = Place::new();
    place.train();
    let eval = |model: &str| -> Value {
        let stderr = place.done(&["eval", model, "--data", "validation.txt", "--format", "json"]);
        serde_json::from_str(&stderr).unwrap()
    };
    let of_run = eval("runs/latest");
    // All of the run's validation sequences are the text that is measured: what the run itself said of them.
    let error_text = place.json("runs/tiny/summary.json")["validation_bits_per_byte"].as_f64().unwrap();
    let measured = of_run["bits_per_byte"].as_f64().unwrap();
    assert!((measured - error_text).abs() < 1e-6, "{measured} {error_text}");
    let loss = of_run["loss"].as_f64().unwrap();
    assert!((loss.exp() - of_run["perplexity"].as_f64().unwrap()).abs() < 1e-9);
    assert!(of_run["max_vio"]["1"].as_f64().unwrap() > 0.0, "{of_run}");

    place.done(&["export", "--to", "hf", "--shard-size", "30KB"]);
    place.done(&["import", "hf", "--name", "back"]);
    assert_eq!(std::fs::read_link(place.path("runs/latest")).unwrap(), Path::new("back"));
    for same in ["hf", "back", "runs/back"] {
        let stderr = place.done(&[
            "eval",
            same,
            "--data",
            "validation.txt",
            "--format",
            "json",
            "--sequence-length",
            "32",
        ]);
        let again: Value = serde_json::from_str(&stderr).unwrap();
        assert_eq!(again["loss"].as_f64().unwrap().to_bits(), loss.to_bits(), "{same}");
        assert_eq!(again["max_vio"], of_run["max_vio"]);
    }
    let speak =
        |model| place.done(&["generate", model, "--prompt", "the ", "--tokens", "9", "--temperature", "0"]);
    assert_eq!(speak("runs/back"), speak("runs/tiny"));

    // A step of nothing: the weights stay what they were read as.
    let args = ["train", "--init", "back", "--name", "on", "--set", "training.steps=1"];
    let still = ["--set", "lr.peak=1e-30", "--set", "lr.floor=0.0", "--set", "balance.bias_speed=0"];
    place.done(&[&args[..], &still[..], &place::TRAINING[..]].concat());
    let of_second = eval("runs/on")["loss"].as_f64().unwrap();
    assert!((of_second - loss).abs() < 1e-6, "{of_second} {loss}");

    let human = place.done(&["eval", "runs/back", "--data", "validation.txt", "--sequence-length", "32"]);
    assert!(text(&human).contains(&format!("bits per byte  {measured:.4}")), "{human}");
}

#[test]
fn a_half_precision_import_keeps_its_form() {
    let place = Place::new();
    let fixture = fixtures()[1].clone();
    place.done(&["export", fixture.to_str().unwrap(), "--to", "half", "--dtype", "bf16"]);
    place.done(&["import", "half"]);
    assert!(tensors(&place.path("half")) == tensors(&place.path("runs/half/model")));
    place.done(&["import", "half"]);
    assert!(place.path("runs/half-2/model/config.json").is_file());
}
