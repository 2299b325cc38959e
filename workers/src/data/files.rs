//! The user's own text: the files and folders of `--data`.
//!
//! It finds the files, reads them all, and reports every fault of the named paths at once; how the documents are split is the
//! corpus's matter.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use contraflow_runtime::files;

use super::fault::{DataFault, unreadable};
use super::format::{FileFormat, Looked, Reading, is_text};
use super::text::Document;

/// A file that is read.
#[derive(Clone, Debug)]
pub(super) struct InputFile {
    pub(super) path: PathBuf,
    pub(super) format: FileFormat,
}

impl InputFile {
    /// Its size on the disk. **Units**: bytes. **Errors**: it is gone.
    pub(super) fn size(&self) -> Result<u64, DataFault> {
        let metadata = files::metadata(&self.path).map_err(|error| unreadable(&self.path, &error))?;
        Ok(metadata.len())
    }
}

/// What in folders is not read, or not as what it may be. Said where it is worth a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Entries whose names begin with a dot.
    pub hidden: usize,
    /// Files that are no UTF-8 text.
    pub not_text: usize,
    /// `.json` files of rows without the field, read as plain text.
    pub json_as_text: usize,
}

impl Skipped {
    /// What the user should know, in sentences.
    pub fn warnings(&self) -> Vec<String> {
        let Skipped { not_text, json_as_text, .. } = self;
        // Hidden entries are left out everywhere: alone they are no news.
        let skipped = (*not_text > 0).then(|| format!("skipped in the folders of --data: {self}"));
        let as_text = (*json_as_text > 0).then(|| {
            format!(
                "{json_as_text} .json file(s) in the folders of --data hold rows without the field that is read: taken as \
                 plain text; data.field (--field) names another field"
            )
        });
        skipped.into_iter().chain(as_text).collect()
    }
}

impl std::ops::Add for Skipped {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Skipped {
            hidden: self.hidden + other.hidden,
            not_text: self.not_text + other.not_text,
            json_as_text: self.json_as_text + other.json_as_text,
        }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "binary files {}, hidden entries {}", self.not_text, self.hidden)
    }
}

/// What the paths held.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) documents: Vec<Document>,
    pub(super) skipped: Skipped,
}

/// Reads all `paths` in order into memory, every text file as one document. Texts that are empty are none.
///
/// **Errors**: all faults, in the order of the paths.
pub(super) fn read(paths: &[PathBuf], field: &str) -> Result<Found, Vec<DataFault>> {
    let mut documents = Vec::new();
    let reading = Reading { field, piece_bytes: u64::MAX };
    let skipped = visit(paths, reading, &mut |document| documents.push(document))?;
    Ok(Found { documents, skipped })
}

/// Broken rows of a file that are listed: with a wrong field all are broken.
const MAX_BROKEN: usize = 10;

impl InputFile {
    /// Passes every document of the file on, and says what is wrong with it.
    pub(super) fn visit(&self, reading: Reading, emit: &mut dyn FnMut(Document)) -> Vec<DataFault> {
        let mut faults = Vec::new();
        let read = self.format.each::<DataFault>(&self.path, reading, &mut |document| {
            match document {
                Ok(document) => emit(document),
                Err(fault) => faults.push(fault),
            }
            match faults.len() {
                MAX_BROKEN => Err(DataFault::MoreRows { path: self.path.clone(), listed: MAX_BROKEN }),
                _ => Ok(()),
            }
        });
        faults.extend(read.err());
        faults
    }
}

/// Passes every document of all `paths` on that is not empty, and says what was passed by.
///
/// **Errors**: all faults, in the order of the paths: what is missing, cannot be read, or has no text.
pub(super) fn visit(
    paths: &[PathBuf],
    reading: Reading,
    emit: &mut dyn FnMut(Document),
) -> Result<Skipped, Vec<DataFault>> {
    let (mut skipped, mut faults) = (Skipped::default(), Vec::new());
    for path in paths {
        let (before, num_faults, mut any_text) = (skipped, faults.len(), false);
        for file in list_path(path, reading.field, &mut skipped, &mut faults) {
            faults.extend(file.visit(reading, &mut |document| {
                if !document.text.is_empty() {
                    any_text = true;
                    emit(document);
                }
            }));
        }
        if !any_text && faults.len() == num_faults {
            faults.push(no_text(path, before, skipped));
        }
    }
    if faults.is_empty() { Ok(skipped) } else { Err(faults) }
}

