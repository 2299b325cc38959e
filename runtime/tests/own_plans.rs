//! A plan of the user's own in a recipe: checked like ours, with all faults at once, and refused where nobody could read it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::PathBuf;

use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{Mode, ScheduleKind, check, lower, text};
use tempfile::TempDir;

/// A folder with a plan of two ranks and four micro-batches under this name.
fn folder(name: &str, plan: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, plan).unwrap();
    (dir, path)
}

/// The recipe on two ranks, whose steps have `sequences` of two in a micro-batch.
fn recipe(plan: &std::path::Path, sequences: usize, more: &[&str]) -> Result<Recipe, String> {
    let mut overrides = vec![
        "parallel.pipeline=2".to_owned(),
        "parallel.expert=1".to_owned(),
        "training.micro_batch_size=2".to_owned(),
        format!("training.global_batch_size={sequences}"),
        format!("parallel.plan={:?}", plan.to_str().unwrap()),
    ];
    overrides.extend(more.iter().map(|&change| change.to_owned()));
    let loaded = Recipe::load(&RecipeSource::Builtin("tiny".into()), &overrides);
    loaded.map_err(|faults| faults.to_string())
}

/// All forward passes, then all backward passes.
const TABLE: &str = "0F0,0F1,0F2,0F3,,0B0,0B1,0B2,0B3\n,1F0,1F1,1F2,1F3,1B0,1B1,1B2,1B3\n";

#[test]
fn text_and_table_are_the_plan_of_the_recipe_and_it_validates_on_their_placement() {
    let (_dir, table) = folder("gpipe.csv", TABLE);
    let from_table = recipe(&table, 8, &[]).unwrap();
    let (plan, note) = from_table.plan(4, Mode::Train).unwrap();
    assert_eq!((plan.schedule.as_str(), note), ("gpipe", None));
    let (_dir, written) = folder("mine.txt", &text::write(&plan));
    assert_eq!(recipe(&written, 8, &[]).unwrap().plan(4, Mode::Train).unwrap().0, plan);
    assert_eq!(from_table.schedule_name(), "gpipe");
    // Written out it names the file, and loads back to the same.
    assert!(from_table.resolved_toml().contains("gpipe.csv"));

    for micro_batches in [1, 5] {
        let (forward, _) = from_table.plan(micro_batches, Mode::ForwardOnly).unwrap();
        assert_eq!(forward.placement, plan.placement);
        check(&forward, &lower(&forward, None, 1)).unwrap();
    }
    assert!(from_table.plan(5, Mode::Train).unwrap_err().contains("expected 4 micro-batches, got 5"));
}

#[test]
fn a_plan_with_two_stages_on_a_rank_brings_its_placement() {
    let (dualpipev, _) = ScheduleKind::Dualpipev.plan(2, 4, Mode::Train).unwrap();
    let (_dir, path) = folder("mine.txt", &text::write(&dualpipev));
    let recipe = recipe(&path, 8, &["parallel.schedule=1f1b"]).unwrap();
    assert_eq!((recipe.stages(), recipe.placement()), (4, dualpipev.placement));
}

#[test]
fn every_fault_of_the_plan_and_of_its_fit_is_named() {
    let (_dir, path) = folder("mine.csv", &TABLE.replace("0B2", "0B1"));
    let faults = recipe(&path, 12, &["parallel.pipeline=1"]).unwrap_err();
    for part in [
        "parallel.plan: rank 0, action 6: ",
        "parallel.pipeline: expected the 2 ranks of parallel.plan, got 1",
        "training.global_batch_size: expected 8 (4 micro-batches of parallel.plan x micro_batch_size 2 x expert 1 x data 1), got 12",
    ] {
        assert!(faults.contains(part), "{faults}");
    }
    let (_dir, path) = folder("mine.csv", "0F0,0Q1\n1F0");
    assert!(recipe(&path, 8, &[]).unwrap_err().contains("mine.csv: line 1, column 2: expected an action"));
    let faults = recipe(&path.with_file_name("none.txt"), 8, &[]).unwrap_err();
    assert!(faults.contains("parallel.plan: ") && faults.contains("none.txt"), "{faults}");
}

#[test]
fn a_job_is_refused_with_the_way_out() {
    let (_dir, path) = folder("gpipe.csv", TABLE);
    let overrides = [format!("parallel.plan={:?}", path.to_str().unwrap())];
    let faults =
        Recipe::to_submit(&RecipeSource::Builtin("tiny".into()), &overrides).unwrap_err().to_string();
    assert!(
        faults.contains(
            "parallel.plan: expected nothing: the ranks of a job make the plan of parallel.schedule"
        ),
        "{faults}"
    );
    assert!(faults.contains("contraflow train runs one's own"), "{faults}");
}
