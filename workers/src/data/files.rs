//! The user's own text: the files and folders of `--data`.
//!
//! It gathers documents and finds every fault of the named paths at once; how the documents are split is the
//! corpus's matter.

use super::corpus::Document;
use super::jsonl::{self, LineFault};
use super::parquet_file;
use contraflow_runtime::files::{self, Refused};
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
    /// It is neither a regular file nor a folder, or a link leads out of the data root.
    #[error("{}: expected a file or a folder, got {why}", path.display())]
    Refused {
        /// The path as given, or the one inside the folder.
        path: PathBuf,
        /// What is there.
        why: Refused,
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
        match files::metadata(&path) {
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
                let text = files::read(&path).map_err(|error| unreadable(&path, &error))?;
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

    /// Reads a folder in sorted order and says whether any text was in it.
    fn read_folder(&mut self, folder: &Path) -> Result<bool, DataFault> {
        let mut any_text = false;
        for entry in sorted_entries(folder)? {
            let path = entry.path();
            any_text |= match Entry::of(&entry)? {
                Entry::Hidden => {
                    self.num_hidden += 1;
                    false
                }
                Entry::Skipped => false,
                Entry::Folder => self.read_folder(&path)?,
                Entry::File if FileFormat::of(&path) != FileFormat::Text => self.read_rows(&path)?,
                Entry::File => self.read_found_file(&path).map_err(|error| unreadable(&path, &error))?,
            };
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
        let mut file = files::reader(path)?;
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
    let mut file = files::reader(path).map_err(|error| unreadable(path, &error))?;
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
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    for path in paths {
        let before = found.len();
        let listed = match files::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(DataFault::Missing { path: path.clone() })
            }
            Err(error) => Err(unreadable(path, &error)),
            Ok(metadata) if metadata.is_dir() => list_folder(path, &mut found),
            Ok(_) => match files::open(path) {
                Err(error) => Err(unreadable(path, &error)),
                Ok(_) => {
                    found.push(path.clone());
                    Ok(())
                }
            },
        };
        faults.extend(listed.err());
        if faults.is_empty() && found.len() == before {
            faults.push(DataFault::NoText { path: path.clone(), num_not_text: 0, num_hidden: 0 });
        }
    }
    if faults.is_empty() { Ok(found) } else { Err(faults) }
}

fn list_folder(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), DataFault> {
    for entry in sorted_entries(folder)? {
        let path = entry.path();
        match Entry::of(&entry)? {
            Entry::Hidden | Entry::Skipped => {}
            Entry::Folder => list_folder(&path, found)?,
            Entry::File => {
                let mut head = Vec::new();
                let read = files::reader(&path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head));
                read.map_err(|error| unreadable(&path, &error))?;
                if FileFormat::of(&path) == FileFormat::Parquet || !head.contains(&0) {
                    found.push(path);
                }
            }
        }
    }
    Ok(())
}

/// What an entry of a folder is to a walk.
enum Entry {
    /// Its name begins with a dot.
    Hidden,
    /// A link to a folder, which may lead back to where the walk came from, or to nothing.
    Skipped,
    Folder,
    /// Whatever else is there: one that is no regular file is refused when it is opened.
    File,
}

impl Entry {
    fn of(entry: &fs::DirEntry) -> Result<Self, DataFault> {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            return Ok(Self::Hidden);
        }
        let kind = entry.file_type().map_err(|error| unreadable(&path, &error))?;
        if kind.is_dir() {
            return Ok(Self::Folder);
        }
        match files::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Skipped),
            Ok(_) => Ok(Self::File),
            Err(error) if kind.is_symlink() && error.kind() != io::ErrorKind::TimedOut => Ok(Self::Skipped),
            Err(error) => Err(unreadable(&path, &error)),
        }
    }
}

fn sorted_entries(folder: &Path) -> Result<Vec<fs::DirEntry>, DataFault> {
    files::read_dir(folder).map_err(|error| unreadable(folder, &error))
}

const HEAD_BYTES: u64 = 8192;

pub(super) fn unreadable(path: &Path, error: &io::Error) -> DataFault {
    match Refused::of(error) {
        Some(why) => DataFault::Refused { path: path.into(), why: why.clone() },
        None => DataFault::Unreadable { path: path.into(), reason: error.to_string() },
    }
}

/// The first sign that `bytes` are no text, and where it is.
fn first_binary(bytes: &[u8]) -> Option<(&'static str, usize)> {
    if let Some(offset) = bytes.iter().position(|&byte| byte == 0) {
        return Some(("a NUL byte", offset));
    }
    std::str::from_utf8(bytes).err().map(|error| ("invalid UTF-8", error.valid_up_to()))
}

#[cfg(test)]
mod tests;
