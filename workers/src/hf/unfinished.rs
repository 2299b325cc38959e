//! A folder on its way to its name: made under another one, and taken up where a process that was killed has left it.
//!
//! Beside its files lies a journal: what the folder becomes, and which files are in it and on disk. Knows names and checksums, no
//! tensors.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::files::{self, UNFINISHED_SUFFIX, sync_dir};
use serde::{Deserialize, Serialize};

use super::check::FileChecksum;
use crate::error::RankError;

/// Name of the journal in the unfinished folder.
const JOURNAL: &str = ".journal";

/// One line of a journal.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// What the folder becomes; the first line.
    Becomes(String),
    /// A file that is on disk.
    File(String, FileChecksum),
}

/// The files of a folder that are on disk.
#[derive(Default)]
pub struct Journal {
    /// `None` where nothing is to be taken up later.
    file: Option<File>,
    done: BTreeMap<String, FileChecksum>,
}

impl Journal {
    /// Reads the journal of a folder, or begins one.
    ///
    /// **Errors**: another process is at work; the folder becomes something else.
    fn open(path: &Path, becomes: &str) -> Result<Self, RankError> {
        let failed = RankError::file(path);
        let wrong =
            |message: &str| RankError::Content { path: path.display().to_string(), message: message.into() };
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(path).map_err(&failed)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(wrong("expected no other process at work in this folder, got one"));
            }
            locked => locked.map_err(io::Error::from).map_err(&failed)?,
        }
        let text = files::read(path).map_err(&failed)?;
        let Parsed { becomes: begun, done, whole } =
            parse_journal(&text).map_err(|message| wrong(&message))?;
        if begun.as_ref().is_some_and(|begun| begun != becomes) {
            return Err(wrong(
                "expected the beginning of the same model, got that of another one, or in another form: remove the folder",
            ));
        }
        file.set_len(whole as u64).map_err(&failed)?;
        let mut journal = Journal { file: Some(file), done };
        if begun.is_none() {
            journal.append(&Line::Becomes(becomes.to_owned())).map_err(&failed)?;
        }
        Ok(journal)
    }

    /// What a file must be that was on disk when an earlier process was killed.
    pub(crate) fn done(&self, name: &str) -> Option<&FileChecksum> {
        self.done.get(name)
    }

    /// Notes a file that is on disk under its name.
    ///
    /// **Errors**: what the system says.
    pub(crate) fn add(&mut self, name: &str, checksum: FileChecksum) -> io::Result<()> {
        self.append(&Line::File(name.to_owned(), checksum))
    }

    fn append(&mut self, line: &Line) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let text = serde_json::to_string(line).expect("a line is texts and numbers");
        file.seek(SeekFrom::End(0))?;
        file.write_all(format!("{text}\n").as_bytes())?;
        file.sync_data()
    }
}

/// What a journal says.
#[derive(Debug)]
pub struct Parsed {
    /// What the folder becomes; `None` if the journal has not begun.
    pub becomes: Option<String>,
    /// The files that are on disk.
    pub done: BTreeMap<String, FileChecksum>,
    /// Bytes of the lines that are whole: the last one may have been cut off.
    pub whole: usize,
}

/// Reads a journal.
///
/// **Errors**: a line that is whole and is none.
pub fn parse_journal(text: &[u8]) -> Result<Parsed, String> {
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let mut parsed = Parsed { becomes: None, done: BTreeMap::new(), whole };
    for (number, line) in text[..whole].split_inclusive(|&byte| byte == b'\n').enumerate() {
        match (number, serde_json::from_slice(line)) {
            (0, Ok(Line::Becomes(model))) => parsed.becomes = Some(model),
            (1.., Ok(Line::File(name, checksum))) => drop(parsed.done.insert(name, checksum)),
            _ => return Err("expected a journal, got a file that is damaged: remove the folder".into()),
        }
    }
    Ok(parsed)
}

/// Where a folder is made before it has its name.
fn part_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(UNFINISHED_SUFFIX);
    target.with_file_name(name)
}

/// What stands where a folder is to be made, if it is nothing that [`staged`] has left.
pub fn obstacle(target: &Path) -> Option<String> {
    let part = part_of(target);
    let is_empty = || part.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if !part.exists() || part.join(JOURNAL).is_file() || is_empty() {
        return None;
    }
    Some(format!(
        "expected no {}, or the beginning of this model, got something else: remove it",
        part.display()
    ))
}

