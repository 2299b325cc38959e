//! Puts into the binary what the default corpus needs: the list of crates (`recipes/corpus.toml`), the cargo
//! home that this build draws from, and the project's own sources, deflated, for machines that have neither.
//! A debug build has only one of those and reads all where they lie, so that an edit of a text compiles nothing.
//!
//! Built outside its workspace (vendored, packaged) the crate embeds its own sources and an empty list;
//! nothing here fails for a file that is missing.

use std::fs;
use std::path::PathBuf;

#[path = "src/data/workspace.rs"]
mod workspace;

/// Level of deflate: higher ones take seconds more for a per cent less.
const DEFLATE_LEVEL: u8 = 6;

fn main() {
    let own_folder = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out_folder = PathBuf::from(variable("OUT_DIR"));
    let list = own_folder.join("../recipes/corpus.toml");
    let root = if list.is_file() { own_folder.join("..") } else { own_folder };

    let list = "recipes/corpus.toml";
    let text = fs::read(root.join(list)).unwrap_or_default();
    fs::write(out_folder.join("corpus.toml"), &text).expect("OUT_DIR can be written");
    let (files, read) = if variable("PROFILE") == "debug" {
        println!("cargo:rustc-env=CONTRAFLOW_BUILD_WORKSPACE={}", root.display());
        (vec![(list.to_owned(), text)], vec![root.join(list)])
    } else {
        (workspace::texts(&root), workspace::places(&root))
    };
    let sources = miniz_oxide::deflate::compress_to_vec(&fields_of(&files), DEFLATE_LEVEL);
    fs::write(out_folder.join("own-sources.deflate"), sources).expect("OUT_DIR can be written");

    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/data/workspace.rs");
    // Cargo takes a missing path for one that always changed.
    for path in read.iter().filter(|path| path.exists()) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rerun-if-env-changed=CARGO_HOME");
    let cargo_home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    if let Some(home) = cargo_home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))) {
        println!("cargo:rustc-env=CONTRAFLOW_BUILD_CARGO_HOME={}", home.display());
    }
}

fn variable(name: &str) -> std::ffi::OsString {
    std::env::var_os(name).expect("cargo sets it for a build script")
}

/// Each name and text as its length (u32, little endian) and its bytes.
fn fields_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let fields = files.iter().flat_map(|(name, text)| [name.as_bytes(), text]);
    fields
        .flat_map(|field| (field.len() as u32).to_le_bytes().into_iter().chain(field.iter().copied()))
        .collect()
}
