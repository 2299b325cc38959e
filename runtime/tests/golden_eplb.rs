//! Placements of experts against recorded ones: the same expert in every slot, the same counts, the same evenness.
#![allow(clippy::unwrap_used, missing_docs)]

mod golden_files;

use std::collections::BTreeSet;

use contraflow_runtime::eplb::{Slots, place};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Golden {
    num_replicas: usize,
    num_groups: usize,
    num_nodes: usize,
    num_gpus: usize,
    policy: String,
    weight: Vec<Vec<f32>>,
    physical_to_logical: Vec<Vec<usize>>,
    /// Filled up with -1.
    logical_to_physical: Vec<Vec<Vec<i64>>>,
    logical_count: Vec<Vec<usize>>,
    /// Six digits behind the point.
    #[serde(default)]
    max_over_mean_gpu_load: Vec<f64>,
}

#[test]
fn placements_equal_the_golden_ones() {
    let mut compared = 0;
    for file in golden_files::all("eplb") {
        let value: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let cases = value.get("cases").and_then(Value::as_array);
        let is_placement = |case: &&Value| case.get("physical_to_logical").is_some();
        for (number, case) in cases.into_iter().flatten().filter(is_placement).enumerate() {
            compare(&Golden::deserialize(case).unwrap(), &format!("{}, case {number}", file.display()));
            compared += 1;
        }
    }
    assert!(compared >= 7, "{compared}");
    println!("{compared} golden placements compared");
}

fn compare(golden: &Golden, what: &str) {
    let &Golden { num_replicas: num_slots, num_groups, num_nodes, num_gpus: num_ranks, .. } = golden;
    let on = Slots { num_slots, num_groups, num_nodes, num_ranks };
    assert_eq!(on.policy().to_string(), golden.policy, "{what}");
    let placements = place(&golden.weight, &on).unwrap();
    assert_eq!(placements.len(), golden.physical_to_logical.len(), "{what}");
    for (layer, placement) in placements.iter().enumerate() {
        assert_eq!(placement.ranks.concat(), golden.physical_to_logical[layer], "{what}, layer {layer}");
        assert_eq!(placement.counts(), golden.logical_count[layer], "{what}, layer {layer}");
        for (slots, expected) in placement.slots.iter().zip(&golden.logical_to_physical[layer]) {
            let found: BTreeSet<i64> = slots.iter().map(|&slot| slot as i64).collect();
            let expected: BTreeSet<i64> = expected.iter().copied().filter(|&slot| slot >= 0).collect();
            assert_eq!(found, expected, "{what}, layer {layer}");
        }
        if let Some(expected) = golden.max_over_mean_gpu_load.get(layer) {
            let found = placement.imbalance(&golden.weight[layer]);
            assert!((found - expected).abs() <= 1e-6, "{what}, layer {layer}: {found}, expected {expected}");
        }
    }
}