/// Lets `write` fill a folder beside `target`, brings it to disk and gives it the name `target`, which must not exist or be an
/// empty folder. What fails leaves nothing; what is killed leaves the folder and its journal, and the next call that is to make the
/// same goes on in it. `becomes` is equal if and only if the folder becomes the same.
///
/// **Errors**: those of `write`; another process is at work there, or something else was begun; what the system says.
pub fn staged<T>(
    target: &Path,
    becomes: &str,
    write: impl FnOnce(&Path, &mut Journal) -> Result<T, RankError>,
) -> Result<T, RankError> {
    let part = part_of(target);
    if let Some(message) = obstacle(target) {
        return Err(RankError::Content { path: target.display().to_string(), message });
    }
    files::make_dir(&part).map_err(RankError::file(&part))?;
    let mut journal = Journal::open(&part.join(JOURNAL), becomes)?;
    let done = write(&part, &mut journal).and_then(|done| {
        sync_dir(&part).map_err(RankError::file(&part))?;
        failpoint("export.whole");
        std::fs::rename(&part, target).map_err(RankError::file(target))?;
        failpoint("export.named");
        Ok(done)
    });
    match done {
        Ok(done) => {
            // Of no use any more; whoever is killed before it is gone leaves a whole folder and this in it.
            drop(std::fs::remove_file(target.join(JOURNAL)));
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            sync_dir(parent).map_err(RankError::file(parent))?;
            Ok(done)
        }
        Err(error) => {
            // The first error is reported.
            drop(std::fs::remove_dir_all(&part));
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: u64) -> FileChecksum {
        FileChecksum { bytes, blake3: "00".into() }
    }

    fn message(path: &Path, becomes: &str) -> String {
        Journal::open(path, becomes).err().unwrap().to_string()
    }

    #[test]
    fn a_journal_is_read_back_without_a_line_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let mut journal = Journal::open(&path, "this").unwrap();
        journal.add("a", checksum(1)).unwrap();
        journal.add("b", checksum(2)).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        let ends: Vec<usize> = (1..=whole.len()).filter(|&end| whole[end - 1] == b'\n').collect();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::open(&path, "this").unwrap();
            let known = ends.iter().filter(|&&end| end <= cut).count().saturating_sub(1);
            assert_eq!(journal.done.len(), known, "{cut}");
            // What is added behind the cut is whole.
            journal.add("c", checksum(3)).unwrap();
            drop(journal);
            let again = Journal::open(&path, "this").unwrap();
            assert_eq!((again.done.len(), again.done("c")), (known + 1, Some(&checksum(3))), "{cut}");
        }
    }

    #[test]
    fn a_journal_of_another_folder_or_another_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let held = Journal::open(&path, "this").unwrap();
        assert!(message(&path, "this").contains("expected no other process"));
        drop(held);
        assert!(message(&path, "that").contains("got that of another one"));
        std::fs::write(&path, "{\"becomes\":\"this\"}\nxyz\n").unwrap();
        assert!(message(&path, "this").contains("a file that is damaged"));
    }

    #[test]
    fn a_folder_that_fails_is_gone_and_one_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        let part = part_of(&target);
        let fails = |_: &Path, _: &mut Journal| -> Result<(), RankError> {
            Err(RankError::Panic { message: "no".into() })
        };
        assert!(staged(&target, "this", fails).is_err() && !part.exists());
        std::fs::create_dir(&part).unwrap();
        assert_eq!(obstacle(&target), None);
        let held = Journal::open(&part.join(JOURNAL), "this").unwrap();
        assert!(staged(&target, "this", fails).is_err() && part.exists());
        drop(held);
        assert_eq!(obstacle(&target), None);
        staged(&target, "this", |part, _| {
            std::fs::write(part.join("file"), "x").map_err(RankError::file(part))
        })
        .unwrap();
        assert_eq!(target.read_dir().unwrap().count(), 1);
        std::fs::create_dir(&part).unwrap();
        std::fs::write(part.join("own"), "x").unwrap();
        assert!(obstacle(&target).unwrap().contains("remove it"));
        assert!(staged(&target, "this", fails).is_err() && part.join("own").exists());
    }
}
