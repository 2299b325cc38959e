//! The default corpus: source files of listed crates that cargo has already put on this machine to build this
//! binary.
//!
//! `recipes/corpus.toml` lists them. Definition of what is read: of each crate in listed order, the `*.rs`
//! files under `src/` sorted by the bytes of their `/`-separated path, without the skipped prefixes, up to
//! and not including the first file that would bring the crate above [`CRATE_LIMIT_BYTES`]. The list's blake3
//! pins all of it. Nothing is ever downloaded.

use super::text::Document;
use contraflow_runtime::files;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The most that one crate gives, in bytes, so that no single hand dominates the text.
const CRATE_LIMIT_BYTES: usize = 400_000;

/// The list of crates, as in `recipes/corpus.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// blake3 over all that is read (see [`Manifest::read`]), in hex.
    blake3: String,
    #[serde(rename = "family")]
    families: Vec<Family>,
}

/// Crates that share the first part of a name or an author: all of them are on the same side of the
/// split.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    name: String,
    split: Split,
    crates: Vec<ListedCrate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Split {
    Train,
    Validation,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedCrate {
    name: String,
    version: String,
    /// Prefixes of paths that are not read: machine-made files and fixtures.
    #[serde(default)]
    skip: Vec<String>,
}

/// Why the listed text cannot be used here.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("the list of crates cannot be read: {0}")]
    Manifest(String),
    #[error("{num} of {of} crates, {first} among them, are in no cargo registry and no vendor folder")]
    Missing { num: usize, of: usize, first: String },
    #[error("{}: {error}", path.display())]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("the crates' sources have blake3 {found}, expected {expected}")]
    Differs { found: String, expected: String },
}

/// What a verified list gave.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) hash: String,
    pub(super) train: Vec<Document>,
    pub(super) validation: Vec<Document>,
}

impl Manifest {
    pub(super) fn parse(text: &str) -> Result<Self, Unusable> {
        toml::from_str(text).map_err(|error| Unusable::Manifest(error.message().into()))
    }

    /// Finds, reads and verifies every listed crate.
    ///
    /// The hash runs over fields, each preceded by its length in bytes (u64, little endian): per crate its
    /// family, split, name and version, per file its path (from the crate's root) and content, and an empty
    /// field at the end of a crate.
    pub(super) fn read(&self, search: &Search) -> Result<Read, Unusable> {
        let listed = || self.families.iter().flat_map(|f| f.crates.iter().map(move |entry| (f, entry)));
        let found: Vec<Option<PathBuf>> = listed().map(|(_, entry)| search.find(entry)).collect();
        if let Some(first) = found.iter().position(Option::is_none) {
            let num = found.iter().filter(|folder| folder.is_none()).count();
            let first = listed().nth(first).map(|(_, entry)| entry.folder_name()).unwrap_or_default();
            return Err(Unusable::Missing { num, of: found.len(), first });
        }
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for ((family, entry), folder) in listed().zip(found.into_iter().flatten()) {
            let (split, side) = match family.split {
                Split::Train => ("train", &mut train),
                Split::Validation => ("validation", &mut validation),
            };
            for word in [&family.name, split, &entry.name, &entry.version] {
                field(word.as_bytes());
            }
            for (path, text) in entry.read(&folder)? {
                field(path.as_bytes());
                field(&text);
                side.push(Document { name: format!("{}/{path}", entry.folder_name()), text });
            }
            field(b"");
        }
        let hash = hasher.finalize().to_hex().to_string();
        if hash != self.blake3 {
            return Err(Unusable::Differs { found: hash, expected: self.blake3.clone() });
        }
        Ok(Read { hash, train, validation })
    }
}

