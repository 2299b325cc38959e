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
        let before = skipped;
        let files = match list_path(path, reading.field, &mut skipped) {
            Ok(files) => files,
            Err(fault) => {
                faults.push(fault);
                continue;
            }
        };
        let (num_faults, mut any_text) = (faults.len(), false);
        for file in &files {
            let read = file.format.each::<DataFault>(&file.path, reading, &mut |document| {
                if !document.text.is_empty() {
                    any_text = true;
                    emit(document);
                }
                Ok(())
            });
            faults.extend(read.err());
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
        let before = skipped;
        match list_path(path, field, &mut skipped) {
            Ok(files) if files.is_empty() => faults.push(no_text(path, before, skipped)),
            Ok(files) => listed.extend(files),
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() { Ok(listed) } else { Err(faults) }
}

fn list_path(path: &Path, field: &str, skipped: &mut Skipped) -> Result<Vec<InputFile>, DataFault> {
    let mut found = Vec::new();
    match files::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DataFault::Missing { path: path.into() });
        }
        Err(error) => return Err(unreadable(path, &error)),
        Ok(metadata) if metadata.is_dir() => list_folder(path, field, skipped, &mut found)?,
        Ok(_) => {
            files::open(path).map_err(|error| unreadable(path, &error))?;
            if let Looked::As(format) = FileFormat::look(path, field, true)? {
                found.push(InputFile { path: path.into(), format });
            }
        }
    }
    Ok(found)
}

fn list_folder(
    folder: &Path,
    field: &str,
    skipped: &mut Skipped,
    found: &mut Vec<InputFile>,
) -> Result<(), DataFault> {
    for entry in sorted_entries(folder)? {
        let path = entry.path();
        match Entry::of(&entry)? {
            Entry::Hidden => skipped.hidden += 1,
            Entry::Skipped => {}
            Entry::Folder => list_folder(&path, field, skipped, found)?,
            Entry::File => {
                let format = match FileFormat::look(&path, field, false) {
                    Ok(Looked::As(format)) => format,
                    Ok(Looked::JsonAsText) => {
                        skipped.json_as_text += 1;
                        FileFormat::Text
                    }
                    // A name is no promise where nobody has chosen the file.
                    Err(DataFault::OtherForm { .. }) => FileFormat::Text,
                    Err(fault) => return Err(fault),
                };
                if format == FileFormat::Text && !is_text(&path)? {
                    skipped.not_text += 1;
                } else {
                    found.push(InputFile { path, format });
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

#[cfg(test)]
mod tests;
