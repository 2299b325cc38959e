//! A model whose gates have no bias: what runs keep of its gates, and how they go on.

use std::collections::BTreeSet;

use safetensors::SafeTensors;

use crate::workplace::Workplace;

/// The model of these tests with the gates of DeepSeek-V2, and its recipe.
fn place() -> Workplace {
    let place = Workplace::new();
    let model = std::fs::read_to_string(place.path("model.json")).unwrap();
    let mut model: serde_json::Value = serde_json::from_str(&model).unwrap();
    for (key, value) in [
        ("model_type", "deepseek_v2".into()),
        ("topk_method", "group_limited_greedy".into()),
        ("norm_topk_prob", false.into()),
        ("num_nextn_predict_layers", 0.into()),
    ] {
        model[key] = value;
    }
    std::fs::write(place.path("model.json"), model.to_string()).unwrap();
    let recipe = std::fs::read_to_string(place.path("recipe.toml")).unwrap();
    let recipe =
        recipe.replace("balance.bias_speed = 0.01\n", "").replace("save_model = false", "save_model = true");
    std::fs::write(place.path("recipe.toml"), recipe).unwrap();
    place
}

/// Names of the weights in the model that a run has left.
fn names(place: &Workplace, run: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (path, bytes) in place.files(&format!("{run}/model")) {
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            names.extend(SafeTensors::deserialize(&bytes).unwrap().names().into_iter().map(str::to_owned));
        }
    }
    names
}

/// Losses and gradient norms as bits, by step; there is no loss of multi-token prediction.
fn curve(place: &Workplace, run: &str) -> Vec<(u64, [u64; 3])> {
    let text = std::fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let point = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let bits = |key: &str| line[key].as_f64().unwrap().to_bits();
        (line["step"].as_u64().unwrap(), ["loss", "balance_loss", "grad_norm"].map(bits))
    };
    text.lines().map(point).collect()
}

#[test]
fn a_model_without_gate_biases_resumes_with_the_same_bits_and_in_another_layout() {
    let place = place();
    place.succeed(&["train", "recipe.toml", "--name", "whole"]);
    place.succeed(&["train", "recipe.toml", "--name", "cut", "--set", "training.steps=8"]);
    place.succeed(&["train", "--resume", "runs/cut", "--set", "training.steps=12"]);
    assert_eq!(curve(&place, "runs/whole"), curve(&place, "runs/cut"));

    let names = names(&place, "runs/cut");
    assert!(names.contains("model.layers.1.mlp.gate.weight"), "{names:?}");
    assert!(names.iter().all(|name| !name.ends_with("correction_bias")), "{names:?}");

    let other =
        ["--set", "parallel.expert=2", "--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b"];
    place.succeed(&[&["train", "--resume", "runs/cut", "--set", "training.steps=16"][..], &other].concat());
    assert_eq!(curve(&place, "runs/cut").last().unwrap().0, 16);
    place.succeed(&["eval", "runs/cut", "--data", "text.txt"]);
}
