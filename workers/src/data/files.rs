//! The user's own text: the files and folders of `--data`.
//!
//! It gathers documents and finds every fault of the named paths at once; how the documents are split is the
//! corpus's matter.

use super::corpus::Document;
use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What is wrong with one path of `--data`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataFault {
    /// Nothing is there.
    #[error("{}: no such file or folder", path.display())]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// The system refuses to read it.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// The path as given, or the one inside the folder that failed.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file without a byte.
    #[error("{}: expected text, the file is empty", path.display())]
    Empty {
        /// The path as given.
        path: PathBuf,
    },
    /// A file that was named itself and is binary.
    #[error("{}: expected UTF-8 text, found {found} at byte {offset}", path.display())]
    NotText {
        /// The path as given.
        path: PathBuf,
        /// `a NUL byte` or `invalid UTF-8`.
        found: &'static str,
        /// Where it stands in the file.
        offset: usize,
    },
    /// A folder with no text in it.
    #[error(
        "{}: expected at least one text file, found none (binary files {num_not_text}, hidden entries {num_hidden})",
        path.display()
    )]
    NoText {
        /// The path as given.
        path: PathBuf,
        /// Files in it that are not UTF-8 text.
        num_not_text: usize,
        /// Entries in it that were passed by for their leading dot.
        num_hidden: usize,
    },
}

/// What the paths held.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) documents: Vec<Document>,
    pub(super) num_hidden: usize,
    pub(super) num_not_text: usize,
    /// blake3 of every document so far.
    seen: HashSet<[u8; 32]>,
}

/// Reads all `paths` in order. **Errors**: all faults, in the order of the paths.
pub(super) fn read(paths: &[PathBuf]) -> Result<Found, Vec<DataFault>> {
    let mut found = Found::default();
    let faults: Vec<DataFault> = paths.iter().filter_map(|path| found.read_named(path).err()).collect();
    if faults.is_empty() { Ok(found) } else { Err(faults) }
}

impl Found {
    fn read_named(&mut self, path: &Path) -> Result<(), DataFault> {
        let path = path.to_path_buf();
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DataFault::Missing { path }),
            Err(error) => Err(unreadable(&path, &error)),
            Ok(metadata) if metadata.is_dir() => self.read_named_folder(path),
            Ok(_) => {
                let text = fs::read(&path).map_err(|error| unreadable(&path, &error))?;
                if text.is_empty() {
                    return Err(DataFault::Empty { path });
                }
                if let Some((found, offset)) = first_binary(&text) {
                    return Err(DataFault::NotText { path, found, offset });
                }
                self.push(&path, text);
                Ok(())
            }
        }
    }

    fn read_named_folder(&mut self, path: PathBuf) -> Result<(), DataFault> {
        let (num_hidden, num_not_text) = (self.num_hidden, self.num_not_text);
        if self.read_folder(&path)? {
            return Ok(());
        }
        let (num_hidden, num_not_text) = (self.num_hidden - num_hidden, self.num_not_text - num_not_text);
        Err(DataFault::NoText { path, num_not_text, num_hidden })
    }

    /// Reads a folder in sorted order and says whether any text was in it. A link to a folder is not
    /// followed: it may lead back to where we came from.
    fn read_folder(&mut self, folder: &Path) -> Result<bool, DataFault> {
        let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
        let mut entries = entries.map_err(|error| unreadable(folder, &error))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        let mut any_text = false;
        for entry in entries {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.num_hidden += 1;
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                any_text |= self.read_folder(&path)?;
            } else if path.is_file() {
                any_text |= self.read_found_file(&path).map_err(|error| unreadable(&path, &error))?;
            }
        }
        Ok(any_text)
    }

    fn read_found_file(&mut self, path: &Path) -> io::Result<bool> {
        // A look at the head keeps weights and archives, which may be huge, out of memory.
        let mut file = fs::File::open(path)?;
        let mut text = Vec::new();
        file.by_ref().take(HEAD_BYTES).read_to_end(&mut text)?;
        if !text.contains(&0) {
            file.read_to_end(&mut text)?;
        }
        if first_binary(&text).is_some() {
            self.num_not_text += 1;
            return Ok(false);
        }
        let any_text = !text.is_empty();
        self.push(path, text);
        Ok(any_text)
    }

    fn push(&mut self, path: &Path, text: Vec<u8>) {
        if !text.is_empty() && self.seen.insert(*blake3::hash(&text).as_bytes()) {
            self.documents.push(Document { name: path.display().to_string(), text });
        }
    }
}

