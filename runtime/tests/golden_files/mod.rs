//! Files of recorded results: this repository's own, and those of `CONTRAFLOW_GOLDEN_DIR`.

use std::path::{Path, PathBuf};

/// Every JSON file of a folder of fixtures, and of the folder that the variable names, if it is set.
pub fn all(own: &str) -> Vec<PathBuf> {
    let mut files =
        json_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(own));
    if let Ok(more) = std::env::var("CONTRAFLOW_GOLDEN_DIR") {
        files.extend(json_files(Path::new(&more)));
    }
    files
}

fn json_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            found.extend(json_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "json") {
            found.push(path);
        }
    }
    found
}
