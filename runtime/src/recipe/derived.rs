//! Keys whose value follows from others where the recipe does not give it. Knows the keys' names, not how they are read.

use toml::Value;

use super::table::RecipeTable;
use crate::model_config::ModelConfig;

/// The formats that a precision recipe consists of.
pub(super) fn precision_of(recipe: &str) -> [(&'static str, &'static str); 7] {
    let [linear, activations, attention_output] = match recipe {
        "fp8" => ["fp8", "bf16", "e5m6"],
        "bf16" => ["bf16"; 3],
        _ => ["f32"; 3],
    };
    [
        ("precision.linear", linear),
        ("precision.activations", activations),
        ("precision.dispatch", linear),
        ("precision.combine", activations),
        ("precision.attention_output", attention_output),
        ("precision.swiglu_input", linear),
        ("precision.moments", activations),
    ]
}

/// Fills in what follows from other values.
pub(super) fn derive(table: &mut RecipeTable, model: &ModelConfig) {
    if !table.is_given("training.init_std") {
        table.set("training.init_std", Value::Float(model.initializer_range));
    }
    if !table.is_given("mtp.weight") {
        let weight = if model.num_nextn_predict_layers > 0 { 0.3 } else { 0.0 };
        table.set("mtp.weight", Value::Float(weight));
    }
    if !table.is_given("balance.bias_speed") {
        let speed = if model.has_gate_bias() { 0.001 } else { 0.0 };
        table.set("balance.bias_speed", Value::Float(speed));
    }
    for (path, value) in precision_of(&table.text("precision.recipe")) {
        if !table.is_given(path) {
            table.set(path, Value::String(value.into()));
        }
    }
    if !table.is_given("lr.floor") {
        let decays = table.get("lr.cosine_tokens").and_then(Value::as_integer) != Some(0);
        if decays && table.faults.spare(&["lr.cosine_tokens"]) {
            table.faults.expected("lr.floor", "a rate to end on where lr.cosine_tokens is set", "nothing");
        }
        if let Some(peak) = table.get("lr.peak").cloned() {
            table.set("lr.floor", peak);
        }
    }
}
