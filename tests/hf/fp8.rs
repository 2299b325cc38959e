//! Weights as DeepSeek-V3 and its descendants are published: FP8 with a scale per block of 128 x 128.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use crate::place::{Place, text};

fn assert_contains(stderr: &str, words: &[&str]) {
    assert!(words.iter().all(|word| stderr.contains(word)), "expected {words:?} in {stderr}");
}

/// A model in FP8 with a scale per block, its scales in other files than their matrices, and what some of them stand for:
/// made with torch and numpy.
fn fp8(place: &Place) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8");
    std::fs::create_dir(place.path("fp8")).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), place.path("fp8").join(entry.file_name())).unwrap();
    }
    from.join("expected.safetensors")
}

#[test]
fn fp8_weights_are_imported_as_the_numbers_they_stand_for() {
    let place = Place::new();
    let expected = std::fs::read(fp8(&place)).unwrap();
    let output = place.run(&["import", "fp8"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let note = "note: FP8 weights become f32, and config.json has no quantization_config any more";
    assert_contains(&text(&output.stderr), &[note]);
    let config = place.json("runs/fp8/model/config.json");
    assert!(config.get("quantization_config").is_none() && config["routed_scaling_factor"] == 2.5);
    let got = std::fs::read(place.path("runs/fp8/model/model.safetensors")).unwrap();
    let got = SafeTensors::deserialize(&got).unwrap();
    assert!(got.names().iter().all(|name| !name.ends_with("_scale_inv")));
    assert_eq!(got.tensor("lm_head.weight").unwrap().dtype(), Dtype::BF16);
    let expected = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(expected.len(), 2);
    for (name, right) in expected.tensors() {
        let got = got.tensor(&name).unwrap();
        assert_eq!((got.dtype(), got.shape()), (Dtype::F32, right.shape()), "{name}");
        assert!(got.data() == right.data(), "{name}");
    }
    place.done(&["export", "fp8", "--to", "half", "--dtype", "bf16"]);
}

#[test]
fn fp8_weights_without_scales_are_refused_by_name() {
    let place = Place::new();
    fp8(&place);
    let mut index = place.json("fp8/model.safetensors.index.json");
    let matrix = "model.layers.0.mlp.gate_proj.weight";
    let scales = format!("{matrix}_scale_inv");
    let file = index["weight_map"].as_object_mut().unwrap().remove(&scales).unwrap();
    std::fs::write(place.path("fp8/model.safetensors.index.json"), index.to_string()).unwrap();
    let path = place.path("fp8").join(file.as_str().unwrap());
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let others = tensors.into_iter().filter(|(name, _)| *name != scales);
    std::fs::write(&path, safetensors::serialize(others, None).unwrap()).unwrap();
    let expected =
        format!("{matrix}: FP8, expected scales {scales} of shape [2, 2], one per 128 x 128, got none");
    for command in [&["import", "fp8"][..], &["export", "fp8", "--to", "out"], &["generate", "fp8"]] {
        assert_contains(&place.refused(command), &[&expected]);
    }
}
