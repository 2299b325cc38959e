//! Whether a recipe can be run on each of the layouts that it names. Knows no job and no slot.

use std::collections::BTreeMap;

use super::{Recipe, relations};
use crate::faults::{Fault, Faults, count};
use crate::topology::Topology;

const KEY: &str = "elastic.layouts";

/// As the recipe writes it.
fn text(Topology { pipeline, expert, data }: &Topology) -> String {
    format!("[{pipeline}, {expert}, {data}]")
}

/// **Errors** (into `faults`): every named layout that the recipe cannot be run on, and one that is missing. What has a fault already is
/// not measured against.
pub(super) fn check(recipe: &Recipe, faults: &mut Faults) {
    if recipe.elastic.layouts.is_empty() {
        return;
    }
    let known = faults.clone();
    let mut first: BTreeMap<Topology, usize> = BTreeMap::new();
    // Of data there may be thousands of paths, which no layout is concerned with.
    let mut on_axes = recipe.clone();
    (on_axes.data.paths, on_axes.data.validation) = Default::default();
    for (at, axes) in recipe.elastic.named().enumerate() {
        let path = format!("{KEY}[{at}]");
        if let Some(before) = first.get(&axes) {
            faults.expected(path, "each layout once", format!("{}, as {KEY}[{before}]", text(&axes)));
            continue;
        }
        first.insert(axes, at);
        let parallel = &mut on_axes.parallel;
        (parallel.pipeline, parallel.expert, parallel.data) = (axes.pipeline, axes.expert, axes.data);
        let mut found = known.clone();
        relations::check_axes(&on_axes, &mut found);
        for Fault { path: of, message } in found.list.into_iter().skip(known.list.len()) {
            faults.push(&path, format!("{} as {of}: {message}", text(&axes)));
        }
    }
    let own = recipe.topology();
    if !first.contains_key(&own) && known.spare(&AXES) {
        let expected = format!("the layout of parallel among them, {}", text(&own));
        faults.expected(KEY, expected, count(first.len(), "other layout"));
    }
}

const AXES: [&str; 3] = ["parallel.pipeline", "parallel.expert", "parallel.data"];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Of the four layers and eight experts of the model, on the axes 2, 2, 1, with a unit of eight sequences.
    const GOOD: &str = r#"
model.config = "tiny"
parallel = { pipeline = 2, expert = 2, schedule = "dualpipe" }
training = { steps = 10, sequence_length = 256, global_batch_size = 16, micro_batch_size = 2 }
lr.peak = 1e-3
"#;

    fn read(changes: &[&str]) -> Result<Recipe, Faults> {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        Recipe::from_toml(GOOD, "test.toml", Path::new(""), &changes)
    }

    fn refused(changes: &[&str]) -> String {
        read(changes).unwrap_err().to_string()
    }

    #[test]
    fn named_layouts_come_back_in_their_order_and_none_are_named_by_default() {
        let recipe = read(&["elastic.layouts=[[2, 2, 2], [2, 2, 1]]"]).unwrap();
        let named: Vec<Topology> = recipe.elastic.named().collect();
        let axes = |data| Topology { pipeline: 2, expert: 2, data };
        assert_eq!(named, [axes(2), axes(1)]);
        let resolved = recipe.resolved_toml();
        assert!(resolved.contains("\nlayouts = [[2, 2, 2], [2, 2, 1]]\n"), "{resolved}");
        assert_eq!(Recipe::from_toml(&resolved, "again", Path::new(""), &[]).unwrap(), recipe);
        assert_eq!(read(&[]).unwrap().elastic.named().count(), 0);
    }

    #[test]
    fn entries_that_are_no_layouts_are_all_told_with_their_places() {
        let expected = "expected [pipeline, expert, data], each a whole number from 1 to 4096, got";
        assert_eq!(
            refused(&["elastic.layouts=[[2, 2, 1], [2, 2], 4, [0, 1, 1], [1, 1, 4097]]"]),
            format!(
                "elastic.layouts[1]: {expected} [2, 2] (--set)\nelastic.layouts[2]: {expected} 4 (--set)\n\
                 elastic.layouts[3]: {expected} [0, 1, 1] (--set)\nelastic.layouts[4]: {expected} [1, 1, 4097] (--set)"
            )
        );
        let list =
            "elastic.layouts: expected a list of at most 256 layouts, each [pipeline, expert, data], got";
        assert_eq!(refused(&["elastic.layouts=4"]), format!("{list} 4 (--set)"));
        let many = format!("elastic.layouts=[{}]", "[1, 1, 1],".repeat(257));
        assert_eq!(refused(&[&many]), format!("{list} a long array (--set)"));
    }

    #[test]
    fn every_layout_is_one_that_the_recipe_can_be_run_on() {
        let layouts = "elastic.layouts=[[2, 2, 1], [2, 3, 1], [2, 2, 1], [6, 1, 1], [2, 2, 3], [3, 1, 1]]";
        assert_eq!(
            refused(&[layouts]),
            "elastic.layouts[1]: [2, 3, 1] as parallel.expert: expected a divisor of the model's 8 routed experts, got 3\n\
             elastic.layouts[2]: expected each layout once, got [2, 2, 1], as elastic.layouts[0]\n\
             elastic.layouts[3]: [6, 1, 1] as parallel.pipeline: expected at most one stage for each of the 4 layers of the \
             model, got 6 stages (dualpipe over 6 ranks)\n\
             elastic.layouts[4]: [2, 2, 3] as training.global_batch_size: expected a multiple of 24 (micro_batch_size 2 x \
             expert 2 x data 3 x 2 directions), got 16\n\
             elastic.layouts[5]: [3, 1, 1] as parallel.pipeline: dualpipe pairs rank r with rank P-1-r and so needs an even \
             number of pipeline ranks, got 3; use an even pipeline, or dualpipev or 1f1b"
        );
        // A ramp begins with a batch that every layout can share out.
        let ramp = ["training.ramp_tokens=100", "training.ramp_start_batch_size=8"];
        let words = refused(&[&ramp[..], &["elastic.layouts=[[2, 2, 1], [2, 2, 2]]"]].concat());
        assert!(
            words.starts_with(
                "elastic.layouts[1]: [2, 2, 2] as training.ramp_start_batch_size: expected from 16 "
            ),
            "{words}"
        );
        // Stages that are listed are those of one pipeline.
        let words = refused(&["parallel.stages=[2, 2]", "elastic.layouts=[[2, 2, 1], [4, 2, 1]]"]);
        assert!(
            words
                .starts_with("elastic.layouts[1]: [4, 2, 1] as parallel.stages: expected layers of 4 stages"),
            "{words}"
        );
    }

    #[test]
    fn the_layout_of_the_recipe_is_among_them() {
        assert_eq!(
            refused(&["elastic.layouts=[[1, 2, 1], [2, 2, 2]]", "parallel.schedule=1f1b"]),
            "elastic.layouts: expected the layout of parallel among them, [2, 2, 1], got 2 other layouts"
        );
        // Where that is not known nothing is missing.
        let words = refused(&["elastic.layouts=[[2, 2, 2]]", "parallel.data=many"]);
        assert_eq!(words, "parallel.data: expected a whole number from 1 to 4096, got \"many\" (--set)");
    }
}
