//! The project's own texts in its workspace, found by folder and extension. Knows no corpus and no binary: the build script puts
//! them into one, and debug builds read them where they lie.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders of the workspace that hold its own text; others (`target`, `runs`, `vendor`) may lie beside them.
const FOLDERS: [&str; 10] =
    ["docs", "k8s", "kernels", "orchestrator", "proto", "recipes", "runtime", "src", "tests", "workers"];

const EXTENSIONS: [&str; 3] = ["md", "rs", "toml"];

/// The names and texts of all own files, sorted by name.
pub fn texts(root: &Path) -> Vec<(String, Vec<u8>)> {
    let mut paths = Vec::new();
    places(root).iter().for_each(|place| list(place, &mut paths));
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for path in paths {
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        files.extend(fs::read(&path).ok().map(|text| (name, text)));
    }
    files.sort();
    files
}

/// The files and folders right under the root that [`texts`] reads.
pub fn places(root: &Path) -> Vec<PathBuf> {
    let is_own_folder = |path: &Path| FOLDERS.iter().any(|folder| path == root.join(folder));
    let is_own = |path: &PathBuf| path.is_file() && is_text(path) || is_own_folder(path);
    entries(root).into_iter().filter(is_own).collect()
}

/// Adds the text files at or under `path`.
fn list(path: &Path, paths: &mut Vec<PathBuf>) {
    if path.is_dir() {
        entries(path).iter().for_each(|entry| list(entry, paths));
    } else if is_text(path) {
        paths.push(path.into());
    }
}

/// What a folder holds, without hidden entries, links and build output.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let kept = entries.filter(|entry| {
        let name = entry.file_name();
        let is_hidden = name.as_encoded_bytes().starts_with(b".");
        !is_hidden && name != "target" && entry.file_type().is_ok_and(|kind| !kind.is_symlink())
    });
    kept.map(|entry| entry.path()).collect()
}

fn is_text(path: &Path) -> bool {
    path.extension().is_some_and(|extension| EXTENSIONS.iter().any(|text| extension == *text))
}
