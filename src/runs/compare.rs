//! Runs side by side: their figures, and the keys of their recipes in which they differ.

use std::path::PathBuf;

use contraflow_runtime::recipe::KEYS;
use serde_json::{Value, json};

use super::survey::Survey;
use crate::failure::Failure;
use crate::output::{Format, print, table};

/// A line: what it shows, and its value for each run; empty where a run has none.
type Line = (String, Vec<String>);

/// Compares these runs.
///
/// **Errors**: stdout cannot be written.
pub fn run(folders: &[PathBuf], format: Format) -> Result<(), Failure> {
    let runs: Vec<Survey> = folders.iter().map(|folder| Survey::of(folder)).collect();
    let (figures, differences) = (figures(&runs), differences(&runs));
    if format == Format::Json {
        let object = |lines: &[Line], run: usize| -> Value {
            lines
                .iter()
                .map(|(name, values)| (name.clone(), json!(values[run])))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let runs: Vec<Value> = (0..runs.len())
            .map(|run| {
                json!({"run": runs[run].name, "figures": object(&figures, run), "recipe": object(&differences, run)})
            })
            .collect();
        return print(&format!("{}\n", json!({"runs": runs})));
    }
    let header: Vec<String> =
        std::iter::once(String::new()).chain(runs.iter().map(|run| run.name.clone())).collect();
    let row = |(name, values): Line| std::iter::once(name).chain(values).collect::<Vec<String>>();
    let same = if differences.is_empty() { "the recipes are the same\n" } else { "" };
    let rows = figures.into_iter().chain(differences).map(row);
    print(&format!("{}{same}", table(header, 1..runs.len() + 1, rows)))
}

/// What came of the runs. A figure that no run has is left out.
fn figures(runs: &[Survey]) -> Vec<Line> {
    let number = |digits: usize| move |number: f64| format!("{number:.digits$}");
    let of_summary = |key: &'static str, digits: usize| {
        let write = move |run: &Survey| run.summary[key].as_f64().map(number(digits)).unwrap_or_default();
        (key.replace('_', " "), runs.iter().map(write).collect())
    };
    let of_run =
        |name: &str, write: fn(&Survey) -> String| (name.to_owned(), runs.iter().map(write).collect());
    let all: Vec<Line> = vec![
        of_run("state", |run| run.state.to_string()),
        of_run("step", Survey::steps_text),
        of_run("loss", |run| run.loss.map_or_else(String::new, |loss| format!("{loss:.4}"))),
        of_run("lowest validation loss", |run| {
            run.best_validation().map_or_else(String::new, |(loss, step)| format!("{loss:.4} (step {step})"))
        }),
        of_summary("validation_bits_per_byte", 4),
        of_summary("tokens", 0),
        of_summary("seconds", 1),
        of_summary("tokens_per_second", 0),
        of_summary("mfu", 3),
        of_summary("max_vio", 2),
        of_summary("parameters", 0),
    ];
    all.into_iter().filter(|(_, values)| values.iter().any(|value| !value.is_empty())).collect()
}

/// The keys of the recipes that are not the same in all runs, in their usual order.
fn differences(runs: &[Survey]) -> Vec<Line> {
    let value = |run: &Survey, path: &str| {
        let (section, key) = path.split_once('.')?;
        run.recipe.get(section)?.get(key).map(ToString::to_string)
    };
    let known = KEYS.iter().map(|key| key.path.to_owned());
    let lines = known.chain(keys_of_models(runs)).map(|path| {
        let values: Vec<String> = runs.iter().map(|run| value(run, &path).unwrap_or_default()).collect();
        (path, values)
    });
    lines.filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect()
}

/// The keys of the model that recipes set by themselves.
fn keys_of_models(runs: &[Survey]) -> Vec<String> {
    let mut paths: Vec<String> = runs
        .iter()
        .filter_map(|run| run.recipe.get("model")?.as_table())
        .flat_map(|model| model.keys().map(|key| format!("model.{key}")))
        .filter(|path| KEYS.iter().all(|key| key.path != path))
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn run(root: &Path, name: &str, recipe: &str, summary: &str) -> Survey {
        let dir = root.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("recipe.toml"), recipe).unwrap();
        std::fs::write(dir.join("summary.json"), summary).unwrap();
        Survey::of(&dir)
    }

    #[test]
    fn only_the_keys_that_differ_are_shown_in_their_usual_order() {
        let root = tempfile::tempdir().unwrap();
        let one = "[model]\nconfig = \"tiny\"\n[training]\nsteps = 7\nseed = 1\n[lr]\npeak = 0.1\n";
        let other = "[model]\nconfig = \"tiny\"\nhidden_size = 64\n[training]\nsteps = 9\nseed = 1\n[lr]\npeak = 0.2\n";
        let runs = [
            run(root.path(), "a", one, r#"{"tokens": 100}"#),
            run(root.path(), "b", other, r#"{"mfu": 0.5}"#),
        ];
        let lines = |lines: Vec<Line>| -> Vec<String> {
            lines.into_iter().map(|(name, values)| format!("{name}: {}", values.join(" | "))).collect()
        };
        assert_eq!(
            lines(differences(&runs)),
            ["training.steps: 7 | 9", "lr.peak: 0.1 | 0.2", "model.hidden_size:  | 64"]
        );
        assert_eq!(
            lines(figures(&runs)),
            ["state: done | done", "step: 0/7 | 0/9", "tokens: 100 | ", "mfu:  | 0.500"]
        );
    }
}
