//! The user's own text: the files and folders of `--data`.
//!
//! It gathers documents and finds every fault of the named paths at once; how the documents are split is the
//! corpus's matter.

use super::corpus::Document;
use super::jsonl::{self, LineFault};
use super::parquet_file;
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
        /// Its offset in the file.
        offset: usize,
    },
    /// A broken line of a JSONL file.
    #[error("{}: {fault}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, and what is wrong with it.
        fault: LineFault,
    },
    /// A Parquet file without the column that is read.
    #[error("{}: expected a column `text` of texts, found {found}", path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// What it has instead.
        found: String,
    },
    /// A file that is called Parquet and cannot be read as such.
    #[error("{}: expected a Parquet file, got: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// A prepared folder, or a file in one, that is not what it should be.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Prepared {
        /// The file or folder.
        path: PathBuf,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
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
            Ok(_) if FileFormat::of(&path) != FileFormat::Text => {
                if self.read_rows(&path)? {
                    Ok(())
                } else {
                    Err(DataFault::Empty { path })
                }
            }
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
        let mut any_text = false;
        for entry in sorted_entries(folder)? {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.num_hidden += 1;
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                any_text |= self.read_folder(&path)?;
            } else if FileFormat::of(&path) != FileFormat::Text && path.is_file() {
                any_text |= self.read_rows(&path)?;
            } else if path.is_file() {
                any_text |= self.read_found_file(&path).map_err(|error| unreadable(&path, &error))?;
            }
        }
        Ok(any_text)
    }

    /// Reads the documents of a JSONL or Parquet file and says whether there were any.
    fn read_rows(&mut self, path: &Path) -> Result<bool, DataFault> {
        let mut any_text = false;
        FileFormat::of(path).each(path, &mut |document: Document| {
            any_text |= !document.text.is_empty();
            self.keep(document);
            Ok(())
        })?;
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
        self.keep(Document { name: path.display().to_string(), text });
    }

    fn keep(&mut self, document: Document) {
        if !document.text.is_empty() && self.seen.insert(*blake3::hash(&document.text).as_bytes()) {
            self.documents.push(document);
        }
    }
}

/// How a file holds documents, by the ending of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileFormat {
    /// A file is a document.
    Text,
    /// `.jsonl`: a line is one.
    Jsonl,
    /// `.parquet`: a row is one.
    Parquet,
}

impl FileFormat {
    pub(super) fn of(path: &Path) -> Self {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("jsonl") => Self::Jsonl,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }

    /// Passes the documents of a file on, one by one, in bounded memory.
    ///
    /// **Errors**: what is wrong with the file, or what `emit` says.
    pub(super) fn each<E: From<DataFault>>(
        self,
        path: &Path,
        emit: &mut dyn FnMut(Document) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Text => each_piece(path, emit),
            Self::Jsonl => jsonl::each(path, emit),
            Self::Parquet => parquet_file::each(path, emit),
        }
    }
}

/// A text file that is longer than this counts as several documents, cut behind the last end of a line that fits.
const PIECE_BYTES: u64 = 16 << 20;

fn each_piece<E: From<DataFault>>(
    path: &Path,
    emit: &mut dyn FnMut(Document) -> Result<(), E>,
) -> Result<(), E> {
    let mut file = fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    let (mut text, mut offset) = (Vec::new(), 0);
    loop {
        let wanted = PIECE_BYTES - text.len() as u64;
        let read =
            file.by_ref().take(wanted).read_to_end(&mut text).map_err(|error| unreadable(path, &error))?;
        let is_last = (read as u64) < wanted;
        let cut = if is_last { text.len() } else { cut_within(&text) };
        if let Some((found, at)) = first_binary(&text[..cut]) {
            return Err(DataFault::NotText { path: path.into(), found, offset: offset + at }.into());
        }
        let rest = text.split_off(cut);
        let piece = std::mem::replace(&mut text, rest);
        offset += piece.len();
        if !piece.is_empty() {
            emit(Document { name: path.display().to_string(), text: piece })?;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// Where a piece that is not the last ends: after the last line, or if there is none, before the last character.
fn cut_within(text: &[u8]) -> usize {
    let line = text.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1);
    // The first byte of a character is no 10xxxxxx.
    line.or_else(|| text.iter().rposition(|&byte| byte & 0b1100_0000 != 0b1000_0000))
        .filter(|&cut| cut > 0)
        .unwrap_or(text.len())
}

/// All files of `paths` in the order in which they are read; in folders hidden entries, links to folders and files with
/// a NUL byte at their head are passed by.
///
/// **Errors**: all faults, in the order of the paths.
pub(super) fn list(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Vec<DataFault>> {
    let (mut files, mut faults) = (Vec::new(), Vec::new());
    for path in paths {
        let before = files.len();
        let listed = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(DataFault::Missing { path: path.clone() })
            }
            Err(error) => Err(unreadable(path, &error)),
            Ok(metadata) if metadata.is_dir() => list_folder(path, &mut files),
            Ok(_) => {
                files.push(path.clone());
                Ok(())
            }
        };
        faults.extend(listed.err());
        if faults.is_empty() && files.len() == before {
            faults.push(DataFault::NoText { path: path.clone(), num_not_text: 0, num_hidden: 0 });
        }
    }
    if faults.is_empty() { Ok(files) } else { Err(faults) }
}

fn list_folder(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataFault> {
    for entry in sorted_entries(folder)? {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list_folder(&path, files)?;
        } else if path.is_file() {
            let mut head = Vec::new();
            let read = fs::File::open(&path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head));
            read.map_err(|error| unreadable(&path, &error))?;
            if FileFormat::of(&path) == FileFormat::Parquet || !head.contains(&0) {
                files.push(path);
            }
        }
    }
    Ok(())
}

fn sorted_entries(folder: &Path) -> Result<Vec<fs::DirEntry>, DataFault> {
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let mut entries = entries.map_err(|error| unreadable(folder, &error))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

const HEAD_BYTES: u64 = 8192;

pub(super) fn unreadable(path: &Path, error: &io::Error) -> DataFault {
    DataFault::Unreadable { path: path.into(), reason: error.to_string() }
}

/// The first sign that `bytes` are no text, and where it is.
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
    fn all_faults_are_reported_at_once_each_with_its_path() {
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
        let error_text: Vec<String> = read(&paths).unwrap_err().iter().map(ToString::to_string).collect();
        let root = folder.path().display();
        assert_eq!(
            error_text,
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
