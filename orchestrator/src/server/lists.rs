//! Lists in files, an entry a line, that are read again when they change. Knows no meaning of an entry.

use std::fs;
use std::path::{Path, PathBuf};

use contraflow_runtime::files::Reloaded;

/// Largest list that is read. **Units**: bytes.
const MAX_LIST: u64 = 4 << 20;

/// A list in a file, an entry a line; one that has not been begun is empty if `may_be_missing`.
///
/// **Errors**: the file cannot be read, or every line that makes no sense.
pub(super) fn list<T: 'static>(
    what: &'static str,
    path: PathBuf,
    parse: fn(&str) -> Result<Vec<T>, Vec<String>>,
    may_be_missing: bool,
) -> Result<Reloaded<Vec<T>>, Vec<String>> {
    let file = path.clone();
    Reloaded::open(what, vec![path], move || {
        if may_be_missing && !file.exists() { Ok(Vec::new()) } else { lines(&file, parse) }
    })
}

fn lines<T>(path: &Path, parse: fn(&str) -> Result<Vec<T>, Vec<String>>) -> Result<Vec<T>, Vec<String>> {
    let fault = |what: &dyn std::fmt::Display| vec![format!("{}: {what}", path.display())];
    let length = fs::metadata(path).map_err(|error| fault(&error))?.len();
    if length > MAX_LIST {
        return Err(fault(&format!("expected at most {MAX_LIST} bytes, got {length}")));
    }
    let text = fs::read_to_string(path).map_err(|error| fault(&error))?;
    parse(&text).map_err(|faults| faults.into_iter().flat_map(|line| fault(&line)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Vec<String>, Vec<String>> {
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn a_list_that_has_not_been_begun_is_empty_where_it_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words");
        assert!(list("words", path.clone(), words, false).is_err());
        let reloaded = list("words", path.clone(), words, true).unwrap();
        assert_eq!(*reloaded.current(), [""; 0]);
        fs::write(&path, "one").unwrap();
        assert_eq!(*reloaded.current(), ["one"]);
        fs::File::options().write(true).open(&path).unwrap().set_len(MAX_LIST + 1).unwrap();
        assert_eq!(*reloaded.current(), ["one"], "too long");
    }
}
