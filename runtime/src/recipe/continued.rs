//! A recipe that continues a run: what of the earlier recipe is taken over, and what may not change. Pure; knows no checkpoint.

use serde_json::Value as Json;
use toml::Value;

use super::Recipe;
use super::derived::precision_of;
use crate::faults::Faults;
use crate::model_config::ModelConfig;

/// Whether overrides set a key.
pub(super) fn is_set(overrides: &[String], path: &str) -> bool {
    overrides.iter().any(|entry| entry.split('=').next().is_some_and(|key| key.trim() == path))
}

/// The resolved recipe of a run that is to be continued with overrides.
pub(super) fn text_to_continue(resolved_toml: &str, overrides: &[String]) -> String {
    let Ok(mut values) = resolved_toml.parse::<toml::Table>() else { return resolved_toml.to_owned() };
    // The floor of a rate that does not decay was derived from the peak, and follows it.
    if is_set(overrides, "lr.peak")
        && let Some(Value::Table(lr)) = values.get_mut("lr")
        && lr.get("floor") == lr.get("peak")
    {
        lr.remove("floor");
    }
    // So do the formats of a precision recipe.
    if is_set(overrides, "precision.recipe")
        && let Some(Value::Table(precision)) = values.get_mut("precision")
    {
        let recipe = precision.get("recipe").and_then(Value::as_str).unwrap_or_default().to_owned();
        for (path, derived) in precision_of(&recipe) {
            let key = path.trim_start_matches("precision.");
            if precision.get(key).and_then(Value::as_str) == Some(derived) {
                precision.remove(key);
            }
        }
    }
    values.to_string()
}

/// The tokens that begin and end a text are the tokenizer's and no part of the model.
const TOKEN_IDS: [&str; 2] = ["bos_token_id", "eos_token_id"];

/// What would make it a different run to continue the run of `before` with `now` after `step`; nothing if it stays the same run.
pub fn continuation(before: &Recipe, now: &Recipe, step: u64) -> Faults {
    let mut faults = Faults::default();
    same_model(&before.model_config, &now.model_config, &mut faults);
    let (then, now) = (&before.training, &now.training);
    for (key, then, now) in [
        ("training.sequence_length", then.sequence_length as u64, now.sequence_length as u64),
        ("training.seed", then.seed, now.seed),
    ] {
        if then != now {
            faults.expected(key, format!("{then}, as in the run so far"), now);
        }
    }
    if (now.steps as u64) < step {
        let expected = format!("at least {step}, the step of the checkpoint");
        faults.expected("training.steps", expected, now.steps);
    }
    faults
}

fn same_model(then: &ModelConfig, now: &ModelConfig, faults: &mut Faults) {
    let fields = |model: &ModelConfig| serde_json::from_str::<Json>(&model.to_hf_json());
    let (Ok(then), Ok(now)) = (fields(then), fields(now)) else { return };
    for (key, expected) in then.as_object().into_iter().flatten() {
        let got = &now[key];
        if got != expected && !TOKEN_IDS.contains(&key.as_str()) {
            faults.expected(format!("model.config.{key}"), format!("{expected}, as in the checkpoint"), got);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::recipe::{NumberFormat, Recipe, RecipeSource};

    #[test]
    fn formats_follow_the_precision_recipe_where_a_run_goes_on_in_another_one() {
        let load = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
            Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes).unwrap()
        };
        let before = load(&["precision.recipe=fp8", "precision.dispatch=bf16"]);
        assert_eq!(
            (before.precision.linear, before.precision.dispatch),
            (NumberFormat::Fp8, NumberFormat::Bf16)
        );
        let go_on = |changes: &[String]| {
            Recipe::reload(&before.resolved_toml(), "run", changes, before.model_config.clone()).unwrap()
        };
        assert_eq!(go_on(&[]), before);
        // What was set apart stays so.
        let now = go_on(&["precision.recipe=f32".into()]).precision;
        assert_eq!((now.linear, now.dispatch), (NumberFormat::F32, NumberFormat::Bf16));
        assert_eq!((now.activations, now.attention_output), (NumberFormat::F32, NumberFormat::F32));
    }
}
