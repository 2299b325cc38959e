//! Files that are read again when they change, so that a process takes up what was renewed while it runs. Knows no meaning of what is
//! in them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use std::{fmt, fs};

use parking_lot::Mutex;

/// Identifies a version of a file: its modification time and length; a file that is not there has none.
pub type Stamp = Option<(SystemTime, u64)>;

/// What reads the files: all that they are wanted for, or every fault.
type Read<T> = Box<dyn Fn() -> Result<T, Vec<String>> + Send + Sync>;

/// What was read from some files, as they are now.
pub struct Reloaded<T> {
    what: &'static str,
    paths: Vec<PathBuf>,
    read: Read<T>,
    known: Mutex<(Vec<Stamp>, Arc<T>)>,
}

impl<T> Reloaded<T> {
    /// Reads files for the first time.
    ///
    /// **Errors**: those of `read`.
    pub fn open(
        what: &'static str,
        paths: Vec<PathBuf>,
        read: impl Fn() -> Result<T, Vec<String>> + Send + Sync + 'static,
    ) -> Result<Self, Vec<String>> {
        let stamps = stamps(&paths);
        let known = Mutex::new((stamps, Arc::new(read()?)));
        Ok(Reloaded { what, paths, read: Box::new(read), known })
    }

    /// What the files held when they were read last.
    pub fn known(&self) -> Arc<T> {
        self.known.lock().1.clone()
    }

    /// What the files hold now; what they held last if they make no sense any more, which is logged.
    pub fn current(&self) -> Arc<T> {
        let mut known = self.known.lock();
        let now = stamps(&self.paths);
        if now != known.0 {
            known.0 = now;
            match (self.read)() {
                Ok(read) => {
                    known.1 = Arc::new(read);
                    tracing::info!("read again: {}", self.what);
                }
                Err(faults) => tracing::warn!("the {} stay as they were: {}", self.what, faults.join("; ")),
            }
        }
        known.1.clone()
    }
}

/// The versions of these files as they are now.
pub fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let found = fs::metadata(path).ok()?;
        Some((found.modified().ok()?, found.len()))
    };
    paths.iter().map(stamp).collect()
}

impl<T> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {:?}", self.what, self.paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Vec<String>, Vec<String>> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if words.contains(&"bad".to_owned()) { Err(vec!["a bad word".into()]) } else { Ok(words) }
    }

    #[test]
    fn a_file_is_read_again_when_it_changes_and_what_makes_no_sense_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words");
        let of = path.clone();
        let reloaded = Reloaded::open("words", vec![path.clone()], move || {
            words(&fs::read_to_string(&of).unwrap_or_default())
        });
        let reloaded = reloaded.unwrap();
        assert_eq!(*reloaded.current(), [""; 0]);
        for (text, expected) in [
            ("one", &["one"][..]),
            ("one two", &["one", "two"]),
            ("bad", &["one", "two"]),
            ("three", &["three"]),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(*reloaded.current(), expected, "{text}");
        }
        let known = reloaded.current();
        assert!(Arc::ptr_eq(&known, &reloaded.current()), "it is not read for nothing");
        fs::remove_file(&path).unwrap();
        assert_eq!(*reloaded.current(), [""; 0]);
    }
}