impl ListedCrate {
    /// The folder's name in a cargo registry.
    fn folder_name(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Paths and contents of the files that count, in order.
    fn read(&self, folder: &Path) -> Result<Vec<(String, Vec<u8>)>, Unusable> {
        let unreadable = |path: PathBuf| move |error| Unusable::Unreadable { path, error };
        let mut paths = Vec::new();
        list_sources(folder, "src", &mut paths).map_err(unreadable(folder.join("src")))?;
        paths.sort_unstable();
        let mut files = Vec::new();
        let mut num_bytes = 0;
        for path in paths {
            if self.skip.iter().any(|prefix| path.starts_with(prefix)) {
                continue;
            }
            let text = files::read(&folder.join(&path)).map_err(unreadable(folder.join(&path)))?;
            num_bytes += text.len();
            if num_bytes > CRATE_LIMIT_BYTES {
                break;
            }
            files.push((path, text));
        }
        Ok(files)
    }
}

/// Adds every `*.rs` file under `root`/`relative`, as `/`-separated paths from `root`.
fn list_sources(root: &Path, relative: &str, paths: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(root.join(relative))? {
        let entry = entry?;
        let path = format!("{relative}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list_sources(root, &path, paths)?;
        } else if path.ends_with(".rs") {
            paths.push(path);
        }
    }
    Ok(())
}

/// Where crates' sources may lie.
#[derive(Debug)]
pub(super) struct Search {
    /// `registry/src/*` of every cargo home, in the order of the search.
    registries: Vec<PathBuf>,
    /// `vendor/` in the current folder and above it.
    vendors: Vec<PathBuf>,
}

impl Search {
    /// Looks in the registries of `cargo_homes`, then in the `vendor` folders from `current` upward.
    pub(super) fn new(cargo_homes: Vec<PathBuf>, current: PathBuf) -> Self {
        let registries = cargo_homes.iter().flat_map(|home| {
            let entries =
                std::fs::read_dir(home.join("registry").join("src")).into_iter().flatten().flatten();
            let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            folders.sort();
            folders
        });
        let vendors = current.ancestors().map(|folder| folder.join("vendor"));
        Self { registries: registries.collect(), vendors: vendors.filter(|folder| folder.is_dir()).collect() }
    }

    /// The run-time cargo home, the one that built this binary, and the current folder.
    pub(super) fn from_environment() -> Self {
        let at_run_time = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let at_run_time = at_run_time.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
        let at_build_time = option_env!("CONTRAFLOW_BUILD_CARGO_HOME").map(PathBuf::from);
        let homes = at_run_time.into_iter().chain(at_build_time).collect();
        Self::new(homes, std::env::current_dir().unwrap_or_default())
    }

