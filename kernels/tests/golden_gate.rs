//! The gate against the published reference's choices and weights.
#![allow(clippy::unwrap_used, missing_docs)]

use contraflow_kernels::{
    gate::{self, GateSpec, GroupScore, Scoring},
    host::HostValues,
    tensor::Tensor,
};
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn rows(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

fn check(number: usize, case: &Value) {
    let size = |key: &str| case[key].as_u64().unwrap() as usize;
    let spec = GateSpec {
        scoring: Scoring::Sigmoid,
        group_score: GroupScore::TopTwo,
        num_experts: size("experts"),
        top_k: size("top_k"),
        num_groups: size("groups"),
        top_groups: size("top_groups"),
        normalise: true,
        scale: case["route_scale"].as_f64().unwrap() as f32,
    };
    let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<f32>>();
    let (logits, ids, weights) =
        (rows(&case["logits"]), rows(&case["topk_index"]), rows(&case["topk_weight"]));
    let num_tokens = logits.len();
    let logits = Tensor::from_vec(&[num_tokens, spec.num_experts], narrow(logits.concat()));

    let bias = Tensor::from_vec(&[spec.num_experts], narrow(numbers(&case["bias"])));

    let routing = gate::forward(&logits, Some(&bias), &spec);

    let (found_ids, found_weights) = (routing.expert_ids.values::<u32>(), routing.weights.values::<f32>());

    for token in 0..num_tokens {
        let chosen = token * spec.top_k..(token + 1) * spec.top_k;
        let mut found: Vec<(u32, f32)> = chosen.map(|at| (found_ids[at], found_weights[at])).collect();
        let mut expected: Vec<(u32, f64)> =
            ids[token].iter().map(|&id| id as u32).zip(weights[token].iter().copied()).collect();
        found.sort_unstable_by_key(|&(id, _)| id);
        expected.sort_unstable_by_key(|&(id, _)| id);
        for ((id, weight), (expected_id, expected_weight)) in found.into_iter().zip(expected) {
            assert_eq!(id, expected_id, "case {number}, token {token}");
            let error = (f64::from(weight) / expected_weight - 1.0).abs();
            assert!(error <= 1e-6, "case {number}, token {token}, expert {id}: {weight} {expected_weight}");
        }
    }
}

#[test]
fn golden_gate_choices_and_weights() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/gate/cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for (number, case) in cases.iter().enumerate() {
        check(number, case);
    }
}
