//! The storage that the workers of a cluster share, and the mark in it by which it is recognized.
//!
//! A file system that is no longer mounted leaves an empty folder in its place, which takes files as well. So whoever writes
//! looks for the mark first, and makes no folder anew that the storage is to have. Knows no job.

use std::io;
use std::path::{Path, PathBuf};

use super::FolderError;
use crate::files;
use crate::random::from_system;

/// The file with the mark, in the storage.
pub const MARK_FILE: &str = ".contraflow-storage";

/// A storage with the mark that it had when the process began to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    root: PathBuf,
    mark: String,
}

impl Storage {
    /// The storage in a folder, which is made if it is not there. The first process that sees it draws its mark by chance.
    ///
    /// **Errors**: what the system says.
    pub fn open(root: &Path) -> io::Result<Self> {
        let path = root.join(MARK_FILE);
        std::fs::create_dir_all(root)?;
        if !path.exists() {
            // Created atomically: a second process finds the file of the first.
            let mark = format!("{:016x}", u64::from_le_bytes(from_system()?));
            let fresh = root.join(format!("{MARK_FILE}.{mark}"));
            std::fs::write(&fresh, &mark)?;
            let linked = std::fs::hard_link(&fresh, &path);
            std::fs::remove_file(&fresh)?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(Storage { root: root.to_owned(), mark: files::read_to_string(&path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The same for all processes that share it.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Checks that it is still there.
    ///
    /// **Errors**: [`FolderError::Gone`] with the mark that was expected; it cannot be read.
    pub fn verify(&self) -> Result<(), FolderError> {
        let (path, mark) = (self.root.join(MARK_FILE), &self.mark);
        let gone = |got: &str| FolderError::Gone {
            path: self.root.clone(),
            message: format!("the storage is gone: expected the mark {mark} in {MARK_FILE}, got {got}"),
        };
        match files::read_to_string(&path) {
            Ok(found) if found == *mark => Ok(()),
            Ok(found) => Err(gone(&format!("{found:?}"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(gone("no such file")),
            Err(source) => Err(FolderError::File { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_that_goes_away_is_noticed_by_its_mark_and_not_made_anew() {
        let mount = tempfile::tempdir().unwrap();
        let (root, away) = (mount.path().join("storage"), mount.path().join("away"));
        let storage = Storage::open(&root).unwrap();
        assert_eq!(Storage::open(&root).unwrap(), storage, "one mark for all who share it");
        storage.verify().unwrap();
        std::fs::rename(&root, &away).unwrap();
        let expected = format!(
            "{}: the storage is gone: expected the mark {} in .contraflow-storage, got no such file",
            root.display(),
            storage.mark()
        );
        assert_eq!(storage.verify().unwrap_err().to_string(), expected);
        std::fs::create_dir(&root).unwrap();
        assert_eq!(storage.verify().unwrap_err().to_string(), expected, "the bare mount point");
        let other = Storage::open(&root).unwrap();
        assert_ne!(other.mark(), storage.mark());
        let reported = storage.verify().unwrap_err().to_string();
        assert!(reported.ends_with(&format!("got {:?}", other.mark())), "{reported}");
        std::fs::remove_dir_all(&root).unwrap();
        std::fs::rename(&away, &root).unwrap();
        storage.verify().unwrap();
    }
}
