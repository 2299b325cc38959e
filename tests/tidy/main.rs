//! The house rules that no compiler holds: who imports whom, where `unsafe` may stand, how files open, what documents name.

#![allow(clippy::unwrap_used, missing_docs)]

mod commands;
mod files;
mod kernels;
mod rooms;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use contraflow_runtime::recipe::{Recipe, RecipeSource};
use serde_json::Value;

/// Every crate of ours and those of ours it may import; the root package may import all.
const EDGES: [(&str, &[&str]); 5] = [
    ("contraflow-proto", &[]),
    ("contraflow-kernels", &[]),
    ("contraflow-runtime", &["contraflow-proto"]),
    ("contraflow-workers", &["contraflow-runtime", "contraflow-kernels", "contraflow-proto"]),
    ("contraflow-orchestrator", &["contraflow-runtime", "contraflow-proto"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of ours with this ending, relative to the root.
fn files(ending: &str) -> Vec<PathBuf> {
    let rooms = ["src", "tests", "kernels", "proto", "runtime", "workers", "orchestrator", "recipes", "k8s"];
    let mut folders: Vec<PathBuf> = rooms.iter().map(|room| root().join(room)).collect();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What is built in a workspace of its own.
                folders.extend((!path.ends_with("target")).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == ending) {
                found.push(path.strip_prefix(root()).unwrap().to_path_buf());
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let read =
        |path: PathBuf| (path.display().to_string(), std::fs::read_to_string(root().join(&path)).unwrap());
    files("rs").into_iter().map(read).collect()
}

fn assert_none(what: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{what}:\n  {}", faults.join("\n  "));
}

#[test]
fn crates_import_only_those_below_them() {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let is_ours = |name: &str| packages.iter().any(|package| package["name"] == name);
    let mut seen = 0;
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let Some((_, allowed)) = EDGES.iter().find(|(known, _)| *known == name) else {
            // They may import everything, and nothing imports them.
            let is_on_top = ["contraflow", "contraflow-fuzz"].contains(&name);
            assert!(is_on_top, "{name} has no place among the import rules");
            continue;
        };
        seen += 1;
        let imports =
            package["dependencies"].as_array().unwrap().iter().map(|import| import["name"].as_str().unwrap());
        let wrong: Vec<String> = imports
            .filter(|import| is_ours(import) && !allowed.contains(import))
            .map(str::to_owned)
            .collect();
        assert_none(&format!("{name} must not import"), &wrong);
    }
    assert_eq!(seen, EDGES.len());
}

#[test]
fn every_file_says_what_it_is() {
    let silent = sources().into_iter().filter(|(_, text)| !text.starts_with("//! "));
    assert_none("files that do not open with `//! `", &silent.map(|(path, _)| path).collect::<Vec<_>>());
}

#[test]
fn unsafe_code_stands_in_kernels_and_where_the_system_is_asked_and_says_why_it_is_sound() {
    let by_system = [
        "workers/src/data/mmap.rs",
        "runtime/src/fabric/prompt.rs",
        "runtime/src/fabric/shm_memory.rs",
        "runtime/src/flight/mapped.rs",
    ];
    let forms = ["{", "fn", "impl", "extern", "trait"].map(|form| ["unsafe", form].join(" "));
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let is_comment = line.trim_start().starts_with("//");
            if is_comment || !forms.iter().any(|form| line.contains(form.as_str())) {
                continue;
            }
            let before = &lines[index.saturating_sub(3)..index];
            if !path.starts_with("kernels/src/") && !by_system.contains(&path.as_str()) {
                faults.push(format!("{path}:{}: outside of kernels", index + 1));
            } else if !before.iter().any(|line| line.trim_start().starts_with("// SAFETY:")) {
                faults.push(format!("{path}:{}: no SAFETY line in the three lines before", index + 1));
            }
        }
    }
    assert_none("unsafe code", &faults);
}

/// A macro that ends the process where nobody reads: a run would be lost with its terminal.
#[test]
fn stderr_is_written_in_one_place() {
    let macros = ["!(", "ln!("].map(|end| ["eprint", end].concat());
    let mut faults = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| path.contains("src/")) {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (index, line) in code.lines().enumerate() {
            let words = line.trim_start();
            if !words.starts_with("//") && macros.iter().any(|name| words.contains(name.as_str())) {
                faults.push(format!("{path}:{}: {words}", index + 1));
            }
        }
    }
    assert_none("written elsewhere than by src/output.rs", &faults);
}

