//! Recipes whose stages, recomputation or studies of precision are wrong.

use super::{Faults, Recipe, RecipeSource};

fn load(name: &str, changes: &[&str]) -> Result<Recipe, Faults> {
    let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
    Recipe::load(&RecipeSource::Builtin(name.into()), &changes)
}

/// What is said about the recipe `tiny`, four layers on two pipeline ranks under DualPipe, with these changes.
fn error_text(changes: &[&str]) -> String {
    load("tiny", changes).map_or_else(|faults| faults.to_string(), |_| "nothing".to_owned())
}

#[test]
fn everything_that_is_wrong_with_stages_is_said_at_once() {
    let text = error_text(&["parallel.stages=[1, 1, 1]", "memory.recompute=[\"norms\", \"norms\"]"]);
    for expected in [
        "parallel.stages: expected layers of 2 stages (dualpipe over 2 ranks), balanced or even, got those of 3",
        "parallel.stages: expected the 4 layers of the model in all, got 3",
        "memory.recompute: expected a list of some of \"norms\", \"mla-up-projections\", \"swiglu\", each once, got \
         [\"norms\", \"norms\"] (--set)",
    ] {
        assert!(text.contains(expected), "expected `{expected}` in: {text}");
    }
    assert!(
        error_text(&["parallel.stages=[4, 0]"])
            .contains("one of \"balanced\", \"even\", or a list of whole numbers from 1 to 4096")
    );
    assert_eq!(error_text(&["parallel.stages=even"]), "nothing");
    assert_eq!(error_text(&["parallel.stages=[]"]), "nothing");
    assert!(error_text(&["memory.recompute=[\"attention\"]"]).contains("\"mla-up-projections\""));
    assert_eq!(error_text(&["parallel.stages=[1, 3]", "memory.recompute=[]"]), "nothing");
}

#[test]
fn studies_of_fp8_are_refused_where_there_is_none_and_last_as_long_as_the_run() {
    let studies = ["precision.accumulate=tensor-core", "precision.gradient_scales=block"];
    for recipe in [&[][..], &["precision.recipe=bf16"], &["precision.recipe=fp8", "precision.linear=bf16"]] {
        let text = error_text(&[recipe, &studies].concat());
        for expected in [
            "precision.accumulate: expected \"promoted\" where precision.linear is not \"fp8\", got \"tensor-core\"",
            "precision.gradient_scales: expected \"tile\" where precision.linear is not \"fp8\", got \"block\"",
        ] {
            assert!(text.contains(expected), "expected `{expected}` in: {text}");
        }
    }
    let before = load("tiny", &["precision.recipe=fp8", studies[0], studies[1]]).unwrap();
    let again = Recipe::reload(&before.resolved_toml(), "run", &[], before.model_config.clone()).unwrap();
    assert_eq!(again, before);
    assert_eq!(error_text(&["precision.linear=fp8", studies[0]]), "nothing");
}
