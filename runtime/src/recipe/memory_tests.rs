//! Recipes whose stages or recomputation are wrong.

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
        "parallel.stages: expected layers of 2 stages (dualpipe over 2 ranks), or none, got those of 3",
        "parallel.stages: expected the 4 layers of the model in all, got 3",
        "memory.recompute: expected a list of some of \"norms\", \"mla-up-projections\", \"swiglu\", each once, got \
         [\"norms\", \"norms\"] (--set)",
    ] {
        assert!(text.contains(expected), "expected `{expected}` in: {text}");
    }
    assert!(error_text(&["parallel.stages=[4, 0]"]).contains("a list of whole numbers from 1 to 4096"));
    assert!(error_text(&["memory.recompute=[\"attention\"]"]).contains("\"mla-up-projections\""));
    assert_eq!(error_text(&["parallel.stages=[1, 3]", "memory.recompute=[]"]), "nothing");
}