#[test]
fn nothing_is_left_for_later() {
    // In two halves, so that this file does not find itself.
    let halves =
        [("todo", "!"), ("unimplemented", "!"), ("dbg", "!("), ("#[ig", "nore"), ("FIX", "ME"), ("TO", "DO")];
    let words = halves.map(|(head, tail)| [head, tail].concat());
    let mut faults = Vec::new();
    for (path, text) in sources() {
        for (index, line) in text.lines().enumerate() {
            let found = words.iter().filter(|word| line.contains(word.as_str()));
            faults.extend(found.map(|word| format!("{path}:{}: {word}", index + 1)));
        }
    }
    assert_none("unfinished business", &faults);
}

#[test]
fn every_recipe_in_the_folder_loads() {
    let recipes = files("toml").into_iter().filter(|path| path.parent() == Some(Path::new("recipes")));
    let mut loaded = BTreeSet::new();
    for path in recipes.filter(|path| path.file_stem().unwrap() != "corpus") {
        let source = RecipeSource::File(root().join(&path));
        if let Err(faults) = Recipe::load(&source, &[]) {
            panic!("{}:\n{faults}", path.display());
        }
        loaded.insert(source.name());
    }
    let built_in = contraflow_runtime::recipe::builtin::recipe_names();
    assert!(built_in.iter().all(|name| loaded.contains(*name)), "{built_in:?} {loaded:?}");
}

/// The arguments after `contraflow` and after `cargo run ... --` in code, as the reader would type them.
fn commands_named_in(text: &str) -> BTreeSet<String> {
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c == '`').collect();
    let after = |head: &str, index: usize| words[index] == head && index + 1 < words.len();
    let is_run =
        |index: usize| after("--", index) && words[..index].iter().rev().take(4).any(|word| *word == "run");
    (0..words.len())
        .filter(|&index| after("contraflow", index) || is_run(index))
        .map(|index| words[index + 1].trim_end_matches([',', '.', ';', ':', ')']).to_owned())
        .filter(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase()))
        .collect()
}

#[test]
fn the_readme_names_commands_that_exist() {
    let help = Command::new(env!("CARGO_BIN_EXE_contraflow")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, commands) = help.split_once("Commands:").unwrap();
    let existing: BTreeSet<&str> =
        commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let named = commands_named_in(&readme);
    assert!(named.contains("train"), "{named:?}");
    let unknown: Vec<String> = named.into_iter().filter(|name| !existing.contains(name.as_str())).collect();
    assert_none("README.md names no subcommand with", &unknown);
}

#[test]
fn the_recipe_in_the_readme_loads() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let recipe = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("readme.toml");
    std::fs::write(&path, recipe).unwrap();
    Recipe::load(&RecipeSource::File(path), &[]).unwrap();
}

#[test]
fn the_documents_name_files_that_exist() {
    let mut faults = Vec::new();
    for document in ["README.md", "ARCHITECTURE.md"] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        let paths = text.split('`').skip(1).step_by(2).filter(|code| {
            let is_path = code.contains('/') && !code.contains(char::is_whitespace);
            is_path && [".rs", ".toml", ".json", ".proto"].iter().any(|ending| code.ends_with(ending))
        });
        let missing = paths.filter(|path| !path.contains(['<', '*', '{']) && !root().join(path).exists());
        faults.extend(missing.map(|path| format!("{document}: {path}")));
    }
    assert_none("files that do not exist", &faults);
}
