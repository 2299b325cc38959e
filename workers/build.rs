//! Puts into the binary what the default corpus needs: the list of crates (`recipes/corpus.toml`), the cargo
//! home that this build draws from, and the project's own sources, deflated, for machines that have neither.
//!
//! Built outside its workspace (vendored, packaged) the crate embeds its own sources and an empty list;
//! nothing here fails for a file that is missing.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders of the workspace that hold its own text; others (`target`, `runs`, `vendor`) may lie beside them.
const FOLDERS: [&str; 10] =
    ["docs", "k8s", "kernels", "orchestrator", "proto", "recipes", "runtime", "src", "tests", "workers"];

const EXTENSIONS: [&str; 3] = ["md", "rs", "toml"];

/// Level of deflate: higher ones take seconds more for a per cent less.
const DEFLATE_LEVEL: u8 = 6;

fn main() {
    let own_folder = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out_folder = PathBuf::from(variable("OUT_DIR"));
    let list = own_folder.join("../recipes/corpus.toml");
    let root = if list.is_file() { own_folder.join("..") } else { own_folder };

    let list = fs::read(root.join("recipes/corpus.toml")).unwrap_or_default();
    fs::write(out_folder.join("corpus.toml"), list).expect("OUT_DIR can be written");
    let sources = miniz_oxide::deflate::compress_to_vec(&collect(&root), DEFLATE_LEVEL);
    fs::write(out_folder.join("own-sources.deflate"), sources).expect("OUT_DIR can be written");

    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CARGO_HOME");
    let cargo_home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    if let Some(home) = cargo_home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))) {
        println!("cargo:rustc-env=CONTRAFLOW_BUILD_CARGO_HOME={}", home.display());
    }
}

fn variable(name: &str) -> std::ffi::OsString {
    std::env::var_os(name).expect("cargo sets it for a build script")
}

/// The names and texts of all own files, sorted by name, each as its length (u32, little endian) and its
/// bytes.
fn collect(root: &Path) -> Vec<u8> {
    let mut paths = Vec::new();
    for path in entries(root) {
        let is_own_folder = FOLDERS.iter().any(|folder| path == root.join(folder));
        if path.is_file() && is_text(&path) || is_own_folder {
            // Named before it is read, and only where it exists: cargo takes a missing path for one that
            // always changed.
            println!("cargo:rerun-if-changed={}", path.display());
            list(&path, &mut paths);
        }
    }
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for path in paths {
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        files.extend(fs::read(&path).ok().map(|text| (name, text)));
    }
    files.sort();
    let fields = files.iter().flat_map(|(name, text)| [name.as_bytes(), text]);
    fields
        .flat_map(|field| (field.len() as u32).to_le_bytes().into_iter().chain(field.iter().copied()))
        .collect()
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