const HEAD_BYTES: u64 = 8192;

fn unreadable(path: &Path, error: &io::Error) -> DataFault {
    DataFault::Unreadable { path: path.into(), reason: error.to_string() }
}

/// The first sign that `bytes` are no text, and where it stands.
fn first_binary(bytes: &[u8]) -> Option<(&'static str, usize)> {
    if let Some(offset) = bytes.iter().position(|&byte| byte == 0) {
        return Some(("a NUL byte", offset));
    }
    std::str::from_utf8(bytes).err().map(|error| ("invalid UTF-8", error.valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn folders_are_read_recursively_in_sorted_order_and_the_rest_is_counted() {
        let folder = folder_with(&[
            ("b.txt", b"b"),
            ("a/z.md", b"z"),
            ("a/c.rs", b"c"),
            ("a/copy.rs", b"b"),
            ("empty.txt", b""),
            (".hidden/x", b"x"),
            (".dot", b"x"),
            ("nul.bin", b"ab\0"),
            ("latin1.txt", b"caf\xe9"),
        ]);
        let found = read(&[folder.path().into()]).unwrap();
        let texts: Vec<&[u8]> = found.documents.iter().map(|document| document.text.as_slice()).collect();
        // a/copy.rs comes before b.txt, so it is the one that is kept.
        assert_eq!(texts, [b"c", b"b", b"z"]);
        assert_eq!((found.num_hidden, found.num_not_text), (2, 2));
    }

    #[test]
    fn files_come_in_the_order_named_and_once() {
        let folder = folder_with(&[("a", b"first"), (".b", b"second")]);
        let (a, b) = (folder.path().join("a"), folder.path().join(".b"));
        let found = read(&[b.clone(), a.clone(), folder.path().into()]).unwrap();
        let names: Vec<_> = found.documents.iter().map(|document| document.name.clone()).collect();
        assert_eq!(names, [b.display().to_string(), a.display().to_string()]);
    }

    #[test]
    fn all_faults_are_told_at_once_each_with_its_path() {
        let folder = folder_with(&[
            ("empty", b""),
            ("nul", b"ab\0c"),
            ("bad", b"abc\xff"),
            ("bin/x", b"\0"),
            ("ok", b"ok"),
        ]);
        let paths: Vec<PathBuf> = ["missing", "empty", "ok", "nul", "bad", "bin"]
            .iter()
            .map(|name| folder.path().join(name))
            .collect();
        let said: Vec<String> = read(&paths).unwrap_err().iter().map(ToString::to_string).collect();
        let root = folder.path().display();
        assert_eq!(
            said,
            [
                format!("{root}/missing: no such file or folder"),
                format!("{root}/empty: expected text, the file is empty"),
                format!("{root}/nul: expected UTF-8 text, found a NUL byte at byte 2"),
                format!("{root}/bad: expected UTF-8 text, found invalid UTF-8 at byte 3"),
                format!(
                    "{root}/bin: expected at least one text file, found none (binary files 1, hidden entries 0)"
                ),
            ]
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_link_back_to_the_folder_does_not_loop() {
        let folder = folder_with(&[("a", b"text")]);
        std::os::unix::fs::symlink(folder.path(), folder.path().join("loop")).unwrap();
        assert_eq!(read(&[folder.path().into()]).unwrap().documents.len(), 1);
    }
}