fn no_text(path: &Path, before: Skipped, skipped: Skipped) -> DataFault {
    let path = path.to_path_buf();
    match files::metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
        false => DataFault::Empty { path },
        true => DataFault::NoText {
            path,
            num_not_text: skipped.not_text - before.not_text,
            num_hidden: skipped.hidden - before.hidden,
        },
    }
}

/// All files of `paths` in the order in which they are read; in folders hidden entries, links to folders and files that are
/// no text are passed by.
///
/// **Errors**: all faults, in the order of the paths.
pub(super) fn list(paths: &[PathBuf], field: &str) -> Result<Vec<InputFile>, Vec<DataFault>> {
    let (mut listed, mut skipped, mut faults) = (Vec::new(), Skipped::default(), Vec::new());
    for path in paths {
        let (before, num_faults) = (skipped, faults.len());
        let files = list_path(path, field, &mut skipped, &mut faults);
        if files.is_empty() && faults.len() == num_faults {
            faults.push(no_text(path, before, skipped));
        }
        listed.extend(files);
    }
    if faults.is_empty() { Ok(listed) } else { Err(faults) }
}

/// The files of one path; what is wrong with others does not hide them.
fn list_path(path: &Path, field: &str, skipped: &mut Skipped, faults: &mut Vec<DataFault>) -> Vec<InputFile> {
    let mut walk = Walk { field, skipped, found: Vec::new(), faults };
    let listed = match files::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(DataFault::Missing { path: path.into() })
        }
        Err(error) => Err(unreadable(path, &error)),
        Ok(metadata) if metadata.is_dir() => walk.folder(path),
        Ok(_) => walk.named(path),
    };
    walk.faults.extend(listed.err());
    walk.found
}

/// A walk through one path.
struct Walk<'a> {
    field: &'a str,
    skipped: &'a mut Skipped,
    found: Vec<InputFile>,
    faults: &'a mut Vec<DataFault>,
}

impl Walk<'_> {
    /// A file that the user has named.
    fn named(&mut self, path: &Path) -> Result<(), DataFault> {
        files::open(path).map_err(|error| unreadable(path, &error))?;
        if let Looked::As(format) = FileFormat::look(path, self.field, true)? {
            self.found.push(InputFile { path: path.into(), format });
        }
        Ok(())
    }

    /// Everything in a folder.
    fn folder(&mut self, folder: &Path) -> Result<(), DataFault> {
        for entry in sorted_entries(folder)? {
            let listed = self.entry(&entry);
            self.faults.extend(listed.err());
        }
        Ok(())
    }

    fn entry(&mut self, entry: &fs::DirEntry) -> Result<(), DataFault> {
        match Entry::of(entry)? {
            Entry::Hidden => self.skipped.hidden += 1,
            Entry::Skipped => {}
            Entry::Folder => self.folder(&entry.path())?,
            Entry::File => self.file(entry.path())?,
        }
        Ok(())
    }

    /// A file that nobody has chosen: its name is no promise.
    fn file(&mut self, path: PathBuf) -> Result<(), DataFault> {
        let format = match FileFormat::look(&path, self.field, false) {
            Ok(Looked::As(format)) => format,
            Ok(Looked::JsonAsText) => {
                self.skipped.json_as_text += 1;
                FileFormat::Text
            }
            Err(DataFault::OtherForm { .. }) => FileFormat::Text,
            Err(fault) => return Err(fault),
        };
        if format == FileFormat::Text && !is_text(&path)? {
            self.skipped.not_text += 1;
        } else {
            self.found.push(InputFile { path, format });
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests;
