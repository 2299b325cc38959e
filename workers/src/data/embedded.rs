//! What the build script put into the binary: the list of crates, and the project's own sources for where
//! they are missing. Debug builds know where those lie instead.

use std::path::Path;

use super::text::Document;
use super::workspace;

/// `recipes/corpus.toml` as it stood at build time; empty where this crate was built outside its workspace.
pub(super) const MANIFEST: &str = include_str!(concat!(env!("OUT_DIR"), "/corpus.toml"));

static OWN_SOURCES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/own-sources.deflate"));

/// The `*.rs`, `*.md` and `*.toml` files of the workspace, sorted by path.
pub(super) fn own_sources() -> Vec<Document> {
    match option_env!("CONTRAFLOW_BUILD_WORKSPACE") {
        Some(root) => {
            let texts = workspace::texts(Path::new(root));
            texts.into_iter().map(|(name, text)| Document { name, text }).collect()
        }
        None => embedded_sources(),
    }
}

fn embedded_sources() -> Vec<Document> {
    let bytes = miniz_oxide::inflate::decompress_to_vec(OWN_SOURCES).expect("the build script deflated it");
    let mut rest = bytes.as_slice();
    let mut documents = Vec::new();
    while !rest.is_empty() {
        let name = String::from_utf8_lossy(take_field(&mut rest)).into_owned();
        documents.push(Document { name, text: take_field(&mut rest).to_vec() });
    }
    documents
}

/// A field is its length (u32, little endian) and its bytes, as the build script wrote it.
fn take_field<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let (length, tail) = rest.split_first_chunk().expect("the build script wrote whole fields");
    let (field, tail) = tail.split_at(u32::from_le_bytes(*length) as usize);
    *rest = tail;
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_build_script_packed_is_unpacked() {
        let sources = embedded_sources();
        let list = sources.iter().find(|document| document.name == "recipes/corpus.toml").unwrap();
        assert_eq!(list.text, MANIFEST.as_bytes());
        assert!(own_sources().iter().any(|document| document.name == "workers/src/data/embedded.rs"));
    }
}