    /// `cargo vendor` writes the version into a folder's name only where a crate has several; the hash tells
    /// a wrong one.
    fn find(&self, entry: &ListedCrate) -> Option<PathBuf> {
        let versioned = entry.folder_name();
        let registries = self.registries.iter().map(|registry| registry.join(&versioned));
        let vendors =
            self.vendors.iter().flat_map(|vendor| [vendor.join(&versioned), vendor.join(&entry.name)]);
        registries.chain(vendors).find(|folder| folder.join("src").is_dir())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;

    fn listed() -> Manifest {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/corpus.toml");
        Manifest::parse(&fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn the_listed_corpus_versions_are_those_of_the_lock_file() {
        let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock")).unwrap();
        let lock: toml::Table = lock.parse().unwrap();
        let text = |package: &toml::Value, key: &str| package[key].as_str().unwrap().to_owned();
        let locked: Vec<_> = lock["package"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| (text(p, "name"), text(p, "version")))
            .collect();
        for entry in listed().families.iter().flat_map(|family| &family.crates) {
            assert!(
                locked.contains(&(entry.name.clone(), entry.version.clone())),
                "recipes/corpus.toml lists {}, Cargo.lock does not",
                entry.folder_name()
            );
        }
    }

    #[test]
    fn no_corpus_family_straddles_the_split() {
        let mut sides: BTreeMap<String, (String, Split)> = BTreeMap::new();
        for family in listed().families {
            let words =
                family.crates.iter().map(|entry| entry.name.split(['-', '_']).next().unwrap().to_owned());
            for word in words.chain([family.name.clone()]) {
                let here = (family.name.clone(), family.split);
                let first = sides.entry(word.clone()).or_insert_with(|| here.clone());
                assert_eq!(*first, here, "crates named {word}* are in two families");
            }
        }
        let num_validation = sides.values().filter(|(_, split)| *split == Split::Validation).count();
        assert!(num_validation >= 3, "validation is drawn from several families");
    }

    #[test]
    fn the_listed_corpus_is_on_the_machine_that_built_this() {
        let read = listed().read(&Search::from_environment()).unwrap_or_else(|why| panic!("{why}"));
        let bytes = |side: &[Document]| side.iter().map(|document| document.text.len()).sum::<usize>();
        let (train, validation) = (bytes(&read.train), bytes(&read.validation));
        let share = validation as f64 / (train + validation) as f64;
        assert!((0.08..0.12).contains(&share), "{train} bytes of training, {validation} of validation");
        for document in read.train.iter().chain(&read.validation) {
            let text = std::str::from_utf8(&document.text).unwrap();
            let head: String = text.lines().take(5).collect();
            assert!(!head.contains("@generated"), "{} is machine-made", document.name);
        }
    }

    const PAIR: &str = r#"
        blake3 = "HASH"
        [[family]]
        name = "left"
        split = "train"
        crates = [{ name = "left", version = "1.2.3", skip = ["src/made/"] }]
        [[family]]
        name = "right"
        split = "validation"
        crates = [{ name = "right", version = "0.1.0" }]
    "#;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), text).unwrap();
        }
    }

    /// A cargo home with `left` and a folder with a vendored `right`; the manifest carries the hash found
    /// there.
    fn pair() -> (tempfile::TempDir, Search, Manifest) {
        let root = tempfile::tempdir().unwrap();
        let big = "x".repeat(CRATE_LIMIT_BYTES - 2);
        let in_registry = |path: &str| format!("home/registry/src/index-0/left-1.2.3/{path}");
        write(
            root.path(),
            &[
                (&in_registry("src/b.rs"), "b"),
                (&in_registry("src/a/z.rs"), "z"),
                (&in_registry("src/a.txt"), "not rust"),
                (&in_registry("src/made/table.rs"), "0, 0, 0"),
                (&in_registry("src/d.rs"), "after the one that does not fit"),
                (&in_registry("src/c.rs"), &big[1..]),
                (&in_registry("build.rs"), "not under src"),
                ("work/vendor/right/src/lib.rs", "right"),
            ],
        );
        fs::create_dir_all(root.path().join("work/deep/er")).unwrap();
        let search = Search::new(vec![root.path().join("home")], root.path().join("work/deep/er"));
        let Err(Unusable::Differs { found, .. }) = Manifest::parse(PAIR).unwrap().read(&search) else {
            panic!("no hash is HASH");
        };
        let manifest = Manifest::parse(&PAIR.replace("HASH", &found)).unwrap();
        (root, search, manifest)
    }

    #[test]
    fn crates_are_found_sorted_skipped_and_limited_as_defined() {
        let (_root, search, manifest) = pair();
        let read = manifest.read(&search).unwrap();
        let names = |side: &[Document]| side.iter().map(|document| document.name.clone()).collect::<Vec<_>>();
        // b and z are two bytes, so c.rs with limit - 3 still fits; d.rs does not and ends the crate.
        assert_eq!(
            names(&read.train),
            ["left-1.2.3/src/a/z.rs", "left-1.2.3/src/b.rs", "left-1.2.3/src/c.rs"]
        );
        assert_eq!(names(&read.validation), ["right-0.1.0/src/lib.rs"]);
        assert_eq!(read.validation[0].text, b"right");
    }

    #[test]
    fn a_changed_byte_path_version_or_split_is_refused() {
        let (root, search, manifest) = pair();
        let differs = |manifest: &Manifest| matches!(manifest.read(&search), Err(Unusable::Differs { .. }));
        assert!(!differs(&manifest));
        let mut moved = Manifest::parse(PAIR).unwrap();
        moved.blake3 = manifest.blake3.clone();
        moved.families[0].split = Split::Validation;
        assert!(differs(&moved));
        let vendored = root.path().join("work/vendor/right/src");
        fs::write(vendored.join("lib.rs"), "wrong").unwrap();
        assert!(differs(&manifest));
        fs::write(vendored.join("lib.rs"), "right").unwrap();
        assert!(!differs(&manifest));
        fs::rename(vendored.join("lib.rs"), vendored.join("main.rs")).unwrap();
        assert!(differs(&manifest));
    }

    #[test]
    fn a_missing_crate_is_named() {
        let (root, _, manifest) = pair();
        let search = Search::new(vec![root.path().join("home")], root.path().into());
        assert_eq!(
            manifest.read(&search).unwrap_err().to_string(),
            "1 of 2 crates, right-0.1.0 among them, are in no cargo registry and no vendor folder"
        );
    }
}
